"""What stands beside exported files, for the engines that load them: a stock config, the tokenizer, pooling."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.convert import copy_companions
from ..errors import OptionError
from ..hub.card import PICTURE_NAME
from ..remote.configuration_dirembed import DirEmbedConfigMixin


POOLINGS = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
MODULES_FILE = "modules.json"
_POOLING_FOLDER = "1_Pooling"
_KEYS = {
    "cls": "pooling_mode_cls_token",
    "lasttoken": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}


def check_pooling(source: Path, pooling: str | None) -> None:
    """Refuses a pooling that there is not, or that the source has its own of.

    Raises:
        OptionError: If so.
    """
    if pooling is None:
        return
    if pooling not in POOLINGS:
        raise OptionError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}: choose one of these")
    if (source / MODULES_FILE).is_file():
        raise OptionError(f"{source} says in {MODULES_FILE} how it is pooled: leave --pooling {pooling} out")


def write_companions(source: Path, model: PreTrainedModel, pooling: str | None, target: Path) -> None:
    """Writes what stands beside the exported files.

    Args:
        source: The checkpoint.
        model: What was exported of it.
        pooling: One of `POOLINGS`, for a source without modules of sentence-transformers; None for no such modules.
        target: The folder to write to.
    """
    copy_companions(source, target)
    (target / PICTURE_NAME).unlink(missing_ok=True)
    _stock_config(model).save_pretrained(target)
    if pooling is not None:
        _write_modules(model.config.get_text_config().hidden_size, pooling, target)


def _stock_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of a compressed model as that of the dense one, which every engine knows."""
    config = copy.deepcopy(model.config)
    if isinstance(config, DirEmbedConfigMixin):
        del config.dirembed
        vars(config).pop("auto_map", None)
        config.__class__ = config.base_class
    config.dtype = "float32"
    config.architectures = [getattr(type(model), "base_class", type(model)).__name__]
    return config


def _write_modules(dim: int, pooling: str, target: Path) -> None:
    """Writes the files by which sentence-transformers knows a transformer and its pooling."""
    kinds = [("", "Transformer"), (_POOLING_FOLDER, "Pooling")]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
    settings = {key: name == pooling for name, key in _KEYS.items()}
    written = {MODULES_FILE: modules, f"{_POOLING_FOLDER}/config.json": {"word_embedding_dimension": dim, **settings}}
    (target / _POOLING_FOLDER).mkdir()
    for name, content in written.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
