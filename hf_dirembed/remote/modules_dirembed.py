"""What runs: embeddings and linear layers over compressed tables.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes_dirembed import CODE_TENSORS, BlocksLayout, ModelError, TableLayout, TableRecord, with_known_options
from .guarded_dirembed import CodesParameter, guard, plain, seal, verify
from .matrix_dirembed import DENSE_CHUNK, CompressedMatrix
from .products_dirembed import is_apart, is_traced, package, product_dtype, rows_product
from .resizing_dirembed import resize_rows
from .stock_dirembed import DecodedWeight, StockEmbedding, shell_of


UNIQUE_FROM = 64  # ids in a batch from which decoding each distinct row once is worth finding the distinct rows


class View:
    """A module as code sees it that is to find other parts there.

    Args:
        module: What everything else is asked of, and called.
        parts: What is found instead, by name.
    """

    def __init__(self, module: nn.Module, parts: Mapping[str, Any]) -> None:
        vars(self).update(parts, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        return self._module(*args, **kwargs)


def view_of(module: nn.Module, paths: Sequence[str]) -> Any:
    """A module, seen with dense weights at the paths where compressed tables are.

    Args:
        module: What the code that reads tables gets for itself.
        paths: The paths of the tables, as that code names them.
    """
    parts: dict[str, Any] = {}
    for path in paths:
        name, _, rest = path.partition(".")
        part = getattr(module, name)
        if rest:
            parts[name] = view_of(part, [rest])
        elif isinstance(part, (CompressedLookup, CompressedMatrix)):
            parts[name] = View(part, {"weight": DecodedWeight(part), **_dense_scale(part)})
    return View(module, parts) if parts else module


def _dense_scale(table: nn.Module) -> dict[str, Any]:
    """The scale of a lookup as the stock module has it."""
    if not isinstance(table, CompressedLookup):
        return {}
    stock = table.stock
    scale = torch.tensor(stock.embed_scale, device=table.weight.device) if stock.round_scale else stock.embed_scale
    return {"embed_scale": scale}


@torch.no_grad()
def ids_of(embedding: CompressedLookup, rows: Tensor) -> Tensor:
    """The token ids of embeddings, the inverse of the lookup: (..., d) to (...,).

    How a row is decoded depends in the last bits on what is decoded with it, so it is the nearest row that is found.

    Args:
        embedding: What they were looked up in.
        rows: What it gave.

    Raises:
        ModelError: If one of them is not what any token id gives.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    best = flat.new_full(flat.shape[:1], torch.inf, dtype=torch.float32)
    nearest = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    for ids in torch.arange(embedding.num_rows, device=flat.device).split(DENSE_CHUNK):
        distances = torch.cdist(flat.float(), embedding(ids).float(), compute_mode="donot_use_mm_for_euclid_dist")
        closest, slots = distances.min(dim=1)
        nearest = torch.where(closest < best, ids[slots], nearest)
        best = torch.minimum(best, closest)

    allowed = 8 * torch.finfo(rows.dtype).eps * flat.float().norm(dim=1)
    if (strange := (best > allowed).nonzero()).numel():
        raise ModelError(
            f"row {int(strange[0])} of inputs_embeds is that of no token, and this model looks tokens up in other "
            "tables, too: give it input_ids"
        )
    return nearest.view(rows.shape[:-1])


class CompressedLookup(nn.Module):
    """What drop-ins for `nn.Embedding` have in common, whatever their rows are decoded from.

    Of a stock embedding that computes more than a scaled lookup, they hold the further tensors and submodules under
    the names that these have there, and run its forward pass around their own lookup.
    """

    weight: nn.Parameter
    stock: StockEmbedding
    embedding_dim: int
    num_embeddings: int

    @property
    def padding_idx(self) -> int | None:
        """The `padding_idx` of the stock embedding."""
        return self.stock.padding_idx

    @property
    def device(self) -> torch.device:
        """The device that the table is on, and runs on."""
        return plain(self.weight).device

    @property
    def num_rows(self) -> int:
        """V, the number of rows."""
        return self.num_embeddings

    @property
    def dim(self) -> int:
        """The length of a row."""
        return self.embedding_dim

    def decode(self, ids: Tensor) -> Tensor:
        """Rows of the table: (...,) row numbers to (..., dim)."""
        raise NotImplementedError

    def lookup(self, input_ids: Tensor) -> Tensor:
        """Rows of the table, each distinct one decoded once: (...,) token ids to (..., dim), on their device."""
        if is_apart(input_ids, self.device):
            return self.lookup(input_ids.to(self.device)).to(input_ids.device)
        # Compilers are asked first: their shapes stay dynamic where nothing compares them. On accelerators they always
        # do: a shape that depends on data waits for the device, and no CUDA graph can hold it.
        if not torch.compiler.is_compiling() and input_ids.is_cpu and input_ids.numel() >= UNIQUE_FROM:
            distinct, inverse = torch.unique(input_ids, return_inverse=True)
            return F.embedding(inverse, self.decode(distinct))
        return self.decode(input_ids)

    def forward(self, input_ids: Tensor) -> Tensor:
        """What the stock embedding gives: (...,) token ids to (..., dim)."""
        if self.stock.attributes is not None:
            return vars(self)["shell"].forward(input_ids)
        return self.stock.scaled(self.lookup(input_ids))

    def take_from(self, dense: nn.Module) -> None:
        """Takes what a stock embedding holds beside its table, the objects that they are, and makes the shell."""
        if self.stock.attributes is None:
            return
        for name, module in dense._modules.items():
            self.add_module(name, module)
        for name, parameter in dense._parameters.items():
            if name != "weight":
                self.register_parameter(name, parameter)
        for name, buffer in dense._buffers.items():
            if name not in dense._non_persistent_buffers_set:
                self.register_buffer(name, buffer)
        vars(self)["shell"] = shell_of(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shell"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.stock.attributes is not None:
            vars(self)["shell"] = shell_of(self)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The whole table, (num_rows, dim)."""
        ids = torch.arange(self.num_embeddings, device=self.weight.device)
        return torch.cat([self.decode(chunk) for chunk in ids.split(DENSE_CHUNK)])

    def to_dense(self) -> nn.Embedding:
        """The stock embedding that this one stands for."""
        dense = self.stock.make(self.dense_weight())
        if self.stock.attributes is not None:
            own = self._own_names()
            dense._modules |= {name: module for name, module in self._modules.items() if name not in own}
            for name, parameter in self._parameters.items():
                if name not in own:
                    dense.register_parameter(name, parameter)
            for name, buffer in self._buffers.items():
                dense.register_buffer(name, buffer)
        return dense

    def _own_names(self) -> set[str]:
        """Names of the parts that stand for the table."""
        return {*CODE_TENSORS, "blocks", "shadow"}


class CompressedEmbedding(CompressedLookup, CompressedMatrix):
    """Drop-in for `nn.Embedding` over a compressed table.

    Args:
        num_embeddings: V.
        embedding_dim: d.
        layout: The layout of the codes.
        stock: What the stock embedding computes beside the lookup.
        dtype: The dtype of the decoder.
        device: Where the tensors are made.

    Raises:
        SpecError: If the layout does not fit the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        layout: TableLayout,
        *,
        stock: StockEmbedding | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        CompressedMatrix.__init__(self, num_embeddings, embedding_dim, layout, dtype=dtype, device=device)
        self.embedding_dim = embedding_dim
        self.stock = stock or StockEmbedding()

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]
        """V, the number of rows."""
        return self.weight.shape[0]

    device = CompressedMatrix.device

    def decode(self, ids: Tensor) -> Tensor:
        """Rows of the table: (...,) row numbers to (..., dim)."""
        return CompressedMatrix.decode(self, ids)

    @classmethod
    def like(
        cls, dense: nn.Embedding, layout: TableLayout, device: torch.device | str | None = None
    ) -> CompressedEmbedding:
        """An embedding of the same shape, scale, dtype and device; its codes are still to be set.

        Raises:
            ModelError: If `dense` is an embedding that no lookup can stand for.
            SpecError: If the layout does not fit the table.
        """
        (num_rows, dim), stock = dense.weight.shape, StockEmbedding.of(dense)
        device = device or dense.weight.device
        module = cls(num_rows, dim, layout, stock=stock, dtype=dense.weight.dtype, device=device)
        module.take_from(dense)
        return module

    @classmethod
    @with_known_options
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        bits: float | None = None,
        ratio: float | None = None,
        rank: int | None = None,
        method: str = "transform",
        token_weights: Tensor | None = None,
        hessian: Tensor | None = None,
        latent_dtype: str | None = None,
        settings: Any = None,
        device: torch.device | str | None = None,
    ) -> CompressedEmbedding:
        """Compresses an `nn.Embedding` of any torch model.

        Args:
            embedding: Left as it is.
            bits: Budget in bits per weight.
            ratio: Budget as the table's bytes over the bytes that replace it.
            rank: Budget as the number of float latents. Exactly one of the three is given.
            method: The method, as [`hf_dirembed.compress`] takes it.
            token_weights: (V,) non-negative: how much each row counts.
            hessian: (d, d) symmetric positive definite: what errors of the rows are measured in.
            latent_dtype: The dtype of float latents: `float32`, `float16` or `bfloat16`.
            settings: `TransformSettings` or `AutoencoderSettings`.
            device: Where to fit.

        Raises:
            DirEmbedError: Where [`hf_dirembed.compress`] raises one.

        Example:
            >>> import torch, hf_dirembed
            >>> dense = torch.nn.Embedding(1000, 64)
            >>> hf_dirembed.CompressedEmbedding.from_embedding(dense, method="svd", rank=16)
            CompressedEmbedding(1000, 64, method=svd, rank=16, bits_per_weight=8.51)
        """
        if package.compress_table is None:
            raise ModelError("compressing needs the package itself: pip install hf_dirembed, and import it first")
        coded = package.compress_table(
            embedding.weight, bits=bits, ratio=ratio, rank=rank, method=method, token_weights=token_weights,
            hessian=hessian, latent_dtype=latent_dtype, settings=settings, device=device,
            padding_idx=embedding.padding_idx,
        )  # fmt: skip
        module = cls.like(embedding, coded.layout)
        if module.stock.attributes is not None:
            module.take_from(copy.deepcopy(embedding))
        module.load_state_dict(coded.tensors, strict=False)  # which leaves what the embedding holds beside its table
        module.record = coded.record
        return module


class CompressedBlocks(CompressedLookup):
    """Drop-in for `nn.Embedding` over a table of several blocks of columns, each compressed by itself.

    A per-layer table is such: it is one small table for each layer, side by side. What stands in its parameter
    `weight` is the number of columns of each block, so that a stock class that is given this checkpoint fails on the
    shape instead of coming up with a random table.

    Args:
        num_embeddings: V.
        embedding_dim: d, of all blocks.
        layout: The layout of the blocks.
        stock: What the stock embedding computes beside the lookup.
        dtype: The dtype of the decoders.
        device: Where the tensors are made.

    Raises:
        SpecError: If the layout does not fit the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        layout: BlocksLayout,
        *,
        stock: StockEmbedding | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        layout.check_table(num_embeddings, embedding_dim)
        super().__init__()
        self.embedding_dim = embedding_dim
        self.stock = stock or StockEmbedding()
        self.record = TableRecord()
        self.blocks = nn.ModuleList(
            CompressedMatrix(num_embeddings, dim, block, dtype=dtype, device=device)
            for _, dim, block in layout.named_blocks()
        )
        self.weight = CodesParameter(torch.tensor(layout.dims, dtype=torch.int32, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            guard(value)
        super().__setattr__(name, value)

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]
        """V, the number of rows."""
        return len(self.matrices()[0][1].weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.matrices()[0][1].dtype

    @property
    def layout(self) -> BlocksLayout:
        """The layout of the blocks."""
        blocks = [block for _, block in self.matrices()]
        dims = tuple(block.decoder_weight.shape[1] for block in blocks)
        return BlocksLayout(dims, tuple(block.layout for block in blocks))

    def decode(self, ids: Tensor) -> Tensor:
        """Rows of the table: (...,) row numbers to (..., dim)."""
        return torch.cat([block.decode(ids) for _, block in self.matrices()], dim=-1)

    @classmethod
    def like(
        cls, dense: nn.Embedding, layout: BlocksLayout, device: torch.device | str | None = None
    ) -> CompressedBlocks:
        """An embedding of the same shape, scale, dtype and device; its codes are still to be set.

        Raises:
            ModelError: If `dense` is an embedding that no lookup can stand for.
            SpecError: If the layout does not fit the table.
        """
        (num_rows, dim), stock = dense.weight.shape, StockEmbedding.of(dense)
        device = device or dense.weight.device
        module = cls(num_rows, dim, layout, stock=stock, dtype=dense.weight.dtype, device=device)
        module.take_from(dense)
        return module

    def matrices(self) -> list[tuple[str, CompressedMatrix]]:
        """The blocks, with what the names of their tensors start with."""
        return [(f"blocks.{number}.", block) for number, block in enumerate(self.blocks)]  # type: ignore[misc]

    def write_codes(self) -> None:
        """Brings packed codes up to date, if there are floats that learn for them."""
        for _, block in self.matrices():
            block.write_codes()

    def verify_codes(self, *, values: bool = False) -> None:
        """As that of each block."""
        verify(self.weight, values=values)
        for _, block in self.matrices():
            block.verify_codes(values=values)

    def seal_codes(self) -> None:
        """As that of each block."""
        seal(self.weight)
        for _, block in self.matrices():
            block.seal_codes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard(self.weight)  # pickled as a plain one

    def code_tensors(self) -> dict[str, Tensor]:
        """The tensors that stand for the table, by name."""
        return {"weight": self.weight} | self._of_blocks(CompressedMatrix.code_tensors)

    def codes(self) -> dict[str, Tensor]:
        """The tensors that stand for the table, by name, without the decoders': its codes."""
        return {"weight": self.weight} | self._of_blocks(CompressedMatrix.codes)

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The codes, by name, as far as training leaves them alone."""
        return {"weight": self.weight} | self._of_blocks(CompressedMatrix.frozen_tensors)

    def _of_blocks(self, tensors: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {prefix + name: tensor for prefix, block in self.matrices() for name, tensor in tensors(block).items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all that stands for the table in a file."""
        return self.weight.nbytes + sum(block.num_bytes for _, block in self.matrices())

    @property
    def bits_per_weight(self) -> float:
        """8 x `num_bytes` / (num_rows x dim)."""
        return 8 * self.num_bytes / (self.num_embeddings * self.embedding_dim)

    def requires_grad_(self, requires_grad: bool = True) -> CompressedBlocks:
        """Like torch's, but does not unfreeze the codes; see [`CompressedMatrix.unfreeze_codes`]."""
        for name, part in self.named_children():
            if name != "blocks":
                part.requires_grad_(requires_grad)
        for name, parameter in self.named_parameters(recurse=False):
            parameter.requires_grad_(requires_grad and name != "weight")
        for block in self.blocks:
            block.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits_per_weight={self.bits_per_weight:.3g}"


class CompressedLinear(CompressedMatrix):
    """Drop-in for the `nn.Linear` of a language-model head over a compressed table: logits = (h Dᵀ) Zᵀ + h·b.

    Packed codes are read as they are, and nothing of them is kept unpacked. On CPUs, states of 16 bits are multiplied
    with them in float32.

    Args:
        in_features: d.
        out_features: V.
        layout: The layout of the codes.
        bias: The bias of the logits, (V,), kept as the parameter it is; or None.
        dtype: The dtype of the decoder.
        device: Where the tensors are made.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: TableLayout,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, layout, dtype=dtype, device=device)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)

    @classmethod
    def like(cls, dense: nn.Linear, layout: TableLayout, device: torch.device | str | None = None) -> CompressedLinear:
        """A head of the same shape, bias, dtype and device; its codes are still to be set.

        Raises:
            ModelError: If `dense` computes something else than a linear map.
        """
        if type(dense).forward is not nn.Linear.forward:
            raise ModelError(f"{type(dense).__name__} is more than a linear layer: it is not supported as a head")
        return cls(
            dense.in_features,
            dense.out_features,
            layout,
            bias=dense.bias,
            dtype=dense.weight.dtype,
            device=device or dense.weight.device,
        )

    @torch.no_grad()
    def resize(self, num_rows: int) -> None:
        """Drops rows from the end, or adds rows, as [`resize_rows`] does; those of the bias that are new are zero."""
        resize_rows(self, num_rows)
        self.out_features = num_rows
        if self.bias is not None:
            bias = F.pad(self.bias[:num_rows], (0, max(0, num_rows - len(self.bias))))
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    @classmethod
    @with_known_options
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: float | None = None,
        ratio: float | None = None,
        rank: int | None = None,
        method: str = "transform",
        token_weights: Tensor | None = None,
        hessian: Tensor | None = None,
        latent_dtype: str | None = None,
        settings: Any = None,
        device: torch.device | str | None = None,
    ) -> CompressedLinear:
        """Compresses an `nn.Linear` of any torch model, such as an LM head, row by row; its bias stays as it is.

        Args:
            linear: Left as it is.
            bits: Budget in bits per weight.
            ratio: Budget as the table's bytes over the bytes that replace it.
            rank: Budget as the number of float latents. Exactly one of the three is given.
            method: The method, as [`hf_dirembed.compress`] takes it.
            token_weights: (V,) non-negative: how much each row counts.
            hessian: (d, d) symmetric positive definite: what errors of the rows are measured in.
            latent_dtype: The dtype of float latents: `float32`, `float16` or `bfloat16`.
            settings: `TransformSettings` or `AutoencoderSettings`.
            device: Where to fit.

        Raises:
            DirEmbedError: Where [`hf_dirembed.compress`] raises one.

        Example:
            >>> import torch, hf_dirembed
            >>> hf_dirembed.CompressedLinear.from_linear(torch.nn.Linear(64, 1000), method="svd", rank=16)
            CompressedLinear(1000, 64, method=svd, rank=16, bits_per_weight=8.51)
        """
        if package.compress_table is None:
            raise ModelError("compressing needs the package itself: pip install hf_dirembed, and import it first")
        coded = package.compress_table(
            linear.weight, bits=bits, ratio=ratio, rank=rank, method=method, token_weights=token_weights,
            hessian=hessian, latent_dtype=latent_dtype, settings=settings, device=device,
        )  # fmt: skip
        module = cls.like(linear, coded.layout)
        module.load_state_dict(coded.tensors, strict=False)  # which leaves the bias
        module.record = coded.record
        return module

    def to_dense(self) -> nn.Linear:
        """The stock linear layer that this head stands for."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.weight.shape[0], bias=False)
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=True)
        dense.register_parameter("bias", self.bias)
        return dense

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The logits: (..., dim) hidden states to (..., V), on their device.

        Raises:
            ModelError: If the states are integers: some models cast them to the dtype of the head's `weight`.
        """
        if not hidden_states.is_floating_point():
            raise ModelError(
                "this model casts its hidden states to the dtype of the head's weight, which packed codes turn into "
                "integers: compress it with method='direction', whose codes are floats"
            )
        self.check_gradients()
        self.verify_codes()
        home = hidden_states.device
        if apart := is_apart(hidden_states, self.device):
            hidden_states = hidden_states.to(self.device)
        if (shadow := self.active_shadow) is not None:
            shadow.refresh(self)

        # what is narrow is widened where products are taken so, but not where autocast chooses
        dtype, given = hidden_states.dtype, hidden_states.dtype
        device = hidden_states.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if autocast and dtype != torch.float64:
            given = torch.get_autocast_dtype(device)  # as that of any linear layer, whose logits are in it
        elif self.layout.packed:
            dtype = product_dtype(dtype, hidden_states.device)
        widened = dtype != given and not autocast
        hidden_states = hidden_states.to(dtype)
        decoder, decoder_bias = self.decoder_in(dtype) if widened else (self.decoder_weight, self.decoder_bias_weight)

        # the logits of the codes
        states = F.linear(hidden_states, decoder)
        offsets = None if decoder_bias is None else hidden_states @ decoder_bias
        if self.layout.packed:
            rounded = given if self.bias is None else None  # what else is added is added to sums that are not rounded
            logits = rows_product(self.scaled(states), self.packed_rows(), offsets, rounded)
            if shadow is not None:
                logits = shadow.carry_product_gradients(logits, states, self)
        else:
            logits = F.linear(states, plain(self.weight).to(states.dtype))
            logits = logits if offsets is None else logits + offsets.unsqueeze(-1)

        # what is beside the codes: rows kept as they are, the row of zeros
        in_place = not (torch.is_grad_enabled() or is_traced(logits))  # and no copies of logits are made
        if self.outlier_rows_weight is not None and self.outlier_weight is not None:
            outliers, rows = plain(self.outlier_weight), plain(self.outlier_rows_weight)
            exact = F.linear(hidden_states, outliers.to(dtype) if widened else outliers).to(logits.dtype)
            copy = logits.index_copy_ if in_place else logits.index_copy
            logits = copy(-1, rows.long(), exact)  # int64 is what ONNX has
        if self.layout.zero_row is not None:
            # filled where it is: from a list it would be copied there, which no CUDA graph can hold
            zero = torch.full((1,), self.layout.zero_row, dtype=torch.int64, device=logits.device)
            # NaN where states are no numbers
            products = (hidden_states * 0).sum(dim=-1, keepdim=True).to(logits.dtype)
            logits = (logits.index_copy_ if in_place else logits.index_copy)(-1, zero, products)

        logits = logits if self.bias is None else logits + self.bias.to(logits.device, logits.dtype)
        logits = logits.to(given)
        return logits.to(home) if apart else logits


CompressedTable: TypeAlias = CompressedEmbedding | CompressedBlocks | CompressedLinear


def compression_line(table: CompressedTable) -> str:
    """How large a compressed table is, and how large it would be dense, in a line."""
    dim = sum(matrix.decoder_weight.shape[1] for _, matrix in table.matrices())
    rows = len(table.matrices()[0][1].weight)
    dense_bytes = int(table.record.figure("dense_bytes") or rows * dim * table.dtype.itemsize)
    smaller = f"{dense_bytes / table.num_bytes:.1f}x smaller than dense"
    size = f"{rows:,} x {dim:,}, {table.num_bytes:,} bytes, {smaller}"
    return f"{size}, {table.bits_per_weight:.2f} bits per weight ({table.layout.method})"
