"""`generate`, in all its ways."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from drop_in_subject import NEW_TOKENS, PROMPT, Subject, row
from torch import Tensor
from transformers import PreTrainedModel


def generated(model: PreTrainedModel, subject: Subject, **options: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = dict(subject.tokenizer(PROMPT, return_tensors="pt"))
    length = inputs["input_ids"].shape[1]
    if options.pop("from_rows", False):
        inputs, length = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")), **inputs}, 0
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**inputs, **options)[0, length:]


def generate(options: dict[str, Any], subject: Subject) -> str:
    found, expected = (generated(model, subject, **options) for model in (subject.model, subject.stock))
    assert torch.equal(found, expected), f"{found.tolist()} is not {expected.tolist()}"
    return f"same text, {len(found)} tokens"


def assisted(subject: Subject) -> str:
    found = generated(subject.model, subject, assistant_model=copy.deepcopy(subject.model))
    expected = generated(subject.stock, subject)
    assert torch.equal(found, expected), f"{found.tolist()} is not {expected.tolist()}"
    return f"same text, {len(found)} tokens"


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search, 3": {"num_beams": 3},
    "sampling with a seed": {"do_sample": True, "top_k": 20},
    "static cache": {"cache_implementation": "static"},
    "from `inputs_embeds`": {"from_rows": True},
}
for way, ways_options in WAYS.items():
    row("generate", way, "causal")(partial(generate, ways_options))
row("generate", "assisted by a copy of itself", "causal")(assisted)
