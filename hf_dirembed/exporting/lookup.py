"""A compressed table -> the nodes that look its rows up in ONNX."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ExportError
from ..remote.codes_dirembed import MAX_CLASSES
from ..remote.guarded_dirembed import plain
from ..remote.matrix_dirembed import CompressedMatrix
from ..remote.modules_dirembed import CompressedBlocks, CompressedEmbedding
from .graph import GraphPart
from .packed import STATES, RowStream, Slots


Lookup: TypeAlias = CompressedEmbedding | CompressedBlocks


def add_lookup(part: GraphPart, table: Lookup, ids: str) -> str:
    """Adds what looks rows of a table up, decoding those rows only, and gives the name of the rows.

    What depends on no token id are small tables that the file holds in short and that runtimes compute once, when they
    load it. Codes are read by token ids, so they stay the packed bytes that they are.

    Args:
        part: Where to add it.
        table: The table.
        ids: The name of the token ids, (batch, length) int64.

    Returns:
        The name of the rows, (batch, length, dim) float32, unscaled.

    Raises:
        ExportError: If the table is not in memory.
    """
    if any(tensor.is_meta for tensor in table.code_tensors().values()):
        raise ExportError("the table's codes are not in memory: load the model without a device_map")
    blocks = [_add_matrix(part, matrix, ids) for _, matrix in table.matrices()]
    return blocks[0] if len(blocks) == 1 else part.add("Concat", *blocks, axis=-1)


def _add_matrix(part: GraphPart, matrix: CompressedMatrix, ids: str) -> str:
    """Adds the lookup of one matrix of codes."""
    rows = _add_packed(part, matrix, ids) if matrix.layout.packed else _add_floats(part, matrix, ids)
    return _add_exceptions(part, matrix, ids, rows)


def _add_floats(part: GraphPart, matrix: CompressedMatrix, ids: str) -> str:
    """Adds the lookup of float latents and their product with the decoder."""
    # bfloat16, which numpy has not, is read as the float16 or float32 that holds the same values
    codes = plain(matrix.weight).detach().cpu()
    narrow = codes.half()
    held = narrow if torch.equal(narrow.to(codes.dtype), codes) else codes.float()
    latents = part.add("Gather", part.constant("codes", held.numpy()), ids)
    if held.dtype != torch.float32:
        latents = part.cast(latents, numpy.float32)
    rows = part.add("MatMul", latents, part.constant("decoder", _floats(matrix.decoder_weight)))
    bias = matrix.decoder_bias_weight
    return rows if bias is None else part.add("Add", rows, part.constant("bias", _floats(bias)))


def _add_packed(part: GraphPart, matrix: CompressedMatrix, ids: str) -> str:
    """Adds the lookup of packed codes: bytes -> states -> levels -> rows."""
    slots = Slots.of(matrix)

    # what is stored of a row beside its codes: its class and its scale
    row = part.cast(part.add("Gather", part.constant("rows", matrix.packed_rows().rows.numpy()), ids), numpy.int32)
    row_class = part.add("BitwiseAnd", row, part.constant("class_bits", numpy.int32(MAX_CLASSES - 1)))

    def of_class(name: str, table: NDArray[Any]) -> str:
        return part.add("Gather", part.constant(name, table), row_class)

    # of each slot, the 8 bits that begin with its code, and where the levels are that they stand for
    pairs = part.add(
        "GatherElements", _add_pairs(part, RowStream.of(matrix), ids), of_class("pair", slots.pair), axis=-1
    )
    shifted = part.add("BitShift", pairs, of_class("shift", slots.shift), direction="RIGHT")
    states = part.add("BitwiseAnd", shifted, part.constant("state_bits", numpy.uint32(STATES - 1)))
    places = part.cast(part.add("BitwiseOr", states, of_class("book", slots.book)), numpy.int32)
    levels = part.add("Gather", part.constant("levels", slots.levels), places)

    latents = part.add("Mul", levels, part.add("Gather", _steps(part, slots), row))
    return part.add("MatMul", latents, _decoder(part, matrix, slots.latents))


def _add_pairs(part: GraphPart, stream: RowStream, ids: str) -> str:
    """Adds what reads rows as pairs of bytes that overlap: (batch, length, bytes - 1) uint32."""
    codes = part.constant("codes", stream.stream)
    if stream.begins is None:
        where = ids
    else:
        begin = part.add("Gather", part.constant("begins", stream.begins[:, None]), ids)
        where = part.add("Add", begin, part.constant("bytes_of_row", numpy.arange(stream.most, dtype=numpy.int32)))
    found = part.cast(part.add("Gather", codes, where), numpy.uint32)

    axis, zero, one, last, end = (
        part.constant("bound", numpy.array([number], dtype=numpy.int64)) for number in (2, 0, 1, -1, stream.most)
    )
    low, high = part.add("Slice", found, zero, last, axis), part.add("Slice", found, one, end, axis)
    high = part.add("BitShift", high, part.constant("byte_bits", numpy.uint32(8)), direction="LEFT")
    return part.add("BitwiseOr", low, high)


def _steps(part: GraphPart, slots: Slots) -> str:
    """Adds what levels are multiplied by, by what is stored of a row: (256, slots), computed when a file is loaded."""
    row_class = numpy.minimum(numpy.arange(len(slots.scales)) % MAX_CLASSES, len(slots.steps) - 1)
    steps = part.add("Gather", part.constant("steps", slots.steps), part.constant("classes", row_class))
    scaled = part.add("Mul", steps, part.constant("scales", slots.scales))
    return part.add("Add", scaled, part.constant("bias_step", slots.offset))


def _decoder(part: GraphPart, matrix: CompressedMatrix, latents: NDArray[numpy.int64]) -> str:
    """Adds decoder and bias, a row for each slot: (slots, dim) float32, computed when a file is loaded."""
    stored, exponents, bias = matrix.stored_decoder(), matrix.exponent_weight, matrix.decoder_bias_weight
    assert exponents is not None
    assert bias is not None
    if stored.dtype == torch.float8_e4m3fn:  # not every runtime has these: they are numbers in a table of 256
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
        index = part.cast(part.constant("decoder", stored.detach().view(torch.uint8).numpy()), numpy.int32)
        decoder = part.add("Gather", part.constant("float8", numbers.numpy()), index)
    else:
        half = stored.detach().half()
        exact = torch.equal(half.to(stored.dtype), stored)
        decoder = part.constant("decoder", half.numpy() if exact else _floats(stored))
        if exact:
            decoder = part.cast(decoder, numpy.float32)
    powers = torch.exp2(plain(exponents).float()).unsqueeze(1)
    scaled = part.add("Mul", decoder, part.constant("powers", powers.numpy()))
    rows = part.add("Gather", scaled, part.constant("latents", latents))
    return part.add("Concat", rows, part.constant("bias", _floats(bias)[None]), axis=0)


def _add_exceptions(part: GraphPart, matrix: CompressedMatrix, ids: str, rows: str) -> str:
    """Adds what gives the rows that their codes do not stand for: those kept as they are, and the row of zeros."""
    kept = {}
    if matrix.outlier_rows_weight is not None and matrix.outlier_weight is not None:
        rows_of, values = plain(matrix.outlier_rows_weight), plain(matrix.outlier_weight)
        kept = dict(zip(rows_of.tolist(), _floats(values), strict=True))
    if matrix.layout.zero_row is not None:
        kept[matrix.layout.zero_row] = numpy.zeros(matrix.dim, numpy.float32)
    if not kept:
        return rows

    # which of them each id is, if any
    last = part.constant("last", numpy.array([-1], dtype=numpy.int64))
    numbers = part.constant("kept_rows", numpy.array(list(kept), dtype=numpy.int64))
    found = part.add("Equal", part.add("Unsqueeze", ids, last), numbers)
    one_hot = part.cast(found, numpy.float32)
    own = part.add("MatMul", one_hot, part.constant("kept", numpy.stack(list(kept.values()))))
    any_of_them = part.cast(part.add("ReduceMax", one_hot, last, keepdims=1), numpy.bool_)
    return part.add("Where", any_of_them, own, rows)


def _floats(tensor: Tensor) -> NDArray[numpy.float32]:
    return tensor.detach().cpu().float().numpy()
