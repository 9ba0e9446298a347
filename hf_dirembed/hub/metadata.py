"""What the name and the card of a model say of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging


logger = logging.get_logger(__name__)


def hub_id(name: Any) -> str | None:
    """What a model was loaded by, if that is the id of a Hub repo and no local path.

    Example:
        >>> hub_id("intfloat/multilingual-e5-small"), hub_id("/home/me/model"), hub_id("../model"), hub_id("")
        ('intfloat/multilingual-e5-small', None, None, None)
    """
    return None if isinstance(name, str) and os.path.exists(name) else valid_repo_id(name)


def valid_repo_id(name: Any) -> str | None:
    """The name, if it can be the id of a Hub repo: what a config or a card states.

    Example:
        >>> valid_repo_id("intfloat/multilingual-e5-small"), valid_repo_id("a/b/c"), valid_repo_id(["a"])
        ('intfloat/multilingual-e5-small', None, None)
    """
    if not isinstance(name, str) or not name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def card_metadata(path: str | Path) -> dict[str, Any]:
    """The YAML head of a model card; empty, with a warning, where it cannot be read: a card never stops anything.

    Args:
        path: A model folder, or its README.md.
    """
    card = Path(path)
    card = card / "README.md" if card.is_dir() else card
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (ValueError, OSError, yaml.YAMLError) as error:  # broken YAML, or no text
        logger.warning(f"cannot read the metadata of {card}: {error}")
        return {}
    return metadata if isinstance(metadata, dict) else {}
