"""Compressed tables on one device and what uses them on another: bit-equal to a model that is on one."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from families import FAMILIES, TABLE_FAMILIES
from packed import make_embedding, make_head
from safetensors import safe_open
from second_device import DEVICE, DeviceTensor, move_parameters, second_device, to_device
from tiny import BUDGETS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

import hf_dirembed
from hf_dirembed.errors import CheckpointError
from hf_dirembed.remote.tables_dirembed import TABLE_MODULES


LLAMA = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TABLES = ("model.embed_tokens", "lm_head")
IDS = torch.arange(7, 97)[None]


@functools.cache
def made_llama(tied: bool, method: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, tie_word_embeddings=tied, attn_implementation="eager", pad_token_id=0)
    return hf_dirembed.compress(LlamaForCausalLM(config), method=method, **BUDGETS[method]).eval()


def make_llama(tied: bool = True, method: str = "transform") -> PreTrainedModel:
    return copy.deepcopy(made_llama(tied, method))


def body_modules(model: PreTrainedModel) -> list[nn.Module]:
    of_tables = {
        id(part) for module in model.modules() if isinstance(module, TABLE_MODULES) for part in module.modules()
    }
    return [module for module in model.modules() if id(module) not in of_tables]


@pytest.mark.parametrize("shape", [(3,), (2, 50), (0,)])
def test_rows_come_out_where_the_ids_are(shape: tuple[int, ...]) -> None:
    embedding, ids = make_embedding(), torch.randint(0, 160, shape)
    for lookup in (embedding, embedding.decode):
        expected = lookup(ids)
        with second_device():
            rows = lookup(to_device(ids))
        assert isinstance(rows, DeviceTensor)
        assert torch.equal(rows.held, expected)


@pytest.mark.parametrize("bias_is_there", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_come_out_where_the_states_are(dtype: torch.dtype, bias_is_there: bool) -> None:
    head, states = make_head(dtype), torch.randn(2, 3, 32).to(dtype)
    with torch.no_grad():
        expected = head(states)
    if bias_is_there:  # it moves with the body, as tied heads have one of their own
        head._parameters["bias"] = nn.Parameter(to_device(head.bias.data), requires_grad=False)
    with second_device():
        logits = head(to_device(states))
    assert isinstance(logits, DeviceTensor)
    assert torch.equal(logits.held, expected)


def test_what_the_second_device_is_worth() -> None:
    """Tensors of both devices do not meet there, so that a test would see it."""
    dense = nn.Embedding(9, 4)
    with second_device(), pytest.raises(RuntimeError, match="on lazy:0 and on cpu"):
        dense(to_device(torch.tensor([1])))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", BUDGETS)
def test_a_model_whose_tables_stay_on_the_cpu(method: str, tied: bool) -> None:
    model = make_llama(tied, method)
    expected, tokens = model(IDS).logits, model.generate(IDS, max_new_tokens=5, do_sample=False)
    for module in body_modules(model):
        move_parameters(module)
    with second_device():
        assert model.device == DEVICE
        assert torch.equal(model(to_device(IDS)).logits.held, expected)
        for ids in (to_device(IDS), IDS):  # which `generate` brings to the model's device
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False).cpu(), tokens)


def dispatched(model: PreTrainedModel, tables: str, body: Any, **options: Any) -> PreTrainedModel:
    parts = ("model.layers", "model.norm", "model.rotary_emb")
    return accelerate.dispatch_model(model, {**dict.fromkeys(TABLES, tables), **dict.fromkeys(parts, body)}, **options)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_tables_off_the_accelerator_run_where_they_are(place: str, tmp_path: Path) -> None:
    """accelerate would bring all codes to the accelerator for each pass."""
    model = make_llama()
    expected = model(IDS).logits
    with second_device():
        dispatched(model, place, str(DEVICE), offload_dir=tmp_path if place == "disk" else None)
        logits = model(IDS).logits
    assert model.device == DEVICE
    for module in model.modules():
        if isinstance(module, TABLE_MODULES):
            assert "_hf_hook" not in vars(module)
            assert {each.device.type for each in module.parameters()} == {"cpu"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits.cpu(), expected)


@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("disk", [TABLES, ("model.embed_tokens",), ("model",), ("model", "lm_head")], ids=str)
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("auto", [LlamaForCausalLM, transformers.AutoModelForCausalLM])
def test_tables_on_disk_stay_maps_of_their_file(auto: Any, disk: tuple[str, ...], method: str, tmp_path: Path) -> None:
    """Alone, where accelerate takes no whole model beside them, and in modules that are there as a whole."""
    model = make_llama(method=method)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    parts = ("model.layers", "model.norm", "model.rotary_emb", "lm_head") if "model" not in disk else ("lm_head",)
    device_map = {**dict.fromkeys(parts, "cpu"), **dict.fromkeys(disk, "disk")}
    given = dict(device_map)
    again = auto.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", attn_implementation="eager"
    )
    assert device_map == given
    assert again.model.layers[0].mlp.up_proj.weight.is_meta == ("model" in disk)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not any(each.is_meta for name in TABLES for each in again.get_submodule(name).parameters())
    assert torch.equal(again(IDS).logits, expected)
    again.save_pretrained(tmp_path / "again")
    files = [safe_open(folder / "model.safetensors", "pt") for folder in (tmp_path, tmp_path / "again")]
    assert all(torch.equal(*(file.get_tensor(key) for file in files)) for key in files[0].keys())  # noqa: SIM118


def test_codes_on_disk_are_checked(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    with safe_open(file, "pt") as tensors:
        codes = tensors.get_tensor("model.embed_tokens.weight").numpy().tobytes()
    content[content.index(codes) + len(codes) // 2] ^= 1
    file.write_bytes(content)
    device_map = {"model": "disk", "lm_head": "disk"}
    with pytest.raises(CheckpointError, match="something has changed the file"):
        LlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")


def test_per_layer_tables_off_the_accelerator() -> None:
    """Their blocks are modules that nobody calls, so accelerate would bring none of their codes."""
    family = TABLE_FAMILIES["gemma4_text"]
    model = hf_dirembed.compress(family.make(family.autos[0]), bits=7)
    model.set_attn_implementation("eager")
    expected = model(**family.inputs()).logits
    tables = [name for name, module in model.named_modules() if isinstance(module, TABLE_MODULES)]
    device_map = {name: "cpu" if name in tables else str(DEVICE) for name in leaves(model, tables)}
    with second_device():
        accelerate.dispatch_model(model, device_map)
        assert torch.equal(model(**family.inputs()).logits.cpu(), expected)


def leaves(model: PreTrainedModel, tables: list[str]) -> list[str]:
    """The modules of a model that have no table in them, the largest ones, and the tables."""
    found = []

    def visit(name: str, module: nn.Module) -> None:
        if name in tables or not any(table.startswith(f"{name}.") for table in tables):
            found.append(name)
            return
        for child, part in module.named_children():
            visit(f"{name}.{child}", part)

    for name, module in model.named_children():
        visit(name, module)
    return found


@pytest.mark.parametrize("name", ["llama-tied", "t5", "gemma4_text"])
def test_automatic_maps_count_what_is_packed_once_and_split_no_table(name: str) -> None:
    family = (FAMILIES | TABLE_FAMILIES)[name]
    model = hf_dirembed.compress(family.make(family.autos[-1]), bits=7)
    sizes, _ = compute_module_sizes(model)
    held = {id(each): each.nbytes for each in (*model.parameters(), *model.buffers())}
    assert sizes[""] == sum(held.values())
    tables = [path for path, module in model.named_modules() if isinstance(module, TABLE_MODULES)]
    for share in range(1, 10):
        room = {0: share * sizes[""] // 10, "cpu": 10 * sizes[""]}
        device_map = infer_auto_device_map(model, room, no_split_module_classes=list(model._no_split_modules))
        for path in tables:
            assert not any(entry.startswith(f"{path}.") for entry in device_map), device_map
