"""One budget over all tables of a model: never exceeded, shared by cost, and recorded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, PreTrainedModel, PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed.calibration.costs import HEAD_COST, cost_by_rule
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.compression import compress_table
from hf_dirembed.errors import BudgetError, OptionError


TEXTS = ["the cat sat on the mat and the dog ran to the house .", "a green tree , a blue house of the cat ."] * 20
ROWS = 600


def llama() -> PreTrainedModel:
    family = FAMILIES["llama-untied"]
    return replace(family, arguments={**family.arguments, "vocab_size": ROWS}).make("AutoModelForCausalLM")


def bert() -> PreTrainedModel:
    family = FAMILIES["bert"]
    arguments = {**family.arguments, "vocab_size": ROWS, "tie_word_embeddings": False}
    return replace(family, arguments=arguments).make("AutoModelForMaskedLM")


def per_layer() -> PreTrainedModel:
    """A model with a table of one block for each of its two layers, and a tied head."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=ROWS, vocab_size_per_layer_input=ROWS, hidden_size=32, hidden_size_per_layer_input=16,
        intermediate_size=[48, 48], num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        laurel_rank=4, altup_num_inputs=2, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64,
    )  # fmt: skip
    return Gemma3nForCausalLM(config).eval()


MODELS = {"llama": llama, "bert": bert, "per-layer": per_layer}


def sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The bytes and weights of each table of its own."""
    tables = [table for table in hf_dirembed.find_tables(model) if table.tied_to is None]
    return {table.name: (table.num_bytes, table.rows * table.dim) for table in tables}


def settings_of(model: PreTrainedModel, name: str) -> dict[str, Any]:
    return model.config.dirembed["record"]["tables"][name]["settings"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{"bits": 5.0}, {"ratio": 5.0}, {"bits": 12.0, "method": "svd"}], ids=str)
def test_all_tables_together_keep_to_the_budget(name: str, options: dict[str, Any]) -> None:
    model = MODELS[name]()
    weights = sum(number for _, number in sizes(model).values())
    hf_dirembed.compress(model, **options)
    found = sizes(model)
    most = weights * 4 / options["ratio"] if "ratio" in options else weights * options["bits"] / 8
    assert len(found) == 2
    assert 0.7 * most < sum(num_bytes for num_bytes, _ in found.values()) <= most

    (asked,) = (f"{key}={value:g}" for key, value in options.items() if key != "method")
    for table, (num_bytes, _) in found.items():
        recorded = settings_of(model, table)
        assert recorded["budget"] == asked
        assert num_bytes <= int(recorded["table_budget"].removeprefix("num_bytes="))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_calibrated_tables_keep_to_the_budget(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = MODELS[name]()
    weights = sum(number for _, number in sizes(model).values())
    hf_dirembed.compress(model, tokenizer, bits=5, languages="en", calibration=TEXTS)
    assert sum(num_bytes for num_bytes, _ in sizes(model).values()) <= weights * 5 / 8


def test_a_head_gets_more_than_an_input_table_like_it() -> None:
    model = llama()
    model.lm_head.weight.data.copy_(model.get_input_embeddings().weight)
    assert cost_by_rule(model, "lm_head") == HEAD_COST * cost_by_rule(model, "model.embed_tokens")
    found = sizes(hf_dirembed.compress(model, bits=5))
    assert found["lm_head"][0] > found["model.embed_tokens"][0]


def test_a_table_that_errors_cost_more_gets_more(tokenizer: PreTrainedTokenizerFast) -> None:
    """A head of longer rows moves the loss by more: calibration tells, the rule does not."""
    shares = []
    for stretch in (1, 30):
        model = llama()
        statistics = hf_dirembed.calibrate(model, tokenizer, TEXTS)
        model.lm_head.weight.data *= stretch
        hf_dirembed.compress(model, tokenizer, bits=5, languages="en", calibration=statistics)
        shares.append(int(settings_of(model, "lm_head")["table_budget"].removeprefix("num_bytes=")))
    assert shares[1] > shares[0]


def test_bits_by_name_hold_for_each_table_whose_blocks_share() -> None:
    model = per_layer()
    before = sizes(model)
    (blocks,) = (name for name in before if name.endswith("per_layer"))
    (other,) = before.keys() - {blocks}
    hf_dirembed.compress(model, bits={blocks: 6, other: 5})
    for name, bits in ((blocks, 6), (other, 5)):
        assert sizes(model)[name][0] <= before[name][1] * bits / 8
    assert settings_of(model, blocks)["budget"] == "bits=6"
    assert settings_of(model, other)["budget"] == "bits=5"


@pytest.mark.parametrize("options", [{"bits": 5.0}, {"ratio": 7.0}, {"bits": 7.0, "method": "svd"}], ids=str)
def test_one_table_alone_gets_all(options: dict[str, Any]) -> None:
    model = FAMILIES["llama-tied"].make("AutoModel")  # without a head, whose norm would say more
    rows = model.get_input_embeddings().weight.data.clone()
    expected = compress_table(rows, **options).tensors
    hf_dirembed.compress(model, **options)
    ((_, matrix),) = model.get_input_embeddings().matrices()
    for name, tensor in {**matrix.code_tensors(), "decoder_weight": matrix.stored_decoder()}.items():
        assert torch.equal(tensor.float(), expected[name].float()), name
    assert "table_budget" not in settings_of(model, "embed_tokens")


def test_streamed_tables_share_as_loaded_ones_do(tmp_path: Path) -> None:
    source, target = tmp_path / "dense", tmp_path / "packed"
    model = llama()
    model.save_pretrained(source)
    compress_checkpoint(source, target, bits=5)
    streamed = type(hf_dirembed.compress(model, bits=5)).from_pretrained(target)
    for name in sizes(model):
        for each, tensor in model.get_submodule(name).code_tensors().items():
            assert torch.equal(tensor, streamed.get_submodule(name).code_tensors()[each]), (name, each)


def test_too_few_bits_for_all_tables_name_one() -> None:
    with pytest.raises(BudgetError, match=r"2 tables and their decoders.*ask for at least bits="):
        hf_dirembed.compress(llama(), bits=0.2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["transform", "direction"])
def test_the_mends_of_too_few_bits_help(name: str, method: str) -> None:
    with pytest.raises(BudgetError) as raised:
        hf_dirembed.compress(MODELS[name](), bits=0.5, method=method)
    said = str(raised.value)
    bits = float(re.search(r"ask for at least bits=([\d.]+)", said)[1])
    model = hf_dirembed.compress(MODELS[name](), bits=bits, method=method)
    assert all(table.compressed for table in hf_dirembed.find_tables(model))
    if left := re.search(r"leave (\S+) out of tables=", said):
        others = [table.name for table in hf_dirembed.find_tables(MODELS[name]()) if table.tied_to is None]
        tables = [table for table in others if table != left[1]]
        hf_dirembed.compress(MODELS[name](), bits=0.5, method=method, tables=tables)


def test_names_of_one_table_twice() -> None:
    """A tied head is its table by another name."""
    model = FAMILIES["llama-tied"].make("AutoModelForCausalLM")
    with pytest.raises(OptionError, match="'lm_head' in bits= names a table that shares the weights of another"):
        hf_dirembed.compress(model, bits={"embed_tokens": 6, "lm_head": 7})
    hf_dirembed.compress(model, bits={"lm_head": 7})
    assert 6 < model.get_input_embeddings().bits_per_weight <= 7


@pytest.mark.parametrize("tables", [3, "embed_tokens", (name for name in ["embed_tokens"]), [3], []])
def test_tables_that_are_no_list_of_names(tables: Any) -> None:
    with pytest.raises(OptionError, match=r"tables="):
        hf_dirembed.compress(llama(), bits=6, tables=tables)


def test_a_tied_table_costs_as_both() -> None:
    model = FAMILIES["llama-tied"].make("AutoModelForCausalLM")
    assert cost_by_rule(model, "model.embed_tokens") == 1 + HEAD_COST
    assert isinstance(model.get_output_embeddings(), nn.Linear)
