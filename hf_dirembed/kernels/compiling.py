"""How kernels are compiled, and how they come at the memory of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import numpy
import numpy.typing
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor


WORD_BYTES = 8  # are loaded at a time, also where a row has fewer left


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call, to run without Python's lock; by one process for all, where it can.

    Numba's cache sees when the file of a function changes, but not when another does that it takes something from:
    clear it then.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no place for numba's cache can be written to
        return numba.njit(nogil=True)(function)


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An address as the pointer that `numba.carray` makes an array of.

    Tensors are handed over as addresses where single rows are read: to turn them into arrays of numpy takes longer.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def load_word(typing_context, address):  # type: ignore[no-untyped-def]
    """The `WORD_BYTES` bytes at any address, the first in the lowest bits, as uint64."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return unaligned_word(builder, arguments[0])

    return types.uint64(types.int64), generate


@intrinsic
def copy(typing_context, source, target, num_bytes):  # type: ignore[no-untyped-def]
    """Copies bytes from one address to another."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, target, num_bytes = arguments
        pointers = [builder.inttoptr(each, cgutils.voidptr_t) for each in (target, source)]
        cgutils.raw_memcpy(builder, *pointers, num_bytes, 1)  # type: ignore[call-arg]
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def array_of(tensor: Tensor, kind: Any) -> numpy.typing.NDArray[Any]:
    """A contiguous tensor on the CPU as an array of a dtype, as long as somebody else holds the tensor.

    `Tensor.numpy` would keep torch from ever resizing the tensor's memory, as it does when it shards parameters.
    """
    if not tensor.nbytes:
        return numpy.empty(tuple(tensor.shape), dtype=kind)
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return numpy.frombuffer(memory, dtype=kind).reshape(tuple(tensor.shape))


def unaligned_word(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """LLVM's instruction for `load_word`."""
    return builder.load(builder.inttoptr(address, ir.PointerType(ir.IntType(64))), align=1)
