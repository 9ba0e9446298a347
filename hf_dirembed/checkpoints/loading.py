"""A checkpoint on disk or on the Hub -> its folder, its config, its model, its tokenizer, its table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CheckpointError, DirEmbedError, ModelError, first_line
from ..remote import modeling_dirembed
from ..remote.configuration_dirembed import MODEL_TYPE
from ..remote.modeling_dirembed import shards_of
from .streaming import StoredTable


# What transformers raises, beside its own errors, on configs and weights that make no model.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


def find_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: `source` itself, or a snapshot of the Hub repo of that name.

    Raises:
        CheckpointError: If there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            raise CheckpointError(f"{folder} holds no {CONFIG_NAME}: name the folder of a transformers model")
        return folder
    try:  # the weights last, by name: what an index does not name, as a copy in another layout, is not fetched
        patterns = ["*.json", "*/*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
        index = Path(
            huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=patterns), SAFE_WEIGHTS_INDEX_NAME
        )
        patterns += [SAFE_WEIGHTS_NAME, *(shards_of(index) if index.is_file() else ())]
        return Path(huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(f"{source} is no folder here, and no id of the Hub: check the name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{source} is neither a folder here nor a model that the Hub gives out ({reason}): check the name"
        ) from error


def is_compressed(source: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is a compressed one.

    Raises:
        CheckpointError: If there is none.
    """
    return read_compressed_config(find_checkpoint(source)) is not None


def read_compressed_config(folder: Path) -> dict[str, Any] | None:
    """What the `config.json` of a compressed checkpoint holds; None for another's."""
    with as_unreadable_error(folder):
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return config if isinstance(config, dict) and config.get("model_type") == MODEL_TYPE else None


def load_model(folder: Path, auto_class: Any = None, **options: Any) -> PreTrainedModel:
    """Loads a checkpoint, dense or compressed.

    Args:
        folder: Where it is.
        auto_class: One of the AutoModel classes; by default the class that it was saved in.
        **options: Of `from_pretrained`; by default the dtype is the one that it was saved in.

    Raises:
        CheckpointError: If transformers cannot load it from safetensors.
        ModelError: If models of its architecture are not among those of the AutoModel class.
    """
    with as_unreadable_error(folder):
        config = AutoConfig.from_pretrained(folder)
        if auto_class is not None and type(config) not in auto_class._model_mapping:
            raise ModelError(f"{folder} is of an architecture without {auto_class.__name__}: choose another model")
        options = {"dtype": "auto", "use_safetensors": True, **options}
        if auto_class is not None:
            return auto_class.from_pretrained(folder, **options)
        # A derived class would read the config again, and warn of the model type that only the file has.
        return _model_class(config).from_pretrained(folder, config=config, **options)


def find_table(folder: Path) -> StoredTable | None:
    """Where a checkpoint has its table, if that can be read without loading the model.

    Raises:
        CheckpointError: If transformers cannot read its config.
        ModelError: If the model has no token embedding.
    """
    with as_unreadable_error(folder):
        config = AutoConfig.from_pretrained(folder)
        return StoredTable.find(folder, config, _model_class(config))


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that a checkpoint was saved with, where it is one for its config; else AutoModel."""
    home = modeling_dirembed if hasattr(config, MODEL_TYPE) else transformers
    named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    found = getattr(home, named, None) if isinstance(named, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return AutoModel
    return found if isinstance(config, found.config_class or ()) else AutoModel


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Loads a checkpoint's tokenizer; None where it has none.

    Raises:
        CheckpointError: If it has one that transformers cannot load.
    """
    if not any(fnmatch(file.name, "*token*") or fnmatch(file.name, "vocab*") for file in folder.iterdir()):
        return None
    with as_unreadable_error(folder):
        return AutoTokenizer.from_pretrained(folder)


@contextmanager
def as_unreadable_error(folder: Path) -> Iterator[None]:
    """Turns what transformers raises on an unreadable checkpoint into this package's error."""
    try:
        yield
    except DirEmbedError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{folder} does not load ({first_line(error)}): it must be a safetensors checkpoint"
        ) from error
