"""How a budget is spent: which rows are of which class, the bits of each class, and how the decoder is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...remote.codes_dirembed import MAX_CLASSES
from ..row_weights import RowWeights, Sample
from .allocation import CODE_ENTRY_BYTES, Allocation, RowsByShare, class_count_bytes
from .decoder import DecoderStorage
from .quantisation import Quantisers


# Where, in the order of their shares, rows may be cut into classes.
_CUTS = (0.005, 0.01, 0.02, 0.035, 0.06, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.65, 0.8)
_TYPICAL_ROWS = 32  # of the sample, which say as much as what all rows say of a part
_RANKS = 24  # numbers of latents to try, from all that there are to a fraction of them
_RANK_STEP = 0.85
_PATIENCE = 2  # ranks that may be worse, one after the other, before the search ends


@dataclass(frozen=True)
class ByteBudget:
    """The bytes that codes and decoder of a table may take.

    Attributes:
        num_bytes: The most.
        num_rows: V.
        dim: d.
        storage: How the decoder is stored.
    """

    num_bytes: int
    num_rows: int
    dim: int
    storage: DecoderStorage

    def decoder_bytes(self, rank: int) -> int:
        """Bytes of a decoder of so many latents."""
        return self.storage.num_bytes(rank, self.dim)

    def left_by(self, plan: Plan) -> int:
        """The bytes that decoder and codes leave, what is stored of the classes counted."""
        entries = CODE_ENTRY_BYTES * sum(each.num_codes for each in plan.allocations)
        num_rows = [self.num_rows] if len(plan.allocations) == 1 else plan.num_rows
        codes = sum(rows * each.num_bytes for rows, each in zip(num_rows, plan.allocations, strict=True))
        held = self.decoder_bytes(plan.rank) + entries + class_count_bytes(self.num_rows, len(plan.allocations))
        return self.num_bytes - codes - held


@dataclass(frozen=True)
class Plan:
    """The classes of rows and their bits.

    Attributes:
        allocations: The bits of the latents of each class; those of the first class are the fewest bytes.
        row_class: (n,) uint8, the class of each row that was planned from.
        rank: How many latents have bits in any class.
        error: What the quantisers promise.
    """

    allocations: tuple[Allocation, ...]
    row_class: Tensor
    rank: int
    error: float

    @property
    def num_rows(self) -> list[int]:
        """How many of these rows are of each class."""
        counts: list[int] = torch.bincount(self.row_class.long(), minlength=len(self.allocations)).tolist()
        return counts


@dataclass(frozen=True)
class Spectrum:
    """What a plan is made from.

    Attributes:
        importance: What an error of each row counts.
        sample: Rows that stand for all.
        latents: (n, dim) those of the sample, on the principal axes, about the mean.
        scales: (n,) of the rows of the sample.
        variances: (dim,) the weighted variance of each latent over all rows, descending.
        quantisers: What bits make of them.
    """

    importance: RowWeights
    sample: Sample
    latents: Tensor
    scales: Tensor
    variances: Tensor
    quantisers: Quantisers

    def by_share(self, *, whole: bool) -> RowsByShare:
        """The rows in the order of their shares, cut into parts; or as one part.

        The variances of a part are those of its sampled rows, and a little of what all rows have.
        """
        order, num_rows = self.importance.order, len(self.importance.order)
        cuts = () if whole else _CUTS
        edges = torch.tensor([0, *(int(cut * num_rows) for cut in cuts), num_rows]).unique()
        ranks = torch.empty_like(order).index_copy_(0, order, torch.arange(num_rows, device=order.device))
        part = torch.bucketize(ranks[self.sample.numbers].cpu(), edges[1:], right=True)

        # sums over the sampled rows of each part, and how many these are
        parts, omega = len(edges) - 1, self.sample.omega.double().cpu().unsqueeze(1)
        squares = omega * self.latents.double().cpu().square()
        sums = torch.zeros(parts, squares.shape[1], dtype=torch.float64).index_add_(0, part, squares)
        rows = torch.bincount(part, minlength=parts).double().unsqueeze(1)

        # what they would be if all parts were alike but for their shares
        share = self._sums(self.importance.share, edges).unsqueeze(1)
        usual = share * self.variances.double().cpu().clamp_min(0) * float(self.importance.omega.sum())
        variances = (rows * sums + _TYPICAL_ROWS * usual) / (rows + _TYPICAL_ROWS)
        return RowsByShare(edges, variances)

    def deviations(self, plan: Plan) -> list[Tensor]:
        """The standard deviation of each latent of a plan, over the rows' scales, in rows of each class: (rank,) each.

        An error counts by its row's weight and the square of its scale.
        """
        found, classes = [], plan.row_class[self.sample.numbers]
        weights = (self.sample.omega * self.scales.square()).unsqueeze(1)
        squares = self.sample.omega.unsqueeze(1) * self.latents.square()
        usual = squares.sum(dim=0) / weights.sum()
        for number in range(len(plan.allocations)):
            sampled = classes == number
            rows, total = int(sampled.sum()), weights[sampled].sum()
            own = squares[sampled].sum(dim=0) / total if total else usual
            variances = (rows * own + _TYPICAL_ROWS * usual) / (rows + _TYPICAL_ROWS)
            found.append(variances[: plan.rank].clamp_min(0).sqrt())
        return found

    def _sums(self, values: Tensor, edges: Tensor) -> Tensor:
        """(parts,) sums over the rows of each part."""
        return torch.stack([part.sum() for part in values[self.importance.order].cpu().tensor_split(edges[1:-1])])


def plan_classes(spectrum: Spectrum, room: ByteBudget, rounding: Tensor, *, most: int = MAX_CLASSES) -> Plan | None:
    """Spends all bytes to the least error that the quantisers promise.

    More latents want a larger decoder, whose bytes the codes lack: so several numbers of latents are tried.

    Args:
        spectrum: What the rows are like.
        room: The bytes for codes and decoder.
        rounding: (dim,) the error that storing the decoder adds, of each latent, relative to the weights' sum.
        most: How many classes there may be.

    Returns:
        The best plan; None if not even one byte a row and its decoder fit.
    """
    rows, left = spectrum.by_share(whole=most == 1), spectrum.quantisers.left.cpu()
    rounded = rounding.double().cpu().cumsum(dim=0) * float(spectrum.importance.omega.sum())
    best: Plan | None = None
    worse, rank = 0, room.dim
    for _ in range(_RANKS):
        found = _with_rank(rows, spectrum.importance, room, left, rank, most)
        if found is not None:
            found = replace(found, error=found.error + float(rounded[rank - 1]))
            best, worse = (found, 0) if best is None or found.error < best.error else (best, worse + 1)
        if worse == _PATIENCE or rank == 1:
            break
        rank = max(1, min(rank - 1, int(rank * _RANK_STEP)))
    return best if best is None else _filled(best, spectrum.importance, room)


def _with_rank(
    rows: RowsByShare, importance: RowWeights, room: ByteBudget, left: Tensor, rank: int, most: int
) -> Plan | None:
    """The best plan with so many latents."""
    segments = rows.segments(rank, left, room.num_rows)
    found = segments.best_classes(room.num_bytes - room.decoder_bytes(rank), most, forbidden=room.dim)
    if found is None:
        return None
    error, classes = found

    # The class with the fewest bytes is the first.
    numbered = sorted(classes, key=lambda each: each[1])
    row_class = torch.zeros_like(importance.order, dtype=torch.uint8)
    for number, (segment, _) in enumerate(numbered):
        begin, end = (int(rows.edges[each[segment]]) for each in (segments.begins, segments.ends))
        row_class[importance.order[begin:end]] = number
    return Plan(tuple(segments.gains.allocation(*each) for each in numbered), row_class, rank, error)


def _filled(plan: Plan, importance: RowWeights, room: ByteBudget) -> Plan:
    """Spends what a plan leaves: the most important rows of a class move up to the class of the rows before them."""
    left = room.left_by(plan)
    sizes = [each.num_bytes for each in plan.allocations]
    in_order = plan.row_class[importance.order].long()
    steps = [
        (sizes[above] - sizes[below], below, above)
        for above, below in torch.unique_consecutive(in_order).unfold(0, 2, 1).tolist()
        if sizes[above] > sizes[below]
    ] if len(sizes) > 1 else []  # fmt: skip
    for further, below, above in sorted(steps, reverse=True):
        rows = importance.order[(in_order == below).nonzero().squeeze(1)[: left // further]]
        rows = rows[plan.row_class[rows] == below]
        plan.row_class[rows] = above
        left -= further * len(rows)
        in_order = plan.row_class[importance.order].long()
    return plan
