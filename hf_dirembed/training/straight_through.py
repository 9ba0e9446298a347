"""Training packed codes: floats that learn in their place, and whose gradient goes straight through the quantiser.

Source: Bengio, Léonard & Courville 2013, "Estimating or propagating gradients through stochastic neurons",
arXiv:1308.3432.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compression.transform.trellis import quantise
from ..errors import ModelError
from ..remote.codes_dirembed import RowClass
from ..remote.guarded_dirembed import plain
from ..remote.kernels_dirembed import HALF, code_steps, pack, row_scales, sections, unpack_levels
from ..remote.matrix_dirembed import DENSE_CHUNK, find_slots


if TYPE_CHECKING:
    from ..remote.matrix_dirembed import CompressedMatrix


_TINY = torch.finfo(torch.float32).tiny


class LatentShadow(nn.Module):
    """Floats that learn in place of a matrix's packed codes, which follow them: one for each code of each row.

    Those of the rows of the first class are the parameter `weight`, those of the others `weight_1` and so on, where
    there are such rows. They are in the unit that the decoder multiplies: half-integers times the steps of the codes,
    the scale of the row and the powers of two of the latents. They start at what the codes stand for. Passes see the
    codes, brought up to date before, so they are always those of what a save holds; gradients reach the floats as if
    there were no quantiser, that of a latent each code that adds to it. A state dict has the codes alone, and what is
    loaded into them the floats take over.

    It is a part of every matrix that shares the codes, and knows none of them: they pass themselves.

    Args:
        matrix: Whose codes shall learn.

    Raises:
        ModelError: If the codes are sharded or not in memory.
    """

    weight: nn.Parameter

    def __init__(self, matrix: CompressedMatrix) -> None:
        if matrix.weight.is_meta:
            raise ModelError("these packed codes are not in memory: load the model without offloading to train them")
        _refuse_sharded(matrix.weight)
        super().__init__()
        self._written: tuple[int, ...] | None = None
        self.follow(matrix)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_sharded(value)  # here, as `fully_shard` tells no module what it does, but puts its parameters there
        super().__setattr__(name, value)

    @torch.no_grad()
    def follow(self, matrix: CompressedMatrix) -> None:
        """Takes over what the codes stand for, in place where the shapes are still the same."""
        every = list(_codes_of(matrix))
        for name in {name for name, _ in self.named_parameters()} - {codes.name for codes in every}:
            delattr(self, name)  # of a class that has lost its rows
        for codes in every:
            floats = codes.read_all(matrix.dtype)
            mine = getattr(self, codes.name, None)
            kind = floats.shape, floats.dtype, floats.device
            if mine is not None and (mine.shape, mine.dtype, mine.device) == kind:
                mine.copy_(floats)
            else:
                setattr(self, codes.name, nn.Parameter(floats, requires_grad=mine is None or mine.requires_grad))
        self._written = self._versions()

    @torch.compiler.disable
    @torch.no_grad()
    def refresh(self, matrix: CompressedMatrix, ids: Tensor | None = None) -> None:
        """Brings codes up to date, if the floats may have changed since that was done last.

        Args:
            matrix: Whose codes they are.
            ids: The rows that are needed; by default all.

        Raises:
            ModelError: If the floats are no longer finite.
        """
        if self._written == self._versions():
            return
        for codes in _codes_of(matrix):
            for slots in codes.slots(ids).split(DENSE_CHUNK):
                codes.write(slots, getattr(self, codes.name)[slots])
        if ids is None:
            self._written = self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters())

    def forget(self) -> None:
        """Notes that the floats may change: not every optimiser counts up the version of what it writes to."""
        self._written = None

    @torch.compiler.disable
    def carry_row_gradients(self, latents: Tensor, ids: Tensor, matrix: CompressedMatrix) -> Tensor:
        """Gives the latents of rows back, but so that their gradient reaches the floats.

        Args:
            latents: (..., rank), of the codes.
            ids: (...,) the rows.
            matrix: Whose rows they are.
        """
        mine = latents.new_zeros(latents.shape)
        for codes in _codes_of(matrix):
            slots, of_class = find_slots(codes.rows, ids, matrix.num_rows)
            floats = F.embedding(slots, getattr(self, codes.name)).to(mine.dtype)
            mine = mine.index_add(-1, codes.latents, floats * of_class.unsqueeze(-1))
        rows: Tensor = _Rows.apply(latents, mine, self)
        return rows

    @torch.compiler.disable
    def carry_product_gradients(self, product: Tensor, states: Tensor, matrix: CompressedMatrix) -> Tensor:
        """Gives a product of states with the latents of all rows back, but so that its gradient reaches the floats.

        Args:
            product: (..., V).
            states: (..., rank) what was multiplied, before the powers of two of the latents.
            matrix: Whose rows they are.
        """
        for codes in _codes_of(matrix):
            product = _Product.apply(product, states, getattr(self, codes.name), codes, self)
        return product

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())

    def _save_to_state_dict(self, *_: Any) -> None:
        """Saves nothing: the codes say what there is to say."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Misses nothing: the matrix lets it follow its codes."""


@dataclass(frozen=True)
class _ClassCodes:
    """The codes of the rows of one class.

    Attributes:
        name: What their floats are called.
        packed: (V, bytes) uint8, the first bytes of every row of the matrix.
        further: (rows of the class, bytes) uint8, the bytes behind them; None where there are none.
        rows: (rows of the class,) int64, which rows they are, ascending.
        row_class: The class.
        latents: (codes,) int64, the latent that each code adds to.
        codebook: (4, 256) int8.
        steps: (codes,) float32, what a half-integer is multiplied by, beside the scale of its row.
        scales: (rows of the class, 1) float32, the scales of the rows.
        gains: (codes,) float32, what the squared error of a code, in half-integers, makes of the row's.
    """

    name: str
    packed: Tensor
    further: Tensor | None
    rows: Tensor
    row_class: RowClass
    latents: Tensor
    codebook: Tensor
    steps: Tensor
    scales: Tensor
    gains: Tensor

    def slots(self, ids: Tensor | None) -> Tensor:
        """Where among the rows of the class those are that are asked for, each once; by default all."""
        if ids is None:
            return torch.arange(len(self.rows), device=self.rows.device)
        return torch.isin(self.rows, ids.to(self.rows.dtype)).nonzero().squeeze(1)

    def bytes_of(self, slots: Tensor) -> Tensor:
        """The packed rows, (n, bytes)."""
        first = self.packed[self.rows[slots]]
        return first if self.further is None else torch.cat([first, self.further[slots]], dim=1)

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """What the codes of rows stand for, (n, codes)."""
        levels = unpack_levels(self.bytes_of(slots), self.row_class.bit_allocation, self.codebook, dtype)
        return levels * self.steps.to(dtype) * self.scales[slots].to(dtype)

    def read_all(self, dtype: torch.dtype) -> Tensor:
        """What all rows of the class stand for, (rows of the class, codes)."""
        floats = self.steps.new_empty(len(self.rows), self.row_class.num_codes, dtype=dtype)
        for slots in self.slots(None).split(DENSE_CHUNK):
            floats[slots] = self.read(slots, dtype)
        return floats

    def write(self, slots: Tensor, floats: Tensor) -> None:
        """Quantises floats, (n, codes); those that are what their codes stand for already stay as they are."""
        if not floats.isfinite().all():
            raise ModelError(
                "the latents that learn are no longer finite, their training diverged: lower the learning rate and "
                "take it up from the last checkpoint"
            )

        moved = (floats != self.read(slots, floats.dtype)).any(dim=1)
        slots = slots[moved]
        if not len(slots):
            return
        targets = floats[moved].float() / self.steps / self.scales[slots]

        book = self.codebook.float() + HALF
        symbols = [
            quantise(targets[:, section], self.gains[section], book, width)[0]
            for width, section, _ in sections(self.row_class.bit_allocation)
        ]
        packed, width = pack(torch.cat(symbols, dim=1), self.row_class.bit_allocation), self.packed.shape[1]
        self.packed[self.rows[slots]] = packed[:, :width]
        if self.further is not None:
            self.further[slots] = packed[:, width:]


def _codes_of(matrix: CompressedMatrix) -> Iterator[_ClassCodes]:
    """The codes of each class of a matrix that has rows."""
    assert matrix.exponent_weight is not None
    packed, classes = matrix.packed_rows(), matrix.row_classes()
    powers = torch.exp2(plain(matrix.exponent_weight).float())
    decoder_gains = matrix.decoder_weight.detach().float().square().sum(dim=1)

    for number in range(len(packed.classes)):
        rows = (classes == number).nonzero().squeeze(1)
        if not len(rows):
            continue
        row_class, latents, exponents = packed.of_class(number)
        steps = code_steps(exponents, torch.float32) * powers[latents]
        yield _ClassCodes(
            name=f"weight_{number}" if number else "weight",
            packed=packed.weight,
            further=matrix.further_bytes(number) if number else None,
            rows=rows,
            row_class=row_class,
            latents=latents,
            codebook=packed.codebook,
            steps=steps.clamp_min(_TINY),
            scales=row_scales(packed.rows[rows]).unsqueeze(1),
            gains=(decoder_gains[latents] * steps.square()).clamp_min(_TINY),
        )


class _Rows(torch.autograd.Function):
    """Latents of codes, with a gradient for the floats that they were made of."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, floats: Tensor, shadow: LatentShadow) -> Tensor:
        ctx.shadow = shadow
        return latents.view_as(latents)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        ctx.shadow.forget()
        return None, grad, None


class _Product(torch.autograd.Function):
    """The product of states with the latents of codes, with a gradient for the floats of one class's codes."""

    @staticmethod
    def forward(
        ctx: Any, product: Tensor, states: Tensor, floats: Tensor, codes: _ClassCodes, shadow: LatentShadow
    ) -> Tensor:
        ctx.shadow, ctx.dtype = shadow, floats.dtype
        ctx.save_for_backward(states, codes.rows, codes.latents)
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None, None]:
        ctx.shadow.forget()
        if not ctx.needs_input_grad[2]:
            return grad, None, None, None, None
        states, rows, latents = ctx.saved_tensors
        of_class = grad.flatten(end_dim=-2)[:, rows].T.to(states.dtype)
        of_latents = of_class @ states.flatten(end_dim=-2)
        return grad, None, of_latents[:, latents].to(ctx.dtype), None, None


def _refuse_sharded(tensor: Any) -> None:
    if hasattr(tensor, "device_mesh"):
        raise ModelError(
            "packed codes that are sharded over processes cannot learn: call freeze_codes() before fully_shard, or "
            "train the whole model in each process (DDP)"
        )
