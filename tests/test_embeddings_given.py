"""Models that are given embeddings answer as the stock ones do, with and without ids; a row is the same alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, TABLE_FAMILIES, Family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hf_dirembed
from hf_dirembed import CompressedEmbedding


EVERY: dict[str, Family] = {**FAMILIES, **TABLE_FAMILIES}
NAMES = ("bert", "llama-tied", "gpt2", "t5", "bart", "gemma3n_text", "gemma4_text", "gemma4", "t5gemma2")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_embeddings_in_the_place_of_ids(name: str) -> None:
    """Alone, beside the ids, with another row among them, for the decoder, and one at a time."""
    family = EVERY[name]
    ours = hf_dirembed.compress(family.make(family.autos[-1] if family.encoder_decoder else family.autos[0]), bits=6)
    stock = hf_dirembed.expand(copy.deepcopy(ours))
    inputs = family.inputs()
    ids, others = inputs["input_ids"], {key: value for key, value in inputs.items() if key != "input_ids"}
    noise = 0.1 * torch.randn(*ids.shape, ours.get_input_embeddings().embedding_dim)

    def cases(model: Any) -> dict[str, dict[str, torch.Tensor]]:
        rows = model.get_input_embeddings()(ids)
        found = {
            "alone": {**others, "inputs_embeds": rows},
            "beside ids": {**inputs, "inputs_embeds": rows},
            "one": {**{key: value[:1] for key, value in others.items()}, "inputs_embeds": rows[:1]},
            "others": {**others, "inputs_embeds": rows + noise},
        }
        if family.encoder_decoder:
            decoder = model.get_decoder().get_input_embeddings()
            found["of the decoder"] = {"input_ids": ids, "decoder_inputs_embeds": decoder(others["decoder_input_ids"])}
        return found

    for (case, mine), theirs in zip(cases(ours).items(), cases(stock).values(), strict=True):
        try:
            expected = stock(**theirs)[0]
        except (NotImplementedError, RuntimeError, ValueError) as error:  # embeddings of no token, both, none at all
            with pytest.raises((hf_dirembed.ModelError, type(error))):
                ours(**mine)
            continue
        torch.testing.assert_close(ours(**mine)[0], expected, rtol=1e-4, atol=1e-4, msg=case)


SHAPES = st.tuples(st.sampled_from([8, 16, 32, 48, 96, 160]), st.sampled_from(["transform", "direction"]))
TABLES: dict[tuple[int, str], CompressedEmbedding] = {}


def table(dim: int, method: str) -> CompressedEmbedding:
    if (dim, method) not in TABLES:
        torch.manual_seed(dim)
        budget = {"bits": 6} if method == "transform" else {"rank": dim - 3}
        TABLES[dim, method] = CompressedEmbedding.from_embedding(nn.Embedding(700, dim), method=method, **budget)
    return copy.deepcopy(TABLES[dim, method])


@settings(max_examples=120, deadline=None)
@given(
    SHAPES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.integers(0, 699), min_size=1, max_size=90),
    st.integers(0, 1000),
)
@torch.no_grad()
def test_a_row_is_the_same_whatever_is_decoded_with_it(
    shape: tuple[int, str], dtype: torch.dtype, ids: list[int], which: int
) -> None:
    """To the bit: many models find the places of images by comparing embeddings with that of one token."""
    embedding, batch = table(*shape).to(dtype), torch.tensor(ids)
    place = which % len(ids)
    row = embedding(batch)[place]
    for alone in (batch[place], batch[place : place + 1], batch[place].view(1, 1), batch[place:].repeat(9)):
        assert torch.equal(embedding(alone).reshape(-1, row.shape[-1])[0], row)
    assert torch.equal(embedding.dense_weight()[ids[place]], row)


@pytest.mark.parametrize("threads", [1, 2, 16])
@torch.no_grad()
def test_a_row_is_the_same_however_many_there_are_and_threads(threads: int) -> None:
    """Each thread of BLAS has some of the rows, if they are long enough to be worth it."""
    before, ids = torch.get_num_threads(), torch.arange(300)
    torch.set_num_threads(threads)
    try:
        for method in ("transform", "direction"):
            embedding = table(384, method)
            rows = embedding.decode(ids)
            for count in (*range(1, 50), 63, 129, 255):
                assert torch.equal(embedding.decode(ids[:count]), rows[:count]), (method, count)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_images_are_found_among_embeddings() -> None:
    """As LLaVA's are, whose token is compared with each row."""
    family = FAMILIES["llava"]
    ours = hf_dirembed.compress(family.make("AutoModelForImageTextToText"), bits=5)
    token = ours.config.image_token_id
    ids = torch.randint(8, 100, (1, 40)).masked_fill(torch.arange(40) % 7 == 3, token)
    embedding = ours.get_input_embeddings()
    found = (embedding(ids) == embedding(torch.tensor(token))).all(-1)
    assert torch.equal(found, ids == token)
