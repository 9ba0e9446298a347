"""A checkpoint -> a folder with an ONNX model, which engines load that know neither this package nor torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.calibrated import Calibration
from ..calibration.languages import card_languages
from ..calibration.statistics import Statistics
from ..calibration.text import Texts
from ..checkpoints.atomic import staged_folder
from ..checkpoints.loading import (
    as_unreadable_error,
    is_compressed,
    load_model,
    load_tokenizer,
    model_class,
    model_on_meta,
    resolve_checkpoint,
)
from ..compression.compress import Settings
from ..errors import ExportError, ModelError, OptionError
from ..hub.metadata import hub_id
from ..hub.source import Source, find_source
from ..pipeline import compress_model
from ..remote.codes_dirembed import with_known_options
from ..request import CompressionRequest
from .body import example_inputs, lookups_of, make_graph, outputs_of
from .card import write_export_card
from .check import check_lookup, compare
from .folder import MODULES_FILE, check_pooling, write_companions
from .lookup import Lookup
from .packages import require_packages
from .quantise import BODIES, Body, body_of, write_quantised
from .summary import ExportedFile, ExportSummary


if TYPE_CHECKING:
    import onnx

FOLDER = "onnx"  # of the files, where engines look for them
METADATA = "hf_dirembed"  # the key, in an ONNX file's metadata, of what it was made of
_CHECKED = {"batch": 3, "length": 33}  # texts and tokens that files are run with before they appear
_MIN_OPSET = 18  # the first that has bitwise operators


@with_known_options
def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    body: str = "fp32",
    opset: int | None = None,
    pooling: str | None = None,
    bits: float | Mapping[str, float] | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    method: str = "transform",
    languages: str | list[str] | tuple[str, ...] | None = None,
    calibration: Texts | Statistics | Calibration | None = None,
    settings: Settings | None = None,
    base_model: str | None = None,
) -> ExportSummary:
    """Exports an encoder or a classifier to ONNX, for engines that know neither this package nor torch.

    The new folder holds what engines expect of a stock model: `config.json`, the tokenizer, the modules of
    sentence-transformers, and `onnx/model.onnx`. Codes stay packed in the file and in the memory of what runs it; only
    the rows that are asked for are decoded. Every file is run in onnxruntime, and compared with the model, before the
    folder appears.

    Args:
        source: A compressed checkpoint, or a dense one and a budget: a local folder or a Hub id.
        out: A folder that does not exist yet; it appears when it is complete.
        body: What is written beside `onnx/model.onnx`, whose body is in float32. `int8`: `onnx/model_quantized.onnx`,
            its matrix products in 8 bits; `int8-weights`: `onnx/model_int8.onnx`, its weights in 8 bits, which is
            closer to the model. `fp32`: nothing.
        opset: The version of ONNX's operators, 18 at least; by default the exporter's.
        pooling: How token vectors become one of the text, for a source that does not say: `mean`, `cls`, `max`,
            `lasttoken`, `weightedmean` or `mean_sqrt_len_tokens`. Of a model with an LM head, the body is exported.
        bits: For a dense source, exactly one of this and the following two, as for [`hf_dirembed.compress`].
        ratio: Likewise.
        rank: Likewise.
        method: As for [`hf_dirembed.compress`].
        languages: Likewise; by default those of the source's model card.
        calibration: Likewise.
        settings: Likewise.
        base_model: The source's Hub id, for the card; by default `source`, where it is one.

    Returns:
        What the folder holds.

    Raises:
        CheckpointError: If the source cannot be read, or `out` cannot be written.
        ExportError: If a package is missing, the model has an LM head or cannot be exported, or what was exported
            does not answer as the model does.
        OptionError: If an option is unknown, or does not go with the source.
        DirEmbedError: Where [`hf_dirembed.compress`] raises one, for a dense source.

    Example:
        >>> import tempfile, hf_dirembed
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=900, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> folder = Path(tempfile.mkdtemp())
        >>> BertModel(config).save_pretrained(folder / "dense")
        >>> summary = hf_dirembed.export(folder / "dense", folder / "exported", bits=4, pooling="mean")
        >>> [file.name for file in summary.files], summary.outputs
        (['onnx/model.onnx'], ('last_hidden_state',))
    """
    # what can be refused before anything is read
    require_packages()
    bodies = list(dict.fromkeys([BODIES["fp32"], body_of(body)]))
    if opset is not None and (type(opset) is not int or opset < _MIN_OPSET):
        raise OptionError(f"opset {opset!r} has no bitwise operators: choose {_MIN_OPSET} or a later one")

    with staged_folder(out) as staging:
        # the compressed model, in float32
        folder = resolve_checkpoint(source)
        check_pooling(folder, pooling)
        options = {
            "bits": bits, "ratio": ratio, "rank": rank, "method": method, "languages": languages,
            "calibration": calibration, "settings": settings,
        }  # fmt: skip
        origin, model, tokenizer = _load(folder, base_model or hub_id(os.fspath(source)), pooling, options)
        model = model.float().eval()

        # its graph, then the files of it and what stands beside them
        inputs = input_names(tokenizer)
        graph, lookups = _make_checked_graph(model, inputs, opset)
        write_companions(folder, model, pooling, staging)
        summary = _write_files(graph, lookups, bodies, model, inputs, staging)
        write_export_card(staging, summary, model, origin, model_id=Path(out).name)
        return summary


def _load(
    folder: Path, name: str | None, pooling: str | None, options: dict[str, Any]
) -> tuple[Source, PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The compressed model of a checkpoint, with its tokenizer, and what it was made from."""
    compressed = is_compressed(folder)
    given = [key for key, value in options.items() if value not in (None, "transform")]
    if compressed and given:
        raise OptionError(
            f"{folder} is compressed already: leave {', '.join(given)} out, or name the dense checkpoint"
        )
    if not compressed and not {"bits", "ratio", "rank"}.intersection(given):
        raise OptionError(f"{folder} is a dense checkpoint: say how small its tables shall be, as with --bits 2")

    auto_class = _class_to_export(folder, encodes=pooling is not None or (folder / MODULES_FILE).is_file())
    if compressed:
        return find_source(folder, name), load_model(folder, auto_class, dtype=torch.float32), load_tokenizer(folder)

    origin = Source.of_folder(folder, name)
    request = CompressionRequest(**options, base_model=origin.base_model)
    request = replace(request, languages=options["languages"] or card_languages(folder))
    model, tokenizer = load_model(folder, auto_class), load_tokenizer(folder)
    return origin, compress_model(model, tokenizer, request), tokenizer


def _class_to_export(folder: Path, *, encodes: bool) -> Any:
    """The AutoModel class to load a checkpoint with; None for the class that it was saved in.

    Raises:
        ExportError: If it has an LM head, and nothing says that it encodes texts.
    """
    with as_unreadable_error(folder):
        config = AutoConfig.from_pretrained(folder)
    saved = model_class(config)
    if model_on_meta(saved, config).get_output_embeddings() is None:
        return None
    if not encodes:
        raise ExportError(
            f"{folder} is a model with an LM head, which onnxruntime cannot read from packed codes: make it dense "
            "with hf-dirembed expand and export that, or export its body as an encoder of texts, with --pooling mean"
        )
    return AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel


def input_names(tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """The inputs that a tokenizer gives, of those that encoders of text have."""
    given = ["input_ids", "attention_mask"] if tokenizer is None else tokenizer.model_input_names
    return ("input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in given else ()))


def _make_checked_graph(
    model: PreTrainedModel, inputs: tuple[str, ...], opset: int | None
) -> tuple[onnx.ModelProto, list[str]]:
    """The ONNX model, and the names of the nodes that look tokens up, whose rows have been compared with torch's."""
    tables = lookups_of(model)
    if not tables:
        raise ModelError(
            f"{type(model).__name__} has no compressed table to look tokens up in: name another checkpoint"
        )
    graph = make_graph(model, example_inputs(inputs, _vocabulary(tables)), opset)
    chosen = next(each.version for each in graph.opset_import if not each.domain)
    for name, table in tables.items():
        check_lookup(name, table, chosen)

    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(model.config.dirembed, sort_keys=True)
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Lookup))
    return graph, [node.name for node in graph.graph.node if node.name.startswith(prefixes)]


def _vocabulary(tables: Mapping[str, Lookup]) -> int:
    """How many ids every table has rows for."""
    return min(table.num_rows for table in tables.values())


def _write_files(
    graph: onnx.ModelProto,
    lookups: list[str],
    bodies: list[Body],
    model: PreTrainedModel,
    inputs: tuple[str, ...],
    staging: Path,
) -> ExportSummary:
    """Writes and runs an ONNX file for each body."""
    import onnx

    # the files, each compared with what the model answers
    tables = lookups_of(model)
    examples = example_inputs(inputs, _vocabulary(tables), **_CHECKED)
    expected = outputs_of(model, examples)
    (staging / FOLDER).mkdir()
    files = []
    for body in bodies:
        file = staging / FOLDER / body.file
        if body.name == "fp32":
            onnx.save(graph, file)
        else:
            write_quantised(graph, body, lookups, file)
        kind = "difference" if body.name == "fp32" else "cosine"
        answered = {kind: compare(file, body, examples, expected)}
        files.append(ExportedFile(f"{FOLDER}/{body.file}", body.name, file.stat().st_size, **answered))

    # what the dense model would take
    dense_tables = sum(4 * table.num_rows * table.dim for table in tables.values())
    own = {id(tensor) for table in tables.values() for tensor in table.code_tensors().values()}
    others = sum(4 * each.numel() for each in model.parameters() if id(each) not in own)
    return ExportSummary(
        getattr(type(model), "base_class", type(model)).__name__,
        inputs,
        tuple(expected),
        tuple(files),
        dense_tables + others,
        tuple(tables),
        sum(table.num_bytes for table in tables.values()),
        dense_tables,
    )
