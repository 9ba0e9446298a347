"""One checkpoint compressed or expanded into another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from ..api import expand
from ..calibration.calibrated import Calibration
from ..calibration.languages import card_languages
from ..calibration.statistics import Statistics
from ..calibration.text import Texts
from ..compression.compress import Effort, Settings
from ..errors import CheckpointError, ModelError
from ..hub.card import write_card, write_expanded_card
from ..hub.metadata import hub_id
from ..hub.source import Source
from ..pipeline import compress_model
from ..processes import on_main_process
from ..request import CompressionRequest
from .atomic import staged_folder
from .loading import is_compressed, load_model, load_tokenizer, resolve_checkpoint
from .streaming import StoredTables
from .summary import CheckpointSummary, inspect_checkpoint


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
    "dirembed.png",
    ".*",
    "onnx",
    "openvino",
    "coreml",
)


def compress_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: float | Mapping[str, float] | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    tables: Sequence[str] | None = None,
    method: str = "transform",
    languages: str | Sequence[str] | None = None,
    calibration: Texts | Statistics | Calibration | None = None,
    token_weights: Tensor | None = None,
    hessian: Tensor | None = None,
    latent_dtype: str | None = None,
    settings: Settings | None = None,
    device: torch.device | str | None = None,
    base_model: str | None = None,
    resume: str | Path | None = None,
    effort: Effort | None = None,
) -> CheckpointSummary:
    """Compresses a checkpoint into another: weights, config, tokenizer, SentenceTransformer modules, and a card.

    Without calibration the model is not loaded, if its file can be read row by row: memory is then a chunk of rows,
    the codes and a few (d, d) matrices, whatever the model's size. Of tables of more than a million rows that all
    count alike, as n-gram tables, not even the codes are in memory. Such codes, and copies of the blocks of a
    per-layer table, are in files beside `out` until it is complete: disk space for both is needed.

    Processes that `accelerate launch` or `torchrun` started on one machine calibrate together, to the same bits as
    one, and share the rows of such tables; the main one fits and writes the rest. Call it in all of them.

    Args:
        source: A local folder or a Hub id.
        out: A folder that does not exist yet; it appears when it is complete.
        bits: These and the following: as for [`hf_dirembed.compress`].
        ratio: Likewise.
        rank: Likewise.
        tables: Likewise.
        method: Likewise.
        languages: By default those of the source's model card.
        calibration: As for [`hf_dirembed.compress`].
        token_weights: Likewise.
        hessian: Likewise.
        latent_dtype: Likewise.
        settings: Likewise.
        device: Likewise.
        base_model: The source's Hub id, for the card; by default `source`, where it is one.
        resume: As for [`hf_dirembed.compress`].
        effort: Likewise.

    Raises:
        DirEmbedError: If the source cannot be compressed, the budget cannot be met, or `out` cannot be written.
    """
    request = CompressionRequest(
        bits, ratio, rank, tables, method, languages, calibration, token_weights, hessian, latent_dtype, settings,
        device, base_model, resume, effort,
    )  # fmt: skip
    with ExitStack() as stack:
        staging = on_main_process(lambda: stack.enter_context(staged_folder(out)))
        folder = resolve_checkpoint(source)
        _refuse_nested(source, out)
        card_source = Source.of_folder(folder, base_model or hub_id(os.fspath(source)))
        request = replace(request, languages=languages or card_languages(folder), base_model=card_source.base_model)
        model = None
        if calibration is not None:
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            used = Calibration.of(model, tokenizer, calibration, request.languages, resume=resume)
            request = replace(request, calibration=used, resume=None)

        def write() -> CheckpointSummary:
            copy_companions(folder, staging)
            stored = StoredTables.find(folder, request.names) if model is None else None
            if stored is not None:
                stored.compress(staging, load_tokenizer(folder), request)
            else:
                dense = load_model(folder) if model is None else model
                compress_model(dense, load_tokenizer(folder), request).save_pretrained(staging)
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
        folder = resolve_checkpoint(source)
        _refuse_nested(source, out)
        if not is_compressed(folder):
            raise ModelError(f"{folder} is not a compressed checkpoint: there is nothing to expand")
        summary = inspect_checkpoint(folder)
        model = expand(load_model(folder))
        copy_companions(folder, staging)
        model.save_pretrained(staging)
        write_expanded_card(staging, summary, Source.of_folder(folder), model_id=Path(out).name)


def copy_companions(source: Path, target: Path) -> None:
    """Copies what stands beside the weights: tokenizer, pooling modules, prompts."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == source
        return {name for name in names if top and any(fnmatch(name, pattern) for pattern in LEFT_OUT)}

    # what is copied is the user's, to be written to, whatever may be done with the source
    for folder, folders, files in os.walk(source):
        skipped = left_out(folder, [*folders, *files])
        folders[:] = [name for name in folders if name not in skipped]
        place = target / Path(folder).relative_to(source)
        place.mkdir(exist_ok=True)
        for name in files:
            if name not in skipped:
                shutil.copyfile(Path(folder, name), place / name)


def _refuse_nested(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Refuses an output in the folder that it is made from, of which it would become a part.

    Raises:
        CheckpointError: If it is.
    """
    if Path(source).is_dir() and Path(out).resolve().is_relative_to(Path(source).resolve()):
        raise CheckpointError(f"{out} is inside of {source}, which it is made from: name a folder beside it")
