"""The second stage: finer codes for the first one's latents, or codes for latents of its own."""

from __future__ import annotations

import pytest
import torch

from hf_dirembed.compression.row_weights import Sample
from hf_dirembed.compression.transform.codec import Codec
from hf_dirembed.compression.transform.decoder import DecoderStorage
from hf_dirembed.compression.transform.plan import ByteBudget
from hf_dirembed.compression.transform.quantisation import BitAllocator, Quantisers
from hf_dirembed.compression.transform.refinement import RefinementPlan, plan_refinement


DIM, NUM_ROWS, NUM_BYTES = 64, 2000, 16


def first_stage(rows: torch.Tensor) -> tuple[Codec, Quantisers]:
    quantisers = Quantisers.fit(rows, rows.square().mean(dim=0))
    base = BitAllocator(quantisers.errors).allocate(NUM_BYTES, DIM)
    assert base is not None
    storage = DecoderStorage(torch.float16, None)
    return Codec.from_quantisers(base, quantisers, torch.eye(DIM), torch.zeros(DIM), storage), quantisers


def plan(codec: Codec, quantisers: Quantisers, rows: torch.Tensor, num_bytes: int) -> RefinementPlan | None:
    sample = Sample(torch.arange(len(rows)), rows, torch.ones(len(rows)))
    shares, room = torch.full((NUM_ROWS,), 1 / NUM_ROWS), ByteBudget(num_bytes, NUM_ROWS, DIM, codec.storage)
    return plan_refinement(codec, quantisers, torch.eye(DIM), sample, shares, room, NUM_BYTES)


def bytes_for(codec: Codec, decoder_rows: int) -> int:
    """ByteBudget for the first stage, that many rows of the decoder, and the second stage of 1,000 rows."""
    return NUM_ROWS * codec.base.num_bytes + codec.storage.num_bytes(decoder_rows, DIM) + 1000 * (NUM_BYTES + 4)


def spread(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1500, DIM, generator=generator) * torch.linspace(0, 3, DIM).neg().exp()


@pytest.mark.parametrize("turned", [False, True])
def test_a_plan_keeps_its_promise(turned: bool) -> None:
    """On rows like those of the first stage, and on others, of which it knows nothing."""
    codec, quantisers = first_stage(spread(0))
    turn, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2)))
    rows = spread(1) @ turn if turned else spread(1)
    found = plan(codec, quantisers, rows, bytes_for(codec, 2 * DIM))
    assert found is not None
    assert 1000 <= found.rows < NUM_ROWS
    refined = codec.refined_by(found.stage, found.further)
    everyone, nobody = torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
    before = codec.residual(rows, codec.encode(rows, nobody)).square().sum(dim=1).mean()
    after = refined.residual(rows, refined.encode(rows, everyone)).square().sum(dim=1).mean()
    share = found.rows / NUM_ROWS
    assert found.error == pytest.approx(float((1 - share) * before + share * after), rel=0.1)
    named = torch.as_tensor(found.stage.latents).sort().values
    assert torch.equal(named, named.unique())
    own = named >= codec.base.rank
    assert int(own.sum()) == len(found.further)
    assert torch.equal(named[own], torch.arange(codec.base.rank, codec.base.rank + len(found.further)))


def test_latents_of_its_own_where_they_are_worth_their_bytes() -> None:
    """Axes of the residual are the best ones, as long as their decoder does not take the room of too many rows."""
    codec, quantisers = first_stage(spread(0))
    generator = torch.Generator().manual_seed(2)
    few, _ = torch.linalg.qr(torch.randn(DIM, 4, generator=generator))
    rows = 30 * torch.randn(1500, 4, generator=generator) @ few.T  # far beyond its levels
    for num_bytes, own in ((bytes_for(codec, DIM), False), (2 * bytes_for(codec, 2 * DIM), True)):
        found = plan(codec, quantisers, rows, num_bytes)
        assert found is not None
        assert bool((torch.as_tensor(found.stage.latents) >= codec.base.rank).all()) == own
    assert plan(codec, quantisers, rows, bytes_for(codec, 0) - 1000 * (NUM_BYTES + 4)) is None
