"""What a head is given, as far as a model says it without any text: by the norm in front of the head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.utils import logging

from ..remote.tables_dirembed import tied_modules
from .statistics import DAMPING, damped


logger = logging.get_logger(__name__)

_TRIAL_TOKENS = 2


def norm_before_head(model: PreTrainedModel) -> str | None:
    """The path of the norm whose output is what the head multiplies; None where there is none.

    A model of the same config is run on the meta device, which computes shapes alone.

    Args:
        model: Dense, with its weights or on the meta device.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> norm_before_head(LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32)))
        'model.norm'
    """
    if model.get_output_embeddings() is None:
        return None
    with torch.device("meta"):
        # in bfloat16, which grouped products of experts ask for
        trial = type(model)(model.config).bfloat16().eval()
    head = trial.get_output_embeddings()
    ids = torch.zeros(1, _TRIAL_TOKENS, dtype=torch.long, device="meta")
    try:
        with _storages_of(trial, head) as (outputs, inputs), _Shapes():
            trial(input_ids=ids, **({"decoder_input_ids": ids} if trial.config.is_encoder_decoder else {}))
    except Exception as error:  # whatever a model raises that looks at values, which are not there
        logger.info(f"{type(model).__name__} does not run without values, so its last norm is not known: {error}")
        return None
    return next((outputs[storage] for storage in inputs if storage in outputs), None)


class _Shapes(TorchDispatchMode):
    """Answers 0 to whatever asks for a value on the meta device, as masks do that could be left out."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Does what the function does, but for reading values."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


@contextmanager
def _storages_of(model: PreTrainedModel, head: nn.Module) -> Iterator[tuple[dict[int, str], list[int]]]:
    """While a model runs, notes the storages of what its norms give, by name, and of what its head is given."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, str] = {}
    inputs: list[int] = []
    kept: list[Tensor] = []  # so that no storage is freed and its address given to another

    def after(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            kept.append(output)
            outputs[output.untyped_storage()._cdata] = names[module]

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].untyped_storage()._cdata)

    norms = [module for module in names if "norm" in type(module).__name__.lower() and _is_gain(module)]
    hooks = [module.register_forward_hook(after) for module in norms]
    hooks.append(head.register_forward_pre_hook(before))
    try:
        yield outputs, inputs
    finally:
        for hook in hooks:
            hook.remove()


def _is_gain(module: nn.Module) -> bool:
    """Whether a module's weight is one factor for each coordinate."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def implied_hessian(model: PreTrainedModel, path: str) -> Tensor | None:
    """What errors of a head's table are measured in where nothing was seen of the model.

    None without such a norm, and where it says nothing: of weights that are all zero, or no numbers.

    Where token ids look the table up, too, nothing is known of that side: the identity stands for it, with as much
    weight as the head's side has.

    Args:
        model: Dense; on the meta device but for that norm, or with all its weights.
        path: Of the table's module.

    Returns:
        (d, d) float64.
    """
    norm = norm_before_head(model)
    if norm is None:
        return None
    moment = implied_moment(model.get_submodule(norm))
    if not moment.any() or not moment.isfinite().all():
        logger.info(f"{norm} of {type(model).__name__} is zero or not finite, and says nothing of its head's errors")
        return None
    looked_up = any(isinstance(model.get_submodule(name), nn.Embedding) for name in tied_modules(model, path))
    return damped(moment, damping=1.0 if looked_up else DAMPING)


@torch.no_grad()
def implied_moment(norm: nn.Module) -> Tensor:
    """E[h hᵀ] of h = norm(u), u with coordinates that are independent and of one size: diag(γ²) + β βᵀ.

    γ is what the norm multiplies each coordinate with, whatever it makes of its weight (Gemma adds 1), and β its bias.

    Args:
        norm: With weights, where accelerate keeps them.

    Returns:
        (d, d) float64.

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> with torch.no_grad():
        ...     _ = norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> implied_moment(norm).diagonal().round(decimals=2).tolist()
        [1.0, 4.0, 9.0, 16.0]
    """
    with align_module_device(norm):
        own = remove_hook_from_module(copy.deepcopy(norm)).cpu().float()
    signs = torch.ones(own.weight.shape)
    signs[1::2] = -1  # of mean 0 and mean square 1: as it is, but for γ and β
    shift = own(torch.zeros_like(signs)).double()
    gain = own(signs).double() - shift
    return torch.diag(gain.square()) + torch.outer(shift, shift)
