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
import torch
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
from ..remote.checks_dirembed import shards_of
from ..remote.configuration_dirembed import MODEL_TYPE


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

_TEXTS = ["*.json", "*.txt", "*.model", "*.jinja"]  # what of a repo is no weights, a tokenizer's files among it


def resolve_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: `source` itself, or a snapshot of the Hub repo of that name.

    Raises:
        CheckpointError: If there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        _check_layout(folder, folder)
        return folder
    with _as_unknown_name(source):
        # The weights last, by name: what an index does not name, as a copy in another layout, is not fetched.
        patterns = [*_TEXTS, "*/*.safetensors", "README.md"]
        index = Path(
            huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=patterns), SAFE_WEIGHTS_INDEX_NAME
        )
        patterns += [SAFE_WEIGHTS_NAME, *(shards_of(index) if index.is_file() else ())]
        folder = Path(huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=patterns))
        _check_layout(folder, source)
        return folder


def _check_layout(folder: Path, name: str | os.PathLike[str]) -> None:
    """Refuses a folder that does not hold a model itself.

    Raises:
        CheckpointError: If it holds no config.
    """
    if (folder / CONFIG_NAME).is_file():
        return
    inner = next((each.parent.name for each in sorted(folder.glob(f"*/{CONFIG_NAME}"))), None)
    if inner is not None and (folder / "modules.json").is_file():
        raise CheckpointError(
            f"{name} is of the old layout of sentence-transformers, with the model in {inner}: save it in today's "
            f"with SentenceTransformer({str(name)!r}).save('a-new-folder'), and give that"
        )
    raise CheckpointError(f"{name} holds no {CONFIG_NAME}: name the folder of a transformers model")


@contextmanager
def _as_unknown_name(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the Hub raises on what it does not give out into this package's error."""
    try:
        yield
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
    return read_compressed_config(resolve_checkpoint(source)) is not None


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
        _check_format(folder, config, options)
        if auto_class is not None and type(config) not in auto_class._model_mapping:
            raise ModelError(f"{folder} is of an architecture without {auto_class.__name__}: choose another model")
        options = {"dtype": "auto", "use_safetensors": True, **options}
        if auto_class is not None:
            return auto_class.from_pretrained(folder, **options)
        # A derived class would read the config again, and warn of the model type that only the file has.
        return model_class(config).from_pretrained(folder, config=config, **options)


def _check_format(folder: Path, config: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Refuses weights that are not in safetensors, and says how to have them so.

    Raises:
        CheckpointError: If there are none that are.
    """
    held = any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if held or not options.get("use_safetensors", True) or "gguf_file" in options:
        return
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    found = f"its weights are in {pickled[0]}" if pickled else f"there is no {SAFE_WEIGHTS_NAME}"
    loader = model_class(config).__name__
    raise CheckpointError(
        f"{folder} holds no safetensors, {found}: if you trust who made them, convert them with "
        f"transformers.{loader}.from_pretrained({str(folder)!r}, use_safetensors=False)"
        ".save_pretrained('a-new-folder'), and copy the tokenizer's files there"
    )


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a checkpoint was saved with, where it is one for its config; else AutoModel."""
    home = modeling_dirembed if hasattr(config, MODEL_TYPE) else transformers
    named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    found = getattr(home, named, None) if isinstance(named, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return AutoModel
    return found if isinstance(config, found.config_class or ()) else AutoModel


def model_on_meta(class_of_model: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config, without any weights."""
    build = getattr(class_of_model, "from_config", None) or class_of_model._from_config  # AutoModel's, or its own
    with torch.device("meta"):
        return build(config)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Loads a checkpoint's tokenizer; None where it has none.

    Raises:
        CheckpointError: If it has one that transformers cannot load.
    """
    if not any(fnmatch(file.name, "*token*") or fnmatch(file.name, "vocab*") for file in folder.iterdir()):
        return None
    with as_unreadable_error(folder):
        return AutoTokenizer.from_pretrained(folder)


def load_tokenizer_of(source: str | os.PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer of a folder, or of a Hub repo, whose weights are not fetched; None where it has none.

    Args:
        source: The folder, or the repo's id.
        revision: Of the repo; by default the newest.

    Raises:
        CheckpointError: If there is neither, or transformers cannot load the tokenizer.
    """
    folder = Path(source)
    if not folder.is_dir():
        with _as_unknown_name(source):
            name = os.fspath(source)
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_TEXTS))
    return load_tokenizer(folder)


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
