"""Where a model's tensors lie and in which dtype: device maps, offloading, casts, copies, pickles, shards."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, TABLE_FAMILIES
from tiny import BUDGETS, make, outputs
from torch import Tensor
from transformers import PreTrainedModel

import hf_dirembed
from hf_dirembed.checkpoints.convert import inspect_checkpoint
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix


AUTOS = {"bert": "AutoModelForMaskedLM", "llama-tied": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
CASES = [(name, method) for name in AUTOS for method in BUDGETS]
every_case = pytest.mark.parametrize(("name", "method"), CASES, ids=["-".join(case) for case in CASES])


def load(name: str, folder: Path, **options: object) -> PreTrainedModel:
    return getattr(transformers, AUTOS[name]).from_pretrained(folder, **options).eval()


def assert_same(model: PreTrainedModel, name: str, expected: list[Tensor]) -> None:
    found = outputs(model, name)
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


def assert_reloads(model: PreTrainedModel, name: str, folder: Path, **options: object) -> None:
    """What is saved answers as the model does."""
    expected = outputs(model, name)
    model.save_pretrained(folder)
    assert_same(load(name, folder, **options), name, expected)


@every_case
def test_device_map(name: str, method: str, tmp_path: Path) -> None:
    model = make(name, AUTOS[name], method)
    expected = outputs(model, name)
    model.save_pretrained(tmp_path / "one")
    for device_map in ("auto", "cpu", {"": "cpu"}):
        again = load(name, tmp_path / "one", device_map=device_map)
        assert_same(again, name, expected)
    assert_reloads(again, name, tmp_path / "two")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_case
def test_casts(name: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(name, AUTOS[name], method).to(dtype)
    table = model.get_input_embeddings()
    assert model.dtype == table.dtype == dtype
    assert table.weight.dtype == (torch.uint8 if method == "transform" else dtype)
    assert outputs(model, name)[0].dtype == dtype
    model.save_pretrained(tmp_path / "one")
    again = load(name, tmp_path / "one")
    assert again.dtype == dtype
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert_reloads(again, name, tmp_path / "two")
    asked = load(name, tmp_path / "one", dtype=torch.float32)
    assert asked.dtype == asked.get_input_embeddings().dtype == torch.float32
    assert_reloads(asked, name, tmp_path / "three")


@every_case
def test_half_and_back(name: str, method: str, tmp_path: Path) -> None:
    model = make(name, AUTOS[name], method)
    assert model.half().dtype == torch.float16
    model.float().save_pretrained(tmp_path)
    # The tensors, not the answers: `half` rounds the rotary frequencies too, which loading computes again.
    again = load(name, tmp_path).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


@every_case
def test_copies(name: str, method: str, tmp_path: Path) -> None:
    model = make(name, AUTOS[name], method)
    expected = outputs(model, name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(model)
        assert_same(twin, name, expected)
        compressed = [module for module in twin.modules() if isinstance(module, CompressedMatrix)]
        assert len({id(module.weight) for module in compressed}) == 1
        assert compressed[0].weight is not model.get_input_embeddings().weight
    assert_reloads(twin, name, tmp_path / "one")
    state = model.state_dict()
    other = make(name, AUTOS[name], method)
    with torch.no_grad():
        other.get_input_embeddings().decoder_weight.add_(1)
    other.load_state_dict(state)
    assert_same(other, name, expected)


@every_case
def test_shards(name: str, method: str, tmp_path: Path) -> None:
    model = make(name, AUTOS[name], method)
    expected = outputs(model, name)
    model.save_pretrained(tmp_path / "one", max_shard_size="10KB")
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    again = load(name, tmp_path / "one")
    assert_same(again, name, expected)
    assert {table.method for table in inspect_checkpoint(tmp_path / "one").tables} == {method}
    assert_reloads(again, name, tmp_path / "two")


@every_case
def test_state_dict_of_one_s_own(name: str, method: str, tmp_path: Path) -> None:
    """As FSDP and DeepSpeed save, who gather the tensors themselves."""
    model = make(name, AUTOS[name], method)
    expected = outputs(model, name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert_same(load(name, tmp_path), name, expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("offloaded", [("bert.embeddings", "cls"), ("bert.encoder",)], ids=["table", "body"])
def test_disk_offload(offloaded: tuple[str, ...], method: str, tmp_path: Path) -> None:
    """What is on disk comes back when it is needed, and saving gathers it. What is tied goes there together."""
    model = make("bert", AUTOS["bert"], method)
    expected = outputs(model, "bert")
    model.save_pretrained(tmp_path / "one")
    parts = ("bert.embeddings", "bert.encoder", "cls")
    device_map = {part: "disk" if part in offloaded else "cpu" for part in parts}
    again = load("bert", tmp_path / "one", device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in again.parameters())
    # Up to rounding, for BLAS sums otherwise where the map of a file on disk starts off a cache line.
    torch.testing.assert_close(outputs(again, "bert"), expected)
    again.save_pretrained(tmp_path / "two")
    assert_same(load("bert", tmp_path / "two"), "bert", expected)


T5_PARTS = ("shared", "encoder", "decoder", "lm_head")


def offloaded_t5(folder: Path, auto: type, *on_disk: str) -> PreTrainedModel:
    device_map = {part: "disk" if part in on_disk else "cpu" for part in T5_PARTS}
    return auto.from_pretrained(folder, device_map=device_map, offload_folder=folder / "offload").eval()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("auto", [transformers.AutoModelForSeq2SeqLM, transformers.T5ForConditionalGeneration])
@pytest.mark.parametrize("method", BUDGETS)
def test_disk_offload_of_a_table_in_several_places(method: str, auto: type, tmp_path: Path) -> None:
    model = make("t5", AUTOS["t5"], method)
    expected = outputs(model, "t5")
    model.save_pretrained(tmp_path / "one")
    again = offloaded_t5(tmp_path / "one", auto, *T5_PARTS)
    assert not any(parameter.is_meta for parameter in again.get_input_embeddings().parameters())
    assert any(parameter.is_meta for parameter in again.parameters())
    torch.testing.assert_close(outputs(again, "t5"), expected)
    again.save_pretrained(tmp_path / "two")
    assert_same(load("t5", tmp_path / "two"), "t5", expected)


@pytest.mark.parametrize("on_disk", [("shared", "lm_head"), ("encoder",)], ids=["table", "encoder"])
def test_a_table_in_several_places_is_offloaded_in_part(on_disk: tuple[str, ...], tmp_path: Path) -> None:
    """Where a stock model's fails: compressed tables stay the map of their file, whatever goes to disk beside them."""
    auto = transformers.AutoModelForSeq2SeqLM
    FAMILIES["t5"].make(AUTOS["t5"]).save_pretrained(tmp_path / "stock")
    with pytest.raises((KeyError, ValueError), match="weight"):
        outputs(offloaded_t5(tmp_path / "stock", auto, *on_disk), "t5")
    model = make("t5", AUTOS["t5"])
    expected = outputs(model, "t5")
    model.save_pretrained(tmp_path / "ours")
    assert_same(offloaded_t5(tmp_path / "ours", auto, *on_disk), "t5", expected)


EVERYWHERE = {
    "bert": "AutoModelForMaskedLM",
    "gemma3n_text": "AutoModelForCausalLM",
    "llama-untied": "AutoModelForCausalLM",
    "llava": "AutoModelForImageTextToText",
    "fsmt": "AutoModelForSeq2SeqLM",
    "mobilebert": "AutoModelForMaskedLM",
}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", EVERYWHERE)
def test_any_module_may_go_to_disk_with_the_tables_in_it(name: str, tmp_path: Path) -> None:
    """All at once, each child of the model, and children of these: what tables are in stays off the device map."""
    family, auto = {**FAMILIES, **TABLE_FAMILIES}[name], getattr(transformers, EVERYWHERE[name])
    model = hf_dirembed.compress(family.make(EVERYWHERE[name]), bits=7).eval()
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        expected = model(**family.inputs()).logits
    children = [child for child, _ in model.named_children()]
    maps = [{"": "disk"}, *({each: "disk" if each == child else "cpu" for each in children} for child in children)]
    for number, device_map in enumerate(maps):
        folder = tmp_path / str(number)
        again = auto.from_pretrained(tmp_path / "one", device_map=device_map, offload_folder=folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**family.inputs()).logits, expected)
