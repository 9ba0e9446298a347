"""Codes that nothing takes for weights: parameters that refuse writes, and readings that only a dense table allows.

The codes of a table are parameters of its module, so whatever walks over the parameters of a model meets them: casts,
averages, exponential moving averages, initialisers, loggers of norms. As integers they would become garbage there
without a word. So they are parameters of a class of their own:

- A write that leaves every code what it is, up to rounding, does nothing: averages over models of equal codes stay
  exact. So does a cast of `.data`. Any other write is refused.
- What has their values is guarded as well: views, copies, casts, concatenations, and the averages of codes.
- What else is computed from them is refused, for codes are no weights, and so is handing their values to Python or
  numpy. Comparisons may be made. The tensors of a state dict may become numpy arrays, for people send and store them.
- Writes that come by without a Python call, such as those of C++ or through numpy, are noticed by the counter of
  versions that torch keeps, and by a checksum: at the next forward pass and whenever the codes are saved.

Why a subclass of `nn.Parameter`, and neither buffers nor a tensor that poses as the dense table? Buffers are copied by
averages and broadcast by DDP before each pass, are no part of what FSDP 2 of accelerate restores, and transformers
looks tied tensors up with `get_parameter`; and an average over the parameters of two models of different codes would
mix their decoders unseen. A tensor of the shape and dtype of the dense table would be that for whatever loads, saves,
shards and counts bytes as well, which need what is stored. `torch.compile`, `torch.export`, safetensors, `deepcopy`,
pickle, FSDP and accelerate treat this class as any parameter: where they make a plain one of it, the module that gets
it makes it a guarded one again.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .codes_dirembed import ModelError
from .kinds_dirembed import (
    copies,
    hands_out,
    is_for_files,
    is_foreach,
    keeps_shape,
    mixes,
    name_of,
    of_foreach,
    reads_in_graphs,
    tells_about,
    tensors_in,
    writes,
)


HOLDS_CODES = (
    "`weight` of a compressed table holds codes, no weights: call the module, ask it for dense_weight(), the (V, d) "
    "table, or make a dense model with hf_dirembed.expand"
)
CHANGED_CODES = (
    "the codes of a compressed table are no weights, and something would change them, or has: average, cast and "
    "initialise floating-point tensors alone (`if tensor.is_floating_point()`), average only models of equal codes, "
    "or expand the models first with hf_dirembed.expand; codes that have been changed come back by loading the model "
    "again"
)

_BASE = Tensor._base.__get__  # type: ignore[union-attr]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_LEARNING: frozenset[Any] = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]


class _Guard:
    """What parameters of codes, and views of them, have in common."""

    # All in `vars`, so that copies of the object's dictionary are copies of these:
    # _alias: the same memory as a plain tensor. _root: of a view, the parameter that it is one of. _seal: version and
    # checksum of the codes that are right. _scale: what a write has multiplied them by. _open: whether they may be
    # written to. _follows: whether floats beside them learn, which say what they are to be. _stored: whether it came
    # by a state dict. _stacked: the dimension along which codes were stacked.

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuses what takes codes for weights; what gives codes still gives guarded ones."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            if reads_in_graphs(func):
                raise ModelError(HOLDS_CODES)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)

        name = name_of(func)
        if isinstance(func, torch._ops.OpOverload):  # graphs that were exported read codes by these
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if tells_about(name):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "__get__":  # of a property, such as its shape: passes ask for these
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args)
                if func == _BASE:
                    return found  # a guard of it would be a view in turn, and so on: compilers follow these
                return _results(found, [args[0]], False) if isinstance(found, Tensor) else found
        if func == _SET_DATA:
            return _set_data(args[0], args[1])
        if func in _LEARNING and isinstance(args[0], CodesParameter):
            return args[0]  # whatever is asked of all parameters of a model: see `unfreeze_codes`
        if is_foreach(name):
            return _foreach(func, name, args, kwargs)
        if writes(name) or kwargs.get("inplace") or kwargs.get("out") is not None:
            return _into(func, name, args, kwargs)
        return _from(func, name, args, kwargs)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as it gives codes other memory; torch asks no `__torch_function__` about it."""
        raise ModelError(CHANGED_CODES)

    def __copy__(self) -> Any:
        return self.detach()  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain parameter or tensor: what reads it needs no class of this package."""
        tensor = plain(self)  # type: ignore[arg-type]
        if isinstance(self, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.requires_grad)
        return tensor.__reduce_ex__(protocol)


class CodesView(_Guard, Tensor):
    """What has the values of codes and is no parameter: views, copies, casts, averages. They are no weights either.

    Views of the same memory guard it as the parameter does; copies may be written to, and are still none.
    """

    def __deepcopy__(self, memo: Any) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _guarded(plain(self).clone(memory_format=torch.preserve_format), [self], CodesView)
        copy: Tensor = memo[id(self)]
        return copy


class CodesParameter(_Guard, nn.Parameter):
    """Codes as a parameter of a module.

    Args:
        data: The codes.
        requires_grad: Whether they learn, as float latents may. What learns is guarded no longer.

    Example:
        >>> codes = CodesParameter(torch.tensor([[7, 3]], dtype=torch.uint8))
        >>> _ = codes.detach().copy_(0.9 * codes + 0.1 * codes)  # an average over equal codes
        >>> plain(codes).tolist()
        [[7, 3]]
        >>> codes.detach().fill_(0)
        Traceback (most recent call last):
        ...
        hf_dirembed...ModelError: the codes of a compressed table are no weights, and something would change them...
        >>> torch.nn.functional.linear(torch.ones(1, 2), codes)
        Traceback (most recent call last):
        ...
        hf_dirembed...ModelError: `weight` of a compressed table holds codes, no weights: call the module...
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        """A parameter of the same memory."""
        return Tensor._make_subclass(cls, plain(data).detach(), requires_grad)

    def __deepcopy__(self, memo: Any) -> CodesParameter:
        if id(self) in memo:
            return memo[id(self)]
        verify(self)
        result = CodesParameter(plain(self).clone(memory_format=torch.preserve_format), self.requires_grad)
        if (sealed := vars(self).get("_seal")) is not None:
            vars(result)["_seal"] = (_version(result), sealed[1])
        if (table := vars(self).get("_table")) is not None:
            vars(result)["_table"] = memo.setdefault(id(table), object())
        if "_follows" in vars(self):
            vars(result)["_follows"] = True
        memo[id(self)] = result
        return result


def plain(tensor: Tensor) -> Tensor:
    """The same memory as a plain tensor, for what is to read codes, or to write them; other tensors as they are."""
    if torch.compiler.is_compiling():
        if isinstance(tensor, _Guard):  # graphs may run on guarded parameters, of which this gives plain ones
            alias: Tensor = torch.ops.aten.alias.default(tensor)
            return alias
        return tensor
    if type(tensor) is not CodesParameter and type(tensor) is not CodesView:
        return tensor
    kept: Tensor | None = vars(tensor).get("_alias")
    if kept is None:
        with torch._C.DisableTorchFunctionSubclass():
            kept = vars(tensor)["_alias"] = tensor.detach().as_subclass(Tensor)
    return kept


def guard(parameter: Tensor | None) -> None:
    """Makes a plain parameter one of codes, the object that it is; what learns, or stands for others, stays."""
    if type(parameter) is nn.Parameter and not parameter.requires_grad:
        parameter.__class__ = CodesParameter


def mark(parameter: Tensor) -> None:
    """Has a plain parameter, of latents that learn, known for codes, which no dense module has for its weight."""
    vars(parameter)["_holds_codes"] = True


def mark_stored(tensor: Tensor) -> None:
    """Lets the codes of a state dict become numpy arrays, in which people send and store what they load again."""
    if isinstance(tensor, _Guard):
        vars(tensor)["_stored"] = True


def unguard(parameter: Tensor | None) -> None:
    """Makes a parameter of codes, such as latents that are to learn, a plain one, the object that it is."""
    if type(parameter) is CodesParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        mark(parameter)
        for name in ("_alias", "_seal", "_open", "_scale", "_follows"):
            vars(parameter).pop(name, None)


def follow_floats(parameter: Tensor | None, follows: bool = True) -> None:
    """Says that floats learn beside codes, and say what they are: then nothing else does, and nothing is noticed."""
    if type(parameter) is CodesParameter:
        vars(parameter).pop("_follows", None)
        if follows:
            vars(parameter)["_follows"] = True


def holds_codes(parameter: Any) -> bool:
    """Whether a parameter is one of codes, those that learn among them."""
    return isinstance(parameter, _Guard) or (isinstance(parameter, nn.Parameter) and "_holds_codes" in vars(parameter))


@contextmanager
def opened(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets codes be written, and seals them as they are then."""
    guarded = [tensor for tensor in tensors.values() if type(tensor) is CodesParameter]
    for tensor in guarded:
        vars(tensor)["_open"] = True
    try:
        yield
    finally:
        for tensor in guarded:
            vars(tensor).pop("_open", None)
            vars(tensor).pop("_scale", None)
            vars(tensor).pop("_alias", None)
            seal(tensor)


def seal(tensor: Tensor, *, anew: bool = True) -> None:
    """Takes codes for right as they are.

    Args:
        tensor: The codes; other tensors are left alone.
        anew: Whether to do so with those that were taken for right before.
    """
    if type(tensor) is CodesParameter and not tensor.is_meta and (anew or "_seal" not in vars(tensor)):
        vars(tensor)["_seal"] = (_version(tensor), _checksum(tensor))


def sealed_checksum(tensor: Tensor) -> int | None:
    """The checksum of codes that were sealed, or of the ones that a state dict's tensor is of; None of all others."""
    root = vars(tensor).get("_root")
    root = tensor if root is None else root
    sealed = vars(root).get("_seal") if type(root) is CodesParameter and "_follows" not in vars(root) else None
    return None if sealed is None else sealed[1]


def verify(tensor: Tensor, *, values: bool = False) -> None:
    """Refuses codes that were written to since they were sealed.

    Args:
        tensor: Codes; other tensors pass.
        values: Whether to compare the values even where torch's counter of versions has not moved.

    Raises:
        ModelError: If their values are others now, or they were scaled and not brought back.
    """
    if type(tensor) is not CodesParameter:
        return
    state = vars(tensor)
    if "_follows" in state:
        return
    if "_scale" in state:
        raise ModelError(CHANGED_CODES)
    sealed, version = state.get("_seal"), _version(tensor)
    if sealed is None:
        if not tensor.is_meta:
            state["_seal"] = (version, None)
        return
    if sealed[0] == version and not values:
        return

    # without a checksum there is only the counter to go by
    if sealed[1] is None:
        if sealed[0] != version:
            raise ModelError(CHANGED_CODES)
        return
    if _checksum(tensor) != sealed[1]:
        raise ModelError(CHANGED_CODES)
    state["_seal"] = (version, sealed[1])


def unwritten(tensor: CodesParameter) -> bool:
    """Whether torch has counted no write to codes since they were sealed, as [`verify`] asks, but in no time."""
    state = vars(tensor)
    sealed, alias = state.get("_seal"), state.get("_alias")
    if sealed is None or alias is None or "_scale" in state or alias.is_inference():
        return False
    return bool(alias._version == sealed[0])


def intact(mine: Tensor, value: Tensor) -> bool:
    """Whether a value is that of codes, up to the rounding of a cast or of an average over equal ones."""
    return _intact(plain(mine), plain(value)) is not None


def _version(tensor: Tensor) -> int:
    alias = plain(tensor)
    return -1 if alias.is_inference() else alias._version


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(plain(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _intact(mine: Tensor, value: Tensor, eps: float | None = None) -> Tensor | None:
    """The value in the dtype that codes are to have, if it is theirs; None if it is not.

    Args:
        mine: The codes.
        value: What is to be in their place.
        eps: The precision of what the value was computed from; by default its own.
    """
    if value.shape != mine.shape:
        return None
    exact = mine.to(value.device)
    if not mine.is_floating_point() and not value.is_floating_point():
        return exact if torch.equal(exact.long(), value.long()) else None
    if not value.is_floating_point():
        return None

    # a cast of float latents is one, and rounds as that of any weight does
    if mine.is_floating_point() and torch.equal(exact.to(value.dtype), value):
        return value
    eps = max(eps or 0.0, torch.finfo(value.dtype).eps)
    if mine.is_floating_point():
        eps = max(eps, torch.finfo(mine.dtype).eps)
        least = torch.finfo(mine.dtype).smallest_normal  # below which floats have fewer bits
        near = (value.double() - exact.double()).abs() <= 4 * eps * (exact.double().abs() + least)
    else:
        near = (value.double() - exact).abs() <= (4 * eps * exact.double().abs().clamp_min(1)).clamp_max(0.45)
    return exact if bool(near.all()) else None


def _set_data(codes: Any, value: Tensor) -> None:
    """Gives codes other memory; a cast to another dtype leaves integers what they are.

    Raises:
        ModelError: If the values are others.
    """
    state, mine, value = vars(codes), plain(codes), plain(value)
    opened_ = state.get("_open", False)
    if not opened_ and not value.is_meta and not mine.is_meta:
        kept = mine.to(value.device) if "_follows" in state else _intact(mine, value)
        if kept is None:
            raise ModelError(CHANGED_CODES)
        value = kept
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(codes, value)  # type: ignore[attr-defined]
    state.pop("_alias", None)
    if not opened_ and state.get("_seal") is not None:
        seal(codes)


def _from(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a function gives that writes to nothing: guarded, where it has the values of codes.

    Raises:
        ModelError: If it computes something else from codes, or gives them to another library.
    """
    sources = [each for each in tensors_in([args, kwargs]) if isinstance(each, _Guard)]
    stored = all(vars(each).get("_stored") for each in sources)
    forced = bool(kwargs.get("force"))  # as exporters ask for the bytes of any tensor
    if hands_out(name) and not ((stored or forced) and is_for_files(name)):
        raise ModelError(HOLDS_CODES)

    copied, mixed = copies(name), mixes(name, args, kwargs, _is_guarded)
    with torch._C.DisableTorchFunctionSubclass():
        try:
            result = (Tensor.unbind if func is Tensor.__iter__ else func)(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError) as error:
            raise ModelError(CHANGED_CODES if mixed else HOLDS_CODES) from error
        if func is Tensor.__iter__:
            return iter(_results(result, sources, False))

        # `nn.Parameter(codes)` insists on the class
        kind = CodesParameter if func is Tensor.detach and type(args[0]) is CodesParameter else CodesView
        results = _results(result, sources, copied or mixed, kind)
        if (name == "stack" and not kwargs.get("dim", args[1] if len(args) > 1 else 0)) or (
            keeps_shape(name) and isinstance(results, _Guard) and "_stacked" in vars(args[0])
        ):
            vars(results)["_stacked"] = 0
        return results


def _results(result: Any, sources: list[Any], may_be_new: bool, kind: type = CodesView) -> Any:
    """What an operation gives, the tensors in it that have the values of codes guarded.

    Args:
        result: What it gave.
        sources: The codes that it was given.
        may_be_new: Whether the operation only copies or averages, so that what is in other memory are codes still.
        kind: What guards them.

    Raises:
        ModelError: If something else was computed from codes; comparisons, which give truth values, may be.
    """
    if type(result) in (tuple, list):
        return type(result)(_results(each, sources, may_be_new, kind) for each in result)
    if isinstance(result, tuple) and next(tensors_in(list(result)), None) is not None:
        raise ModelError(HOLDS_CODES)  # of `max`, `sort`, and others that name what they give
    if type(result) is not Tensor or result.dtype == torch.bool or result.is_meta or not result.numel():
        return result
    strided = result.layout == torch.strided
    if may_be_new or (strided and any(_shares_memory(result, each) for each in sources)):
        return _guarded(result, sources, kind) if strided else result
    raise ModelError(HOLDS_CODES)


def _guarded(result: Tensor, sources: list[Any], kind: type) -> Tensor:
    """A tensor that is codes still, as such; of the parameter whose memory it shares, if it does."""
    view: Tensor = result.as_subclass(kind)
    shared = [each for each in sources if _shares_memory(result, each)]
    vars(view)["_root"] = vars(shared[0]).get("_root", shared[0]) if shared else None
    if all(vars(each).get("_stored") for each in sources):
        vars(view)["_stored"] = True
    return view


def _shares_memory(tensor: Tensor, codes: Any) -> bool:
    held = plain(codes)
    if held.is_meta or held.layout != torch.strided or type(held) is not Tensor:
        return False
    return tensor.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()


def _is_guarded(value: Any) -> bool:
    """Whether a value is of codes, as are lists of such."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_guarded, value))
    return isinstance(value, _Guard)


def _foreach(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Does to each of the codes in lists of tensors what a function does to all: what has none it does at once."""

    def at(number: int, value: Any) -> Any:
        return value[number] if isinstance(value, (tuple, list)) else value

    def some(numbers: list[int], value: Any) -> Any:
        return [value[number] for number in numbers] if isinstance(value, (tuple, list)) else value

    # what has codes at any of its places, and what has none
    results: list[Any] = [None] * len(args[0])
    of_codes = [any(isinstance(at(number, each), _Guard) for each in args) for number in range(len(results))]
    rest = [number for number, is_one in enumerate(of_codes) if not is_one]
    if rest:
        options = {key: some(rest, value) for key, value in kwargs.items()}
        done = func(*(some(rest, each) for each in args), **options)
        for number, result in zip(rest, done or [None] * len(rest), strict=True):
            results[number] = result
    single = of_foreach(name)
    for number in range(len(results)):
        if of_codes[number]:
            options = {key: at(number, value) for key, value in kwargs.items()}
            results[number] = single(*(at(number, each) for each in args), **options)
    return None if writes(name) else results


def _into(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Does what writes: to codes nothing, see `_write`; to other memory, which is guarded as well once it has codes.

    Raises:
        ModelError: If codes would change, or something else is computed from codes.
    """
    if not args:  # as `torch.nn.init` calls
        (first, target), *_ = kwargs.items()
        args, kwargs = (target,), {key: value for key, value in kwargs.items() if key != first}
    target = kwargs["out"] if kwargs.get("out") is not None else args[0]
    if isinstance(target, _Guard) and (root := vars(target).get("_root", target)) is not None:
        return _write(target, root, func, args, kwargs)

    known = isinstance(target, _Guard)
    pure = name in ("copy_", "__setitem__") or copies(name)
    in_place = (
        name.removesuffix("_") if name.endswith("_") and not name.startswith("__") else name.replace("__i", "__")
    )
    others = {key: value for key, value in kwargs.items() if key != "out"}
    mixed = mixes(in_place, args, others, lambda each: each is target or _is_guarded(each))
    if not known and not (pure or mixed):
        raise ModelError(HOLDS_CODES)
    # weights, and what may be the memory of some: codes as integers go to integers alone
    of_integers = any(
        not each.is_floating_point() for each in tensors_in([args[1:], kwargs]) if isinstance(each, _Guard)
    )
    if not known and (isinstance(target, nn.Parameter) or (of_integers and target.is_floating_point())):
        raise ModelError(HOLDS_CODES)
    with torch._C.DisableTorchFunctionSubclass():
        try:
            result = func(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError) as error:
            raise ModelError(CHANGED_CODES if mixed else HOLDS_CODES) from error
    if type(target) is Tensor:
        target.__class__ = CodesView
        vars(target)["_root"] = None
    return result


def _write(target: Any, root: Any, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Does nothing where a write leaves codes what they are.

    Averages come in two steps as well, `p.mul_(decay).add_(q, alpha=1 - decay)`. So a factor is remembered, and is to
    be made up for by what is added; until then, codes are none.

    Raises:
        ModelError: If they would become others.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if vars(root).get("_open", False) or root.requires_grad:
            return func(*args, **kwargs)
        if "_follows" in vars(root):
            return target
        mine, state = plain(target), vars(root)
        whole = mine.shape == plain(root).shape
        value = mine.double() * (state.get("_scale", 1.0) if whole else 1.0)
        try:
            rest = [_as_value(each) for each in args[1:]] if func.__name__ != "__setitem__" else [args[1], *args[2:]]
            if "out" in kwargs:
                value = func(*map(_as_value, args), **{name: each for name, each in kwargs.items() if name != "out"})
            else:
                func(value, *map(_plain_value, rest), **{name: _as_value(each) for name, each in kwargs.items()})
        except (RuntimeError, TypeError, IndexError) as error:
            raise ModelError(CHANGED_CODES) from error

        if _intact(mine, value, _precision(args)) is not None:
            state.pop("_scale", None)
            return target
        if whole and func.__name__ in ("mul_", "div_", "__imul__", "__itruediv__"):
            factor = _factor(func.__name__, args[1])
            if factor is not None:
                state["_scale"] = state.get("_scale", 1.0) * factor
                return target
    raise ModelError(CHANGED_CODES)


def _precision(args: Any) -> float:
    """The precision of the narrowest float among the arguments of a write; that of float32 if there is none."""
    floats = [each.dtype for each in args[1:] if isinstance(each, Tensor) and each.is_floating_point()]
    return max(torch.finfo(dtype).eps for dtype in (torch.float32, *floats))


def _plain_value(value: Any) -> Any:
    """An argument without guards."""
    return plain(value) if isinstance(value, Tensor) else value


def _as_value(value: Any) -> Any:
    """An argument as what is computed with: in float64 and without guards."""
    if not isinstance(value, Tensor):
        return value
    value = plain(value)
    return value.double() if value.dtype != torch.bool else value


def _factor(name: str, value: Any) -> float | None:
    """The number that a write multiplies by; None where it is none."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value:
        return None
    return value if "mul" in name else 1 / value
