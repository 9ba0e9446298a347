"""A table as it is stored: codes, decoder and their layout."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..remote.codes_dirembed import TableLayout, TableRecord
from ..remote.matrix_dirembed import DENSE_CHUNK, CompressedMatrix
from .baselines.factorization import Factorization


_FEW_ROWS = 256  # tell whether a dtype is too coarse
_ROUNDING = 0.1  # of the rows' lengths


@dataclass(frozen=True)
class CodedTable:
    """A table's codes and decoder, as a module holds them.

    Attributes:
        layout: Their layout.
        tensors: Those of `CompressedMatrix.code_tensors`, by name.
        record: What they were made with, and what came of it.
    """

    layout: TableLayout
    tensors: dict[str, Tensor]
    record: TableRecord = field(default_factory=TableRecord)

    @classmethod
    def of(cls, found: Factorization, method: str, *, codes: str, decoder: str) -> CodedTable:
        """Stores float latents and their decoder.

        Args:
            found: What a method found.
            method: Its name.
            codes: Dtype of the latents, one of `FLOAT_CODES`.
            decoder: Dtype of decoder and bias, likewise.

        Example:
            >>> coded = CodedTable.of(
            ...     Factorization(torch.ones(4, 1), torch.ones(1, 3)), "svd", codes="float16", decoder="float32"
            ... )
            >>> coded.tensors["weight"].dtype, coded.reconstruct(slice(0, 1))
            (torch.float16, tensor([[1., 1., 1.]]))
        """
        dtype = getattr(torch, decoder)
        tensors = {"decoder_weight": found.decoder.to(dtype), "weight": found.latents.to(getattr(torch, codes))}
        if found.bias is not None:
            tensors["decoder_bias_weight"] = found.bias.to(dtype)
        layout = TableLayout(method=method, rank=found.rank, codes=codes, decoder=decoder, bias=found.bias is not None)
        return cls(layout, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def to_matrix(self) -> CompressedMatrix:
        """The module that decodes it in float32, its codes in the same storage."""
        num_rows, dim = len(self.tensors["weight"]), self.tensors["decoder_weight"].shape[1]
        matrix = CompressedMatrix(num_rows, dim, self.layout, dtype=torch.float32, device="meta")
        names = {"decoder_weight", "decoder_bias_weight"} & self.tensors.keys()
        wide = {name: self.tensors[name].float() for name in names}
        matrix.load_state_dict({**self.tensors, **wide}, assign=True)
        return matrix

    @torch.no_grad()
    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a module of that dtype computes what the codes stand for: no overflow, no underflow.

        Example:
            >>> found = Factorization(torch.tensor([[2.0], [7e4]]), torch.ones(1, 3))
            >>> coded = CodedTable.of(found, "svd", codes="float32", decoder="float32")
            >>> coded.fits(torch.float32), coded.fits(torch.float16)
            (True, False)
        """
        floats = [tensor for tensor in self.tensors.values() if tensor.is_floating_point()]
        if not all(tensor.float().isfinite().all() for tensor in floats):
            return False
        if dtype != torch.float16:  # the others reach as far as float32
            return True
        matrix = self.to_matrix()
        for ids in torch.arange(len(matrix.weight)).split(DENSE_CHUNK):
            latents, rows = matrix.latents_of(ids), matrix.decode(ids)
            if not (latents.half().isfinite().all() and rows.half().isfinite().all()):
                return False
        rows, narrow = rows[:_FEW_ROWS], matrix.half().decode(ids[:_FEW_ROWS]).float()
        return bool((narrow - rows).norm() <= _ROUNDING * rows.norm())

    @torch.no_grad()
    def keeps(self, found: Factorization) -> bool:
        """Whether rounding to the stored dtypes left of a table what was found: no overflow, no underflow.

        Example:
            >>> found = Factorization(torch.full((4, 1), 1e-9), torch.ones(1, 3))
            >>> dtypes = ("float32", "float16", "bfloat16")
            >>> [CodedTable.of(found, "svd", codes=dtype, decoder="float32").keeps(found) for dtype in dtypes]
            [True, False, True]
        """
        some = slice(None, None, max(1, len(found.latents) // _FEW_ROWS))
        rows = found.reconstruct(some).cpu().double()  # in which short rows have a length
        return bool((self.reconstruct(some).double() - rows).norm() <= _ROUNDING * rows.norm())

    @torch.no_grad()
    def reconstruct(self, rows: slice = slice(None)) -> Tensor:
        """The approximated rows, (n, dim) float32."""
        matrix = self.to_matrix()
        return matrix.decode(torch.arange(len(matrix.weight), device=matrix.weight.device)[rows]).float()
