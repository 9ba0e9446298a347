"""A second device on a machine that has none: tensors that compute on the CPU, and refuse to meet what is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


DEVICE = torch.device("lazy", 0)  # a name that torch knows, and that nothing here runs on
_MOVES = {Tensor.to, Tensor.cpu}


class DeviceTensor(Tensor):
    """A tensor on the second device, around one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        assert type(held) is Tensor
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes on the CPU; tensors of the CPU that are more than one number are strangers, as on a GPU."""

        def inner(value: Any) -> Any:
            if isinstance(value, DeviceTensor):
                return value.held
            if isinstance(value, Tensor) and value.dim():
                raise RuntimeError(f"{func} was given tensors on {DEVICE} and on {value.device}")
            return torch.device("cpu") if value == DEVICE else value

        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == torch.device("cpu"):
            return func(args[0].held, **kwargs)
        if func is torch.ops.aten.copy_.default:
            args = (args[0], *(to_device(each) if isinstance(each, Tensor) else each for each in args[1:]))
        result = func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        return tree_map(lambda value: DeviceTensor(value) if type(value) is Tensor else value, result)


class _Moves(TorchFunctionMode):
    """Brings tensors to the second device and makes them there, where no kernel of its own could."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MOVES:
            to = kwargs.get("device", next((each for each in args[1:] if not isinstance(each, torch.dtype)), None))
            to = to.device if isinstance(to, Tensor) else to
            if str(to) == str(DEVICE) and not isinstance(args[0], DeviceTensor):
                rest = [each for each in args[1:] if isinstance(each, torch.dtype)]
                return to_device(args[0].to(*rest, kwargs.get("dtype") or args[0].dtype))
        elif kwargs.get("device") == DEVICE and not any(isinstance(each, Tensor) for each in args):
            return to_device(func(*args, **{**kwargs, "device": "cpu"}))
        elif func is torch.where:  # which makes tensors of its numbers
            args = (args[0], *(each if isinstance(each, Tensor) else torch.tensor(each) for each in args[1:]))
        return func(*args, **kwargs)


def to_device(tensor: Tensor) -> Tensor:
    """A tensor on the second device."""
    return tensor if isinstance(tensor, DeviceTensor) else DeviceTensor(tensor.detach().as_subclass(Tensor))


@contextmanager
def second_device() -> Iterator[torch.device]:
    """A second device while this is open, for what needs no gradients."""
    with torch.no_grad(), _Moves():
        yield DEVICE


def move_parameters(module: nn.Module) -> None:
    """Puts the tensors of a module, but not of its submodules, on the second device."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(to_device(parameter.data), requires_grad=False)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else to_device(buffer)
