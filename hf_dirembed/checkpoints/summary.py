"""What a compressed checkpoint is made of, read from its config and its tensors' headers alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CheckpointError, ModelError
from ..remote.codes_dirembed import CODE_TENSORS, CompressionSpec
from ..remote.configuration_dirembed import read_spec
from ..remote.kernels_dirembed import expanded_bytes
from ..remote.modeling_dirembed import check_stored_dtypes, shards_of
from .loading import as_unreadable_error, find_checkpoint, read_compressed_config
from .safetensors_io import StoredFile


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
        refined_rows: Rows that have further codes.
        refinement_rank: For how many latents.
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


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSummary:
    """Reads what a compressed checkpoint is made of, from its config and its tensors' headers alone.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or one whose tensors do not fit its config.
        ModelError: If the checkpoint is not a compressed one.
        SpecError: If its `dirembed` object is malformed.
    """
    folder = find_checkpoint(folder)
    config = read_compressed_config(folder)
    if config is None:
        raise ModelError(f"{folder} is not a compressed checkpoint: compress it first")
    with as_unreadable_error(folder):
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
        rank=spec.base_rank,
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
