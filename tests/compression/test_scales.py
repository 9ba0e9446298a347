"""Methods with float latents give of a table at any scale what they give of it at scale 1, or say that they cannot."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_dirembed import CompressedEmbedding, TableError
from hf_dirembed.compression import AutoencoderSettings, CodedTable, compress_table


OPTIONS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "direction": {"method": "direction"},
    "autoencoder": {"method": "autoencoder"},
    "autoencoder, random start": {
        "method": "autoencoder",
        "settings": AutoencoderSettings.paper(epochs=15, learning_rate=1e-2),
    },
}
# Training sees lengths of 1 to 2; of a table this small, lengths are what it learns last from random weights.
TOLERANCE = {"svd": 1e-5, "direction": 1e-5, "autoencoder": 5e-3, "autoencoder, random start": 8e-2}


def rows() -> Tensor:
    return torch.randn(300, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, 32)


def figures(table: Tensor, **options: Any) -> tuple[float, float]:
    """Mean cosine, and root mean square error over that of the rows."""
    coded: CodedTable = compress_table(table, rank=8, **options)
    error = (coded.reconstruct().double() - table.double()).norm() / table.double().norm()
    return coded.record.quality["mean_cosine"], float(error)


@functools.cache
def at_scale_1(name: str) -> tuple[float, float]:
    return figures(rows(), **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=8, deadline=None)
@given(st.floats(-30, 16))
def test_any_scale_is_as_good(name: str, power: float) -> None:
    assert figures(rows() * 10**power, **OPTIONS[name]) == pytest.approx(at_scale_1(name), abs=TOLERANCE[name])


@settings(max_examples=20, deadline=None)
@given(st.integers(-100, 60))
def test_figures_of_any_scale_are_the_same(exponent: int) -> None:
    """By a power of two, so that the table has the same digits; its squares need not be float32's."""
    found = compress_table(rows() * 2.0**exponent, method="svd", rank=8).record.quality
    expected = compress_table(rows(), method="svd", rank=8).record.quality
    assert expected.keys() > {"distortion", "bound_bits"}
    assert found == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "power", "more"),
    [
        *((torch.bfloat16, power, 0.005) for power in (-30, -6, 15)),
        *((torch.float16, power, 0.02) for power in (-6, 3)),
    ],
)
def test_narrow_tables_are_as_good(name: str, dtype: torch.dtype, power: int, more: float) -> None:
    table = (rows() * 10.0**power).to(dtype)
    assert figures(table, **OPTIONS[name]) == pytest.approx(at_scale_1(name), abs=TOLERANCE[name] + more)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("method", ["svd", "direction", "autoencoder"])
def test_latents_that_float16_cannot_hold_are_refused(method: str, scale: float) -> None:
    embedding = nn.Embedding.from_pretrained(rows() * scale)
    options = {"method": method, "rank": 8, "latent_dtype": "float16"}
    if method == "autoencoder":  # whose decoder has the scale, in float32
        compressed = CompressedEmbedding.from_embedding(embedding, **options)
        assert compressed.record.quality["mean_cosine"] == pytest.approx(at_scale_1(method)[0], abs=5e-3)
    else:
        with pytest.raises(TableError, match="exceeds the range of float16: give the model"):
            CompressedEmbedding.from_embedding(embedding, **options)


@pytest.mark.parametrize("method", ["svd", "direction", "autoencoder"])
def test_a_table_of_the_least_numbers_of_float16_is_refused(method: str) -> None:
    table = (rows() * 1e-7).half()  # one or two of the steps that latents and decoder have, too
    assert table.any()
    with pytest.raises(TableError, match="exceeds the range of float16: give the model"):
        compress_table(table, method=method, rank=8)
