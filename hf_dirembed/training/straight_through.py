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
from ..remote.codes_dirembed import BIT_WIDTHS
from ..remote.kernels_dirembed import HALF, pack, unpack_levels
from ..remote.matrix_dirembed import DENSE_CHUNK, find_slots


if TYPE_CHECKING:
    from ..remote.matrix_dirembed import CompressedMatrix


_TINY = torch.finfo(torch.float32).tiny


class LatentShadow(nn.Module):
    """Float latents that learn in place of a matrix's packed codes, which follow them.

    They are in the unit that the decoder multiplies, half-integers times their powers of two, and start at what the
    codes stand for. Passes see the codes, brought up to date before, so they are always those of what a save holds;
    gradients reach the floats as if there were no quantiser. A state dict has the codes alone, and what is loaded
    into them the floats take over.

    It is a part of every matrix that shares the codes, and knows none of them: they pass themselves.

    Args:
        matrix: Whose codes shall learn.

    Raises:
        ModelError: If the codes are sharded or not in memory.
    """

    weight: nn.Parameter
    refinement_weight: nn.Parameter | None

    def __init__(self, matrix: CompressedMatrix) -> None:
        if matrix.weight.is_meta:
            raise ModelError("these packed codes are not in memory: load the model without offloading to train them")
        _refuse_sharded(matrix.weight)
        super().__init__()
        self.refinement_weight = None
        self._written: tuple[int, ...] | None = None
        self.follow(matrix)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_sharded(value)  # here, as `fully_shard` tells no module what it does, but puts its parameters there
        super().__setattr__(name, value)

    @torch.no_grad()
    def follow(self, matrix: CompressedMatrix) -> None:
        """Takes over what the codes stand for, in place where the shapes are still the same."""
        for stage in _stages(matrix):
            parts = torch.arange(len(stage.codes), device=stage.codes.device).split(DENSE_CHUNK)
            latents = torch.cat([stage.read(stage.codes[rows], matrix.dtype) for rows in parts])
            mine = getattr(self, stage.name, None)
            if mine is not None and (mine.shape, mine.dtype, mine.device) == (
                latents.shape,
                latents.dtype,
                latents.device,
            ):
                mine.copy_(latents)
            else:
                setattr(self, stage.name, nn.Parameter(latents, requires_grad=mine is None or mine.requires_grad))
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
        for stage in _stages(matrix):
            for part in stage.slots(ids).split(DENSE_CHUNK):
                stage.write(part, getattr(self, stage.name)[part])
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
        mine = F.embedding(ids, self.weight)
        if matrix.refined_rows_weight is not None and self.refinement_weight is not None:
            slots, refined = find_slots(matrix.refined_rows_weight, ids, len(self.weight))
            mine = matrix.refine(mine, F.embedding(slots, self.refinement_weight) * refined.unsqueeze(-1))
        rows: Tensor = _Rows.apply(latents, mine, self)
        return rows

    @torch.compiler.disable
    def carry_product_gradients(self, product: Tensor, states: Tensor, name: str) -> Tensor:
        """Gives a product of states with the latents of all rows back, but so that its gradient reaches the floats.

        Args:
            product: (..., V), or of the refined rows alone.
            states: (..., rank) what was multiplied.
            name: What the codes are called in their matrix.
        """
        carried: Tensor = _Product.apply(product, states, getattr(self, name), self)
        return carried

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())

    def _save_to_state_dict(self, *_: Any) -> None:
        """Saves nothing: the codes say what there is to say."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Misses nothing: the matrix lets it follow its codes."""


@dataclass(frozen=True)
class _Stage:
    """The codes of one of a matrix's stages.

    Attributes:
        name: What the codes are called in the matrix, and their floats here.
        codes: (slots, bytes per row) uint8.
        rows: (slots,) which rows of the matrix have them, ascending; None if all do.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.
        codebook: (3, 256) int8.
        steps: (rank,) what a latent's 1 is.
        gains: (rank,) what the squared error of a latent, in steps, makes of the row's.
    """

    name: str
    codes: Tensor
    rows: Tensor | None
    bit_allocation: tuple[int, ...]
    codebook: Tensor
    steps: Tensor
    gains: Tensor

    def slots(self, ids: Tensor | None) -> Tensor:
        """Where the codes of rows of the matrix are, each row once; by default those of all rows."""
        if ids is None:
            return torch.arange(len(self.codes), device=self.codes.device)
        if self.rows is None:
            return ids.unique()
        return torch.isin(self.rows, ids.to(self.rows.dtype)).nonzero().squeeze(1)

    def read(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What packed rows stand for, (n, rank)."""
        return unpack_levels(codes, self.bit_allocation, self.codebook, dtype) * self.steps.to(dtype)

    def write(self, slots: Tensor, latents: Tensor) -> None:
        """Quantises latents, (n, rank); those that are what their codes stand for already stay as they are."""
        if not latents.isfinite().all():
            raise ModelError(
                "the latents that learn are no longer finite, their training diverged: lower the learning rate and "
                "take it up from the last checkpoint"
            )

        moved = (latents != self.read(self.codes[slots], latents.dtype)).any(dim=1)
        slots, targets = slots[moved], latents[moved].float() / self.steps.clamp_min(_TINY)
        if not len(slots):
            return

        symbols, first, book = [], 0, self.codebook.float() + HALF
        for count, width in zip(self.bit_allocation, BIT_WIDTHS, strict=True):
            section, first = slice(first, first + count), first + count
            if count:
                symbols.append(quantise(targets[:, section], self.gains[section], book, width)[0])

        packed = pack(torch.cat(symbols, dim=1), self.bit_allocation)
        changed = (packed != self.codes[slots]).any(dim=1)
        if changed.any():  # a write makes a head expand the codes anew
            self.codes[slots[changed]] = packed[changed]


def _stages(matrix: CompressedMatrix) -> Iterator[_Stage]:
    """The stages of a matrix of packed codes."""
    layout, codebook, exponents = matrix.layout, matrix.codebook_weight, matrix.exponent_weight
    assert layout.bit_allocation is not None
    assert codebook is not None
    assert exponents is not None

    steps = torch.exp2(exponents.float())
    gains, base = (matrix.decoder_weight.float() * steps.unsqueeze(1)).square().sum(dim=1), slice(layout.base_rank)
    yield _Stage(
        "weight", matrix.weight, None, layout.bit_allocation, codebook, steps[base], gains[base].clamp_min(_TINY)
    )

    if layout.refinement is not None and (codes := matrix.refinement_weight) is not None:
        assert matrix.refined_latents_weight is not None
        rows, allocation = matrix.refined_rows_weight, layout.refinement.bit_allocation
        named, further = matrix.refined_latents_weight.long(), matrix.refinement_steps(torch.float32)
        yield _Stage(
            "refinement_weight",
            codes,
            rows,
            allocation,
            codebook,
            steps[named] * further,
            (gains[named] * further.square()).clamp_min(_TINY),
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
    """The product of states with the latents of codes, with a gradient for the floats that these were made of."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, states: Tensor, floats: Tensor, shadow: LatentShadow) -> Tensor:
        ctx.shadow, ctx.dtype = shadow, floats.dtype
        ctx.save_for_backward(states)
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        ctx.shadow.forget()
        if not ctx.needs_input_grad[2]:
            return grad, None, None, None
        (states,) = ctx.saved_tensors
        mine = grad.flatten(end_dim=-2).T.to(states.dtype) @ states.flatten(end_dim=-2)
        return grad, None, mine.to(ctx.dtype), None


def _refuse_sharded(tensor: Any) -> None:
    if hasattr(tensor, "device_mesh"):
        raise ModelError(
            "packed codes that are sharded over processes cannot learn: call freeze_codes() before fully_shard, or "
            "train the whole model in each process (DDP)"
        )
