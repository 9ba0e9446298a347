"""What torch's functions do with values, by kind: what copies them, mixes equal ones, writes to them, hands them out.

A function is told by its name, for `torch.add`, `Tensor.add` and `Tensor.__add__` are of one kind. What is of no kind
here computes something else from values: it is taken for such without being listed.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


# What graphs are checked for, when a compiler traces Python and asks for functions, not names.
_GRAPH_READERS: frozenset[Any] = frozenset(
    {
        *(F.embedding, F.embedding_bag, F.linear, F.bilinear, F.normalize, F.cosine_similarity, F.softmax),
        *(F.log_softmax, F.cross_entropy, F.layer_norm, F.pairwise_distance, torch.embedding, torch.cdist),
        *(torch.matmul, torch.mm, torch.mv, torch.bmm, torch.addmm, torch.addmv, torch.baddbmm, torch.einsum),
        *(torch.tensordot, torch.inner, torch.mean, torch.norm, torch.std, torch.var, torch.index_select),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.mv, Tensor.bmm, Tensor.addmm),
        *(Tensor.inner, Tensor.index_select, Tensor.mean, Tensor.norm, Tensor.std, Tensor.var),
    }
)

_OPERATORS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
_ASSIGNMENTS = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS)})
_HARMLESS_IN_PLACE = frozenset({"requires_grad_", "share_memory_", "detach_", "retain_grad_", "rename_"})

# New memory with the same values, or with room for such; slices and other views share memory, which tells them.
_COPIES = frozenset(
    {
        *("clone", "contiguous", "to", "type", "type_as", "detach", "alias", "pin_memory", "positive", "lift_fresh"),
        *("cpu", "cuda", "xpu", "mps", "npu", "hpu", "float", "half", "double", "bfloat16"),
        *("int", "long", "short", "byte", "char", "reshape", "reshape_as", "flatten", "ravel", "unflatten"),
        *("repeat", "tile", "expand", "expand_as", "broadcast_to", "pad", "flip", "fliplr", "flipud", "roll", "rot90"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack"),
        *("__deepcopy__", "__copy__", "_to_copy", "_copy_from", "copy", "clone_preserve_strides"),
    }
)
_SHAPE_KEEPING = frozenset(
    {"to", "type", "type_as", "clone", "contiguous", "detach", "cpu", "cuda", "float", "double"}
)

# Sums of codes with codes, and codes times numbers: averages are made of these.
_SUMS = frozenset({"add", "sub", "subtract", "rsub", "__add__", "__radd__", "__sub__", "__rsub__", "lerp"})
_PRODUCTS = frozenset(
    {"mul", "multiply", "div", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__", "__div__", "round"}
)
_OVER_A_STACK = frozenset({"mean", "sum"})

# What gives numbers of Python's or of another library.
_HANDED_OUT = frozenset(
    {
        *("item", "tolist", "numpy", "__array__", "__dlpack__", "__float__", "__int__", "__complex__", "__index__"),
        *("__bool__", "to_dense", "__cuda_array_interface__"),
    }
)
_FOR_FILES = frozenset({"numpy", "__array__", "tolist"})  # what people write state dicts to, and send them by
_ABOUT = frozenset({"__len__", "size", "numel", "nelement", "dim", "ndimension", "stride", "element_size", "__repr__"})
_FOREACH = "_foreach_"


def name_of(func: Any) -> str:
    """What a function is called; of a property it is `__get__`, `__set__` or `__delete__`."""
    return getattr(func, "__name__", "")


def reads_in_graphs(func: Any) -> bool:
    """Whether a function that a compiler traces multiplies, looks up or measures weights."""
    return func in _GRAPH_READERS


def copies(name: str) -> bool:
    """Whether a function gives values as they are, in memory, a dtype or an order of their own, or room for them.

    Example:
        >>> copies("clone"), copies("zeros_like"), copies("view_copy"), copies("exp")
        (True, True, True, False)
    """
    return name in _COPIES or name.endswith(("_like", "_copy")) or name.startswith("new_")


def keeps_shape(name: str) -> bool:
    """Whether a copy has the shape of what it is one of."""
    return name in _SHAPE_KEEPING


def hands_out(name: str) -> bool:
    """Whether a function gives values to Python or to another library."""
    return name in _HANDED_OUT


def tells_about(name: str) -> bool:
    """Whether a function tells of the form of a tensor alone; under a tracer it gives numbers as tensors."""
    return name in _ABOUT


def is_for_files(name: str) -> bool:
    """Whether it gives them in a form in which state dicts are written and sent."""
    return name in _FOR_FILES


def writes(name: str) -> bool:
    """Whether a function changes its first argument.

    Example:
        >>> writes("add_"), writes("__setitem__"), writes("requires_grad_"), writes("add")
        (True, True, False, False)
    """
    if name in _ASSIGNMENTS:
        return True
    return name.endswith("_") and not name.startswith("__") and name not in _HARMLESS_IN_PLACE


def is_foreach(name: str) -> bool:
    """Whether a function does the same to each tensor of lists."""
    return name.startswith(_FOREACH)


def of_foreach(name: str) -> Any:
    """What a function of lists does to each tensor."""
    single = name.removeprefix(_FOREACH)
    return getattr(Tensor, single, None) or getattr(torch, single)


def mixes(name: str, args: Any, kwargs: Any, is_codes: Any) -> bool:
    """Whether a call gives sums of codes with codes, or codes times a number, of which averages are made.

    Args:
        name: The function's name, without the underscore of those that work in place.
        args: What it is called with.
        kwargs: The same.
        is_codes: Tells tensors of codes.
    """
    others = [each for each in (*args, *kwargs.values()) if not is_codes(each)]
    if name in _PRODUCTS:
        return all(_is_number(each) for each in others)
    if name in _OVER_A_STACK:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return vars(args[0]).get("_stacked") is not None and dims in (vars(args[0])["_stacked"], (0,), [0])
    if name not in _SUMS:
        return False

    # the weight of `lerp` and `alpha` are numbers, and `sum(...)` begins with 0
    if name == "lerp":
        return len(others) <= 1 and all(_is_number(each) for each in others)
    rest = [each for each in args if not is_codes(each)]
    return all(_is_number(each) and float(each) == 0 for each in rest) and all(map(_is_number, kwargs.values()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument or a result: itself, or those in the lists, tuples and dictionaries that it is."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() == 0
    return isinstance(value, (int, float)) or value is None
