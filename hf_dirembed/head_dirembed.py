"""What runs: the LM head that is tied to a compressed embedding, over the same codes and decoder.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels_dirembed import ExpandedCodes, packed_linear
from .layout_dirembed import CompressionSpec, ModelError
from .matrix_dirembed import CompressedMatrix
from .packing_dirembed import HALF, PackedCodes


class CompressedLMHead(CompressedMatrix):
    """Drop-in for the `nn.Linear` of a language-model head over a compressed table: logits = (h Dᵀ) Zᵀ + h·b.

    Packed codes are kept expanded to int8 on CPU, from the first forward pass on, in training and in evaluation: V
    times the rank, rounded up to a multiple of 16, in bytes, and the same again for refined rows and their rank. Moves
    and casts of the module free them until the next pass. On CUDA nothing is kept.

    Args:
        in_features: d.
        out_features: V.
        spec: The layout of the codes.
        bias: The bias of the logits, (V,), kept as the parameter it is; or None.
        dtype: Of the decoder.
        device: Where the tensors are made.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: CompressionSpec,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, spec, dtype=dtype, device=device)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)
        self._expanded = ExpandedCodes()
        self._expanded_refinement = ExpandedCodes()

    @classmethod
    def like(
        cls, dense: nn.Linear, spec: CompressionSpec, device: torch.device | str | None = None
    ) -> CompressedLMHead:
        """A head of the same shape, bias, dtype and device; its codes are still to be set.

        Raises:
            ModelError: If `dense` computes something else than a linear map.
        """
        if type(dense).forward is not nn.Linear.forward:
            raise ModelError(f"{type(dense).__name__} is more than a linear layer: it is not supported as a head")
        return cls(
            dense.in_features,
            dense.out_features,
            spec,
            bias=dense.bias,
            dtype=dense.weight.dtype,
            device=device or dense.weight.device,
        )

    @property
    def expanded_bytes(self) -> int:
        """Memory that the expanded codes take now, beyond the parameters'."""
        return self._expanded.num_bytes + self._expanded_refinement.num_bytes

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedLMHead:
        self._expanded.clear()
        self._expanded_refinement.clear()
        return super()._apply(fn, recurse)

    def to_dense(self) -> nn.Linear:
        """The stock linear layer that this head stands for."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.weight.shape[0], bias=False)
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=True)
        dense.register_parameter("bias", self.bias)
        return dense

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The logits: (..., dim) hidden states to (..., V).

        Raises:
            ModelError: If the states are integers: some models cast them to the dtype of the head's `weight`.
        """
        if not hidden_states.is_floating_point():
            raise ModelError(
                "this model casts its hidden states to the dtype of the head's weight, which packed codes turn into "
                "integers: compress it with method='direction', whose codes are floats"
            )
        self.check_gradients()
        if (shadow := self.heeded_shadow) is not None:
            shadow.refresh(self)
        states = F.linear(hidden_states, self.decoder_weight)
        latents, rank = self.scaled(states), self.spec.base_rank
        logits = self._code_product(latents[..., :rank], self.weight, self.spec.bit_allocation, self._expanded)
        if shadow is not None:
            logits = shadow.lend_to_product(logits, states[..., :rank], "weight")
        if (
            self.refinement_weight is not None
            and self.refined_rows_weight is not None
            and self.refined_latents_weight is not None
            and self.spec.refinement is not None
        ):
            refined_latents = self.refined_latents_weight.long()
            refinement = self._code_product(
                latents[..., refined_latents] * self.refinement_steps(latents.dtype),
                self.refinement_weight,
                self.spec.refinement.bit_allocation,
                self._expanded_refinement,
            )
            if shadow is not None:
                refinement = shadow.lend_to_product(refinement, states[..., refined_latents], "refinement_weight")
            logits = logits.index_add(-1, self.refined_rows_weight.long(), refinement)  # int64 is what ONNX has
        if self.decoder_bias_weight is not None:
            logits = logits + (hidden_states @ self.decoder_bias_weight).unsqueeze(-1)
        if self.outlier_rows_weight is not None and self.outlier_weight is not None:
            exact = F.linear(hidden_states, self.outlier_weight).to(logits.dtype)
            logits = logits.index_copy(-1, self.outlier_rows_weight.long(), exact)
        if self.spec.zero_row is not None:
            zero = torch.tensor([self.spec.zero_row], device=logits.device)
            logits = logits.index_fill(-1, zero, 0)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def _code_product(
        self, latents: Tensor, codes: Tensor, bit_allocation: tuple[int, ...] | None, expanded: ExpandedCodes
    ) -> Tensor:
        """The product of (..., r) states in the latents' space with the latents of all rows, (..., V)."""
        if bit_allocation is None or self.codebook_weight is None:
            return F.linear(latents, codes.to(latents.dtype))
        packed = PackedCodes(codes, bit_allocation, self.codebook_weight)
        integers = packed_linear(latents, packed, expanded=expanded)
        halves = HALF * latents.sum(dim=-1, keepdim=True)
        return integers + halves.to(integers.dtype)  # autocast sums in float32
