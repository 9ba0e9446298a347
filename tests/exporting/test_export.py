"""Exported folders: families, bodies, what stands beside the files, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from families import FAMILIES
from transformers import AutoConfig, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

import hf_dirembed
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.cli.commands import main
from hf_dirembed.exporting import export as exporting
from hf_dirembed.exporting import packages
from hf_dirembed.exporting.body import example_inputs, make_graph, outputs_of
from hf_dirembed.exporting.check import compare
from hf_dirembed.exporting.export import METADATA
from hf_dirembed.exporting.quantise import BODIES


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
# Of each way in which models use their table, one; families that are built like another one are left out.
MODELS = [
    ("bert", "AutoModelForTokenClassification", "logits"),
    ("albert", "AutoModelForQuestionAnswering", "start_logits"),
    ("modernbert", "AutoModelForSequenceClassification", "logits"),
    ("t5", "AutoModelForTextEncoding", "last_hidden_state"),
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny XLM-RoBERTa with its tokenizer, without modules of sentence-transformers."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    config = XLMRobertaConfig(
        vocab_size=900, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=80, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    XLMRobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n")
    return folder


@pytest.fixture(scope="module")
def compressed(dense: Path) -> Path:
    compress_checkpoint(dense, dense.parent / "compressed", bits=5)
    return dense.parent / "compressed"


@pytest.fixture(scope="module")
def exported(compressed: Path) -> Path:
    """With both files that a body in 8 bits comes with."""
    out = compressed.parent / "exported"
    result = run("export", compressed, out, "--body", "int8-weights", "--pooling", "mean", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert [each["name"] for each in summary["files"]] == ["onnx/model.onnx", "onnx/model_int8.onnx"]
    assert [each["num_bytes"] for each in summary["files"]] == [
        (out / each["name"]).stat().st_size for each in summary["files"]
    ]
    return out


@pytest.mark.parametrize(("name", "auto", "output"), MODELS, ids=[name for name, _, _ in MODELS])
def test_families(name: str, auto: str, output: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(FAMILIES[name].make_config()).eval()
    model = hf_dirembed.compress(model, bits=7)
    names = ("input_ids", "attention_mask")
    graph = make_graph(model, example_inputs(names, 150), None)
    onnx.save(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx")

    inputs = example_inputs(names, 150, batch=3, length=21)
    expected = outputs_of(model, inputs)
    assert output in expected
    assert compare(tmp_path / "model.onnx", BODIES["fp32"], inputs, expected) < 1e-5
    assert not [name for name, _ in model.named_parameters() if "exported_table" in name]


def test_folder(exported: Path, compressed: Path) -> None:
    """A stock config and tokenizer, pooling, a card; nothing of the plugin but in the files' metadata."""
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("xlm-roberta", ["XLMRobertaModel"])
    assert "dirembed" not in config
    assert "auto_map" not in config
    assert type(AutoConfig.from_pretrained(exported)) is XLMRobertaConfig
    assert not [*exported.glob("*.py"), *exported.glob("*.safetensors"), *exported.parent.glob(".*")]
    assert (exported / "tokenizer.json").read_bytes() == (compressed / "tokenizer.json").read_bytes()

    modules = json.loads((exported / "modules.json").read_text())
    assert [each["type"].rpartition(".")[2] for each in modules] == ["Transformer", "Pooling"]
    pooling = json.loads((exported / modules[1]["path"] / "config.json").read_text())
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens"]
    assert pooling["word_embedding_dimension"] == 32

    card = (exported / "README.md").read_text()
    assert "license: mit" in card
    for file in ("model.onnx", "model_int8.onnx"):
        assert f"| `onnx/{file}` |" in card
        model = onnx.load(exported / "onnx" / file)
        (entry,) = [each.value for each in model.metadata_props if each.key == METADATA]
        spec = json.loads(entry)
        assert (
            spec["tables"].keys() == json.loads((compressed / "config.json").read_text())["dirembed"]["tables"].keys()
        )
        assert spec["record"]


@pytest.mark.parametrize("body", BODIES)
def test_answers(body: str, exported: Path, compressed: Path, tmp_path: Path) -> None:
    """Whatever the body, of any batch and length; decoder and position table are in no 8 bits."""
    folder = exported
    if body == "int8":
        folder = tmp_path / "out"
        assert run("export", compressed, folder, "--body", body).exit_code == 0
    file = folder / "onnx" / BODIES[body].file
    model = hf_dirembed.checkpoints.loading.load_model(compressed, dtype=torch.float32).eval()
    for batch, length in ((1, 1), (2, 70)):
        inputs = example_inputs(("input_ids", "attention_mask"), 900, batch=batch, length=length)
        cosine_or_difference = compare(file, BODIES[body], inputs, outputs_of(model, inputs))
        assert cosine_or_difference < 1e-5 if body == "fp32" else cosine_or_difference > 0.98

    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert {"fp32": "MatMul", "int8": "MatMulInteger", "int8-weights": "MatMulNBits"}[body] in kinds
    held = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in onnx.load(file).graph.initializer
        if len(each.dims) == 2
    }
    (positions,) = [each for name, each in held.items() if "position" in name]
    assert positions.dtype == numpy.float32
    assert not [name for name in held if name.endswith(("decoder_quantized", "decoder_Q8"))]


def test_from_a_dense_checkpoint(dense: Path, tmp_path: Path) -> None:
    """Compressed on the way: the same file as in two steps."""
    result = run("export", dense, tmp_path / "out", "--bits", "5", "--opset", "18")
    assert result.exit_code == 0, result.output
    assert "onnx/model.onnx" in result.stdout
    assert not (tmp_path / "out" / "modules.json").exists()
    assert onnx.load(tmp_path / "out/onnx/model.onnx").opset_import[0].version == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--body", "int4"), "body 'int4' is not one of fp32, int8, int8-weights: choose one of these"),
        (("--opset", "12"), "opset 12 has no bitwise operators: choose 18 or a later one"),
        (("--pooling", "sum"), "pooling 'sum' is not one of cls, lasttoken, max, mean,"),
        (("--bits", "2"), "is compressed already: leave bits out, or name the dense checkpoint"),
        (("--calibrate", "self"), "is compressed already: leave calibration out, or name the dense checkpoint"),
    ],
)
def test_options_are_refused(arguments: tuple[str, ...], message: str, compressed: Path, tmp_path: Path) -> None:
    result = run("export", compressed, tmp_path / "out", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_sources_are_refused(dense: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a mend that helps."""
    result = run("export", dense, tmp_path / "out")
    assert "is a dense checkpoint: say how small its tables shall be, as with --bits 2" in result.stderr
    result = run("export", exported, tmp_path / "out", "--bits", "2", "--pooling", "cls")
    assert "says in modules.json how it is pooled: leave --pooling cls out" in result.stderr

    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(tmp_path / "head")
    result = run("export", tmp_path / "head", tmp_path / "out", "--bits", "7")
    assert (
        "is a model with an LM head, which onnxruntime cannot read from packed codes: make it dense" in result.stderr
    )
    result = run("export", tmp_path / "head", tmp_path / "out", "--bits", "7", "--pooling", "mean")
    assert result.exit_code == 0, result.output

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        hf_dirembed.ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'hf_dirembed\[onnx\]'"
    ):
        packages.require_packages()


def test_wrong_answers_are_refused(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that does not answer as the model does never appears, nor does its folder."""

    def damaged(*arguments: Any) -> Any:
        graph = make_graph(*arguments)
        norm = next(each for each in graph.graph.initializer if each.name.endswith("LayerNorm.weight"))
        norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm) * numpy.float32(1.01), norm.name))
        return graph

    monkeypatch.setattr(exporting, "make_graph", damaged)
    with pytest.raises(hf_dirembed.ExportError, match=r"model.onnx answers otherwise than the model, by "):
        hf_dirembed.export(compressed, tmp_path / "out")
    assert not list(tmp_path.iterdir())
