"""A matrix held as codes and a decoder: how it is decoded, how it learns, and how it gets more or fewer rows.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes_dirembed import (
    CODE_TENSORS,
    CheckpointError,
    ModelError,
    TableError,
    TableLayout,
    TableRecord,
)
from .guarded_dirembed import (
    CHANGED_CODES,
    CodesParameter,
    follow_floats,
    guard,
    holds_codes,
    intact,
    mark,
    mark_stored,
    opened,
    plain,
    seal,
    sealed_checksum,
    unguard,
    unwritten,
    verify,
)
from .kernels_dirembed import PackedRows, count_classes, gaussian_codebook, pack_rows, row_classes
from .products_dirembed import is_apart, package, product_dtype, read_rows, runs_compiled, scaled


DENSE_ROWS_WANTED = (
    "which has codes and a decoder in the place of dense rows: leave it out of target_modules, or make a dense model "
    "first with hf_dirembed.expand"
)
TWO_TABLES = (
    "this module has codes of one table and a decoder of another, as after `head.weight = embedding.weight` or "
    "torch.utils.swap_tensors: load the model again; to tie it, tie the dense model before it is compressed, with "
    "config.tie_word_embeddings and tie_weights()"
)
MAX_EXPONENT = 100  # of the powers of two that latents are multiplied by: beyond, rows would not be finite
LOST_CODES = (
    "something took `weight`, the codes of a compressed table, out of its module, as `torch.nn.utils` do to change "
    "weights: load the model again, and do that to a dense one, which hf_dirembed.expand makes"
)
CACHE_LINE = 64  # bytes; what torch's own allocations are aligned to
STEADY_ROWS = 4  # BLAS rounds each row of a product alike where the number of rows is a multiple of this,
MANY_ROWS = 1024  # and where there are so many that each thread has full tiles
DENSE_CHUNK = 1 << 14  # rows decoded at a time when the whole table is asked for
DECODER_TENSORS = ("decoder_weight", "decoder_bias_weight")  # of the code tensors, those that learn unless frozen
STEADY_TENSORS = frozenset(CODE_TENSORS) - {*DECODER_TENSORS, "outlier_weight"}  # parameters that stay such
INTEGER_TENSORS = ("weight", "codebook_weight", "further_weight")  # of packed codes, those that may hold any bits


class CompressedMatrix(nn.Module):
    """A (num_rows, dim) matrix held as codes and an affine decoder: row i is zᵢ D + b.

    The latents zᵢ are the floats of row i of the code matrix or, where it is packed, sums of what its codes stand for:
    a code's half-integer (a mid-rise quantiser's) times its step is added to one latent. Rows are of one or several
    classes, each with codes of its own; the more a row counts, the more bits its class has. All latents of a row are
    multiplied by its scale, and each latent by a power of two: these exponents keep D at the size that optimisers
    expect of weights and that narrow floats hold well. Outliers, rows that the codes would lose, are kept as they are.
    Training changes the decoder alone; latents and outliers too, once they are unfrozen. Packed latents then have
    floats beside them that learn, a module which is no part of files.

    The code matrix is the parameter named `weight`: native tying of an LM head's `weight` then works unchanged, and a
    stock class that is given this checkpoint fails on its shape instead of loading it for a table. The float
    parameters come first, in the model's dtype, so that `next(model.parameters()).dtype` stays what it was; in the
    narrower dtype that files have the decoder in, optimisers would fail on it. Every tensor's name ends in `weight`,
    which keeps transformers' tie maps on their fast path.

    Args:
        num_rows: V.
        dim: d.
        layout: The layout of the codes.
        dtype: The dtype of the rows and of the decoder, and the widest that float codes are held in.
        device: Where the tensors are made.

    Raises:
        SpecError: If the layout does not fit the matrix.
    """

    weight: nn.Parameter
    decoder_weight: nn.Parameter
    codebook_weight: nn.Parameter | None
    exponent_weight: nn.Parameter | None
    decoder_bias_weight: nn.Parameter | None
    latents_weight: nn.Parameter | None
    steps_weight: nn.Parameter | None
    row_weight: nn.Parameter | None
    class_counts_weight: nn.Parameter | None
    further_weight: nn.Parameter | None
    outlier_weight: nn.Parameter | None
    outlier_rows_weight: nn.Parameter | None
    tied = False  # whether other modules of the model share its tensors
    learning = False  # whether its codes were unfrozen

    def __init__(
        self,
        num_rows: int,
        dim: int,
        layout: TableLayout,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        layout.check_table(num_rows, dim)
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        self.layout = layout
        self.record = TableRecord()
        shapes = layout.stored_shapes(num_rows, dim)

        def parameter(name: str, dtype: torch.dtype, trained: bool = False) -> nn.Parameter | None:
            # Codes are parameters too, not buffers: transformers looks tied tensors up by `get_parameter`.
            if name not in shapes:
                return None
            return nn.Parameter(torch.empty(shapes[name], dtype=dtype, device=device), requires_grad=trained)

        self.decoder_bias_weight = parameter("decoder_bias_weight", dtype, trained=True)
        self.register_parameter("decoder_weight", parameter("decoder_weight", dtype, trained=True))
        self.register_parameter(
            "weight", parameter("weight", torch.uint8 if layout.packed else _narrower(layout.codes, dtype))
        )

        self.codebook_weight = parameter("codebook_weight", torch.int8)
        self.exponent_weight = parameter("exponent_weight", torch.int8)
        self.latents_weight = parameter("latents_weight", torch.int32)  # processes cannot broadcast 16 bits
        self.steps_weight = parameter("steps_weight", torch.int8)

        self.row_weight = parameter("row_weight", torch.uint8)
        self.class_counts_weight = parameter("class_counts_weight", torch.int32)
        self.further_weight = parameter("further_weight", torch.uint8)
        self.outlier_weight = parameter("outlier_weight", dtype)
        self.outlier_rows_weight = parameter("outlier_rows_weight", torch.int32)

        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CODE_TENSORS and name not in DECODER_TENSORS and isinstance(value, nn.Parameter):
            value = self._as_codes(name, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Like torch's; codes become parameters that refuse to be taken for weights."""
        if name in CODE_TENSORS and name not in DECODER_TENSORS and param is not None:
            self._guard(param)
        super().register_parameter(name, param)

    def _as_codes(self, name: str, value: nn.Parameter) -> nn.Parameter:
        """What a parameter of codes is to be; a float one of integers that are intact is these.

        Raises:
            ModelError: If it holds floats in the place of integers.
        """
        mine = self._parameters.get(name)
        if mine is not None and value.shape[1:] != mine.shape[1:] and not hasattr(value, "device_mesh"):
            raise ModelError(
                f"{name} of a compressed table has rows of {list(mine.shape[1:])} codes, not of "
                f"{list(value.shape[1:])}: to give the model a dense table, expand it with hf_dirembed.expand and set "
                "that one's"
            )
        if mine is not None and not mine.is_floating_point() and value.is_floating_point():
            kept = not value.is_meta and not mine.is_meta and intact(mine, value)
            if not kept:
                raise ModelError(CHANGED_CODES)
            return mine
        self._guard(value)
        return value

    def _guard(self, tensor: Tensor) -> None:
        """Makes a guarded parameter of codes, but of latents and outliers that were unfrozen."""
        if self.learning and tensor.is_floating_point():
            mark(tensor)
        else:
            guard(tensor)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws random codes and decoder, as building a model from its config alone does."""
        if self.weight.is_meta:
            return

        nn.init.normal_(self.decoder_weight, std=0.02)
        if self.decoder_bias_weight is not None:
            nn.init.zeros_(self.decoder_bias_weight)
        with opened(self.codes()):
            if self.weight.is_floating_point():
                nn.init.normal_(plain(self.weight))
            else:
                self._reset_codes()

            if self.outlier_weight is not None:
                nn.init.normal_(plain(self.outlier_weight))
            if self.outlier_rows_weight is not None:
                torch.arange(len(self.outlier_rows_weight), out=plain(self.outlier_rows_weight))

    def _reset_codes(self) -> None:
        """Random packed codes; the first rows are of the classes of more bits."""
        assert self.exponent_weight is not None
        assert self.latents_weight is not None
        assert self.steps_weight is not None
        assert self.row_weight is not None
        for name in INTEGER_TENSORS:
            if getattr(self, name) is not None:
                codes = plain(getattr(self, name))
                codes.random_(torch.iinfo(codes.dtype).min, torch.iinfo(codes.dtype).max + 1)
        plain(self.exponent_weight).fill_(-7)  # as levels go up to 127.5
        plain(self.steps_weight).zero_()

        counts, device = [each.num_codes for each in self.layout.classes], self.weight.device
        of_classes = [torch.arange(count, device=device) % self.layout.rank for count in counts]
        plain(self.latents_weight).copy_(torch.cat(of_classes))

        numbers = torch.arange(1, len(counts), device=device)
        sizes = torch.tensor([each.rows for each in self.layout.classes[1:]], dtype=torch.int64, device=device)
        classes = F.pad(numbers.repeat_interleave(sizes), (0, self.num_rows - int(sizes.sum())))
        plain(self.row_weight).copy_(pack_rows(classes, torch.ones(self.num_rows, device=device)))
        if self.class_counts_weight is not None:
            plain(self.class_counts_weight).copy_(count_classes(plain(self.row_weight), len(counts)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.decoder_weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that the matrix is on, and runs on."""
        return self.decoder_weight.device

    @property
    def num_rows(self) -> int:
        """V, the number of rows."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """The length of a row."""
        return self.decoder_weight.shape[1]

    def packed_rows(self) -> PackedRows:
        """The packed codes of all rows, with what it takes to read them.

        Raises:
            ModelError: If the codes are floats.
        """
        held = {name: plain(each) for name, each in self._parameters.items() if each is not None}
        if "latents_weight" not in held:
            raise ModelError("these codes are floats, not packed integers: read them from `weight`")
        if "weight" not in held:
            raise ModelError(LOST_CODES)
        weight, codebook = held["weight"], held.get("codebook_weight")
        return PackedRows(
            weight=weight,
            codebook=gaussian_codebook(weight.device) if codebook is None else codebook,
            latents=held["latents_weight"],
            steps=held["steps_weight"],
            rows=held["row_weight"],
            classes=self.layout.classes,
            rank=self.layout.rank,
            class_counts=held.get("class_counts_weight"),
            further=held.get("further_weight"),
        )

    def verify_codes(self, *, values: bool = False) -> None:
        """Refuses codes that something has changed behind the layout's back.

        Args:
            values: Whether to compare all of them, as before they are saved, and not only where torch has counted a
                write.

        Raises:
            ModelError: If something has.
        """
        if torch.compiler.is_compiling():
            return
        tables, swapped = set(), False
        for name, tensor in self._parameters.items():
            if tensor is None:
                continue
            table = vars(tensor).get("_table")
            if table is not None:
                tables.add(id(table))
            elif type(tensor) is nn.Parameter and name in STEADY_TENSORS and not holds_codes(tensor):
                swapped = True  # whatever a module is given is guarded or marked
            if type(tensor) is CodesParameter and name not in DECODER_TENSORS and (values or not unwritten(tensor)):
                verify(tensor, values=values)
        if len(tables) > 1 or (tables and swapped):
            raise ModelError(TWO_TABLES)

    def guard_codes(self) -> None:
        """Makes guarded parameters of the codes again."""
        for tensor in self.codes().values():
            self._guard(tensor)
        self.follow_shadow()

    def follow_shadow(self) -> None:
        """Tells the codes whether there are floats that learn for them."""
        for tensor in (self.weight, self.further_weight):
            follow_floats(tensor, self.shadow is not None)

    def seal_codes(self, *, anew: bool = True) -> None:
        """Takes the codes for right as they are now.

        Args:
            anew: Whether to do so with those that were taken for right before.
        """
        for tensor in self.codes().values():
            seal(tensor, anew=anew)

    def mark_as_one(self) -> None:
        """Marks codes and decoder as those of one table, which modules that are tied share as a whole."""
        table = object()
        for tensor in self.code_tensors().values():
            vars(tensor)["_table"] = table

    def row_classes(self) -> Tensor:
        """The class of every row, (num_rows,) int32; all zero where the codes are floats."""
        if self.row_weight is None:
            return torch.zeros(self.num_rows, dtype=torch.int32, device=self.weight.device)
        return row_classes(plain(self.row_weight))

    def further_bytes(self, number: int) -> Tensor:
        """The bytes of a class's rows behind those in `weight`, (its rows, bytes), where they are in memory."""
        assert self.further_weight is not None
        each, (begin, end) = self.layout.classes[number], self.layout.further_offsets[number : number + 2]
        further = plain(self.further_weight)[begin:end]
        return further.view(each.rows or 0, each.num_bytes - self.layout.code_width)

    def check_codes(self) -> None:
        """Refuses packed codes that could make kernels read beyond them; those that are not in memory pass.

        Raises:
            CheckpointError: If a shape or dtype does not fit the layout, a latent's number is none, or the classes of
                the rows are miscounted.
        """
        codes = self.codes().values()
        if not self.layout.packed or any(each.is_meta or hasattr(each, "device_mesh") for each in codes):
            return
        try:
            self.packed_rows().check()
        except TableError as error:
            raise CheckpointError(str(error)) from error
        assert self.exponent_weight is not None
        largest = max(abs(each) for each in plain(self.exponent_weight).aminmax())
        if int(largest) > MAX_EXPONENT:
            raise CheckpointError(
                f"exponent_weight holds a power of two of {int(largest)}, which no decoder is scaled by (at most "
                f"{MAX_EXPONENT}): compress the model again"
            )

    def latents_of(self, ids: Tensor) -> Tensor:
        """The latents of rows, (..., rank), those of packed codes in float32 at least; zero where a row has none."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ModelError(f"ids of {ids.dtype} are no numbers of rows: give integers, as a tokenizer does")
        self.check_gradients()
        self.verify_codes()
        if (shadow := self.active_shadow) is not None:
            shadow.refresh(self, ids)

        if not self.layout.packed:
            return F.embedding(ids, plain(self.weight)).to(self.dtype)
        exponents = None if self.exponent_weight is None else plain(self.exponent_weight)
        latents = read_rows(self.packed_rows(), ids, self.dtype, exponents)
        return latents if shadow is None else shadow.carry_row_gradients(latents, ids, self)

    @property
    def shadow(self) -> Any:
        """The floats that learn for packed codes, a `LatentShadow`, once these are unfrozen; None before."""
        return self._modules.get("shadow")  # not there at all while it is None: `print(model)` would show it

    @property
    def active_shadow(self) -> Any:
        """`shadow`; None for what is compiled or exported in evaluation, when codes are up to date."""
        return None if torch.compiler.is_compiling() and not self.training else self.shadow

    def scaled(self, latents: Tensor) -> Tensor:
        """What is in the unit of packed latents, (..., rank), times their powers of two; float latents as they are."""
        if self.exponent_weight is None:
            return latents
        return scaled(latents, plain(self.exponent_weight))

    def decode(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: (...,) row numbers to (..., dim).

        On CPUs a row is the same to the bit, whatever is decoded with it: many models find the places of images in
        their embeddings by `inputs_embeds == embedding(image_token_id)`. Rows are where the row numbers are.
        """
        decoder: Tensor = self.decoder_weight
        if is_apart(ids, decoder.device):
            return self.decode(ids.to(decoder.device)).to(ids.device)
        if decoder.device.type != "meta" and torch.is_autocast_enabled(decoder.device.type):
            with torch.autocast(decoder.device.type, enabled=False):  # which leaves stock lookups alone
                return self.decode(ids)

        bias: Tensor | None = self.decoder_bias_weight
        given, latents = decoder.dtype, self.latents_of(ids)
        dtype = product_dtype(given, decoder.device)
        if dtype != given:
            decoder, bias = self.decoder_in(dtype)
        rows = _rowwise_product(latents if latents.dtype == dtype else latents.to(dtype), decoder)
        kept, rows_kept = self._parameters.get("outlier_weight"), self._parameters.get("outlier_rows_weight")
        outliers = None if kept is None else plain(kept)
        numbers = None if rows_kept is None else plain(rows_kept)
        zero_row = self.layout.zero_row

        # Nobody else has these rows: where no gradient is asked for, they are changed where they are.
        learns = torch.is_grad_enabled() and any(_learns(each) for each in (rows, bias, outliers))
        if package.patch_rows is not None and not learns and rows.dtype == dtype and runs_compiled(ids, rows):
            rows = rows if bias is None else rows.add_(bias)
            rows = rows if given == dtype else rows.to(given)
            if numbers is not None or zero_row is not None:
                package.patch_rows(rows, ids, numbers, outliers, zero_row)
            return rows

        if bias is not None:
            rows = rows + bias
        rows = rows.to(given)
        if numbers is not None and outliers is not None:
            slots, is_outlier = find_slots(numbers, ids, len(self.weight))
            rows = torch.where(is_outlier.unsqueeze(-1), F.embedding(slots, outliers).to(rows.dtype), rows)
        if zero_row is not None:
            rows = rows.masked_fill((ids == zero_row).unsqueeze(-1), 0)
        return rows

    def decoder_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The decoder and its bias in a dtype.

        Casts are not kept: torch does not count writes through `.data`, and they are quick beside the product.
        """
        decoder, bias = self.decoder_weight, self.decoder_bias_weight
        return decoder.to(dtype), None if bias is None else bias.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedMatrix:
        self.verify_codes()
        with opened(self.codes()):
            super()._apply(fn, recurse)
        self.guard_codes()  # from and to the meta device, torch makes new parameters
        return self

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The whole matrix, (num_rows, dim)."""
        ids = torch.arange(len(self.weight), device=self.weight.device)
        return torch.cat([self.decode(chunk) for chunk in ids.split(DENSE_CHUNK)])

    def matrices(self) -> list[tuple[str, CompressedMatrix]]:
        """The matrices that stand for the table, with what the names of their tensors start with: itself alone."""
        return [("", self)]

    def code_tensors(self) -> dict[str, Tensor]:
        """The tensors that stand for the matrix, by name: what a tied module shares."""
        return {name: tensor for name in CODE_TENSORS if (tensor := getattr(self, name)) is not None}

    def codes(self) -> dict[str, Tensor]:
        """The tensors that stand for the matrix, by name, without the decoder's: its codes."""
        return {name: tensor for name, tensor in self.code_tensors().items() if name not in DECODER_TENSORS}

    @torch.no_grad()
    def stored_decoder(self, decoder: Tensor | None = None) -> Tensor:
        """The decoder as files have it: in the dtype that the layout names, where that loses nothing.

        Args:
            decoder: The decoder's values where they are no longer the module's, as of a model that is sharded.
        """
        decoder = self.decoder_weight.detach() if decoder is None else decoder
        if decoder.is_meta or hasattr(decoder, "device_mesh"):  # a comparison would wait for the other processes
            return decoder
        narrow = decoder.to(_narrower(self.layout.decoder, decoder.dtype))
        if narrow.dtype == decoder.dtype:  # not all of which have an `equal`
            return decoder
        return narrow if torch.equal(narrow.to(decoder.dtype), decoder) else decoder

    @property
    def num_bytes(self) -> int:
        """Bytes of all that stands for the matrix in a file."""
        stored = {**self.code_tensors(), "decoder_weight": self.stored_decoder()}
        return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())

    @property
    def bits_per_weight(self) -> float:
        """8 x `num_bytes` / (num_rows x dim)."""
        return 8 * self.num_bytes / (self.weight.shape[0] * self.decoder_weight.shape[1])

    def current_layout(self, decoder: Tensor | None = None) -> TableLayout:
        """The layout with the dtypes and the numbers of rows as training, casts and resizing left them.

        Args:
            decoder: The decoder's values, as [`stored_decoder`] takes them.
        """
        changes: dict[str, Any] = {"decoder": str(self.stored_decoder(decoder).dtype).removeprefix("torch.")}
        if not self.layout.packed:
            changes["codes"] = str(self.weight.dtype).removeprefix("torch.")
        if self.outlier_rows_weight is not None:
            changes["outliers"] = len(self.outlier_rows_weight)
        return replace(self.layout, **changes)

    def align(self) -> None:
        """Moves float tensors that a file's memory map placed off a cache line.

        With a rank that is no multiple of a vector register, BLAS rounds differently there, and a reloaded model's
        logits would differ in the last bit from those of the model that was saved.
        """
        for tensor in self.code_tensors().values():
            if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.data_ptr() % CACHE_LINE:
                tensor.data = plain(tensor).detach().clone()

    def requires_grad_(self, requires_grad: bool = True) -> CompressedMatrix:
        """Like torch's, but does not unfreeze the codes; see [`unfreeze_codes`]."""
        frozen = self.frozen_tensors()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in frozen)
        return self

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The codes, by name, and the floats that learn for them, as far as training leaves them alone."""
        codes = self.codes()
        if self.shadow is not None:
            codes |= {f"shadow.{name}": tensor for name, tensor in self.shadow.named_parameters()}
        return {name: tensor for name, tensor in codes.items() if not tensor.requires_grad}

    def unfreeze_codes(self) -> CompressedMatrix:
        """Makes latents and outliers learn, as the decoder does; nothing that the matrix stands for changes by that.

        Float latents widen to the decoder's dtype, which optimisers need, and modules that are tied to this one
        follow. Saving keeps the wider dtype, until `freeze_codes` narrows it. Packed latents get floats beside them,
        which optimisers train; passes and files have the codes that these are quantised to: straight-through training.

        Raises:
            ModelError: If the codes are packed and a tied head shares them, which the model's `unfreeze_codes` sees
                to; if they are sharded or not in memory; if they are packed and the package is not installed.

        Example:
            >>> import torch, hf_dirembed
            >>> table = torch.nn.Embedding(1000, 64)
            >>> embedding = hf_dirembed.CompressedEmbedding.from_embedding(table, method="direction", rank=16)
            >>> embedding.weight.requires_grad, embedding.unfreeze_codes().weight.requires_grad
            (False, True)
        """
        self._refuse_tied("unfreeze_codes")
        unfreeze([self])
        return self

    def _refuse_tied(self, call: str) -> None:
        if self.tied and self.layout.packed:
            raise ModelError(f"these packed codes are shared with a tied module: call {call}() of the model itself")

    def check_gradients(self) -> None:
        """Refuses to train latents in a dtype that is narrower than the decoder's.

        Raises:
            ModelError: If they were unfrozen by other means than `unfreeze_codes`.
        """
        if not self.layout.packed and self.weight.requires_grad and self.weight.dtype != self.dtype:
            raise ModelError(
                f"latents in {self.weight.dtype} cannot be trained, optimisers make NaNs of them: call "
                "unfreeze_codes() on the model's input embedding first, or freeze_codes() to leave them as they are"
            )

    def freeze_codes(self) -> CompressedMatrix:
        """Undoes `unfreeze_codes`: latents are rounded to the dtype that they were compressed to, or quantised.

        Raises:
            ModelError: If the codes are packed and learn in a tied head too: call the model's.
        """
        if self.shadow is not None:
            self._refuse_tied("freeze_codes")
        freeze([self])
        return self

    def write_codes(self) -> None:
        """Brings packed codes up to date, if there are floats that learn for them."""
        if self.shadow is not None:
            self.shadow.refresh(self)

    def train(self, mode: bool = True) -> CompressedMatrix:
        """Like torch's; evaluation begins with codes that are up to date."""
        if not mode:
            self.write_codes()
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write_codes()
        self.verify_codes()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes = sealed_checksum(self.weight)
        if not keep_vars:
            for name in self.codes():
                mark_stored(destination[prefix + name])
            vars(destination[f"{prefix}decoder_weight"])["_codes"] = codes
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] |= {"layout": self.layout.to_dict(), "codes": codes}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        taken = self._codes_to_load(state_dict, prefix, local_metadata)
        is_one = "_table" in vars(self.weight)
        with opened(self.codes()):
            super()._load_from_state_dict(taken, prefix, local_metadata, *args)
        self.seal_codes(anew=False)
        if is_one and local_metadata.get("assign_to_params_buffers"):
            self.mark_as_one()
        self.check_codes()
        if self.shadow is not None:
            self.shadow.follow(self)

    def _codes_to_load(self, state_dict: Mapping[str, Tensor], prefix: str, metadata: Any) -> Mapping[str, Tensor]:
        """A state dict whose codes are integers again where an average or a cast left them what they are.

        Raises:
            ModelError: If it holds floats that are no codes, codes without their decoder that are others than here, or
                codes of another layout.
        """
        names = self.code_tensors()
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        stated = metadata.get("layout")
        of_others = stated is not None and reading_of(stated) != reading_of(self.layout.to_dict())
        integers = {name for name, value in found.items() if not value.is_floating_point()}
        if found and (of_others or any(names[name].is_floating_point() for name in integers)):
            raise ModelError(
                "the state dict holds codes of another layout than this table's: load it into the model that it was "
                "taken of, or load that with from_pretrained"
            )

        self._check_decoder(found, metadata.get("codes"))
        restored, others = {}, []
        for name, value in found.items():
            mine = names[name]
            elsewhere = mine.is_meta or value.is_meta or hasattr(value, "device_mesh")
            if name not in DECODER_TENSORS:
                restored[prefix + name] = plain(value)
            learns = name in DECODER_TENSORS or (mine.is_floating_point() and mine.requires_grad)
            if learns or elsewhere or value.shape != mine.shape:
                continue
            if intact(mine, value):
                restored[prefix + name] = plain(mine).clone()
            elif value.is_floating_point() and not mine.is_floating_point():
                raise ModelError(CHANGED_CODES)
            else:
                others.append(name)
        if others and len(found) < len(names):
            raise ModelError(
                f"the state dict holds {', '.join(others)} of another table, without "
                f"{', '.join(sorted(names.keys() - found.keys()))}: load a state dict of all of it"
            )
        return {**state_dict, **restored}

    def _check_decoder(self, found: Mapping[str, Tensor], stated: int | None) -> None:
        """Refuses a decoder of other codes than those that it is to be beside; one of which nothing is known may be.

        Raises:
            ModelError: If the state dict says that it was taken of other codes.
        """
        decoder = found.get("decoder_weight")
        if decoder is None:
            return
        own = vars(decoder).get("_codes", stated)
        beside = sealed_checksum(found["weight"]) if "weight" in found else sealed_checksum(self.weight)
        if own is not None and beside is not None and own != beside:
            raise ModelError(
                "the state dict holds a decoder of another table than the codes that it would be loaded beside: load "
                "codes and decoder of one model"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Like any module's; refuses to copy and to pickle codes that something has changed, or of another table."""
        self.verify_codes()
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.guard_codes()  # pickled as plain ones
        self.seal_codes(anew=False)

        # plain parameters, such as the decoder, have lost their marks; other modules may have marked what they share
        tensors = self.code_tensors().values()
        table = next((vars(each)["_table"] for each in tensors if "_table" in vars(each)), object())
        for tensor in tensors:
            vars(tensor).setdefault("_table", table)

    def __format__(self, format_spec: str) -> str:
        """What a message says that names the module, such as PEFT's on a target that it cannot adapt: with a mend.

        `print(model)` and `repr` show the module alone.
        """
        return format(f"{self!r} ({DENSE_ROWS_WANTED})", format_spec)

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        shape = f"{self.weight.shape[0]}, {self.decoder_weight.shape[1]}"
        rank = f"rank={self.layout.rank}"
        if len(self.layout.classes) > 1:
            rank += f", classes={len(self.layout.classes)}"
        if self.outlier_rows_weight is not None:
            rank += f", outliers={len(self.outlier_rows_weight)}"
        return f"{shape}, method={self.layout.method}, {rank}, bits_per_weight={self.bits_per_weight:.3g}"


def unfreeze(matrices: Sequence[CompressedMatrix]) -> None:
    """Makes the codes learn that matrices share.

    Raises:
        ModelError: If they are packed, and sharded or not in memory, or the package is not installed.
    """
    first = matrices[0]
    first.verify_codes()
    if not first.layout.packed:
        unguard(first.weight)
        first.weight.data = first.weight.data.to(first.dtype)
        first.weight.requires_grad_(True)
        for matrix in matrices:
            matrix.learning = True
        return

    # packed codes: floats beside them learn, the same for all matrices that share the codes
    if first.shadow is None:
        if package.shadow_latents is None:
            raise ModelError(
                "training packed codes needs the package itself: pip install hf_dirembed, and import it before the "
                "model is loaded"
            )
        shadow = package.shadow_latents(first)
        for matrix in matrices:
            matrix._modules["shadow"] = shadow
            matrix.follow_shadow()

    for matrix in matrices:
        matrix.learning = True
        matrix.shadow.requires_grad_(True)
        if matrix.outlier_weight is not None:
            unguard(matrix.outlier_weight)
            matrix.outlier_weight.requires_grad_(True)


def freeze(matrices: Sequence[CompressedMatrix]) -> None:
    """Undoes [`unfreeze`]."""
    for matrix in matrices:
        matrix.write_codes()
    for matrix in matrices:
        for tensor in matrix.codes().values():
            tensor.requires_grad_(False)
        if not matrix.layout.packed:
            matrix.weight.data = matrix.weight.data.to(_narrower(matrix.layout.codes, matrix.dtype))
        matrix._modules.pop("shadow", None)
        matrix.follow_shadow()
        matrix.learning = False
        matrix.guard_codes()
        matrix.seal_codes()


def reading_of(layout: Mapping[str, Any]) -> dict[str, Any]:
    """What of a layout says how codes are read, without the dtypes that casts and training change, and the method."""
    return {name: value for name, value in layout.items() if name not in ("decoder", "codes", "method")}


def _rowwise_product(latents: Tensor, decoder: Tensor) -> Tensor:
    """The product of (..., rank) latents with a decoder, in which a row does not depend on how many there are.

    BLAS takes some rows at a time, and sums those that are left over in another order: up to three rows, or the last
    rows of each thread. So there are zeros for what is missing of the last rows.
    """
    if torch.compiler.is_compiling() or not latents.is_cpu:
        return latents @ decoder
    shape = latents.shape
    count = shape.numel() // shape[-1]
    if count % STEADY_ROWS == 0 or count > MANY_ROWS:
        return latents @ decoder
    rows = torch.constant_pad_nd(latents.reshape(count, shape[-1]), (0, 0, 0, -count % STEADY_ROWS)) @ decoder
    return rows[:count].view(*shape[:-1], decoder.shape[1])


def find_slots(some_rows: Tensor, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where among some rows, in ascending order, `ids` are, any slot for those that are not; and which of them are."""
    if torch.compiler.is_compiling():  # exporters to ONNX know no searchsorted
        numbers = torch.arange(len(some_rows), dtype=torch.int32, device=ids.device)
        slots = numbers.new_zeros(num_rows).scatter(0, some_rows.long(), numbers)[ids].long()
    else:
        slots = torch.searchsorted(some_rows, ids.to(some_rows.dtype)).clamp(max=len(some_rows) - 1)
    return slots, some_rows[slots] == ids


def _learns(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _narrower(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of that name, or `dtype` where that takes less room."""
    named: torch.dtype = getattr(torch, name)
    return named if named.itemsize <= dtype.itemsize else dtype
