"""Where tables run: on the device that their codes are on, also where accelerate keeps them off the accelerator.

accelerate brings what a `device_map` sends to the CPU or to disk to the accelerator for each pass, and takes it away
again: of a table, all codes for the few rows of a lookup. Compressed tables run where they are instead. Token ids and
hidden states come to them, rows and logits go back; codes that were to stay on disk are the memory map of their file.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .codes_dirembed import CODE_TENSORS
from .guarded_dirembed import plain
from .matrix_dirembed import CompressedMatrix
from .modules_dirembed import CompressedBlocks, CompressedLinear
from .tables_dirembed import TABLE_MODULES, compressed_tables


def run_in_place(model: PreTrainedModel) -> set[str]:
    """Has tables that accelerate keeps on the CPU or on disk run on the CPU.

    What is tied is one table and lies on one device: if any of its modules is on an accelerator, all of them are.

    Args:
        model: A model that accelerate has just dispatched, with its hooks.

    Returns:
        The paths of the tables that were on disk, whose values nobody has checked yet.
    """
    from_disk = set()
    for path, names in compressed_tables(model).items():
        modules = [model.get_submodule(name) for name in sorted(names | {path}, key=lambda name: name != path)]
        parts = [_parts(module) for module in modules]
        away = [any(_offloading_hook(part) is not None for part in of_module) for of_module in parts]
        if not any(away):
            continue

        # the codes of the first that is in memory, or that comes there, are those of all
        first = away.index(False) if not all(away) else 0
        if all(away) and any(_is_on_disk(part) for part in parts[first]):
            from_disk.add(path)
        for number in [number for number, is_away in enumerate(away) if is_away]:
            for part in parts[number]:
                _bring_back(part, with_codes=number == first)
        for of_module in parts:
            for part, source in zip(of_module, parts[first], strict=True):
                _share(part, source)
    return from_disk


def keep_mapped(model: PreTrainedModel, device_map: dict[str, Any] | None) -> None:
    """Sends tables that a device map sends to disk to the CPU, where the map of their file stands for them.

    Args:
        model: The model, before anything is loaded.
        device_map: It is changed. What has parameters beside modules, and a table in it, stays whole.
    """
    for path, names in compressed_tables(model).items() if device_map else ():
        changed = dict(device_map or {})
        if all(_keep_mapped(model, changed, name) for name in {path, *names}) and device_map is not None:
            device_map.clear()
            device_map.update(changed)


def _keep_mapped(model: PreTrainedModel, device_map: dict[str, Any], name: str) -> bool:
    """Does so for one module; False if it cannot be."""
    steps = name.split(".")
    entry = next((each for each in _above(name) if each in device_map), None)
    if entry is None or device_map[entry] != "disk":
        return True

    # what else is in the module that goes there as a whole goes there by itself
    at = entry
    for step in steps[len(entry.split(".")) if entry else 0 :]:
        del device_map[at]
        module = model.get_submodule(at)
        computed = module._non_persistent_buffers_set  # which device maps say nothing of
        stored = [each for name, each in module._buffers.items() if name not in computed]
        if any(each is not None for each in (*module._parameters.values(), *stored)):
            return False
        for child, _ in module.named_children():
            device_map.setdefault(f"{at}.{child}".lstrip("."), "disk")
        at = f"{at}.{step}".lstrip(".")
    device_map[name] = "cpu"
    return True


def _above(name: str) -> list[str]:
    """A module's name, that of the module it is in, and so on.

    Example:
        >>> _above("model.embed_tokens")
        ['model.embed_tokens', 'model', '']
    """
    steps = name.split(".")
    return [".".join(steps[:count]) for count in range(len(steps), -1, -1)]


def body_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module, without those of compressed tables in it."""
    if isinstance(module, TABLE_MODULES):
        return
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        yield from body_parameters(child)


def _parts(module: nn.Module) -> list[nn.Module]:
    """The modules that hold the codes of a table."""
    return [module, *module.blocks] if isinstance(module, CompressedBlocks) else [module]


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that a module has."""
    hook = vars(module).get("_hf_hook")
    return list(getattr(hook, "hooks", [] if hook is None else [hook]))


def _offloading_hook(module: nn.Module) -> Any:
    """The hook that brings a module's tensors for each pass; None if there is none."""
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def _is_on_disk(module: nn.Module) -> bool:
    """Whether a module's codes are in a file alone."""
    with _reading(_offloading_hook(module)) as values:
        return not _in_memory(values, "weight")


def _in_memory(values: Any, name: str) -> bool:
    """Whether accelerate holds a tensor itself."""
    prefix, held = getattr(values, "prefix", ""), getattr(values, "dataset", values)
    return f"{prefix}{name}" in getattr(held, "state_dict", held)


@contextmanager
def _reading(hook: Any) -> Iterator[Mapping[str, Tensor]]:
    """The tensors that a hook brings, as they are on the CPU."""
    loader = getattr(hook.weights_map, "dataset", hook.weights_map)
    device = getattr(loader, "device", None)
    if device is not None:
        loader.device = "cpu"
    try:
        yield hook.weights_map
    finally:
        if device is not None:
            loader.device = device


def _bring_back(module: nn.Module, *, with_codes: bool) -> None:
    """Gives a module its tensors for good, codes on the CPU, and takes accelerate's hooks off it."""
    hook = _offloading_hook(module)
    if hook is not None:
        with _reading(hook) as values:
            held = {**module._parameters, **module._buffers}
            away = {name: tensor for name, tensor in held.items() if tensor is not None and tensor.is_meta}
            for name, tensor in away.items():
                if name in CODE_TENSORS and not with_codes:
                    continue
                of_table = name in CODE_TENSORS or isinstance(module, CompressedLinear)
                value = plain(values[name]).detach().to("cpu" if of_table else hook.execution_device)
                if name in module._buffers:
                    module._buffers[name] = value
                else:
                    setattr(module, name, nn.Parameter(value, requires_grad=tensor.requires_grad))

    before = vars(module).pop("_old_forward", None)
    vars(module).pop("_hf_hook", None)
    if before is not None:
        vars(module).pop("forward", None)
        if getattr(before, "__func__", None) is not type(module).forward:
            module.forward = before


def _share(module: nn.Module, source: nn.Module) -> None:
    """Has a module share the codes of another that stands for the same table."""
    if module is source or not isinstance(module, (CompressedMatrix, CompressedBlocks)):
        return
    for name in CODE_TENSORS:
        if isinstance(parameter := source._parameters.get(name), nn.Parameter):
            setattr(module, name, parameter)
