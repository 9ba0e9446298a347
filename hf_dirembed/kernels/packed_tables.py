"""Packed rows as the library takes them: addresses and sizes, checked once for as long as they stay what they are."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..remote.codes_dirembed import (
    BIT_WIDTHS,
    CLASS_BLOCK,
    CODEBOOK_SHAPE,
    MAX_CLASSES,
    RowClass,
    TableError,
    further_offsets,
)
from ..remote.kernels_dirembed import PackedRows, sections


DAMAGED_TABLE = "packed codes do not fit their classes: compress the model again"
FREED_TABLE = "something freed the memory of packed codes: load the model again"
_KEPT = 256  # tables whose addresses are kept
_DTYPES = {
    "weight": torch.uint8,
    "codebook": torch.int8,
    "latents": torch.int32,
    "steps": torch.int8,
    "rows": torch.uint8,
    "class_counts": torch.int32,
    "further": torch.uint8,
}


class _Section(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("count", "bit", "code")]


class _Class(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("rows", "bytes", "codes", "first_code", "further")],
        ("sections", _Section * len(BIT_WIDTHS)),
    ]


class TableStruct(ctypes.Structure):
    """`packed_table` of csrc/dirembed.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in _DTYPES],
        *[(name, ctypes.c_int64) for name in ("num_rows", "shared", "num_codes", "rank", "num_classes")],
        ("classes", _Class * MAX_CLASSES),
    ]


class ClassStruct(NamedTuple):
    """`row_class` of csrc/dirembed.h: its address, as long as the struct is held."""

    address: int
    held: Any


@functools.lru_cache(maxsize=64)
def class_struct(row_class: RowClass) -> ClassStruct:
    """A class as the library takes it where there is no other."""
    struct = _Class()
    _fill(struct, row_class, first_code=0, further=0)
    return ClassStruct(ctypes.addressof(struct), struct)


def _fill(struct: Any, row_class: RowClass, first_code: int, further: int) -> None:
    struct.rows, struct.bytes, struct.codes = row_class.rows or 0, row_class.num_bytes, row_class.num_codes
    struct.first_code, struct.further = first_code, further
    for width, codes, bit in sections(row_class.bit_allocation):
        section = struct.sections[BIT_WIDTHS.index(width)]
        section.count, section.bit, section.code = codes.stop - codes.start, bit, codes.start


class PackedTable(NamedTuple):
    """What the library takes for packed rows.

    Attributes:
        address: Of the struct, as long as this is held.
        most_codes: Codes of a row of the class that has most of them.
        held: What must not be freed: the struct, the classes, and copies of tensors that could not be taken as they
            are.
    """

    address: int
    most_codes: int
    held: tuple[Any, ...]


_tables: dict[tuple[Any, ...], PackedTable] = {}


def table_of(rows: PackedRows) -> PackedTable:
    """The packed rows as the library takes them.

    Nothing is kept of what tensors hold but of where they are: a table is taken from those that are kept only if all
    tensors are where they were, in the same shape and dtype. So they may be written to, moved, resized and freed.

    Raises:
        TableError: If the shapes do not fit the classes, or the memory of a tensor was freed.
    """
    weight, codebook, latents, steps, of_rows, classes, rank, counts, further = rows
    key = (
        id(classes), rank, weight.shape, _identity(weight), _identity(codebook), _identity(latents), _identity(steps),
        _identity(of_rows), _identity(counts), _identity(further),
    )  # fmt: skip
    table = _tables.get(key)
    if table is None:
        table, copied = _make_table(rows)
        if not copied:
            if len(_tables) >= _KEPT:
                _tables.clear()
            _tables[key] = table
    return table


def _identity(tensor: Tensor | None) -> Any:
    return tensor if tensor is None else (tensor.data_ptr(), tensor.nbytes, tensor.dtype, tensor.is_contiguous())


def _is_freed(tensor: Tensor) -> bool:
    """Whether something took the memory of a tensor, as `untyped_storage().resize_(0)` does."""
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
    return tensor.numel() > 0 and tensor.is_contiguous() and tensor.untyped_storage().nbytes() < needed


def _make_table(rows: PackedRows) -> tuple[PackedTable, bool]:
    """The table, and whether tensors had to be copied for it."""
    tensors: dict[str, Tensor | None] = {name: getattr(rows, name) for name in _DTYPES}
    if any(each is not None and _is_freed(each) for each in tensors.values()):
        raise TableError(FREED_TABLE)
    taken = {
        name: None if each is None else each.detach().to(_DTYPES[name]).contiguous() for name, each in tensors.items()
    }
    _check_shapes(rows)
    struct = TableStruct(
        *[0 if each is None else each.data_ptr() for each in taken.values()],
        *(*rows.weight.shape, rows.latents.numel(), rows.rank, len(rows.classes)),
    )

    first_code = 0
    for each, further, of in zip(rows.classes, further_offsets(rows.classes), struct.classes, strict=False):
        _fill(of, each, first_code, further)
        first_code += each.num_codes

    copies = [
        each
        for name, each in taken.items()
        if each is not None and each.data_ptr() != tensors[name].data_ptr()  # type: ignore[union-attr]
    ]
    most = max(each.num_codes for each in rows.classes)
    return PackedTable(ctypes.addressof(struct), most, (struct, rows.classes, *copies)), bool(copies)


def _check_shapes(rows: PackedRows) -> None:
    """Refuses tensors of other sizes than the classes give them; what is in them, the library checks as it reads.

    Raises:
        TableError: If they do not fit.
    """
    classes: tuple[RowClass, ...] = rows.classes
    num_rows, shared = rows.weight.shape
    num_codes = sum(each.num_codes for each in classes)
    codebook_size = CODEBOOK_SHAPE[0] * CODEBOOK_SHAPE[1]
    fits = (
        shared == classes[0].num_bytes
        and rows.rows.numel() == num_rows
        and rows.latents.numel() == rows.steps.numel() == num_codes
        and rows.codebook.numel() == codebook_size
        and all(each.num_bytes >= shared for each in classes)
    )
    if len(classes) > 1:
        blocks = -(-num_rows // CLASS_BLOCK)
        sizes = blocks * (len(classes) - 1), further_offsets(classes)[-1]
        several = (rows.class_counts, rows.further)
        fits = fits and all(
            each is not None and each.numel() == size for each, size in zip(several, sizes, strict=True)
        )
    if not fits:
        raise TableError(DAMAGED_TABLE)
