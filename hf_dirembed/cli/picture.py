"""A picture of a compressed table: its spectrum, the bits of its latents, and cosines by token frequency."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.languages import card_languages
from ..calibration.token_weights import token_weights
from ..checkpoints.loading import load_model, load_tokenizer
from ..checkpoints.summary import TableSummary, inspect_checkpoint
from ..compression.subspace import eigenbasis, row_cosines, second_moment
from ..compression.table import Table
from ..errors import CheckpointError, ModelError, first_line
from ..remote.codes_dirembed import BIT_WIDTHS
from ..remote.matrix_dirembed import CompressedMatrix
from ..remote.tables_dirembed import TABLE_MODULES, locate_tables, table_at


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DENSE, _COMPRESSED = "#7a8793", "#1f6fb4"
_CLASSES = (_COMPRESSED, "#e08a1e", "#3f8f5f", "#a4508b")  # of rows, from the one that has most of them
_DEPTH = 1e-6  # of the strongest axis: what lies lower is rounding
_BINS = 60  # of token ranks, on a logarithmic axis
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class TableProfile:
    """What the picture shows.

    Attributes:
        summary: The summary of the compressed table.
        bits: (classes, rank) the bits of each latent, of the rows of each class.
        spectrum: (d,) the variance of the compressed rows along their principal axes, descending.
        dense_spectrum: (d,) the variance of the dense rows along theirs, descending; None without a reference.
        ranks: (bins,) the middle of each bin of tokens, by how often they are expected; None without a reference.
        cosines: (3, bins) the lowest tenth, the median and the highest tenth of the cosines in each bin.
        by_weights: Whether the ranks are by expected frequency, or by id where there is no tokenizer.
    """

    summary: TableSummary
    bits: Tensor
    spectrum: Tensor
    dense_spectrum: Tensor | None = None
    ranks: Tensor | None = None
    cosines: Tensor | None = None
    by_weights: bool = False

    @classmethod
    @torch.no_grad()
    def of_checkpoint(cls, folder: Path, reference: Path | None = None) -> TableProfile:
        """Reads a compressed checkpoint, and the dense one that it is compared with.

        Raises:
            CheckpointError: If one cannot be loaded, or the reference's table has another shape.
            ModelError: If the folder holds no compressed checkpoint.
        """
        model = load_model(folder)
        tables = {table.name: table for table in inspect_checkpoint(folder).tables if table.blocks == 1}
        if not tables:
            raise ModelError(f"{folder} has no compressed table of one block to draw: compress it first")
        summary = tables[_drawn_table(model, tables)]

        matrix = table_at(model, summary.name)
        assert isinstance(matrix, CompressedMatrix)
        compressed = matrix.dense_weight()
        profile = cls(summary, _bits(matrix), _spectrum(compressed))
        if reference is None:
            return profile

        # the same table in the dense checkpoint
        base = load_model(reference)
        place = locate_tables(base, [summary.name]).get(summary.name)
        module = None if place is None else base.get_submodule(place)
        if isinstance(module, TABLE_MODULES):
            raise CheckpointError(f"{reference} is compressed itself: name the dense model")
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            raise CheckpointError(f"{reference} has no dense {summary.name}: name the dense model")

        dense = module.weight
        if dense.shape != compressed.shape:
            raise CheckpointError(
                f"the table of {reference} is {list(dense.shape)}, that of {folder} {list(compressed.shape)}: "
                "name the model that it was made from"
            )

        # the most frequent tokens first, where a tokenizer tells which these are
        tokenizer = load_tokenizer(folder) or load_tokenizer(reference)
        order = torch.arange(len(dense))
        if tokenizer is not None:
            weights = token_weights(tokenizer, len(dense), languages=card_languages(reference) or None)
            order = weights.argsort(descending=True, stable=True)
        ranks, cosines = _binned(row_cosines(dense.float(), compressed.float())[order])
        return cls(summary, profile.bits, profile.spectrum, _spectrum(dense), ranks, cosines, tokenizer is not None)


def _drawn_table(model: PreTrainedModel, names: Iterable[str]) -> str:
    """The input embedding, where it is among the tables; else the first of them."""
    embedding = model.get_input_embeddings()
    return next((name for name in names if model.get_submodule(name) is embedding), next(iter(names)))


def require_matplotlib() -> None:
    """Raises `ModelError` unless matplotlib is installed, which only pictures need."""
    if find_spec("matplotlib") is None:
        raise ModelError("a picture needs matplotlib: pip install 'hf_dirembed[plot]'")


def save_picture(profile: TableProfile, file: Path) -> None:
    """Draws a profile into an image file, of the format that its name ends in.

    Raises:
        ModelError: If matplotlib is not installed.
        CheckpointError: If the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels = 2 if profile.cosines is None else 3
    figure = Figure(figsize=(4.6 * panels, 3.9), layout="constrained")
    axes = figure.subplots(1, panels)
    _draw_spectrum(axes[0], profile)
    _draw_bits(axes[1], profile)
    if profile.cosines is not None:
        _draw_cosines(axes[2], profile)

    summary = profile.summary
    size = f"{summary.num_embeddings:,} x {summary.embedding_dim:,}"
    figure.suptitle(f"{size} in {summary.bits_per_weight:.2f} bits per weight ({summary.method})", fontsize=12)

    image = BytesIO()  # first whole in memory: no half of a picture is ever written
    try:
        figure.savefig(image, format=file.suffix.lower().removeprefix(".") or "png", dpi=150)
        file.write_bytes(image.getvalue())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written ({error.strerror or error}): name another file") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {first_line(error)}: name a .png, .svg or .pdf file") from error


def _spectrum(rows: Tensor) -> Tensor:
    table = Table(rows)
    mean = rows.double().mean(dim=0)
    values, _ = eigenbasis(second_moment(table) / table.num_rows - torch.outer(mean, mean))
    return values.clamp_min(0)


def _bits(matrix: CompressedMatrix) -> Tensor:
    """The bits of each latent, (classes, rank): summed over the codes that add to it, from the fewest bytes on."""
    if not matrix.layout.packed:
        return torch.full((1, matrix.layout.rank), 8 * matrix.weight.element_size())
    rows, found = matrix.packed_rows(), []
    for number, each in enumerate(rows.classes):
        widths = torch.tensor(BIT_WIDTHS).repeat_interleave(torch.tensor(each.bit_allocation))
        _, latents, _ = rows.of_class(number)
        found.append((each.num_bytes, torch.zeros(rows.rank, dtype=torch.int64).index_add(0, latents, widths)))
    return torch.stack([bits for _, bits in sorted(found, key=lambda each: each[0])])


def _binned(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles of cosines, given in order of falling frequency, in bins that widen with the rank."""
    edges = torch.logspace(0, torch.log10(torch.tensor(float(len(cosines)))).item(), _BINS).round().long().unique()
    edges = torch.cat([edges[edges < len(cosines)], torch.tensor([len(cosines) + 1])])
    ranks, quantiles = [], []
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        found = cosines[first - 1 : last - 1]
        found = found[found.isfinite()]
        if len(found):
            ranks.append((first * (last - 1)) ** 0.5)
            quantiles.append(found.double().quantile(torch.tensor(_QUANTILES, dtype=torch.float64)))
    return torch.tensor(ranks), torch.stack(quantiles, dim=1) if quantiles else torch.empty(3, 0)


def _draw_spectrum(axes: Axes, profile: TableProfile) -> None:
    axes.set_title("Spectrum", fontsize=11)
    numbers = range(1, len(profile.spectrum) + 1)
    whole = profile.spectrum if profile.dense_spectrum is None else profile.dense_spectrum
    total = whole.sum().clamp_min(1e-300)
    if profile.dense_spectrum is not None:
        axes.plot(numbers, profile.dense_spectrum / total, color=_DENSE, lw=2.2, label="dense")
    axes.plot(numbers, profile.spectrum / total, color=_COMPRESSED, lw=1.5, label="compressed")
    if whole.any():
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(float(whole.min() / total) / 3, float(whole.max() / total) * _DEPTH))
    _label(axes, "principal axis", f"share of the {'' if profile.dense_spectrum is None else 'dense '}variance")
    axes.legend(frameon=False)


def _draw_bits(axes: Axes, profile: TableProfile) -> None:
    axes.set_title("Bits of the latents", fontsize=11)
    dim, num_rows = profile.summary.embedding_dim, profile.summary.num_embeddings
    labels = [f"{each.rows / num_rows:.0%} of the rows" for each in profile.summary.classes]
    if len(labels) < 2:
        labels = ["every row"]
    for bits, color, label in zip(profile.bits.tolist(), _CLASSES, labels, strict=False):
        axes.stairs([*bits, *[0] * (dim - len(bits))], range(dim + 1), color=color, lw=1.8, label=label)

    axes.set_xlim(0, dim)
    axes.set_ylim(0, max(1, int(profile.bits.max())) * 1.25)
    axes.set_yticks(sorted({0, *profile.bits.unique().tolist()}))
    _label(axes, f"latent, of {dim:,} dimensions", "bits")
    axes.legend(frameon=False)


def _draw_cosines(axes: Axes, profile: TableProfile) -> None:
    assert profile.cosines is not None
    assert profile.ranks is not None
    axes.set_title("Cosine of a row and what replaces it", fontsize=11)
    low, middle, high = profile.cosines
    axes.fill_between(profile.ranks, low, high, color=_COMPRESSED, alpha=0.18, lw=0, label="the middle 80 %")
    axes.plot(profile.ranks, middle, color=_COMPRESSED, lw=1.8, label="median")
    axes.set_xscale("log")
    axes.set_ylim(min(0.5, float(low.min()) - 0.05) if low.numel() else 0, 1.01)
    _label(axes, "token, from the most expected" if profile.by_weights else "token id", "cosine")
    axes.legend(frameon=False, loc="lower left")


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
