"""What a head is given, as the norm before it says it: found in all architectures, used where nothing was seen."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import FAMILIES, TABLE_FAMILIES
from safetensors.torch import load_file

import hf_dirembed
from hf_dirembed.calibration.head_norm import implied_hessian, implied_moment, norm_before_head
from hf_dirembed.calibration.statistics import damped
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.remote.tables_dirembed import input_table


NORMS = {
    "bert": "cls.predictions.transform.LayerNorm",
    "distilbert": "vocab_layer_norm",
    "gpt2": "transformer.ln_f",
    "llama-tied": "model.norm",
    "gemma3": "model.norm",
    "mixtral": "model.norm",
    "bart": "model.decoder.layers.1.final_layer_norm",
    "gemma3-vision": "model.language_model.norm",
    "gemma4_text": "model.norm",
    "t5": None,  # it scales what the norm gives
}
LMS = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")


def make(name: str):
    family = {**FAMILIES, **TABLE_FAMILIES}[name]
    model = family.make(next(auto for auto in family.autos if auto in LMS))
    for path, module in model.named_modules():
        if path == NORMS[name]:
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, 1.0, 0.5)
    return model


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_before_the_head_is_found_and_its_moment_is_that_of_random_inputs(name: str) -> None:
    model = make(name)
    assert norm_before_head(model) == NORMS[name]
    if NORMS[name] is None:
        assert implied_hessian(model, input_table(model)) is None
        return

    norm = model.get_submodule(NORMS[name])
    inputs = torch.randn(
        200_000, model.get_output_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        outputs = norm(inputs).double()
    expected = outputs.T @ outputs / len(outputs)
    # a norm keeps the size of its input, so that coordinates of few are not wholly independent
    torch.testing.assert_close(implied_moment(norm), expected, rtol=0.1, atol=0.1 * expected.diagonal().mean().item())


def test_moments_are_of_float32_whatever_the_model_is_in() -> None:
    model = make("gemma3").bfloat16()
    moment = implied_moment(model.model.norm)
    assert torch.equal(moment, implied_moment(copy.deepcopy(model).float().model.norm))
    assert model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_heads_are_coded_by_it_where_nothing_was_seen(name: str, tmp_path: Path) -> None:
    """As with that Hessian and errors relative to rows; from a checkpoint the same, to the byte."""
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    table = model.get_input_embeddings().weight.data.clone()
    hessian = implied_hessian(model, input_table(model))
    assert torch.equal(hessian, damped(implied_moment(model.get_submodule(NORMS[name])), damping=1.0))

    compress_checkpoint(tmp_path / "dense", tmp_path / "small", bits=6)
    hf_dirembed.compress(model, bits=6).save_pretrained(tmp_path / "loaded")
    found, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("small", "loaded"))
    assert found.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in found.items())

    # errors lie where the norm makes least of them
    errors = (model.get_input_embeddings().dense_weight() - table).double()
    plain = hf_dirembed.compression.compress.compress_table(table, bits=6)
    assert model.config.dirembed["record"]["tables"].popitem()[1]["settings"]["hessian"]
    assert not plain.record.settings["hessian"]
    share = lambda e: float(((e @ hessian) * e).sum() / e.square().sum())  # noqa: E731
    without = hf_dirembed.CompressedEmbedding.from_embedding(torch.nn.Embedding.from_pretrained(table), bits=6)
    assert share(errors) < 0.95 * share((without.dense_weight() - table).double())


def test_a_head_of_its_own_is_measured_by_its_side_alone() -> None:
    model = FAMILIES["llama-untied"].make("AutoModelForCausalLM")
    assert torch.equal(implied_hessian(model, "lm_head"), damped(implied_moment(model.model.norm)))
    records = hf_dirembed.compress(model, bits=7).config.dirembed["record"]["tables"]
    assert {path: record["settings"]["hessian"] for path, record in records.items()} == {
        "model.embed_tokens": False, "lm_head": True,
    }  # fmt: skip


def test_given_statistics_and_hessians_come_first() -> None:
    given = torch.eye(32)
    one, other = (hf_dirembed.compress(make("gemma3"), bits=6, hessian=hessian) for hessian in (given, None))
    codes = [model.get_input_embeddings().weight.detach() for model in (one, other)]
    assert not torch.equal(*map(torch.Tensor.clone, codes))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, 1e300])
def test_a_norm_that_says_nothing_is_left_out(value: float) -> None:
    """Nothing was calibrated, so nobody is to be told of calibration."""
    model = FAMILIES["llama-untied"].make("AutoModelForCausalLM").double()
    torch.nn.init.constant_(model.model.norm.weight, value)
    assert implied_hessian(model, "lm_head") is None
    records = hf_dirembed.compress(model, bits=7).config.dirembed["record"]["tables"]
    assert not records["lm_head"]["settings"]["hessian"]
