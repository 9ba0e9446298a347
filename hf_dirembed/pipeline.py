"""A model and a request → the compressed model: its tables, what their errors cost, their bytes, their codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .calibration.calibrated import Calibration
from .calibration.costs import table_costs
from .calibration.head_norm import implied_hessian
from .calibration.token_weights import token_weights as weights_of_tokens
from .compression.budget import Budget
from .compression.coded import CodedTable
from .compression.compress import WEIGHING, fit_table, shows_progress, warn_of_shortened
from .compression.demand import demand_of
from .compression.distortion import Measure
from .compression.row_files import TableFiles, memory_sink
from .compression.sharing import share_bytes
from .compression.table import Columns, RowSource, Table
from .compression.work import table_work
from .conversion import convert
from .errors import BudgetError, ModelError, OptionError
from .hub.metadata import hub_id
from .progress import progress_bar
from .remote.codes_dirembed import BlocksLayout, CompressionSpec, Layout, TableRecord
from .request import CompressionRequest, whole_bytes
from .tables import VocabularyTable, choose_tables, find_tables, is_head, match_name, num_blocks


logger = logging.get_logger(__name__)

_BLOCK_BYTES = torch.int32.itemsize  # of the width of each block, which is stored beside them


def compress_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    request: CompressionRequest,
    files: TableFiles | None = None,
) -> PreTrainedModel:
    """Does what [`compress`] was asked for.

    Args:
        model: Changed in place.
        tokenizer: The model's.
        request: What was asked for.
        files: Where the rows of each table are, where the model is on the meta device and so does not hold them.

    Raises:
        DirEmbedError: Where [`compress`] raises one.
    """
    _check_kinds(model, tokenizer)
    if request.language_tags and tokenizer is None:
        raise OptionError(
            f"languages={request.languages!r} says which words are frequent, and it takes a tokenizer to find their "
            "tokens: pass the model's, or leave languages out"
        )
    chosen = choose_tables(model, request.names)
    if request.names is None:
        for table in find_tables(model):
            if table.refusal is not None:
                logger.warning(f"the table {table.name} stays dense: {table.refusal}")

    if request.hessian is not None and len(chosen) > 1:
        names = ", ".join(table.name for table in chosen)
        raise OptionError(f"hessian is of one table, and the model has several ({names}): name one with tables=")

    used = _calibrate(model, tokenizer, request)
    matrices = [matrix for table in chosen for matrix in _matrices_of(model, table, files)]
    measured = [
        matrix
        for table in chosen
        for matrix in _measured(model, tokenizer, request, used, [each for each in matrices if each.table is table])
    ]
    budgeted = _with_budgets(model, request, used, measured)

    named = chosen[0].name if len(chosen) == 1 else f"{len(chosen)} tables"
    work = [table_work(*matrix.shape) for matrix in budgeted]
    with progress_bar(f"Fitting {named}", sum(work), shown=shows_progress(request.method)) as progress:
        coded = [
            fit_table(
                matrix.rows, matrix.checked_budget, request.options, matrix.measure, padding_idx=matrix.padding_idx,
                resume=None if used is not None else request.resume,
                make_sink=memory_sink if files is None else files.make_sink(matrix.path),
                progress=progress.part(of_matrix),
            )
            for matrix, of_matrix in zip(budgeted, work, strict=True)
        ]  # fmt: skip
    for each in coded:
        warn_of_shortened(each.record)

    return _put_into(model, request, used, budgeted, coded)


def _check_kinds(model: object, tokenizer: object) -> None:
    """Refuses what is no model, such as the name of one.

    Raises:
        ModelError: If the model is none of transformers'.
        OptionError: If the tokenizer is none.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{model!r:.80} is no transformers model: load one with from_pretrained")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OptionError(f"tokenizer={tokenizer!r:.80} is none: load one with AutoTokenizer.from_pretrained")


@dataclass(frozen=True)
class _Matrix:
    """A table to be coded, or a block of its columns.

    Attributes:
        table: The table that it is, or is a block of.
        path: The path of the module that holds its codes.
        rows: Its rows.
        block: Which of several blocks of columns it is; None if it is the whole table.
        padding_idx: The row of the padding token.
        measure: What errors of its rows cost, relative to one another.
        budget: What may replace it.
        total_budget: What it shares with others.
    """

    table: VocabularyTable
    path: str
    rows: RowSource
    block: int | None
    padding_idx: int | None
    measure: Measure = field(default_factory=Measure)
    budget: Budget | None = None
    total_budget: Budget | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """V and d."""
        num_rows, dim = self.rows.shape
        return num_rows, dim

    @property
    def checked_budget(self) -> Budget:
        """The budget, once it is known."""
        assert self.budget is not None
        return self.budget

    @property
    def num_weights(self) -> int:
        """V x d."""
        return self.shape[0] * self.shape[1]


def _matrices_of(model: PreTrainedModel, table: VocabularyTable, files: TableFiles | None) -> list[_Matrix]:
    """A table as what is coded: as a whole, or, of a per-layer table, a block for each layer."""
    module: Any = model.get_submodule(table.name)
    rows: RowSource = module.weight.data if files is None else files.rows[table.name]
    padding_idx = getattr(module, "padding_idx", None)
    block = table.dim // num_blocks(model, table)
    if block == table.dim:
        return [_Matrix(table, table.name, rows, None, padding_idx)]
    starts = range(0, table.dim, block)
    if files is None:
        blocks: list[RowSource] = [Columns(rows, start, start + block) for start in starts]
    else:
        blocks = [*files.blocks(table.name, [block] * len(starts))]
    return [
        _Matrix(table, f"{table.name}.blocks.{number}", each, number, padding_idx)
        for number, each in enumerate(blocks)
    ]


def _calibrate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, request: CompressionRequest
) -> Calibration | None:
    if request.calibration is None or isinstance(request.calibration, Calibration):
        return request.calibration
    return Calibration.of(model, tokenizer, request.calibration, request.languages, resume=request.resume)


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    request: CompressionRequest,
    used: Calibration | None,
    matrices: list[_Matrix],
) -> list[_Matrix]:
    """Says what errors of a table cost, to the table or to each of its blocks of columns."""
    table, tempering = matrices[0].table, request.options.tempering
    hashed = table.kind == "n-gram"  # whose rows count alike
    seen = used is not None and table.name in used.statistics.further
    if request.method not in WEIGHING or (hashed and not seen):
        return [replace(matrix, measure=Measure(tempering=tempering)) for matrix in matrices]

    weights = None if hashed else request.token_weights
    if weights is None and tokenizer is not None and used is not None:
        weights = used.weights(model, tokenizer, table.name, request.languages)
    elif weights is None and tokenizer is not None:
        weights = weights_of_tokens(tokenizer, table.rows, languages=request.languages)

    if request.method == "transform" and request.hessian is None and used is not None:
        hessians = [used.hessian(model, table.name, matrix.block or 0) for matrix in matrices]
        measures = [Measure(weights, hessian, tempering) for hessian in hessians]
    elif request.method == "transform" and request.hessian is None and is_head(model, table.name):
        # along which directions errors matter, but not in which rows
        measures = [Measure(weights, implied_hessian(model, table.name), tempering, relative=True)]
    else:
        measures = [Measure(weights, request.hessian, tempering)] * len(matrices)
    return [replace(matrix, measure=measure) for matrix, measure in zip(matrices, measures, strict=True)]


def _with_budgets(
    model: PreTrainedModel, request: CompressionRequest, used: Calibration | None, matrices: list[_Matrix]
) -> list[_Matrix]:
    """Says what may replace each matrix: a share of the bytes of all, or of its table where bits are by name."""
    if request.rank is not None:
        return [replace(matrix, budget=Budget(rank=request.rank)) for matrix in matrices]
    if not isinstance(request.bits, Mapping):
        return _share(model, request, used, matrices, Budget(request.bits, request.ratio))

    names = {table.name: table for table in find_tables(model)}
    told: dict[str, Budget] = {}
    for name, bits in request.bits.items():
        table = names[match_name(name, names)]
        source = table.tied_to or table.name
        if source in told:
            raise OptionError(f"{name!r} in bits= names a table that shares the weights of another there: name one")
        told[source] = Budget(bits)

    shares = []
    for source, budget in told.items():
        of_table = [matrix for matrix in matrices if matrix.table.name == source]
        shares += _share(model, request, used, of_table, budget)
    return shares


def _share(
    model: PreTrainedModel,
    request: CompressionRequest,
    used: Calibration | None,
    matrices: list[_Matrix],
    total: Budget,
) -> list[_Matrix]:
    """Shares the bytes of some matrices between them, by what their errors cost."""
    if len(matrices) == 1:
        return [replace(matrices[0], budget=total)]

    num_weights = sum(matrix.num_weights for matrix in matrices)
    dense = sum((matrix.rows.dtype or torch.float32).itemsize * matrix.num_weights for matrix in matrices)
    bits = total.bits or 8 * dense / num_weights / (total.ratio or 1)
    if bits * num_weights >= 8 * dense:
        raise BudgetError(
            f"{total} makes nothing smaller: the tables take {8 * dense / num_weights:.3g} bits per weight as they "
            "are; ask for fewer bits, or a ratio above 1"
        )

    device = request.options.fitting_device()
    tables = [(matrix.table.name, matrix.block or 0, Table(matrix.rows, device=device)) for matrix in matrices]
    demands = []
    with progress_bar("Measuring tables", num_weights) as progress:
        for matrix, cost in zip(matrices, table_costs(model, tables, used), strict=True):
            asked = demand_of(matrix.rows, matrix.measure, name=matrix.table.name, cost=cost, options=request.options)
            demands.append(asked)
            progress.advance(matrix.num_weights)

    widths = _BLOCK_BYTES * sum(matrix.block is not None for matrix in matrices)
    shares = share_bytes(demands, whole_bytes(bits, num_weights), reserved=widths)
    return [
        replace(matrix, budget=Budget(num_bytes=num_bytes), total_budget=total)
        for matrix, num_bytes in zip(matrices, shares, strict=True)
    ]


def _put_into(
    model: PreTrainedModel,
    request: CompressionRequest,
    used: Calibration | None,
    matrices: list[_Matrix],
    coded: list[CodedTable],
) -> PreTrainedModel:
    """Turns a model into the compressed one of coded tables."""
    made_with = {
        "base_model": request.base_model or hub_id(model.name_or_path),
        "languages": request.language_tags,
        "calibration": None if used is None else used.source,
        "calibration_tokens": None if used is None else used.statistics.num_tokens,
    }

    by_table: dict[str, list[CodedTable]] = {}
    for matrix, each in zip(matrices, coded, strict=True):
        by_table.setdefault(matrix.table.name, []).append(each)

    layouts: dict[str, Layout] = {}
    records: dict[str, TableRecord] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    blocks = {matrix.table.name for matrix in matrices if matrix.block is not None}
    for name, parts in by_table.items():
        layouts[name], tensors[name], records[name] = _joined(parts) if name in blocks else _alone(parts[0])
        told = {key: value for key, value in {**_budgets_of(name, matrices), **made_with}.items() if value}
        records[name] = replace(records[name], settings={**records[name].settings, **told})

    return convert(model, CompressionSpec(layouts, records), tensors)


def _budgets_of(name: str, matrices: list[_Matrix]) -> dict[str, str]:
    """What was asked for, and the share of it that a table got, all its blocks together; nothing if it is all."""
    of_table = [matrix for matrix in matrices if matrix.table.name == name]
    total = of_table[0].total_budget
    if total is None:
        return {}
    widths = _BLOCK_BYTES * sum(matrix.block is not None for matrix in of_table)
    own = Budget(num_bytes=widths + sum(matrix.checked_budget.num_bytes or 0 for matrix in of_table))
    return {"budget": str(total), "table_budget": str(own)}


def _alone(coded: CodedTable) -> tuple[Layout, dict[str, Tensor], TableRecord]:
    return coded.layout, coded.tensors, coded.record


def _joined(blocks: list[CodedTable]) -> tuple[Layout, dict[str, Tensor], TableRecord]:
    """The layout, tensors and record of a table that was coded in blocks of columns."""
    dims = tuple(block.tensors["decoder_weight"].shape[1] for block in blocks)
    tensors = {f"blocks.{n}.{name}": each for n, block in enumerate(blocks) for name, each in block.tensors.items()}
    tensors["weight"] = torch.tensor(dims, dtype=torch.int32)
    quality: dict[str, Any] = {}
    for name in blocks[0].record.quality:
        values = [value for block in blocks if (value := block.record.quality.get(name)) is not None]
        if len(values) == len(blocks):
            total = sum(values)
            quality[name] = total if isinstance(total, int) else round(total / len(values), 6)
    return (
        BlocksLayout(dims, tuple(block.layout for block in blocks)),
        tensors,
        TableRecord(blocks[0].record.settings, quality),
    )
