"""What PEFT may wrap of a compressed model, and what may have its codes for a weight.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from .codes_dirembed import CODE_TENSORS, ModelError
from .guarded_dirembed import CodesParameter, holds_codes
from .matrix_dirembed import DECODER_TENSORS, CompressedMatrix


WRAPPED = ("base_layer", "original_module")  # what PEFT's wrappers call the module that they wrap

CHANGES = ("orig", "g", "v")  # what `torch.nn.utils` adds to the name of a weight that it changes


def refuse_wrapper(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuses wrappers of PEFT that cannot work around a compressed matrix; called for every module that gets a part.

    Args:
        parent: What the module becomes a part of.
        name: What it is called there.
        child: The module.

    Raises:
        ModelError: If the wrapper changes rows of a dense table, trains packed codes, or adapts one of several modules
            that share a decoder.
    """
    if name not in WRAPPED or not isinstance(child, CompressedMatrix):
        return
    wrapper = type(parent)
    if wrapper.__module__.partition(".")[0] != "peft":
        return

    parameter = vars(parent).get("parameter_name")  # of LoRA's `target_parameters`
    if parameter is not None:
        if child.tied:
            raise ModelError(
                f"{parameter} of this {type(child).__name__} is shared with a tied module, which an adapter of one of "
                "them would leave behind: train the decoder itself, or expand the model with hf_dirembed.expand"
            )

        if not child.get_parameter(parameter).is_floating_point():
            raise ModelError(f"{parameter} holds packed integers, which no adapter adds to: choose decoder_weight")
    elif wrapper.__name__ != "ModulesToSaveWrapper":
        raise ModelError(
            f"PEFT's {wrapper.__name__} changes rows of a dense table, and a {type(child).__name__} has none: expand "
            "the model first with hf_dirembed.expand"
            + ("" if child.tied else ", or adapt its decoder with LoraConfig(target_parameters=['...decoder_weight'])")
        )
    elif not child.layout.packed and not child.learning:
        raise ModelError(
            f"modules_to_save trains all of a module, and the latents of this {type(child).__name__} are frozen: call "
            "unfreeze_codes() of the model first, or leave the module out"
        )
    elif child.layout.packed:
        raise ModelError(
            "modules_to_save trains all of a module, and packed codes learn only without PEFT (unfreeze_codes): leave "
            f"the {type(child).__name__} out of it, or compress with method='direction' and call unfreeze_codes(), or "
            "expand the model first with hf_dirembed.expand"
        )


def refuse_codes(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Refuses codes as the parameter of what computes with them; called for every parameter that a module gets.

    A head that is tied by hand, or by PEFT's `ensure_weight_tying`, would multiply with them; `torch.nn.utils` prunes,
    scales and parametrises weights.

    Raises:
        ModelError: If the parameter is one of codes, and the module a dense one or one that changes weights; or if a
            compressed one is given what stands for changed codes.
    """
    if parameter is None:
        return
    stem, _, change = name.rpartition("_")
    of_codes = isinstance(module, CompressedMatrix) and stem in CODE_TENSORS and stem not in DECODER_TENSORS
    if (of_codes and change in CHANGES) or (isinstance(module, ParametrizationList) and holds_codes(parameter)):
        raise ModelError(
            "the codes of a compressed table cannot be pruned, normalised or parametrised, as weights can: do that to "
            "the dense model before it is compressed, or to one that hf_dirembed.expand makes"
        )
    if name == "weight" and isinstance(module, (nn.Linear, nn.Embedding)) and holds_codes(parameter):
        raise ModelError(
            f"a dense {type(module).__name__} cannot have the codes of a compressed table for its weight: give it "
            "dense_weight(), with PEFT leave ensure_weight_tying out, or make a dense model first with "
            "hf_dirembed.expand, and compress that once it is tied"
        )


def refuse_idle_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Refuses a step of an optimiser that has nothing but codes, and so would do nothing.

    Raises:
        ModelError: If it has none but codes that are frozen.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if parameters and all(isinstance(each, CodesParameter) for each in parameters):
        raise ModelError(
            "this optimiser has nothing but codes of compressed tables, which do not learn: give it the parameters of "
            "the model or of the table, of which the decoder learns, or call unfreeze_codes() first"
        )
