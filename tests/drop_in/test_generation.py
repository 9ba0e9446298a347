"""`generate` in all its ways: the same tokens as the expanded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny import make
from torch import Tensor
from transformers import PreTrainedModel

import hf_dirembed


AUTOS = {
    "llama-tied": "AutoModelForCausalLM",
    "llama-untied": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "gemma3": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}
CASES = [
    (name, way) for name in AUTOS for way in WAYS if AUTOS[name] == "AutoModelForCausalLM" or way != "static cache"
]


def generate(model: PreTrainedModel, name: str, **options: Any) -> Tensor:
    torch.manual_seed(0)
    ids = FAMILIES[name].inputs()["input_ids"]
    alone = "prompt_lookup_num_tokens" in options or "assistant_model" in options
    return model.generate(ids[:1] if alone else ids, min_new_tokens=8, max_new_tokens=8, **options)


@pytest.mark.parametrize(("name", "way"), CASES, ids=["-".join(case) for case in CASES])
def test_it_generates_what_the_expanded_model_does(name: str, way: str) -> None:
    model = make(name, AUTOS[name])
    found = generate(model, name, **WAYS[way])
    assert torch.equal(found, generate(hf_dirembed.expand(model), name, **WAYS[way]))


@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_assisted_by_another_compressed_model(name: str) -> None:
    model, assistant = make(name, AUTOS[name]), make(name, AUTOS[name], "direction")
    expected = generate(model, name, do_sample=False)[:1]
    assert torch.equal(generate(model, name, do_sample=False, assistant_model=assistant), expected)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma3", "gpt2"])
def test_from_embeddings(name: str) -> None:
    model = make(name, AUTOS[name])
    ids = FAMILIES[name].inputs()["input_ids"]
    rows = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=rows, do_sample=False, min_new_tokens=8, max_new_tokens=8)
    assert torch.equal(found, generate(model, name, do_sample=False)[:, ids.shape[1] :])
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=rows).logits, model(input_ids=ids).logits)
