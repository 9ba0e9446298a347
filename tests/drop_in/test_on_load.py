"""`from_pretrained(base, quantization_config=...)`: the model that `compress` makes of the one that was loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DIM, FAMILIES, VOCAB
from test_fresh_process import run
from tiny import outputs
from transformers import AutoModel, BertForMaskedLM, BertModel, PreTrainedModel, PreTrainedTokenizerFast

import hf_dirembed
from benchmarks.stand_in_hub import StandInHub
from hf_dirembed import (
    AutoencoderSettings,
    BudgetError,
    CalibrationError,
    CheckpointError,
    DirEmbedQuantizationConfig,
    ModelError,
    OptionError,
    Statistics,
    TransformSettings,
)
from hf_dirembed.checkpoints.loading import load_tokenizer


AUTOS = {
    "bert": "AutoModelForMaskedLM",
    "llama-tied": "AutoModelForCausalLM",
    "llama-untied": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bits": {"bits": 7},
    "ratio": {"ratio": 4, "settings": {"seed": 1, "passes": 2}, "languages": ("de",)},
    "rank": {"rank": 6, "method": "direction", "latent_dtype": "float16"},
    "svd": {"ratio": 4, "method": "svd"},
    "autoencoder": {"rank": 5, "method": "autoencoder", "settings": {"epochs": 1}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Dense models with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    for name, auto in AUTOS.items():
        FAMILIES[name].make(auto).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made up, of a model with a tied head."""
    torch.manual_seed(3)
    moments = [(root := torch.randn(DIM, DIM, dtype=torch.float64)) @ root.T for _ in range(2)]
    counts = torch.randint(0, 50, (VOCAB,)).double()
    probabilities = torch.rand(VOCAB).double()
    made = Statistics(
        counts, *moments, num_tokens=int(counts.sum()), num_predictions=9, num_windows=3,
        probabilities=probabilities / probabilities.sum(),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    made.save(file)
    return file


def load(bases: Path, name: str, auto: Any = None, **options: Any) -> PreTrainedModel:
    return (auto or getattr(transformers, AUTOS[name])).from_pretrained(bases / name, **options)


def on_load(bases: Path, name: str, auto: Any = None, /, **options: Any) -> PreTrainedModel:
    return load(bases, name, auto, quantization_config=DirEmbedQuantizationConfig(**options))


def compressed(bases: Path, name: str, auto: Any = None, /, **options: Any) -> PreTrainedModel:
    """What `compress` makes of a model that was loaded."""
    kinds = {"autoencoder": AutoencoderSettings}
    if settings := options.get("settings"):
        options["settings"] = kinds.get(options.get("method", ""), TransformSettings)(**settings)
    return hf_dirembed.compress(load(bases, name, auto), load_tokenizer(bases / name), **options)


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit, and in everything that hangs on a model and its config."""
    assert type(model) is type(expected)
    assert type(model.config) is type(expected.config)
    assert vars(model).keys() == vars(expected).keys()
    assert vars(model.config).keys() == vars(expected.config).keys()
    assert model.config.to_dict() == expected.config.to_dict()
    mine, theirs = model.state_dict(keep_vars=True), expected.state_dict(keep_vars=True)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key
        assert mine[key].requires_grad == tensor.requires_grad, key
    assert [sorted(k for k in mine if mine[k] is tensor) for tensor in mine.values()] == [
        sorted(k for k in theirs if theirs[k] is tensor) for tensor in theirs.values()
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", AUTOS)
def test_as_compress_does(name: str, options: dict[str, Any], bases: Path) -> None:
    model, expected = on_load(bases, name, **options), compressed(bases, name, **options)
    assert_same(model, expected)
    assert not model.training
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert all(map(torch.equal, outputs(model, name), outputs(expected, name)))


@pytest.mark.parametrize("stock", [BertModel, BertForMaskedLM, transformers.BertForTokenClassification])
def test_stock_classes(stock: Any, bases: Path) -> None:
    torch.manual_seed(0)  # for the head that the checkpoint lacks
    model = on_load(bases, "bert", stock, bits=7)
    torch.manual_seed(0)
    assert_same(model, compressed(bases, "bert", stock, bits=7))
    assert isinstance(model, stock)


def test_tables_of_their_own(bases: Path) -> None:
    for options in ({"bits": {"embed_tokens": 6, "lm_head": 7}}, {"bits": 7, "tables": ["lm_head"]}):
        model = on_load(bases, "llama-untied", **options)
        assert_same(model, compressed(bases, "llama-untied", **options))
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_dtype(name: str, bases: Path) -> None:
    config = DirEmbedQuantizationConfig(bits=7)
    model = load(bases, name, dtype=torch.bfloat16, quantization_config=config)
    expected = hf_dirembed.compress(
        load(bases, name, dtype=torch.bfloat16), load_tokenizer(bases / name), bits=7
    )  # T5 keeps some of its weights in float32
    assert_same(model, expected)
    assert model.dtype == model.get_input_embeddings().dtype == torch.bfloat16


def test_a_dictionary_will_do(bases: Path) -> None:
    model = load(bases, "bert", quantization_config={"quant_method": "dirembed", "bits": 7})
    assert_same(model, compressed(bases, "bert", bits=7))


@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_statistics(name: str, bases: Path, statistics: Path) -> None:
    expected = compressed(bases, name, bits=7, calibration=Statistics.load(statistics))
    for given in (statistics, str(statistics), Statistics.load(statistics)):
        assert_same(on_load(bases, name, bits=7, statistics=given), expected)
    assert not torch.equal(outputs(expected, name)[0], outputs(compressed(bases, name, bits=7), name)[0])


def test_tokenizers(bases: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    weighed, alike = compressed(bases, "bert", bits=7), hf_dirembed.compress(load(bases, "bert"), bits=7)
    assert not torch.equal(outputs(weighed, "bert")[0], outputs(alike, "bert")[0])
    assert_same(on_load(bases, "bert", bits=7, tokenizer=None), alike)
    for given in (tokenizer, bases / "t5", str(bases / "t5")):
        assert_same(on_load(bases, "bert", bits=7, tokenizer=given), weighed)
    with pytest.raises(CheckpointError, match="neither a folder here nor a model that the Hub"):
        on_load(bases, "bert", bits=7, tokenizer=str(tmp_path.name))


def test_without_a_tokenizer(
    tmp_path: Path, statistics: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and so it does of what goes with one."""
    FAMILIES["bert"].make(AUTOS["bert"]).save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    model = on_load(tmp_path, "bert", bits=7)
    assert_same(model, hf_dirembed.compress(load(tmp_path, "bert"), bits=7))
    assert "bert has no tokenizer, so all rows of the tables count alike: name one" in caplog.text
    with pytest.raises(CalibrationError, match=r"bert has no tokenizer, which statistics go with: name one with"):
        on_load(tmp_path, "bert", bits=7, statistics=statistics)
    caplog.clear()
    on_load(tmp_path, "bert", bits=7, tokenizer=None)
    on_load(tmp_path, "bert", ratio=4, method="svd")
    assert "tokenizer" not in caplog.text


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(device_map: Any, bases: Path) -> None:
    model = load(bases, "llama-tied", device_map=device_map, quantization_config=DirEmbedQuantizationConfig(bits=7))
    expected = compressed(bases, "llama-tied", bits=7)
    assert all(map(torch.equal, outputs(model, "llama-tied"), outputs(expected, "llama-tied")))
    model.float().to("cpu")


PARTS = ("bert.embeddings", "bert.encoder", "cls")


def some_on_disk(bases: Path, folder: Path, *offloaded: str) -> PreTrainedModel:
    device_map = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    config = DirEmbedQuantizationConfig(bits=7)
    return load(bases, "bert", device_map=device_map, offload_folder=folder, quantization_config=config)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_body_on_disk(bases: Path, tmp_path: Path) -> None:
    model = some_on_disk(bases, tmp_path / "offload", "bert.encoder")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert model.get_input_embeddings()._hf_hook is not None
    expected = outputs(compressed(bases, "bert", bits=7), "bert")
    torch.testing.assert_close(outputs(model, "bert"), expected)
    model.save_pretrained(tmp_path / "bert")
    torch.testing.assert_close(outputs(load(tmp_path, "bert"), "bert"), expected)


def test_a_table_on_disk_is_refused(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"the table bert.embeddings.word_embeddings .*: load it without device_map, save the compressed model"
    for offloaded in (PARTS, ("bert.embeddings", "cls")):
        with pytest.raises(ModelError, match=message):
            some_on_disk(bases, tmp_path, *offloaded)
    # And where the map does not tell, as of what accelerate offloads from a GPU to the memory.
    monkeypatch.setattr("hf_dirembed.integrations.on_load.get_device", lambda *_: "cpu")
    with pytest.raises(ModelError, match=message):
        some_on_disk(bases, tmp_path, "bert.embeddings", "cls")


NO_BUDGET = "give exactly one of bits, ratio and rank"
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no budget": ({}, BudgetError, f"{NO_BUDGET}, not none"),
    "two budgets": ({"bits": 2, "ratio": 8}, BudgetError, f"{NO_BUDGET}, not bits=2, ratio=8"),
    "no number": ({"bits": "two"}, BudgetError, "bits='two' is not a positive number"),
    "nothing": ({"ratio": 0}, BudgetError, "ratio=0 is not a positive number"),
    "no table named": ({"bits": {}}, BudgetError, r"bits=\{\} names no table"),
    "a table of no bits": ({"bits": {"lm_head": -1}}, BudgetError, "bits=-1 is not a positive number"),
    "a rank of integers": ({"rank": 4}, BudgetError, "rank=4 goes with methods of float latents"),
    "method": ({"bits": 2, "method": "magic"}, OptionError, "method 'magic' is unknown: choose one of transform"),
    "settings of no method": (
        {"bits": 2, "method": "magic", "settings": {"seed": 1}}, OptionError, "method 'magic' is unknown",
    ),
    "tables": ({"bits": 2, "tables": "lm_head"}, OptionError, "tables='lm_head' is no list of names"),
    "tables and names": ({"bits": {"lm_head": 2}, "tables": ["lm_head"]}, OptionError, "says the same twice"),
    "latents": ({"bits": 2, "latent_dtype": "float16"}, OptionError, "goes with methods of float latents"),
    "dtype": ({"rank": 2, "method": "svd", "latent_dtype": "int8"}, OptionError, "is no dtype of latents"),
    "settings": ({"bits": 2, "settings": AutoencoderSettings()}, OptionError, "takes no AutoencoderSettings"),
    "a setting": ({"bits": 2, "settings": {"epochs": 3}}, OptionError, "'transform' has no setting 'epochs': it has"),
    "its value": ({"bits": 2, "settings": {"passes": -1}}, OptionError, "passes=-1"),
    "settings of svd": ({"rank": 2, "method": "svd", "settings": {}}, OptionError, "'svd' takes no settings"),
    "other settings": ({"bits": 2, "settings": 3}, OptionError, "takes no int"),
    "statistics": ({"bits": 2, "statistics": 3}, OptionError, "statistics=3 are none: give Statistics, or the path"),
    "no file": ({"bits": 2, "statistics": "absent"}, CalibrationError, "absent is no readable statistics file"),
    "statistics of svd": (
        {"rank": 2, "method": "svd", "statistics": Statistics(torch.ones(2), None, torch.eye(2), 2)},
        OptionError, "'svd' takes no calibration",
    ),
    "statistics alone": (
        {"bits": 2, "tokenizer": None, "statistics": "absent"}, OptionError, "statistics go with a tokenizer: leave",
    ),
    "tokenizer": ({"bits": 2, "tokenizer": False}, OptionError, "tokenizer=False is none: give a tokenizer"),
    "its name": ({"bits": 2, "tokenizer": ""}, OptionError, "tokenizer='' is none: give a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_are_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DirEmbedQuantizationConfig(**options)


def test_mistakes_of_dictionaries(bases: Path, tmp_path: Path) -> None:
    read = DirEmbedQuantizationConfig.from_dict
    with pytest.raises(BudgetError, match=NO_BUDGET):
        read({"quant_method": "dirembed", "method": "svd"})
    with pytest.raises(OptionError, match="has no option 'bitz': it has bits, ratio, rank, tables, method"):
        read({"quant_method": "dirembed", "bitz": 2})
    # What a config says that came with a model is not read before a model is loaded.
    config = read({"quant_method": "dirembed", "bits": 2, "statistics": "absent"})
    with pytest.raises(CalibrationError, match="absent is no readable statistics file"):
        load(bases, "bert", quantization_config=config)


def test_mistakes_that_the_model_shows(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its weights are read."""

    def not_yet(*args: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", not_yet)
    with pytest.raises(OptionError, match=r"'lm_heads' names no table: the model has model\.embed_"):
        on_load(bases, "llama-untied", bits=7, tables=["lm_heads"])
    with pytest.raises(OptionError, match="device 'abacus' cannot be used"):
        on_load(bases, "bert", bits=7, device="abacus")


def test_a_model_without_tables(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="ViTModel has no token embedding that can be compressed"):
        AutoModel.from_pretrained(tmp_path / "vit", quantization_config=DirEmbedQuantizationConfig(bits=2))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("auto", [transformers.AutoModelForMaskedLM, BertForMaskedLM])
def test_what_is_compressed_already_is_refused(auto: Any, bases: Path, tmp_path: Path) -> None:
    on_load(bases, "bert", bits=7).save_pretrained(tmp_path / "bert")
    for options in ({"bits": 7}, {"rank": 3, "method": "svd"}):
        with pytest.raises(ModelError, match=r"bert is compressed already: leave quantization_config out, or load"):
            on_load(tmp_path, "bert", auto, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_round_trips(options: dict[str, Any], tmp_path: Path, statistics: Path) -> None:
    weighs = options.get("method") in (None, "direction")
    config = DirEmbedQuantizationConfig(**options, device="cpu", statistics=statistics if weighs else None)
    values = config.to_dict()
    assert values == dict(config) == json.loads(config.to_json_string())
    assert values["quant_method"] == "dirembed"
    config.to_json_file(tmp_path / "config.json")
    for read in (values, json.loads((tmp_path / "config.json").read_text())):
        again = DirEmbedQuantizationConfig.from_dict(read)
        assert again == config
        assert transformers.quantizers.AutoQuantizationConfig.from_dict(read) == config
    other, unused = DirEmbedQuantizationConfig.from_dict(
        values, return_unused_kwargs=True, tokenizer="other", colour="green"
    )
    assert (other.tokenizer, unused) == ("other", {"colour": "green"})
    assert other != config
    loading = config.get_loading_attributes()
    assert DirEmbedQuantizationConfig(**loading) == config
    assert "tables" not in loading


def test_settings_of_either_form_are_one() -> None:
    given = DirEmbedQuantizationConfig(bits=2, settings=TransformSettings(seed=3))
    assert given == DirEmbedQuantizationConfig(bits=2, settings={**given.settings})
    assert given.settings["seed"] == 3
    paper = DirEmbedQuantizationConfig(rank=2, method="autoencoder", settings=AutoencoderSettings.paper())
    assert paper.request().settings == AutoencoderSettings.paper()


def test_json_holds_no_tensors(statistics: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, value in (("statistics", Statistics.load(statistics)), ("tokenizer", tokenizer)):
        config = DirEmbedQuantizationConfig(bits=2, **{name: value})
        with pytest.raises(OptionError, match=f"JSON does not hold the {name}: save them, and give {name}= the path"):
            config.to_json_string()
        assert type(config.to_dict()[name]) is type(value)


@pytest.mark.parametrize("name", AUTOS)
def test_save_and_reload(name: str, bases: Path, tmp_path: Path) -> None:
    model = on_load(bases, name, bits=7)
    model.save_pretrained(tmp_path / "one" / name)
    compressed(bases, name, bits=7).save_pretrained(tmp_path / "two" / name)
    for file in (tmp_path / "two" / name).iterdir():
        assert (tmp_path / "one" / name / file.name).read_bytes() == file.read_bytes(), file.name
    for auto in (None, type(model).base_class):
        again = load(tmp_path / "one", name, auto)
        assert type(again) is type(model)
        assert all(map(torch.equal, outputs(again, name), outputs(model, name)))


FRESH = """
import json, sys, torch, transformers
import hf_dirembed

source, target, auto, options = sys.argv[1:]
config = hf_dirembed.DirEmbedQuantizationConfig.from_dict(json.loads(options))
getattr(transformers, auto).from_pretrained(source, quantization_config=config).save_pretrained(target)
"""


def test_a_fresh_process(bases: Path, tmp_path: Path) -> None:
    options = DirEmbedQuantizationConfig(bits=7).to_json_string()
    run(FRESH, bases / "llama-tied", tmp_path / "fresh", AUTOS["llama-tied"], options, modules=tmp_path)
    on_load(bases, "llama-tied", bits=7).save_pretrained(tmp_path / "here")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "fresh" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


HUB = """
import sys, transformers, hf_dirembed
config = hf_dirembed.DirEmbedQuantizationConfig(bits=7)
model = transformers.AutoModelForMaskedLM.from_pretrained("me/dense", revision=sys.argv[2], quantization_config=config)
model.save_pretrained(sys.argv[1])
"""


def test_a_model_of_the_hub(hub: StandInHub, bases: Path, tmp_path: Path) -> None:
    """The tokenizer is that of the same revision; every file comes once."""
    files = {file.name: file.read_bytes() for file in (bases / "bert").iterdir()}
    hub.add("me/dense", files)
    revision = hub.repos["me/dense"].branches["main"]
    hub.repos["me/dense"].commit("main", {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"})
    for target in ("one", "two"):
        hub.run(HUB, tmp_path / target, revision, cache=tmp_path / "cache")
        if target == "one":
            assert sorted(hub.downloads) == sorted((name, len(content)) for name, content in files.items())
            hub.downloads.clear()
    assert not hub.downloads
    model = load(tmp_path, "one", transformers.AutoModelForMaskedLM)
    spec = model.config.dirembed["record"]["tables"]["bert.embeddings.word_embeddings"]["settings"]
    assert spec["base_model"] == "me/dense"
    assert all(map(torch.equal, outputs(model, "bert"), outputs(compressed(bases, "bert", bits=7), "bert")))


def test_it_trains(bases: Path, tmp_path: Path) -> None:
    ids = FAMILIES["llama-tied"].inputs()["input_ids"]
    model, twin = on_load(bases, "llama-tied", bits=7), compressed(bases, "llama-tied", bits=7)
    transformers.trainer_utils.validate_quantization_for_training(model)
    for each in (model, twin):
        optimizer = torch.optim.SGD([p for p in each.train().parameters() if p.requires_grad], lr=0.1)
        each(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, twin)
    before = load(bases, "llama-tied").model.layers[0].mlp.up_proj.weight
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    model.eval().save_pretrained(tmp_path / "llama-tied")
    again = load(tmp_path, "llama-tied")
    torch.testing.assert_close(outputs(again, "llama-tied"), outputs(model, "llama-tied"))
    assert model.to(torch.bfloat16).half().dtype == torch.float16
    assert type(hf_dirembed.expand(model)) is transformers.LlamaForCausalLM


def test_lora(bases: Path, tmp_path: Path) -> None:
    """On top of it, and where `from_pretrained` is given an adapter, whose base it then compresses."""
    peft = pytest.importorskip("peft")
    ids = FAMILIES["llama-tied"].inputs()["input_ids"]
    model = on_load(bases, "llama-tied", bits=7)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted(input_ids=ids, labels=ids).loss.backward()
    adapted.eval().save_pretrained(tmp_path / "llama-tied")
    expected = outputs(adapted, "llama-tied")
    again = peft.PeftModel.from_pretrained(on_load(bases, "llama-tied", bits=7), tmp_path / "llama-tied").eval()
    assert all(map(torch.equal, outputs(again, "llama-tied"), expected))
    found = on_load(tmp_path, "llama-tied", bits=7)
    assert isinstance(found.get_input_embeddings(), hf_dirembed.CompressedEmbedding)
    assert all(map(torch.equal, outputs(found, "llama-tied"), expected))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert all(
        map(torch.equal, outputs(load(tmp_path, "merged", type(model)), "llama-tied"), outputs(merged, "llama-tied"))
    )
