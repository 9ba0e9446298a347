"""A body that torchao or bitsandbytes quantises around a compressed table: loads, saves, reloads."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB
from tiny import BUDGETS
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)

import hf_dirembed
from hf_dirembed import CheckpointError, ModelError
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix


IDS = FAMILIES["llama-tied"].inputs()["input_ids"]
CASES = [(tied, method) for tied in (True, False) for method in BUDGETS]


def of_torchao(kind: str, group: int = 32) -> TorchAoConfig:
    """Weights alone, for any device. torchao's own int4 layouts are kernels of GPUs."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    configs = {
        "int8": Int8WeightOnlyConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)),
    }
    return TorchAoConfig(configs[kind])


QUANTISERS = {
    "bitsandbytes": {
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    },
    "torchao": {kind: partial(of_torchao, kind) for kind in ("int8", "int4")},
}
FORMATS = [(package, kind) for package, kinds in QUANTISERS.items() for kind in kinds]


def dense(tied: bool) -> PreTrainedModel:
    """Wider than the other tiny models: a group of nf4 is 64 weights of a row."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def make(tied: bool, method: str) -> PreTrainedModel:
    """A compressed one."""
    return hf_dirembed.compress(dense(tied), method=method, **BUDGETS[method])


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")  # theirs, of CPUs
@pytest.mark.parametrize(("package", "kind"), FORMATS, ids=["-".join(case) for case in FORMATS])
@pytest.mark.parametrize(("tied", "method"), CASES)
def test_quantised_body(tied: bool, method: str, package: str, kind: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    dense_body = make(tied, method)
    dense_body.save_pretrained(tmp_path / "one")
    quantisation = QUANTISERS[package][kind]()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", quantization_config=quantisation, dtype="float32")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert type(weight) is not type(dense_body.model.layers[0].mlp.up_proj.weight)
    for module, twin in zip(model.modules(), dense_body.modules(), strict=False):
        if isinstance(module, CompressedMatrix):
            assert type(module) is type(twin)
            for key, tensor in twin.code_tensors().items():
                assert torch.equal(module.code_tensors()[key], tensor), key
    # Before it runs: on CPU, bitsandbytes then repacks its four-bit weights, and rounds their scales.
    model.save_pretrained(tmp_path / "two")
    expected = logits(model)
    scale = logits(dense_body).abs().max()
    assert 0 < (expected - logits(dense_body)).abs().max() < scale
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert again.config.quantization_config.quant_method == package
    assert isinstance(again.get_input_embeddings(), CompressedMatrix)
    assert torch.equal(logits(again), expected)
    with pytest.raises(RuntimeError, match="mismatch"):  # one quantiser has the config's place: AutoModels load it
        LlamaForCausalLM.from_pretrained(tmp_path / "two")


@pytest.mark.filterwarnings("ignore")
def test_what_a_quantiser_fails_on_is_said(tmp_path: Path) -> None:
    """And not that weights are missing, which it did not make."""
    pytest.importorskip("torchao")
    make(True, "transform").save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"proj.weight could not be converted: .* 48: change the quantization_conf"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=of_torchao("int4", group=48))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize(("package", "kind"), FORMATS, ids=["-".join(case) for case in FORMATS])
@pytest.mark.parametrize("tied", [True, False])
def test_compressed_after_its_body(tied: bool, package: str, kind: str, auto: type, tmp_path: Path) -> None:
    """The other order: a dense model whose body is quantised while it is loaded, and then its tables."""
    pytest.importorskip(package)
    dense(tied).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base", quantization_config=QUANTISERS[package][kind](), dtype="float32")
    expected_type = type(model.model.layers[0].mlp.up_proj.weight)
    hf_dirembed.compress(model, bits=7)
    alone = hf_dirembed.compress(dense(tied), bits=7)
    for name, module in alone.named_modules():
        if isinstance(module, CompressedMatrix):
            for key, tensor in module.code_tensors().items():
                assert torch.equal(model.get_submodule(name).code_tensors()[key], tensor), key
    model.save_pretrained(tmp_path / "both")
    expected = logits(model)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert type(again.model.layers[0].mlp.up_proj.weight) is expected_type
    assert isinstance(again.get_input_embeddings(), CompressedMatrix)
    assert isinstance(again.get_output_embeddings(), CompressedMatrix)
    assert torch.equal(logits(again), expected)


@pytest.mark.filterwarnings("ignore")
def test_one_slot_holds_one_quantiser(tmp_path: Path) -> None:
    """What transformers refuses: to compress on load what is quantised, and to quantise by a stock class."""
    pytest.importorskip("torchao")
    dense(True).save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=of_torchao("int8")).save_pretrained(
        tmp_path / "quantised"
    )
    with pytest.raises(ValueError, match="quantized with TorchAoConfig but you are passing a DirEmbedQuantizationCon"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "quantised", quantization_config=hf_dirembed.DirEmbedQuantizationConfig(bits=7)
        )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert isinstance(hf_dirembed.compress(model, bits=7).get_input_embeddings(), CompressedMatrix)

    make(True, "transform").save_pretrained(tmp_path / "packed")
    with pytest.raises(
        ValueError, match="quantized with DirEmbedQuantizationConfig but you are passing a TorchAoConf"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=of_torchao("int8"))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_head_stays(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    dense(False).save_pretrained(tmp_path)
    quantisation = of_torchao("int8")
    quantisation.include_input_output_embeddings = True
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype="float32")
    head = model.lm_head.weight
    with pytest.raises(ModelError, match="lm_head cannot be compressed: it is quantised, a Int8Tensor: load"):
        hf_dirembed.compress(model, bits=7, tables=["lm_head"])
    hf_dirembed.compress(model, bits=7)
    assert model.lm_head.weight is head
    assert isinstance(model.get_input_embeddings(), CompressedMatrix)
