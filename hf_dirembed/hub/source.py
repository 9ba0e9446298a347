"""What the card of a compressed model takes over from the model it was made from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.utils import CONFIG_NAME, logging

from ..errors import CheckpointError
from ..remote.configuration_dirembed import read_spec
from .metadata import card_metadata, valid_repo_id


logger = logging.get_logger(__name__)

INHERITED = ("language", "license", "license_name", "license_link", "pipeline_tag", "library_name")


@dataclass(frozen=True)
class Source:
    """The model that a compressed one was made from.

    Attributes:
        base_model: Its Hub id; None where only a local folder is known, which other people do not have.
        metadata: What its card states of language, licence, pipeline tag and library.

    Raises:
        CheckpointError: If the base model cannot be the id of a Hub repo.
    """

    base_model: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base_model is not None and valid_repo_id(self.base_model) is None:
            raise CheckpointError(f"base model {self.base_model!r} is no id of the Hub: give one like org/name")

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str], base_model: str | None = None) -> Source:
        r"""Reads the card of a folder: the source's own, or the generated one of what was made from it.

        Args:
            folder: It need not hold a card.
            base_model: The Hub id; by default that which a card of a compressed model states.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = Path(folder, "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n")
            ...     Source.of_folder(folder, base_model="me/model")
            Source(base_model='me/model', metadata={'language': ['en', 'no'], 'license': 'mit'})
        """
        stated = card_metadata(Path(folder))
        if base_model is None and stated.get("base_model_relation") == "quantized":
            base_model = valid_repo_id(stated.get("base_model"))
        metadata = {name: _text(stated[name]) for name in INHERITED if _text(stated.get(name))}
        return cls(base_model, metadata)

    @classmethod
    def of_hub(cls, base_model: str) -> Source:
        """Reads the card of a Hub repo; without one, or without the Hub, only its name is known."""
        try:
            return cls.of_folder(Path(hf_hub_download(base_model, "README.md")).parent, base_model)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            logger.warning(f"the card of {base_model} cannot be read, so no licence is taken over: {error}")
            return cls(base_model)

    def completed_by(self, other: Source) -> Source:
        """This source with what only the other one knows."""
        return Source(self.base_model or other.base_model, {**other.metadata, **self.metadata})


def find_source(folder: Path, base_model: str | None = None) -> Source:
    """What a compressed checkpoint was made from, by its own card, its config, and the base model's card.

    Args:
        folder: The checkpoint.
        base_model: The Hub id, where it is known.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    _, spec = read_spec(config)
    source = Source.of_folder(folder, base_model)
    stated = next((record.settings.get("base_model") for record in spec.records.values()), None)
    source = source.completed_by(Source(valid_repo_id(stated)))
    if source.base_model and "license" not in source.metadata:
        source = source.completed_by(Source.of_hub(source.base_model))
    return source


def _text(value: Any) -> Any:
    """A string, or a list of strings; None for anything else that a card may hold."""
    if isinstance(value, list):
        # YAML 1.1 reads an unquoted `no`, for Norwegian, as false
        return [tag for tag in ("no" if each is False else each for each in value) if isinstance(tag, str)] or None
    return value if isinstance(value, str) and value else None
