"""Where this hooks into vLLM. None of it is a documented extension point, so all of it is named here.

vLLM's documented ways do not reach far enough. A quantisation method is one for the whole model, so that a compressed
table could not stand beside a quantised body, and two thirds of the vocabulary layers are made without telling it. A
model class registered under another name loses what vLLM knows of the architecture by its name.
"""

from __future__ import annotations

from typing import Any

from vllm import __version__ as version
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils import config as vllm_config

from .config import served_config


TESTED = "0.32"
DENSE_METHOD: Any = UnquantizedEmbeddingMethod  # makes the weight of vocabulary layers that nothing quantises
_PARSERS: dict[str, Any] = vllm_config._CONFIG_FORMAT_TO_CONFIG_PARSER  # `register_config_parser("hf")` would warn
_MARK = "hf_dirembed"  # of what is hooked in already
logger = init_logger("vllm.plugins.hf_dirembed")
_serving_classes: dict[type, type] = {}


def install() -> None:
    """Hooks in, once: a config of ours is read as its base's, and its model has layers that wait for tables.

    Raises:
        AttributeError: If this vLLM has no such places, or other ones.
        LookupError: Likewise.
    """
    parser, resolve = _PARSERS["hf"], ModelRegistry.resolve_model_cls
    if not hasattr(parser, _MARK):
        _PARSERS["hf"] = _reading_ours(parser)
    if not hasattr(resolve, _MARK):
        ModelRegistry.resolve_model_cls = _serving_ours(resolve)


def _reading_ours(parser: Any) -> type:
    """A parser of configs that reads those of compressed models as their bases'."""

    def parse(self: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        config_dict, config = served_config(*parser.parse(self, *args, **kwargs))
        if hasattr(config, "dirembed") and not version.startswith(f"{TESTED}."):
            logger.warning_once(f"hf_dirembed was tested with vLLM {TESTED}, and this is {version}")
        return config_dict, config

    return type(parser.__name__, (parser,), {"parse": parse, _MARK: True})


def _serving_ours(resolve: Any) -> Any:
    """What finds a model's class, and makes of it one with layers that wait where the model is compressed."""

    def resolve_model_cls(architectures: Any, model_config: Any) -> tuple[type, str]:
        found, architecture = resolve(architectures, model_config)
        if not hasattr(model_config.hf_config, "dirembed"):
            return found, architecture
        if found not in _serving_classes:
            from .layers import serving_class

            _serving_classes[found] = serving_class(found, DENSE_METHOD)
        return _serving_classes[found], architecture

    setattr(resolve_model_cls, _MARK, True)
    return resolve_model_cls
