"""Tables at the edges of what is numerically possible: defined results, or a typed error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

import hf_dirembed
from hf_dirembed import BudgetError, CompressedEmbedding, SpecError, TableError, TableLayout
from hf_dirembed.compression import compress_table


V, D = 400, 32
METHODS: dict[str, dict[str, Any]] = {
    "transform, 3 bits": {"method": "transform", "bits": 3},
    "transform, 1.5 bits": {"method": "transform", "bits": 1.5},
    "svd, rank 1": {"method": "svd", "rank": 1},
    "svd, rank d - 1": {"method": "svd", "rank": D - 1},
    "direction, rank 1": {"method": "direction", "rank": 1},
    "direction, rank d - 1": {"method": "direction", "rank": D - 1},
    "autoencoder": {"method": "autoencoder", "rank": 4},
}


def gaussian(rows: int = V) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(0))


def with_zero_rows() -> Tensor:
    rows = gaussian()
    rows[::7] = 0
    return rows


# Each with the least mean cosine that every method reaches.
TABLES: dict[str, tuple[Tensor, float]] = {
    "zero rows": (with_zero_rows(), 0.15),
    "rows that are all alike": (torch.full((V, D), 0.3), 0.999),
    "nothing but zeros": (torch.zeros(V, D), 1.0),
    "rows of one direction": (gaussian()[:, :1] @ gaussian(1), 0.97),  # some of them are very short
    "five rows again and again": (gaussian(5).repeat(V // 5, 1), 0.45),
    "norms from 1e-3 to 1e3": (gaussian() * torch.logspace(-3, 3, V)[:, None], 0.1),
    "1e15 long": (gaussian() * 1e15, 0.15),
    "half precision": ((gaussian() * 1000).half(), 0.15),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TABLES)
def test_results_are_finite_and_no_worse_than_the_edge_allows(name: str, method: str) -> None:
    rows, least = TABLES[name]
    coded = compress_table(rows, **METHODS[method])
    found = coded.reconstruct()
    assert found.isfinite().all()
    assert all(tensor.float().isfinite().all() for tensor in coded.tensors.values())
    assert coded.record.quality["mean_cosine"] >= least
    if not rows.any():
        assert not found.any()


@pytest.mark.parametrize("method", ["svd", "direction"])
def test_one_token(method: str) -> None:
    rows = gaussian(1)
    torch.testing.assert_close(compress_table(rows, method=method, rank=1).reconstruct(), rows)


def test_one_token_is_too_little_for_transform() -> None:
    with pytest.raises(BudgetError, match="ask for at least bits="):
        compress_table(gaussian(1), bits=3)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_tables_with_infinities_are_refused(value: float, method: str) -> None:
    rows = gaussian().half()
    rows[17, 3] = value
    with pytest.raises(TableError, match="row 17"):
        compress_table(rows, **METHODS[method])


def test_rows_whose_square_overflows_are_refused() -> None:
    rows = gaussian()
    rows[9] *= 1e30
    with pytest.raises(TableError, match="row 9"):
        compress_table(rows, bits=3)


@pytest.mark.parametrize("options", [{"bits": 3}, {"method": "direction", "rank": 8}, {"method": "svd", "rank": 8}])
def test_a_zero_padding_row_stays_exactly_zero(options: dict[str, Any]) -> None:
    dense = nn.Embedding(V, D, padding_idx=5)
    assert not dense.weight[5].any()
    compressed = CompressedEmbedding.from_embedding(dense, **options)
    assert compressed.layout.zero_row == 5
    ids = torch.arange(V)
    looked_up = compressed(ids)
    assert not looked_up[5].any()
    assert (looked_up[ids != 5] != 0).any(dim=1).all()
    assert not compressed(torch.tensor([5])).any()  # few ids take another way
    assert not compressed.to_dense().weight[5].any()
    looked_up[5].sum().backward()
    assert not compressed.decoder_weight.grad.any()  # as nn.Embedding gives its padding row no gradient


def test_a_padding_row_that_is_not_zero_is_a_row_like_others() -> None:
    dense = nn.Embedding.from_pretrained(gaussian(), padding_idx=5)
    assert CompressedEmbedding.from_embedding(dense, bits=3).layout.zero_row is None


@pytest.mark.parametrize("options", [{"bits": 6}, {"method": "direction", "rank": 9}])
@pytest.mark.parametrize(
    ("family", "auto"), [("bert", "AutoModelForMaskedLM"), ("llama-tied", "AutoModelForCausalLM")]
)
def test_a_tied_head_agrees_about_the_zero_row(family: str, auto: str, options: dict[str, Any], tmp_path: Any) -> None:
    model = FAMILIES[family].make(auto)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    hf_dirembed.compress(model, **options)
    assert model.get_input_embeddings().layout.zero_row == 0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    inputs = FAMILIES[family].inputs()
    inputs["input_ids"][:, 0] = 0
    expanded = hf_dirembed.expand(copy.deepcopy(model))
    with torch.no_grad():
        logits = loaded(**inputs).logits
        torch.testing.assert_close(logits, expanded(**inputs).logits, atol=1e-4, rtol=1e-4)
    bias = loaded.get_output_embeddings().bias
    assert torch.equal(logits[..., 0], torch.full_like(logits[..., 0], 0.0 if bias is None else bias[0].item()))
    assert loaded.get_input_embeddings().layout.zero_row == 0


def test_a_zero_row_that_is_cut_off_is_forgotten() -> None:
    model = FAMILIES["bert"].make("AutoModelForMaskedLM")
    hf_dirembed.compress(model, bits=6)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.layout = head.layout = TableLayout.from_dict({**embedding.layout.to_dict(), "zero_row": 150})
    model.resize_token_embeddings(140)
    assert embedding.layout.zero_row is None
    embedding.current_layout().check_table(140, 32)
    assert model(torch.arange(9).view(1, -1)).logits.shape == (1, 9, 140)


@pytest.mark.parametrize("row", [-1, 1.0, True, "0", 160])
def test_a_zero_row_must_be_a_row(row: Any) -> None:
    values = compress_table(gaussian(160), method="svd", rank=4).layout.to_dict()
    with pytest.raises(SpecError):
        TableLayout.from_dict({**values, "zero_row": row}).check_table(160, D)
