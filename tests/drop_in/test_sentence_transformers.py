"""Multilingual sentence encoders, as e5: SentenceTransformer keeps all modules, through saves and uploads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

import hf_dirembed
from benchmarks.stand_in_hub import StandInHub
from hf_dirembed.checkpoints.convert import compress_checkpoint


sentence_transformers = pytest.importorskip("sentence_transformers")
SENTENCES = ["the cat sat on a mat", "a dog ran to the green house", "blue"]
MODULES = ["Transformer", "Pooling", "Normalize"]
PUSH = """
import sys, hf_dirembed
from sentence_transformers import SentenceTransformer

SentenceTransformer(sys.argv[1], device="cpu").push_to_hub("me/small", private=True)
again = SentenceTransformer("me/small", device="cpu")
assert isinstance(again[0].auto_model.get_input_embeddings(), hf_dirembed.CompressedEmbedding)
print([type(module).__name__ for module in again])
print(again.encode(["the cat sat on a mat"])[0].tolist())
"""


@pytest.fixture
def dense(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny XLM-RoBERTa with e5's modules and prompts."""
    config = transformers.XLMRobertaConfig(
        vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.XLMRobertaModel(config).save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    modules = pytest.importorskip("sentence_transformers.models")
    parts = [modules.Transformer(str(tmp_path / "body")), modules.Pooling(32, "mean"), modules.Normalize()]
    prompts = {"query": "a ", "passage": "the "}
    sentence_transformers.SentenceTransformer(modules=parts, prompts=prompts, device="cpu").save(str(tmp_path / "st"))
    return tmp_path / "st"


def load(folder: Path) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def check(model: sentence_transformers.SentenceTransformer, expected: torch.Tensor) -> None:
    assert [type(module).__name__ for module in model] == MODULES
    assert model.prompts["query"] == "a "
    assert isinstance(model[0].auto_model.get_input_embeddings(), hf_dirembed.CompressedEmbedding)
    assert torch.equal(model.encode(SENTENCES, prompt_name="query", convert_to_tensor=True), expected)


@pytest.mark.parametrize("options", [{"bits": 7}, {"method": "direction", "rank": 8}], ids=["packed", "float"])
def test_all_modules_are_kept(options: dict[str, object], dense: Path, tmp_path: Path) -> None:
    compress_checkpoint(dense, tmp_path / "one", **options)
    model = load(tmp_path / "one")
    expected = model.encode(SENTENCES, prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    close = torch.cosine_similarity(
        expected, load(dense).encode(SENTENCES, prompt_name="query", convert_to_tensor=True)
    )
    assert close.min() > 0.7
    check(model, expected)
    model.save_pretrained(str(tmp_path / "two"))
    check(load(tmp_path / "two"), expected)
    hf_dirembed.expand(model[0].auto_model)
    dense_again = model.encode(SENTENCES, prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(dense_again, expected, rtol=1e-4, atol=1e-5)


def test_in_place_and_to_the_hub(dense: Path, tmp_path: Path) -> None:
    """The model inside is compressed where it is; the upload has its modules, its code and a card."""
    model = load(dense)
    hf_dirembed.compress(model[0].auto_model, model.tokenizer, bits=7)
    model.save_pretrained(str(tmp_path / "one"))
    with StandInHub() as hub:
        names, vector = hub.run(PUSH, tmp_path / "one", cache=tmp_path / "hf").splitlines()[-2:]
        assert hub.repos["me/small"].private
        files = hub.repos["me/small"].files()
    assert names == str(MODULES)
    assert vector == str(model.encode(["the cat sat on a mat"])[0].tolist())
    assert {"modules.json", "1_Pooling/config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert {"modeling_dirembed.py", "configuration_dirembed.py", "README.md"} <= files.keys()
