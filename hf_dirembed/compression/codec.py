"""Integer codes of one or two layers, and the decoder that they are fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..packing_dirembed import pack, unpack
from .importance import Sample
from .lattice import DecoderFit, coordinate_descent
from .quantisation import Allocation, ScalarQuantisers, quantise
from .table import Table


_PASSES = 2  # over the whole table, after the training on a sample
_WORTHWHILE = 0.005  # the fall of the error that makes another round of training worth it


@dataclass
class Codec:
    """What codes stand for: row ŷ = z D + b, z half-integers, of which refined rows have more.

    Attributes:
        base: The latents of every row.
        refinement: The further latents of refined rows, if there are any.
        largest: (rank of both,) the largest level of each latent.
        decoder: D, (rank of both, dim).
        bias: b, (dim,).
    """

    base: Allocation
    refinement: Allocation | None
    largest: Tensor
    decoder: Tensor
    bias: Tensor

    @classmethod
    def from_quantisers(cls, base: Allocation, quantisers: ScalarQuantisers, basis: Tensor, bias: Tensor) -> Codec:
        """Starts from scalar quantisers of the leading latents of a basis, whose steps the decoder takes in."""
        decoder = base.steps(quantisers).to(basis).unsqueeze(1) * basis[:, : base.rank].T
        return cls(base, None, base.largest_levels().to(basis), decoder, bias)

    def refined_by(self, other: Codec) -> Codec:
        """This codec with that of its residual as a second layer."""
        largest, decoder = torch.cat([self.largest, other.largest]), torch.cat([self.decoder, other.decoder])
        return Codec(self.base, other.base, largest, decoder, self.bias + other.bias)

    def encode(self, rows: Tensor, refined: Tensor) -> Tensor:
        """Half-integer latents of rows, zero for those that a row does not have.

        Args:
            rows: y, (n, dim).
            refined: (n,) which rows have the second layer.

        Returns:
            (n, rank of both).
        """
        latents = rows.new_zeros(len(rows), len(self.decoder))
        residual = rows - self.bias
        for layer, has_layer in self._layers(refined):
            decoder = self.decoder[layer]
            levels = quantise(residual @ torch.linalg.pinv(decoder), self.largest[layer])
            latents[:, layer] = levels * has_layer.unsqueeze(1)
            residual = residual - latents[:, layer] @ decoder
        return self.improve(rows, latents, refined, sweeps=2)

    def improve(self, rows: Tensor, latents: Tensor, refined: Tensor, sweeps: int = 1) -> Tensor:
        """Coordinate descent of latents for the decoder there is."""
        improved = torch.zeros_like(latents)
        for subset, rank in ((~refined, self.base.rank), (refined, len(self.decoder))):
            if subset.any():
                decoder, largest = self.decoder[:rank], self.largest[:rank]
                start = latents[subset, :rank]
                improved[subset, :rank] = coordinate_descent(rows[subset] - self.bias, start, decoder, largest, sweeps)
        return improved

    def error(self, rows: Tensor, latents: Tensor, omega: Tensor) -> float:
        """Σ ω ‖y - ŷ‖²."""
        return float((rows - latents @ self.decoder - self.bias).square().sum(dim=1).double() @ omega.double())

    def refit(self, fit: DecoderFit) -> None:
        """Takes over the best decoder for the latents that `fit` has seen."""
        self.decoder, self.bias = fit.solve()

    def _layers(self, refined: Tensor) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.base.rank), torch.ones_like(refined)
        if self.refinement is not None:
            yield slice(self.base.rank, len(self.decoder)), refined

    def _fit(self) -> DecoderFit:
        rank, dim = self.decoder.shape
        return DecoderFit(rank, dim, self.decoder.device)

    def train(self, sample: Sample, refined: Tensor, rounds: int) -> None:
        """Fits decoder and codes to each other on a sample, in turn, while it helps.

        Args:
            sample: The rows.
            refined: (n,) which of them have the second layer.
            rounds: The most rounds.
        """
        latents = self.encode(sample.rows, refined)
        before = self.error(sample.rows, latents, sample.omega)
        for _ in range(rounds):
            fit = self._fit()
            fit.add(sample.rows, latents, sample.omega)
            self.refit(fit)
            latents = self.improve(sample.rows, latents, refined)
            after = self.error(sample.rows, latents, sample.omega)
            if after > (1 - _WORTHWHILE) * before:
                break
            before = after

    def encode_table(self, table: Table, omega: Tensor, refined: Tensor) -> dict[str, Tensor]:
        """Codes all rows, refits the decoder to them, and does both once more.

        Args:
            table: The rows y.
            omega: (num_rows,) what an error of each counts.
            refined: (num_rows,) which rows have the second layer.

        Returns:
            The packed codes: `weight`, (num_rows, bytes), and with a second layer `refinement_weight`.
        """
        latents: list[PackedLatents | None] = [None] * table.num_chunks
        for _ in range(_PASSES):
            fit = self._fit()
            for index, (part, rows) in enumerate(table.chunks()):
                packed = latents[index]
                if packed is None:
                    found = self.encode(rows, refined[part])
                else:
                    found = self.improve(rows, packed.unpack(), refined[part])
                fit.add(rows, found, omega[part].float())
                latents[index] = PackedLatents.of(found, refined[part], self)
            self.refit(fit)
        kept = [packed for packed in latents if packed is not None]
        tensors = {"weight": torch.cat([packed.base for packed in kept])}
        if self.refinement is not None:
            tensors["refinement_weight"] = torch.cat([packed.further for packed in kept])
        return tensors


@dataclass(frozen=True)
class PackedLatents:
    """The latents of a chunk of rows, packed as they are stored.

    Attributes:
        base: (n, bytes) uint8.
        further: (refined rows, bytes) uint8.
        refined: (n,) which rows have those.
        codec: What they belong to.
    """

    base: Tensor
    further: Tensor
    refined: Tensor
    codec: Codec

    @classmethod
    def of(cls, latents: Tensor, refined: Tensor, codec: Codec) -> PackedLatents:
        """Packs half-integers, (n, rank of both)."""
        codes, rank = latents.floor().to(torch.int8), codec.base.rank
        further = codes.new_zeros(0, 0)
        if codec.refinement is not None:
            further = pack(codes[refined, rank:], codec.refinement.counts)
        return cls(pack(codes[:, :rank], codec.base.counts), further, refined, codec)

    def unpack(self) -> Tensor:
        """The half-integers, zero for latents that a row does not have."""
        base = unpack(self.base, self.codec.base.counts).float() + 0.5
        latents = base.new_zeros(len(base), len(self.codec.decoder))
        latents[:, : base.shape[1]] = base
        if self.codec.refinement is not None:
            latents[self.refined, base.shape[1] :] = unpack(self.further, self.codec.refinement.counts).float() + 0.5
        return latents
