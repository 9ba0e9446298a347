"""New tokens, tables that are replaced, and those who read the table."""

from __future__ import annotations

import copy

import torch
from drop_in_subject import SENTENCES, Skip, Subject, close, exact, row
from torch import nn

import hf_dirembed
from hf_dirembed import ModelError


@row("resize", "8 tokens more, saved, reloaded, back again, 64 fewer")
def resize(subject: Subject) -> str:
    model = subject.load()
    size = model.get_input_embeddings().num_embeddings
    if int(subject.inputs["input_ids"].max()) >= size - 64:
        raise Skip("the sentences need the last 64 tokens")
    width = size if subject.kind == "causal" else subject.expected.shape[-1]
    model.resize_token_embeddings(size + 8)
    more = subject.answer(model)
    differences = [close(more[:, :width], subject.expected)]
    model.save_pretrained(subject.work / "resized")
    exact(subject.answer(subject.load(subject.work / "resized")), more)
    model.resize_token_embeddings(size)
    differences.append(close(subject.answer(model), subject.expected))
    model.resize_token_embeddings(size - 64)
    fewer = subject.answer(model)
    differences.append(close(fewer, subject.expected[:, : fewer.shape[-1]]))
    return "; ".join(differences) + "; reloaded exact"


@row("resize", "a token added to the tokenizer, resize_token_embeddings, both saved and reloaded")
def added_token(subject: Subject) -> str:
    model, tokenizer = subject.load(), copy.deepcopy(subject.tokenizer)
    token = "<new-token>"
    tokenizer.add_tokens([token])
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(subject.work / "added")
    inputs = tokenizer(f"{token} {SENTENCES[0]}", return_tensors="pt")
    assert tokenizer.convert_tokens_to_ids(token) in inputs["input_ids"]
    with torch.no_grad():
        answer = exact(subject.load(subject.work / "added")(**inputs)[0], model(**inputs)[0])
    return f"reloaded {answer}"


@row("table", "set_input_embeddings with a dense one: run, saved")
def replaced(subject: Subject) -> str:
    model = subject.load()
    table = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding.from_pretrained(table.dense_weight().detach()))
    difference = close(subject.answer(model), subject.expected)
    try:
        model.save_pretrained(subject.work / "replaced")
    except ModelError as error:
        said = str(error).partition("\n")[0]
    else:
        raise AssertionError("what would not load was saved")
    hf_dirembed.expand(model).save_pretrained(subject.work / "replaced")
    expanded = exact(subject.answer(subject.load(subject.work / "replaced")), subject.answer(model))
    return f"{difference}; saving is refused: {said}; expanded and reloaded {expanded}"


@row("table", "its rows are read: dense_weight(), and what `weight` holds")
def readers(subject: Subject) -> str:
    table = subject.model.get_input_embeddings()
    rows, expected = table.dense_weight(), subject.stock.get_input_embeddings().weight
    assert len(table.weight) == len(expected)
    assert table.weight.shape != expected.shape
    return f"{close(rows, expected)}; `weight` holds codes, {tuple(table.weight.shape)} {table.weight.dtype}"
