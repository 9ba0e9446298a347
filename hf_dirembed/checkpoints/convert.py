"""One checkpoint compressed or expanded into another."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..api import check_request, compress, expand
from ..calibration.calibrated import Calibration
from ..calibration.languages import card_languages
from ..errors import ModelError
from ..hub.card import write_card
from ..hub.metadata import hub_id
from ..hub.source import Source
from ..processes import on_main_process
from .atomic import staged_folder
from .loading import find_checkpoint, find_table, is_compressed, load_model, load_tokenizer
from .summary import CheckpointSummary, inspect_checkpoint


# Reading and inspecting have rooms of their own; users find all there is to do with a checkpoint here.
__all__ = [
    "CheckpointSummary",
    "compress_checkpoint",
    "expand_checkpoint",
    "find_checkpoint",
    "find_table",
    "inspect_checkpoint",
    "is_compressed",
    "load_model",
    "load_tokenizer",
]

# Of a source folder, what is not carried over: its weights in any format (new ones are written), its card (it speaks
# of another model), its code (the base class is transformers' own) and the figures that were taken of it.
LEFT_OUT = (
    "model*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "tf_model*",
    "flax_model*",
    "rust_model*",
    "*.onnx",
    "*.gguf",
    "*.py",
    "README.md",
    "dirembed_results.json",
    ".*",
    "onnx",
    "openvino",
    "coreml",
)


def compress_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    **options: Any,
) -> CheckpointSummary:
    """Compresses a checkpoint into another: weights, config, tokenizer, SentenceTransformer modules, and a card.

    Without calibration the model is not loaded, if its file can be read row by row: memory is then a chunk of rows,
    the codes and a few (d, d) matrices, whatever the model's size.

    Processes that `accelerate launch` or `torchrun` started calibrate together, to the same bits as one; the main one
    fits and writes. Call it in all of them.

    Args:
        source: A local folder or a Hub id.
        out: A folder that does not exist yet; it appears when it is complete.
        base_model: The source's Hub id, for the card; by default `source`, where it is one.
        **options: Those of [`compress`], `method` and one of `bits`, `ratio` and `rank` first of all. `languages` are
            by default those of the source's model card.

    Raises:
        DirEmbedError: If the source cannot be compressed, the budget cannot be met, or `out` cannot be written.
    """
    check_request(**options)
    with ExitStack() as stack:
        staging = on_main_process(lambda: stack.enter_context(staged_folder(out)))
        folder = find_checkpoint(source)
        options["languages"] = options.get("languages") or card_languages(folder)
        card_source = Source.of_folder(folder, base_model or hub_id(os.fspath(source)))
        options["base_model"] = card_source.base_model
        model = None
        if (calibration := options.get("calibration")) is not None:
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            resume = options.pop("resume", None)
            options["calibration"] = Calibration.of(model, tokenizer, calibration, options["languages"], resume=resume)

        def write() -> CheckpointSummary:
            _copy_companions(folder, staging)
            stored = find_table(folder) if model is None else None
            if stored is not None:
                stored.compress(staging, load_tokenizer(folder), **options)
            else:
                dense = load_model(folder) if model is None else model
                compress(dense, load_tokenizer(folder), **options).save_pretrained(staging)
            summary = inspect_checkpoint(staging)
            write_card(staging, summary, card_source, model_id=Path(out).name)
            stack.close()  # which gives the folder its name
            return summary

        return on_main_process(write)


def expand_checkpoint(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Expands a compressed checkpoint into a stock one, which loads without this package.

    Raises:
        DirEmbedError: If the source is not compressed, or `out` cannot be written.
    """
    with staged_folder(out) as staging:
        folder = find_checkpoint(source)
        if not is_compressed(folder):
            raise ModelError(f"{folder} is not a compressed checkpoint: there is nothing to expand")
        model = expand(load_model(folder))
        _copy_companions(folder, staging)
        model.save_pretrained(staging)


def _copy_companions(source: Path, target: Path) -> None:
    """Copies what stands beside the weights: tokenizer, pooling modules, prompts."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == source
        return {name for name in names if top and any(fnmatch(name, pattern) for pattern in LEFT_OUT)}

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)
