"""A matrix held as codes and a decoder: how it is decoded, how it learns, and how it gets more or fewer rows.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes_dirembed import CODE_TENSORS, CODEBOOK_SHAPE, NO_STEP, PACKED_CODES, ModelError, TableLayout, TableRecord
from .kernels_dirembed import refinement_steps, unpack_levels


CACHE_LINE = 64  # bytes; what torch's own allocations are aligned to
DENSE_CHUNK = 1 << 14  # rows decoded at a time when the whole table is asked for
DECODER_TENSORS = ("decoder_weight", "decoder_bias_weight")  # of the code tensors, those that learn unless frozen


@dataclass
class Package:
    """What only the installed package does, with more than these files hold; it fills this in when it is imported.

    Attributes:
        compress_table: Compresses a table.
        shadow_latents: The floats that learn in place of a matrix's packed codes.
        find_tables: Every vocabulary table of a model, compressed or not.
        before_upload: Called with model, folder and repo before `push_to_hub` uploads the folder.
    """

    compress_table: Callable[..., Any] | None = None
    shadow_latents: Callable[[CompressedMatrix], nn.Module] | None = None
    find_tables: Callable[[Any], list[Any]] | None = None
    before_upload: Callable[[Any, str, str], None] | None = None


package = Package()


class CompressedMatrix(nn.Module):
    """A (num_rows, dim) matrix held as codes and an affine decoder: row i is zᵢ D + b.

    The latents zᵢ are the floats of row i of the code matrix or, where it is packed, the integers that it stands for
    plus ½ (a mid-rise quantiser), times a power of two for each latent: these exponents keep D at the size that
    optimisers expect of weights and that narrow floats hold well. To some latents of the rows that a refinement names
    it adds finer ones, times steps of their own; outliers, rows that the codes would lose, are kept as they are.
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

    codebook_weight: nn.Parameter | None
    exponent_weight: nn.Parameter | None
    decoder_bias_weight: nn.Parameter | None
    refinement_weight: nn.Parameter | None
    refined_rows_weight: nn.Parameter | None
    refined_latents_weight: nn.Parameter | None
    refinement_exponent_weight: nn.Parameter | None
    outlier_weight: nn.Parameter | None
    outlier_rows_weight: nn.Parameter | None
    tied = False  # whether other modules of the model share its tensors

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

        def parameter(*shape: int, dtype: torch.dtype, trained: bool = False) -> nn.Parameter:
            # Codes are parameters too, not buffers: transformers looks tied tensors up by `get_parameter`.
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=trained)

        code_dtype = torch.uint8 if layout.codes == PACKED_CODES else _narrower(layout.codes, dtype)
        refined = layout.refinement
        self.decoder_bias_weight = parameter(dim, dtype=dtype, trained=True) if layout.bias else None
        self.decoder_weight = parameter(layout.rank, dim, dtype=dtype, trained=True)
        self.weight = parameter(num_rows, layout.code_width, dtype=code_dtype)

        packed = layout.codes == PACKED_CODES
        self.codebook_weight = parameter(*CODEBOOK_SHAPE, dtype=torch.int8) if packed else None
        self.exponent_weight = parameter(layout.rank, dtype=torch.int8) if packed else None

        self.refinement_weight = parameter(refined.rows, refined.code_width, dtype=torch.uint8) if refined else None
        self.refined_rows_weight = parameter(refined.rows, dtype=torch.int32) if refined else None
        self.refined_latents_weight = parameter(refined.rank, dtype=torch.int32) if refined else None
        self.refinement_exponent_weight = parameter(refined.rank, dtype=torch.int8) if refined else None
        self.outlier_weight = parameter(layout.outliers, dim, dtype=dtype) if layout.outliers else None
        self.outlier_rows_weight = parameter(layout.outliers, dtype=torch.int32) if layout.outliers else None

        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws random codes and decoder, as building a model from its config alone does."""
        if self.weight.is_meta:
            return

        nn.init.normal_(self.decoder_weight, std=0.02)
        if self.decoder_bias_weight is not None:
            nn.init.zeros_(self.decoder_bias_weight)
        if self.weight.is_floating_point():
            nn.init.normal_(self.weight)

        for codes in (self.weight, self.refinement_weight, self.codebook_weight):
            if codes is not None and not codes.is_floating_point():
                codes.random_(torch.iinfo(codes.dtype).min, torch.iinfo(codes.dtype).max + 1)
        if self.exponent_weight is not None:
            self.exponent_weight.fill_(-7)  # as levels go up to 127.5
        if self.refinement_exponent_weight is not None:
            nn.init.zeros_(self.refinement_exponent_weight)

        if self.outlier_weight is not None:
            nn.init.normal_(self.outlier_weight)
        for numbers in (self.refined_rows_weight, self.refined_latents_weight, self.outlier_rows_weight):
            if numbers is not None:
                torch.arange(len(numbers), out=numbers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.decoder_weight.dtype

    @property
    def num_rows(self) -> int:
        """V, the number of rows."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """The length of a row."""
        return self.decoder_weight.shape[1]

    def latents_of(self, ids: Tensor) -> Tensor:
        """The latents of rows, (..., rank); zero where a row has none."""
        self.check_gradients()
        if (shadow := self.active_shadow) is not None:
            shadow.refresh(self, ids)

        codes = F.embedding(ids, self.weight)
        if self.layout.bit_allocation is None or self.codebook_weight is None:
            return codes.to(self.dtype)

        latents = unpack_levels(codes, self.layout.bit_allocation, self.codebook_weight, self.dtype)
        if (
            self.refinement_weight is not None
            and self.refined_rows_weight is not None
            and self.layout.refinement is not None
        ):
            slots, refined = find_slots(self.refined_rows_weight, ids, len(self.weight))
            codes = F.embedding(slots, self.refinement_weight)
            further = unpack_levels(codes, self.layout.refinement.bit_allocation, self.codebook_weight, self.dtype)
            latents = self.refine(latents, further * self.refinement_steps(self.dtype) * refined.unsqueeze(-1))

        latents = self.scaled(latents)
        return latents if shadow is None else shadow.carry_row_gradients(latents, ids, self)

    def refine(self, latents: Tensor, further: Tensor) -> Tensor:
        """Latents of the first stage, (..., base rank), and those of the second in their unit: (..., rank)."""
        assert self.refined_latents_weight is not None
        every = F.pad(latents, (0, self.layout.rank - self.layout.base_rank))
        return every.index_add(-1, self.refined_latents_weight.long(), further)

    def refinement_steps(self, dtype: torch.dtype) -> Tensor:
        """What the second stage's half-integers are multiplied by to be in the first stage's unit, (its rank,)."""
        assert self.refinement_exponent_weight is not None
        return refinement_steps(self.refinement_exponent_weight, dtype)

    @property
    def shadow(self) -> Any:
        """The floats that learn for packed codes, a `LatentShadow`, once these are unfrozen; None before."""
        return self._modules.get("shadow")  # not there at all while it is None: `print(model)` would show it

    @property
    def active_shadow(self) -> Any:
        """`shadow`; None for what is compiled or exported in evaluation, when codes are up to date."""
        return None if torch.compiler.is_compiling() and not self.training else self.shadow

    def scaled(self, latents: Tensor) -> Tensor:
        """Half-integers, (..., rank), times the powers of two that belong to them; floats as they are."""
        if self.exponent_weight is None:
            return latents
        return latents * torch.exp2(self.exponent_weight.to(latents.dtype))

    def decode(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: (...,) row numbers to (..., dim)."""
        rows = self.latents_of(ids) @ self.decoder_weight
        if self.decoder_bias_weight is not None:
            rows = rows + self.decoder_bias_weight
        if self.outlier_rows_weight is not None and self.outlier_weight is not None:
            slots, is_outlier = find_slots(self.outlier_rows_weight, ids, len(self.weight))
            kept = F.embedding(slots, self.outlier_weight).to(rows.dtype)
            rows = torch.where(is_outlier.unsqueeze(-1), kept, rows)
        if self.layout.zero_row is not None:
            rows = rows.masked_fill((ids == self.layout.zero_row).unsqueeze(-1), 0)
        return rows

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
        if self.layout.bit_allocation is None:
            changes["codes"] = str(self.weight.dtype).removeprefix("torch.")
        if self.layout.refinement is not None and self.refined_rows_weight is not None:
            changes["refinement"] = replace(self.layout.refinement, rows=len(self.refined_rows_weight))
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
                tensor.data = tensor.data.clone()

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
        if self.tied and self.layout.bit_allocation is not None:
            raise ModelError(f"these packed codes are shared with a tied module: call {call}() of the model itself")

    def check_gradients(self) -> None:
        """Refuses to train latents in a dtype that is narrower than the decoder's.

        Raises:
            ModelError: If they were unfrozen by other means than `unfreeze_codes`.
        """
        if self.weight.requires_grad and self.weight.dtype != self.dtype:
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

    def _save_to_state_dict(self, *args: Any) -> None:
        self.write_codes()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.shadow is not None:
            self.shadow.follow(self)

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        shape = f"{self.weight.shape[0]}, {self.decoder_weight.shape[1]}"
        rank = f"rank={self.layout.base_rank}"
        if self.refined_rows_weight is not None and self.layout.refinement is not None:
            rank += f"+{self.layout.refinement.rank} for {len(self.refined_rows_weight)} rows"
        if self.outlier_rows_weight is not None:
            rank += f", outliers={len(self.outlier_rows_weight)}"
        return f"{shape}, method={self.layout.method}, {rank}, bits_per_weight={self.bits_per_weight:.3g}"


def unfreeze(matrices: Sequence[CompressedMatrix]) -> None:
    """Makes the codes learn that matrices share.

    Raises:
        ModelError: If they are packed, and sharded or not in memory, or the package is not installed.
    """
    first = matrices[0]
    if first.layout.bit_allocation is None:
        first.weight.data = first.weight.data.to(first.dtype)
        first.weight.requires_grad_(True)
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

    for matrix in matrices:
        matrix.shadow.requires_grad_(True)
        if matrix.outlier_weight is not None:
            matrix.outlier_weight.requires_grad_(True)


def freeze(matrices: Sequence[CompressedMatrix]) -> None:
    """Undoes [`unfreeze`]."""
    for matrix in matrices:
        matrix.write_codes()
    for matrix in matrices:
        for tensor in matrix.codes().values():
            tensor.requires_grad_(False)
        if matrix.layout.bit_allocation is None:
            matrix.weight.data = matrix.weight.data.to(_narrower(matrix.layout.codes, matrix.dtype))
        matrix._modules.pop("shadow", None)


def find_slots(some_rows: Tensor, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where among some rows, in ascending order, `ids` are, any slot for those that are not; and which of them are."""
    if torch.compiler.is_compiling():  # exporters to ONNX know no searchsorted
        numbers = torch.arange(len(some_rows), dtype=torch.int32, device=ids.device)
        slots = numbers.new_zeros(num_rows).scatter(0, some_rows.long(), numbers)[ids].long()
    else:
        slots = torch.searchsorted(some_rows, ids.to(some_rows.dtype)).clamp(max=len(some_rows) - 1)
    return slots, some_rows[slots] == ids


def _narrower(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of that name, or `dtype` where that takes less room."""
    named: torch.dtype = getattr(torch, name)
    return named if named.itemsize <= dtype.itemsize else dtype


@torch.no_grad()
def resize_rows(matrix: CompressedMatrix, num_rows: int) -> None:
    """Drops rows from the end, or adds rows: the mean latents or, packed, the codes of the row nearest to it.

    Args:
        matrix: Changed in place.
        num_rows: How many it shall have.
    """
    matrix.write_codes()
    _resize_outliers(matrix, num_rows)
    _resize_refinement(matrix, num_rows)
    kept = matrix.weight[:num_rows]
    if (added := num_rows - len(kept)) > 0:
        kept = torch.cat([kept, _mean_codes(matrix).expand(added, -1)])
    matrix.weight = nn.Parameter(kept.clone(), requires_grad=matrix.weight.requires_grad)
    if matrix.layout.zero_row is not None and matrix.layout.zero_row >= num_rows:
        matrix.layout = replace(matrix.layout, zero_row=None)
    if matrix.shadow is not None:
        matrix.shadow.follow(matrix)


def _resize_refinement(matrix: CompressedMatrix, num_rows: int) -> None:
    if matrix.refined_rows_weight is None or matrix.refinement_weight is None:
        return
    inside = matrix.refined_rows_weight < num_rows
    rows, codes = matrix.refined_rows_weight[inside], matrix.refinement_weight[inside]
    if not len(rows):  # none at all would be another layout: the first row becomes one, to which codes add nothing
        rows, codes = matrix.refined_rows_weight.new_zeros(1), matrix.refinement_weight[:1].clone()
        assert matrix.refinement_exponent_weight is not None
        matrix.refinement_exponent_weight.fill_(NO_STEP)
    matrix.refined_rows_weight = nn.Parameter(rows, requires_grad=False)
    matrix.refinement_weight = nn.Parameter(codes, requires_grad=False)


def _resize_outliers(matrix: CompressedMatrix, num_rows: int) -> None:
    if matrix.outlier_rows_weight is None or matrix.outlier_weight is None:
        return
    inside = matrix.outlier_rows_weight < num_rows
    rows, kept = matrix.outlier_rows_weight[inside], matrix.outlier_weight[inside]
    if not len(rows):  # none at all would be another layout: the first row becomes one
        rows = matrix.outlier_rows_weight.new_zeros(1)
        kept = matrix.decode(rows)
    matrix.outlier_rows_weight = nn.Parameter(rows, requires_grad=False)
    matrix.outlier_weight = nn.Parameter(kept, requires_grad=matrix.outlier_weight.requires_grad)


def _mean_codes(matrix: CompressedMatrix) -> Tensor:
    """The code row that stands for the mean row, or for the row nearest to it, (1, code width)."""
    if matrix.weight.is_floating_point():
        return matrix.weight.float().mean(dim=0, keepdim=True).to(matrix.weight.dtype)
    chunks = torch.arange(len(matrix.weight), device=matrix.weight.device).split(DENSE_CHUNK)
    mean = torch.stack([matrix.decode(ids).double().sum(dim=0) for ids in chunks]).sum(dim=0) / len(matrix.weight)
    distances = torch.cat([(matrix.decode(ids) - mean).square().sum(dim=1) for ids in chunks])
    # Not those whose codes alone stand for another row: zero, refined or an outlier, which no added row is.
    if matrix.refined_rows_weight is not None:
        distances[matrix.refined_rows_weight.long()] += distances.max()
    if matrix.outlier_rows_weight is not None:
        distances[matrix.outlier_rows_weight.long()] = torch.inf
    if matrix.layout.zero_row is not None:
        distances[matrix.layout.zero_row] = torch.inf
    return matrix.weight[distances.argmin()].unsqueeze(0)
