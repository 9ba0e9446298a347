"""What runs: the embedding over a matrix held as codes and a decoder.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout_dirembed import CompressionSpec, ModelError
from .matrix_dirembed import CompressedMatrix


UNIQUE_FROM = 64  # ids in a batch from which decoding each distinct row once is worth finding the distinct rows


class CompressedEmbedding(CompressedMatrix):
    """Drop-in for `nn.Embedding` over a compressed table.

    Args:
        num_embeddings: V.
        embedding_dim: d.
        spec: The layout of the codes.
        padding_idx: Kept for those who read it; lookups depend on the spec's `zero_row` alone.
        embed_scale: What looked-up rows are multiplied by, as Gemma's and BART's embeddings do.
        round_scale: Whether the scale is first rounded to the dtype of the rows, as Gemma's is.
        dense_class: The class of `nn.Embedding` that this module stands for.
        dtype: Of the decoder.
        device: Where the tensors are made.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: CompressionSpec,
        *,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
        round_scale: bool = False,
        dense_class: type[nn.Embedding] = nn.Embedding,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, spec, dtype=dtype, device=device)
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.embed_scale = embed_scale  # a float: a non-persistent buffer would come back from meta as garbage
        self.round_scale = round_scale
        self.dense_class = dense_class

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows."""
        return self.weight.shape[0]

    @classmethod
    def like(
        cls, dense: nn.Embedding, spec: CompressionSpec, device: torch.device | str | None = None
    ) -> CompressedEmbedding:
        """An embedding of the same shape, scale, dtype and device; its codes are still to be set.

        Raises:
            ModelError: If `dense` computes something else than a scaled lookup.
        """
        scale = getattr(dense, "embed_scale", 1.0)
        round_scale = isinstance(scale, Tensor)
        if round_scale:
            scale = dense.scalar_embed_scale
        lookup = type(dense).forward is nn.Embedding.forward or hasattr(dense, "embed_scale")
        if not lookup or len(list(dense.parameters())) > 1:
            raise ModelError(f"{type(dense).__name__} is more than a scaled lookup: it is not supported")
        if dense.max_norm is not None:
            raise ModelError("an embedding with max_norm changes its own table: set max_norm to None first")
        return cls(
            dense.num_embeddings,
            dense.embedding_dim,
            spec,
            padding_idx=dense.padding_idx,
            embed_scale=float(1.0 if scale is None else scale),
            round_scale=round_scale,
            dense_class=type(dense),
            dtype=dense.weight.dtype,
            device=device or dense.weight.device,
        )

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options: Any) -> CompressedEmbedding:
        """Compresses an `nn.Embedding` of any torch model.

        Args:
            embedding: Left as it is.
            **options: Those of [`hf_dirembed.compress`] that concern a table: `method`, one of `bits`, `ratio` and
                `rank`, `weights`, `settings`, ...

        Raises:
            DirEmbedError: As [`hf_dirembed.compress`] does.

        Example:
            >>> import torch, hf_dirembed
            >>> dense = torch.nn.Embedding(1000, 64)
            >>> hf_dirembed.CompressedEmbedding.from_embedding(dense, method="svd", rank=16)
            CompressedEmbedding(1000, 64, method=svd, rank=16, bits_per_weight=8.51)
        """
        try:  # only where the package is installed; this file alone loads models, it does not make them
            from hf_dirembed.compression import compress_table
        except ImportError as error:
            raise ModelError("compressing needs the package itself: pip install hf_dirembed") from error
        coded = compress_table(embedding.weight, padding_idx=embedding.padding_idx, **options)
        module = cls.like(embedding, coded.spec)
        module.load_state_dict(coded.tensors)
        return module

    def to_dense(self) -> nn.Embedding:
        """The stock embedding that this one stands for."""
        scale: dict[str, Any] = {} if self.dense_class is nn.Embedding else {"embed_scale": self.embed_scale}
        with torch.device("meta"):
            dense = self.dense_class(self.num_embeddings, self.embedding_dim, self.padding_idx, **scale)
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=True)
        if self.round_scale:
            dense.embed_scale = torch.tensor(self.embed_scale, device=self.weight.device)
        return dense

    def forward(self, input_ids: Tensor) -> Tensor:
        """Looks up rows: (...,) token ids to (..., dim)."""
        # Compilers are asked first: their shapes stay dynamic where nothing compares them.
        if not torch.compiler.is_compiling() and input_ids.numel() >= UNIQUE_FROM:
            distinct, inverse = torch.unique(input_ids, return_inverse=True)
            rows = F.embedding(inverse, self.decode(distinct))
        else:
            rows = self.decode(input_ids)
        if self.embed_scale == 1.0:
            return rows
        return rows * (rows.new_full((), self.embed_scale) if self.round_scale else self.embed_scale)


def compression_line(embedding: nn.Embedding | CompressedEmbedding) -> str:
    """How large an embedding is, and how large it would be dense, in a line."""
    rows, dim = embedding.num_embeddings, embedding.embedding_dim
    dense_bytes = rows * dim * embedding.weight.element_size()
    if not isinstance(embedding, CompressedEmbedding):  # replaced by hand, with set_input_embeddings
        return f"token embeddings {rows:,} x {dim:,}: {dense_bytes:,} bytes, dense"
    dense_bytes = int(embedding.spec.figure("dense_bytes") or rows * dim * embedding.dtype.itemsize)
    smaller = f"{dense_bytes / embedding.num_bytes:.1f}x smaller than dense"
    size = f"token embeddings {rows:,} x {dim:,}: {embedding.num_bytes:,} bytes, {smaller}"
    return f"{size}, {embedding.bits_per_weight:.2f} bits per weight ({embedding.spec.method})"
