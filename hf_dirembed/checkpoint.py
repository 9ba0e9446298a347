"""Checkpoints on disk: one compressed or expanded into another, and what one is made of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
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
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import modeling_dirembed
from .compression import compress, expand
from .compression.calibrated import Calibration
from .compression.compress import check_request
from .compression.languages import card_languages
from .configuration_dirembed import MODEL_TYPE, read_spec
from .hub import Source, write_card
from .kernels_dirembed import expanded_bytes
from .layout_dirembed import CODE_TENSORS, CheckpointError, CompressionSpec, DirEmbedError, ModelError, first_line
from .loading_dirembed import check_stored_dtypes, shards_of
from .metadata import hub_id
from .processes import on_main_process
from .staging import staged_folder
from .stored import StoredFile
from .streaming import StoredTable


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
# What transformers raises, beside its own errors, on configs and weights that make no model.
UNREADABLE = (
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
_FIGURES = ("mean_cosine", "token_cosine", "shortened_cosine", "distortion", "bound_bits")


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return prod(self.shape) * str_to_torch_dtype[self.dtype].itemsize


@dataclass(frozen=True)
class CheckpointSummary:
    """What a compressed checkpoint holds in place of its token-embedding table.

    Attributes:
        method: What found the codes.
        base_model_type: The architecture, like `bert`.
        num_embeddings: V.
        embedding_dim: d.
        rank: Latents of every row.
        refined_rows: Rows that have further latents.
        refinement_rank: How many they have.
        outliers: Rows that are kept as they are.
        codes: `packed`, or the dtype of the latents.
        bits_per_weight: 8 x `bytes` / (V x d).
        ratio: `dense_bytes` / `bytes`.
        bytes: Of all tensors that replace the table.
        code_bytes: Of these, the codes, the outliers and the numbers of such rows.
        decoder_bytes: Of these, the decoder and its bias.
        expanded_bytes: Memory that a tied head takes beside them, on CPU from its first pass on: codes unpacked.
        dense_bytes: Of the table, as the source checkpoint stored it.
        mean_cosine: Between the rows of the table and what replaces them; None where the checkpoint does not say.
        token_cosine: The same, each row weighed by how often its token is expected.
        shortened_rows: How many rows are far longer than most, and had to be coded all the same: only their direction.
        shortened_cosine: The mean cosine of these; None where there are none.
        distortion: The share of the table's weighted variance that is lost, in the measure that `transform` minimises.
        bound_bits: Bits per weight in which a Gaussian table of the same weighted spectrum could be coded with that
            distortion (reverse water-filling); `bits_per_weight` less this is the distance to the bound.
    """

    method: str
    base_model_type: str
    num_embeddings: int
    embedding_dim: int
    rank: int
    refined_rows: int
    refinement_rank: int
    outliers: int
    codes: str
    bits_per_weight: float
    ratio: float
    bytes: int
    code_bytes: int
    decoder_bytes: int
    expanded_bytes: int
    dense_bytes: int
    mean_cosine: float | None
    token_cosine: float | None
    shortened_rows: int
    shortened_cosine: float | None
    distortion: float | None
    bound_bits: float | None


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
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{source} is neither a folder here nor a model that the Hub gives out ({reason}): check the name"
        ) from error


def is_compressed(source: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is a compressed one.

    Raises:
        CheckpointError: If there is none.
    """
    return _read_compressed_config(find_checkpoint(source)) is not None


def _read_compressed_config(folder: Path) -> dict[str, Any] | None:
    """What the `config.json` of a compressed checkpoint holds; None for another's."""
    with _as_checkpoint_error(folder):
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
    with _as_checkpoint_error(folder):
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
    with _as_checkpoint_error(folder):
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
    with _as_checkpoint_error(folder):
        return AutoTokenizer.from_pretrained(folder)


@contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    """Turns what transformers raises on an unreadable checkpoint into this package's error."""
    try:
        yield
    except DirEmbedError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder} does not load ({first_line(error)}): it must be a safetensors checkpoint"
        ) from error


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
        model = expand(load_model(folder))
        _copy_companions(folder, staging)
        model.save_pretrained(staging)


def _copy_companions(source: Path, target: Path) -> None:
    """Copies what stands beside the weights: tokenizer, pooling modules, prompts."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == source
        return {name for name in names if top and any(fnmatch(name, pattern) for pattern in LEFT_OUT)}

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSummary:
    """Reads what a compressed checkpoint is made of, from its config and its tensors' headers alone.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or one whose tensors do not fit its config.
        ModelError: If the checkpoint is not a compressed one.
        SpecError: If its `dirembed` object is malformed.
    """
    folder = find_checkpoint(folder)
    config = _read_compressed_config(folder)
    if config is None:
        raise ModelError(f"{folder} is not a compressed checkpoint: compress it first")
    with _as_checkpoint_error(folder):
        base_model_type, spec = read_spec(config)
        tensors = _read_headers(folder)
    num_rows, dim, sizes = _table_tensors(folder, spec, tensors)
    num_bytes = sum(sizes.values())
    decoder_bytes = sizes["decoder_weight"] + sizes.get("decoder_bias_weight", 0)
    dense_bytes = int(spec.figure("dense_bytes") or num_rows * dim * 4)
    return CheckpointSummary(
        method=spec.method,
        base_model_type=base_model_type,
        num_embeddings=num_rows,
        embedding_dim=dim,
        rank=spec.rank,
        refined_rows=spec.refinement.rows if spec.refinement else 0,
        refinement_rank=spec.refinement.rank if spec.refinement else 0,
        outliers=spec.outliers or 0,
        codes=spec.codes,
        bits_per_weight=8 * num_bytes / (num_rows * dim),
        ratio=dense_bytes / num_bytes,
        bytes=num_bytes,
        code_bytes=num_bytes - decoder_bytes,
        decoder_bytes=decoder_bytes,
        expanded_bytes=expanded_bytes(num_rows, spec),
        dense_bytes=dense_bytes,
        shortened_rows=int(spec.figure("shortened_rows") or 0),
        **{name: spec.figure(name) for name in _FIGURES},
    )


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """What the headers of a checkpoint's shards say of every tensor; nothing else is read."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    tensors = {}
    for shard in sorted(shards_of(index) if index.is_file() else {SAFE_WEIGHTS_NAME}):
        for name, tensor in StoredFile.read(folder / shard).tensors.items():
            tensors[name] = StoredTensor(tuple(tensor["shape"]), tensor["dtype"])
    return tensors


def _table_tensors(
    folder: Path, spec: CompressionSpec, tensors: dict[str, StoredTensor]
) -> tuple[int, int, dict[str, int]]:
    """V, d, and the bytes of each tensor that replaces the table."""
    check_stored_dtypes(spec, {name: tensor.dtype for name, tensor in tensors.items()})
    for name, decoder in tensors.items():
        prefix = name.removesuffix("decoder_weight")
        codes = tensors.get(f"{prefix}weight")
        if prefix == name or codes is None or len(codes.shape) != 2 or len(decoder.shape) != 2:
            continue
        (num_rows, _), (_, dim) = codes.shape, decoder.shape
        found = {tensor: tensors[prefix + tensor] for tensor in CODE_TENSORS if prefix + tensor in tensors}
        if spec.stored_shapes(num_rows, dim) == {tensor: stored.shape for tensor, stored in found.items()}:
            spec.check_table(num_rows, dim)
            return num_rows, dim, {tensor: stored.num_bytes for tensor, stored in found.items()}
    raise CheckpointError(f"no tensors of {folder} fit its dirembed config: save or download the model again")
