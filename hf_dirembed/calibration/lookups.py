"""The lookups of a model's tables while it runs on text: the rows that come out, before the model scales them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..remote.tables_dirembed import tied_modules
from ..tables import find_tables, num_blocks


@dataclass(frozen=True)
class LookupStatistics:
    """What calibration text says about a table that is looked up beside the input embedding.

    Attributes:
        counts: How often each row was read, (V,) float64; None for hashed (n-gram) tables, whose rows count alike.
        gradient_moment: E[g gᵀ] over reads, g the gradient of the loss at a row, float64: (blocks, width, width), one
            for each block of columns that is coded by itself, so that a wide per-layer table costs its blocks alone.
        num_reads: How many rows were read.
    """

    counts: Tensor | None
    gradient_moment: Tensor
    num_reads: int

    def moment(self, block: int) -> Tensor | None:
        """E[g gᵀ] of a block of columns, (width, width); None where nothing that the model computes depends on it."""
        moment = self.gradient_moment[block]
        return moment if moment.any() else None

    def __add__(self, other: LookupStatistics) -> LookupStatistics:
        total = self.num_reads + other.num_reads
        moment = self.num_reads * self.gradient_moment + other.num_reads * other.gradient_moment
        counts = None if self.counts is None or other.counts is None else self.counts + other.counts
        return LookupStatistics(counts, moment / max(total, 1), total)


@dataclass(frozen=True)
class FurtherTable:
    """A table that is looked up beside the input embedding.

    Attributes:
        name: Its path.
        modules: The modules that look it up.
        rows: V, whose reads are counted; None for a hashed table.
        dim: d.
        blocks: Blocks of columns that are coded by themselves.
    """

    name: str
    modules: tuple[nn.Module, ...]
    rows: int | None
    dim: int
    blocks: int

    @classmethod
    def all_of(cls, model: PreTrainedModel) -> list[FurtherTable]:
        """Those of a dense model; not those that share the weights of its input embedding."""
        embedding, found = model.get_input_embeddings(), []
        for table in find_tables(model):
            names = sorted(tied_modules(model, table.name))
            modules = tuple(each for name in names if isinstance(each := model.get_submodule(name), nn.Embedding))
            if table.tied_to is None and modules and embedding not in modules:
                rows = None if table.kind == "n-gram" else table.rows
                found.append(cls(table.name, modules, rows, table.dim, num_blocks(model, table)))
        return found

    def no_sums(self) -> dict[str, Tensor]:
        """Zeros, float64: what `sums` of batches are added to."""
        width = self.dim // self.blocks
        sums = {"gradient": torch.zeros(self.blocks, width, width), "reads": torch.zeros(1)}
        if self.rows is not None:
            sums["counts"] = torch.zeros(self.rows)
        return {name: zeros.double() for name, zeros in sums.items()}

    def sums(self, ids: Tensor, gradients: Tensor) -> dict[str, Tensor]:
        """The sums over reads of rows `ids`, (n,), with gradients (n, d)."""
        parts = gradients.detach().float().unflatten(-1, (self.blocks, -1)).movedim(1, 0)
        sums = {"gradient": (parts.mT @ parts).cpu().double(), "reads": torch.tensor([len(ids)]).double()}
        if self.rows is not None:
            sums["counts"] = torch.bincount(ids.cpu(), minlength=self.rows).double()
        return sums

    def statistics(self, sums: Mapping[str, Tensor]) -> LookupStatistics:
        """What the sums of all batches say."""
        reads = int(sums["reads"])
        return LookupStatistics(sums.get("counts"), sums["gradient"] / max(reads, 1), reads)


@dataclass
class RecordedLookups(TorchFunctionMode):
    """While it is active, rows that tables give are kept, and the graph is cut there, so that gradients end at them.

    What a module does with rows after that, as Gemma's scale or a norm, is part of the graph: gradients are those of
    the rows as the table holds them.

    Attributes:
        modules: The modules whose weights are the tables, by the name of the table.
        found: The lookups so far: the table's name, the ids, of any shape, and the rows, of that shape and d.
    """

    modules: Mapping[str, Sequence[nn.Module]]
    found: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Lets every function of torch do what it does, but for lookups in the tables."""
        result = func(*args, **(kwargs or {}))
        if func is F.embedding:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            for name, modules in self.modules.items():
                # the modules are asked each time: where a weight is offloaded, every pass has another object
                if any(module.weight is given["weight"] for module in modules):
                    result = result.detach().requires_grad_()
                    self.found.append((name, given["input"], result))
        return result
