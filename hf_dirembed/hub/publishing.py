"""What goes to the Hub with a compressed model: its card, and the upload itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedModel

from ..checkpoints.summary import inspect_checkpoint
from ..errors import CheckpointError, first_line
from ..evaluation.results import RESULTS_NAME
from ..remote import configuration_dirembed
from .card import CARD_NAME, PICTURE_NAME, RESULTS_FILE, is_generated, write_card
from .metadata import card_metadata, valid_repo_id
from .source import Source, find_source


def write_checkpoint_card(
    folder: str | os.PathLike[str], *, base_model: str | None = None, model_id: str | None = None, force: bool = False
) -> Path:
    """Writes the model card of a compressed checkpoint, with the results of evaluations that lie beside it.

    What a card that is there says of licence, language and task is kept.

    Args:
        folder: The checkpoint.
        base_model: The Hub id of the model that it was made from; by default what its card or config say.
        model_id: Its own Hub id; by default the folder's name.
        force: Replace a card that somebody wrote by hand.

    Returns:
        The card's file.

    Raises:
        DirEmbedError: If the folder holds no compressed checkpoint or a card written by hand, or cannot be written.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is no folder: download the model first, or name its folder")
    summary, folder = inspect_checkpoint(folder), Path(folder)
    if not summary.tables:
        raise CheckpointError(f"{folder} is not a compressed checkpoint: compress it first")
    if model_id is not None and valid_repo_id(model_id) is None:
        raise CheckpointError(f"model id {model_id!r} is no id of the Hub: give one like org/name")
    source = find_source(folder, base_model)
    return write_card(folder, summary, source, model_id=model_id or folder.resolve().name, force=force)


def upload_checkpoint(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False) -> str:
    """Uploads a checkpoint to the Hub.

    Args:
        folder: What [`compress_checkpoint`] wrote.
        repo_id: Made if it does not exist.
        private: Whether a repo that is made is private.

    Returns:
        The repo's address.

    Raises:
        CheckpointError: If the Hub cannot be reached or refuses.
    """
    try:
        repo = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        if is_generated(Path(folder) / CARD_NAME):
            write_checkpoint_card(folder, model_id=repo.repo_id)  # which says what to load it by
        huggingface_hub.upload_folder(repo_id=repo.repo_id, folder_path=Path(folder))
    except _upload_errors() as error:
        raise CheckpointError(
            f"{repo_id} takes no upload ({first_line(error)}): check its name, run hf auth login, and try again with "
            f"hf upload {repo_id} {folder}, which is complete"
        ) from error
    return str(repo)


def _upload_errors() -> tuple[type[Exception], ...]:
    """What uploads raise; where there is no connection, what depends on huggingface_hub's version and HTTP library."""
    transport = (module.HTTPError for name in ("httpx", "httpx2") if (module := sys.modules.get(name)))
    return HFValidationError, HfHubHTTPError, OSError, *transport


def remove_traces(folder: str | os.PathLike[str]) -> None:
    """Removes what a compressed model has beside config and weights, from a folder that a stock one was saved over.

    A card or results that somebody wrote by hand stay, and so do files that are only called alike.

    Args:
        folder: It need not have held a compressed model.
    """
    held = Path(folder)
    if not (held / f"{configuration_dirembed.__name__.rpartition('.')[2]}.py").is_file():
        return
    code = {file.name for file in Path(configuration_dirembed.__file__).parent.glob("*_dirembed.py")}
    for name in (*code, PICTURE_NAME, RESULTS_NAME, RESULTS_FILE):
        (held / name).unlink(missing_ok=True)
    if (held / CARD_NAME).is_file() and is_generated(held / CARD_NAME):
        (held / CARD_NAME).unlink()
    results = (held / RESULTS_FILE).parent
    if results.is_dir() and not any(results.iterdir()):
        results.rmdir()


def write_upload_card(model: PreTrainedModel, folder: str, repo_id: str) -> None:
    """Writes the card of a model that `push_to_hub` is about to upload, unless its repo has one written by hand.

    Results of evaluations are not taken along: what is pushed may have been trained since.

    Args:
        model: The model that is pushed.
        folder: What is uploaded, the card of the repo or of transformers among it.
        repo_id: Where it is uploaded to.
    """
    path = Path(folder)
    if not is_generated(path / CARD_NAME):
        return
    source = find_source(path)
    if (loaded_from := model.name_or_path) and os.path.isdir(loaded_from):
        source = source.completed_by(Source.of_folder(loaded_from))
    stated = card_metadata(path).get("tags")
    tags = tuple(tag for tag in stated if isinstance(tag, str)) if isinstance(stated, list) else ()
    write_card(path, inspect_checkpoint(path), source, model_id=repo_id, tags=tags)
