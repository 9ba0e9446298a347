"""New tokens, embeddings replaced by hand, and those who read the table's `weight`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from families import DIM, FAMILIES, VOCAB
from tiny import BUDGETS, make
from torch import nn
from transformers import PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed import CompressedEmbedding, ModelError


AUTOS = {"bert": "AutoModelForMaskedLM", "llama-tied": "AutoModelForCausalLM", "llama-untied": "AutoModelForCausalLM"}


@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("name", AUTOS)
def test_added_tokens(name: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A new token starts at the mean of the others, or at the row nearest to it; the old ones stay as they were."""
    tokenizer = copy.deepcopy(tokenizer)
    model = make(name, AUTOS[name], method)
    ids = FAMILIES[name].inputs()["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCAB + 3 - len(tokenizer))])
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    table = model.get_input_embeddings()
    assert table.num_embeddings == model.config.vocab_size == VOCAB + 8
    with torch.no_grad():
        after = model(input_ids=ids).logits
        torch.testing.assert_close(after[..., :VOCAB], before)
        new = torch.tensor([[len(tokenizer) - 1]])
        rows = table.dense_weight()
        mean = rows[:VOCAB].mean(dim=0)
        if table.layout.packed:  # of those of the first class, if there are any
            first = table.row_classes()[:VOCAB] == 0
            alone = first if first.any() else ~first
            if table.layout.zero_row is not None:
                alone[table.layout.zero_row] = False
            candidates = rows[:VOCAB][alone]
            mean = candidates[(candidates - mean).square().sum(dim=1).argmin()]
        torch.testing.assert_close(rows[VOCAB:], mean.expand(8, -1), rtol=1e-2, atol=1e-3)
        model.save_pretrained(tmp_path)
        again = getattr(transformers, AUTOS[name]).from_pretrained(tmp_path)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
        torch.testing.assert_close(again(input_ids=new).logits, model(input_ids=new).logits)


def test_an_embedding_of_one_s_own(tmp_path: Path) -> None:
    """`set_input_embeddings` puts a dense one there; saving refuses what would not load."""
    model = make("llama-untied", "AutoModelForCausalLM")
    model.set_input_embeddings(nn.Embedding(VOCAB, DIM))
    ids = FAMILIES["llama-untied"].inputs()["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    with pytest.raises(ModelError, match="set_input_embeddings"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    hf_dirembed.expand(model).save_pretrained(tmp_path / "stock")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    hf_dirembed.compress(model, **BUDGETS["transform"]).save_pretrained(tmp_path / "model")


def test_an_embedding_of_one_s_own_that_is_compressed(tmp_path: Path) -> None:
    model = make("llama-untied", "AutoModelForCausalLM")
    model.set_input_embeddings(CompressedEmbedding.from_embedding(nn.Embedding(VOCAB, DIM), method="svd", rank=9))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_input_embeddings().layout.rank == 9
    ids = FAMILIES["llama-untied"].inputs()["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("method", BUDGETS)
def test_readers_of_the_table(method: str) -> None:
    """`weight` has the rows of the table but holds its codes; `dense_weight()` is what readers want."""
    table = make("bert", "AutoModel", method).get_input_embeddings()
    assert (table.num_embeddings, table.embedding_dim) == (VOCAB, DIM)
    assert len(table.weight) == VOCAB
    assert table.weight.shape[1] != DIM
    rows = table.dense_weight()
    assert rows.shape == (VOCAB, DIM)
    torch.testing.assert_close(rows[[3, 9]], table(torch.tensor([3, 9])))
    torch.testing.assert_close(table.to_dense().weight, rows)
