"""Stock classes load compressed checkpoints where the plugin is imported, and fail on them where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, Family
from safetensors.torch import load_file, save_file
from tiny import BUDGETS, make, outputs
from transformers import BertForMaskedLM, BertModel

import hf_dirembed
from hf_dirembed import CheckpointError, ModelError
from hf_dirembed.errors import SpecError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make("bert", "AutoModelForMaskedLM")
    model.save_pretrained(tmp_path / "one")
    return tmp_path / "one"


@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_stock_class_loads_it(
    family: Family, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = family.make(family.autos[1])
    base = type(dense)
    model = hf_dirembed.compress(dense, method=method, **BUDGETS[method])
    model.save_pretrained(tmp_path / "one")
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    transformers.logging.set_verbosity_warning()
    try:
        again = base.from_pretrained(tmp_path / "one")
    finally:
        transformers.logging.set_verbosity_error()
    # some versions of transformers warn of Gemma's nested `rope_parameters`, of dense checkpoints as well
    assert [record for record in caplog.records if record.name != "transformers.modeling_rope_utils"] == []
    assert isinstance(again, base)
    assert type(again) is type(model)
    assert type(again.config) is type(model.config)
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again, "hf_quantizer")
    assert not hasattr(again.config, "quantization_config")
    assert all(map(torch.equal, outputs(again, family.name), outputs(model, family.name)))
    again.save_pretrained(tmp_path / "two")
    for file in (tmp_path / "one").glob("*.py"):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
    third = getattr(transformers, family.autos[1]).from_pretrained(tmp_path / "two")
    assert all(map(torch.equal, outputs(third, family.name), outputs(model, family.name)))


def test_another_head_and_a_dtype(folder: Path) -> None:
    """A class whose head the checkpoint lacks gets a fresh one; casts and loading info work as ever."""
    model, info = transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=3, dtype=torch.bfloat16, output_loading_info=True
    )
    assert info["missing_keys"] == {
        "classifier.weight",
        "classifier.bias",
        *(f"bert.pooler.dense.{name}" for name in ("weight", "bias")),
    }
    assert model.config.num_labels == 3
    assert model.dtype == model.get_input_embeddings().decoder_weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.uint8
    half = model.half()
    assert half.dtype == torch.float16


def test_a_class_of_one_s_own(folder: Path, tmp_path: Path) -> None:
    class Own(BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).last_hidden_state

    model = Own.from_pretrained(folder)
    ids = FAMILIES["bert"].inputs()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids), BertModel.from_pretrained(folder)(ids).last_hidden_state)


def test_a_class_of_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="compressed 'bert', which RobertaForMaskedLM does not read"):
        transformers.RobertaForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["weight", "decoder_weight", "decoder_bias_weight"])
def test_a_missing_tensor_is_no_random_one(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"bert.embeddings.word_embeddings.{name}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks bert.embeddings.word_embeddings.{name}"):
        BertForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_mismatched_tensor_is_refused(folder: Path, ignore: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, RuntimeError), match=r"lacks|mismatch"):
        BertForMaskedLM.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_pickles_and_broken_configs_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors only"):
        BertForMaskedLM.from_pretrained(folder, use_safetensors=False)
    config = json.loads((folder / "config.json").read_text())
    del config["dirembed"]["tables"]["bert.embeddings.word_embeddings"]["rank"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="rank"):
        BertForMaskedLM.from_pretrained(folder)
