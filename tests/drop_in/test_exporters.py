"""Whole models compiled, exported, and run in onnxruntime with other shapes than they were exported with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tiny import BUDGETS, make
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_dirembed


AUTOS = {
    "bert": "AutoModelForMaskedLM",
    "llama-tied": "AutoModelForCausalLM",
    "gemma3": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def exported(model: PreTrainedModel, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    model.config.use_cache = False
    shapes = dict.fromkeys(inputs, DYNAMIC)
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


# Tracing is slow: each way once.
@pytest.mark.parametrize(("name", "dynamic"), [("bert", None), ("llama-tied", True), ("t5", True)])
def test_compile(name: str, dynamic: bool | None) -> None:
    torch.compiler.reset()
    model, inputs = make(name, AUTOS[name]), FAMILIES[name].inputs()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
    shorter = {key: ids[:1, :5] for key, ids in inputs.items()}
    torch.testing.assert_close(logits(compiled, shorter), logits(model, shorter))


@pytest.mark.parametrize("method", BUDGETS)
def test_compiled_training(method: str) -> None:
    torch.compiler.reset()
    ids = FAMILIES["llama-tied"].inputs()["input_ids"]
    grads = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)):
        model = make("llama-tied", "AutoModelForCausalLM", method)
        wrap(model)(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(name.endswith("decoder_weight") for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama-tied", "gemma3"])
def test_export(name: str) -> None:
    model, inputs = make(name, AUTOS[name]), FAMILIES[name].inputs()
    program = exported(model, inputs)
    for shape in (inputs, {key: ids[:1, :5] for key, ids in inputs.items()}):
        torch.testing.assert_close(logits(program.module(), shape), logits(model, shape))


TOKENS = 20_000
SIZES = {"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
# Larger tables than elsewhere: exporters fold what is small into float constants.
LARGE = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, num_attention_heads=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=True)),
}


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{"bits": 2}, {"method": "direction", "ratio": 8}], ids=["packed", "floats"])
@pytest.mark.parametrize("name", LARGE)
def test_onnx(name: str, options: dict, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = hf_dirembed.compress(LARGE[name]().eval(), **options)
    ids = torch.randint(0, TOKENS, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.onnx.export(exported(model, inputs), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    wider = {"input_ids": torch.randint(0, TOKENS, (3, 70)), "attention_mask": torch.ones(3, 70, dtype=torch.long)}
    for shape in (inputs, wider, {key: value[:1, :5] for key, value in inputs.items()}):
        (found,) = session.run(None, {key: value.numpy() for key, value in shape.items()})
        torch.testing.assert_close(torch.from_numpy(found), logits(model, shape), rtol=1e-4, atol=1e-5)
    table = model.get_input_embeddings()
    others = sum(tensor.nbytes for tensor in set(model.parameters()) - set(table.parameters()))
    # The decoder is there in the model's dtype, and what the exporter adds is small beside a dense table.
    held = table.num_bytes + table.decoder_weight.nbytes
    assert (tmp_path / "model.onnx").stat().st_size < others + held + TOKENS * 32 * 4 / 2
