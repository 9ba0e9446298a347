"""What a stock embedding computes beside the lookup, and what code that reads its weight is given.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes_dirembed import ModelError, first_line
from .matrix_dirembed import DENSE_CHUNK


# All that the forward pass of a stock embedding names which does no more than look up and scale.
_SCALED_LOOKUP = {"super", "forward", "embed_scale", "to", "weight", "dtype"}


@dataclass(frozen=True)
class StockEmbedding:
    """What a stock embedding computes beside the lookup, and what it is called.

    Attributes:
        dense_class: `nn.Embedding`, or the subclass of it.
        padding_idx: Kept for those who read it; lookups depend on the layout's `zero_row` alone.
        embed_scale: What looked-up rows are multiplied by, as Gemma's and BART's embeddings do.
        round_scale: Whether the scale is first rounded to the dtype of the rows, as Gemma's is.
        attributes: Of a subclass that computes more than a scaled lookup, what its forward pass finds on the module
            beside parameters, buffers and submodules; None for every other.
    """

    dense_class: type[nn.Embedding] = nn.Embedding
    padding_idx: int | None = None
    embed_scale: float = 1.0  # a float: a non-persistent buffer would come back from meta as garbage
    round_scale: bool = False
    attributes: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, dense: nn.Embedding) -> StockEmbedding:
        """What an embedding computes.

        Raises:
            ModelError: If its rows change with use, it keeps what no file has, or it uses its table otherwise than by
                looking rows up.
        """
        if dense.max_norm is not None:
            raise ModelError("an embedding with max_norm changes its own table: set max_norm to None first")
        scale: Any = getattr(dense, "embed_scale", 1.0)
        round_scale = isinstance(scale, Tensor)
        if round_scale:
            scale = vars(dense).get("scalar_embed_scale", None if scale.is_meta else float(scale))
        unsaved = sorted(dense._non_persistent_buffers_set - {"embed_scale"})
        if unsaved or (round_scale and scale is None):
            raise ModelError(
                f"{type(dense).__name__} keeps {', '.join(unsaved) or 'embed_scale'} in a buffer that no file has: "
                "choose other tables with tables="
            )

        stock = cls(type(dense), dense.padding_idx, float(1.0 if scale is None else scale), round_scale)
        if _is_scaled_lookup(dense):
            return stock
        stock = replace(stock, attributes=_plain_attributes(dense))
        _try_shell(stock, dense)
        return stock

    def scaled(self, rows: Tensor) -> Tensor:
        """Looked-up rows times the scale."""
        if self.embed_scale == 1.0:
            return rows
        return rows * (rows.new_full((), self.embed_scale) if self.round_scale else self.embed_scale)

    def make(self, weight: Tensor) -> nn.Embedding:
        """The stock embedding over a table; one with tensors of its own still lacks these."""
        dense: nn.Embedding
        if self.attributes is None:
            scale: dict[str, Any] = {} if self.dense_class is nn.Embedding else {"embed_scale": self.embed_scale}
            with torch.device("meta"):
                dense = self.dense_class(weight.shape[0], weight.shape[1], self.padding_idx, **scale)
        else:
            dense = self.dense_class.__new__(self.dense_class)
            nn.Module.__init__(dense)
            vars(dense).update(copy.deepcopy(dict(self.attributes)), num_embeddings=len(weight))

        dense.weight = nn.Parameter(weight, requires_grad=True)
        if self.round_scale:
            scale_tensor = torch.tensor(self.embed_scale, device=weight.device)
            dense.register_buffer("embed_scale", scale_tensor, persistent=False)
        return dense


def _is_scaled_lookup(dense: nn.Embedding) -> bool:
    """Whether an embedding does no more than look rows up and scale them."""
    if type(dense).forward is nn.Embedding.forward:
        plain = True
    else:
        code = getattr(type(dense).forward, "__code__", None)
        plain = hasattr(dense, "embed_scale") and code is not None and set(code.co_names) <= _SCALED_LOOKUP
    return plain and len(list(dense.parameters())) == 1 and not dense._modules


def _plain_attributes(dense: nn.Embedding) -> dict[str, Any]:
    """What an embedding holds beside tensors and submodules, and beside what goes with the size of its table."""
    known = {"training", "num_embeddings"}
    return {name: value for name, value in vars(dense).items() if name not in known and not name.startswith("_")}


def _try_shell(stock: StockEmbedding, dense: nn.Embedding) -> None:
    """Runs the forward pass of a stock embedding around a lookup, which must be all that it uses its table for.

    Raises:
        ModelError: If it does not run, or answers otherwise than the stock embedding does.
    """
    ids = torch.zeros((1, 2), dtype=torch.int64, device=dense.weight.device)
    with torch.no_grad():
        try:
            rows = shell_of(_DenseLookup(stock, dense)).forward(ids)
            same = dense.weight.is_meta or torch.equal(rows, dense(ids))
        except (AttributeError, RuntimeError, TypeError) as error:
            if dense.weight.is_meta and isinstance(error, NotImplementedError):
                return  # there are things that tensors without values cannot do
            raise ModelError(
                f"{type(dense).__name__} uses its table otherwise than by looking rows up ({first_line(error)}): "
                "choose other tables with tables="
            ) from error

    if not same:
        raise ModelError(
            f"{type(dense).__name__} answers otherwise around a compressed table: choose other tables with tables="
        )


class DecodedWeight:
    """What code that reads the `weight` of a dense table is given: rows are decoded when they are asked for.

    It indexes like the (V, d) table, has its shape, dtype and device, and `F.embedding` takes it.

    Args:
        table: The compressed table, or anything with `decode`, `shape`, `dtype` and `device`.

    Example:
        >>> import torch, hf_dirembed
        >>> dense = torch.nn.Embedding(1000, 64)
        >>> embedding = hf_dirembed.CompressedEmbedding.from_embedding(dense, method="svd", rank=16)
        >>> weight = DecodedWeight(embedding)
        >>> weight.dtype, weight[3, :].shape, torch.nn.functional.embedding(torch.tensor([[1, 2]]), weight).shape
        (torch.float32, torch.Size([64]), torch.Size([1, 2, 64]))
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self._table.dtype

    @property
    def device(self) -> torch.device:
        """The device that rows are decoded on."""
        return self._table.weight.device

    @property
    def shape(self) -> torch.Size:
        """The shape of the table, (V, d)."""
        table = self._table
        return torch.Size((table.num_rows, table.dim))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        rows, *columns = key if isinstance(key, tuple) else (key,)
        ids = rows if isinstance(rows, Tensor) and rows.dtype == torch.int64 else self._ids()[rows]
        decoded: Tensor = self._table.decode(ids)
        return decoded[(..., *columns)] if columns else decoded

    def product(self, states: Tensor) -> Tensor:
        """What a linear layer of the table gives: (..., d) to (..., V)."""
        own = states.to(self.device)
        logits = torch.cat([F.linear(own, self._table.decode(ids)) for ids in self._ids().split(DENSE_CHUNK)], dim=-1)
        return logits.to(states.device)

    def _ids(self) -> Tensor:
        return torch.arange(len(self), device=self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers lookups, and products of (..., V) floats with the table; no other function has a use for rows."""
        if len(args) != 2 or not isinstance(args[1], cls):
            return NotImplemented
        weight = args[1]
        if func is F.embedding:
            return weight._table.decode(args[0])
        if func is torch.matmul:
            chunks = zip(args[0].split(DENSE_CHUNK, dim=-1), weight._ids().split(DENSE_CHUNK), strict=True)
            return torch.stack([factors @ weight._table.decode(ids) for factors, ids in chunks]).sum(dim=0)
        return NotImplemented


class Shell(nn.Embedding):
    """What the forward pass of a stock embedding runs in, around another lookup.

    The class of a shell is derived from the stock one and from this, so that `super().forward` there comes here. It
    holds nothing: whatever the pass reads is the owner's.
    """

    def __init__(self, owner: Any) -> None:
        vars(self)["owner"] = owner  # not a submodule, and no module of its own

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The owner's rows."""
        return DecodedWeight(self.owner)

    def __getattr__(self, name: str) -> Any:
        owner = vars(self)["owner"]
        stock: StockEmbedding = owner.stock
        if name == "embed_scale" and stock.round_scale:
            return torch.tensor(stock.embed_scale, device=owner.weight.device)
        if stock.attributes is not None and name in stock.attributes:
            return stock.attributes[name]
        return getattr(owner, name)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The owner's rows: (...,) token ids to (..., dim)."""
        rows: Tensor = self.owner.lookup(input_ids)
        return rows


_shell_classes: dict[type[nn.Embedding], type[Shell]] = {}


def shell_of(owner: Any) -> Shell:
    """A shell for the stock embedding that a lookup stands for."""
    dense_class = owner.stock.dense_class
    if dense_class not in _shell_classes:
        _shell_classes[dense_class] = type(f"Shell{dense_class.__name__}", (dense_class, Shell), {})
    shell = object.__new__(_shell_classes[dense_class])
    Shell.__init__(shell, owner)
    return shell


class _DenseLookup:
    """A dense table as the owner of a shell."""

    def __init__(self, stock: StockEmbedding, dense: nn.Embedding) -> None:
        self.stock, self.dense = stock, dense
        self.dtype, (self.num_rows, self.dim) = dense.weight.dtype, dense.weight.shape

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["dense"], name)

    def decode(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.dense.weight)

    lookup = decode
