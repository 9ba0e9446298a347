"""Compressing without loading the model gives what loading it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from transformers.modeling_utils import str_to_torch_dtype

from benchmarks.peers.measure import PeakMemory
from hf_dirembed import BudgetError, ModelError
from hf_dirembed.checkpoints import convert as checkpoint
from hf_dirembed.checkpoints.convert import compress_checkpoint, inspect_checkpoint
from hf_dirembed.checkpoints.safetensors_io import StoredFile
from hf_dirembed.checkpoints.streaming import StoredTables
from hf_dirembed.checkpoints.summary import CheckpointSummary


OPTIONS: dict[str, dict[str, Any]] = {
    "transform": {"bits": 6},
    "direction": {"method": "direction", "rank": 6},
    "svd": {"method": "svd", "rank": 6, "latent_dtype": "float16"},
    "autoencoder": {"method": "autoencoder", "rank": 6},
}
# Of which the file has the table under another name than the model: they are loaded.
RENAMED = {"llava", "gemma3-vision"}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def make(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    FAMILIES[name].make(FAMILIES[name].autos[1]).to(dtype).save_pretrained(folder, **options)
    return folder


def compress_both(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Path, Path]:
    """Compresses without and with loading the model."""
    assert isinstance(StoredTables.find(source), StoredTables)
    streamed, loaded = tmp_path / "streamed" / "out", tmp_path / "loaded" / "out"  # of one name, which the card bears
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_model", lambda _: pytest.fail("the model was loaded"))
        compress_checkpoint(source, streamed, **options)
    with monkeypatch.context() as patch:
        patch.setattr(StoredTables, "find", lambda *_: None)
        compress_checkpoint(source, loaded, **options)
    return streamed, loaded


def ranks(summary: CheckpointSummary) -> set[int]:
    return {table.rank for table in summary.tables}


def assert_same(streamed: Path, loaded: Path) -> None:
    found, expected = tensors_of(streamed), tensors_of(loaded)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor.flatten().view(torch.uint8), found[name].flatten().view(torch.uint8)), name
    names = {str(path.relative_to(loaded)) for path in loaded.rglob("*") if "safetensors" not in path.name}
    assert names == {str(path.relative_to(streamed)) for path in streamed.rglob("*") if "safetensors" not in path.name}
    for name in names:
        assert (streamed / name).read_bytes() == (loaded / name).read_bytes(), name


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - RENAMED))
def test_every_family_comes_out_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(name, tmp_path / "dense")
    assert_same(*compress_both(source, tmp_path, monkeypatch, method="svd", rank=5))


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_method_comes_out_the_same(
    method: str,
    dtype: torch.dtype,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make("bert", tmp_path / "dense", dtype=dtype)
    tokenizer.save_pretrained(source)
    streamed, loaded = compress_both(source, tmp_path, monkeypatch, **OPTIONS[method])
    assert_same(streamed, loaded)
    both = [StoredFile.read(folder / "model.safetensors") for folder in (streamed, loaded)]
    assert both[0].metadata == both[1].metadata
    for name, tensor in both[0].tensors.items():  # mapped tensors are used where they lie
        size = str_to_torch_dtype[tensor["dtype"]].itemsize
        assert (both[0].start + tensor["data_offsets"][0]) % size == 0, name


def test_a_file_of_untouched_tensors_is_not_held_in_memory(tmp_path: Path) -> None:
    """One file, of which the table is a small part: copied range by range, metadata and odd dtypes too."""
    source, out = tmp_path / "dense", tmp_path / "out"
    sizes = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(intermediate_size=400_000, tie_word_embeddings=True, dtype="float16", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
    file = source / "model.safetensors"
    held = load_file(file)
    held["éxtra.scale"] = torch.arange(7, dtype=torch.uint8).view(torch.float8_e4m3fn)
    held["empty"] = torch.zeros(0, 3, dtype=torch.int64)
    metadata = {"format": "pt", "trained by": "«somebody»"}
    save_file(held, file, metadata)
    del held
    num_bytes = file.stat().st_size
    assert num_bytes > 150e6
    memory = PeakMemory()
    compress_checkpoint(source, out, method="svd", rank=5)
    assert (memory.bytes() or 0) < num_bytes / 2
    with safe_open(file, framework="pt") as before, safe_open(out / "model.safetensors", framework="pt") as after:
        assert after.metadata() == metadata
        names = set(before.keys()) - {"model.embed_tokens.weight"}
        assert names | {f"model.embed_tokens.{name}" for name in ("weight", "decoder_weight")} == set(after.keys())
        for name in names:
            old, new = before.get_tensor(name), after.get_tensor(name)
            assert (old.dtype, old.shape) == (new.dtype, new.shape)
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8)), name
    assert not list(out.glob(".*"))
    assert transformers.AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().layout.rank == 5


def test_shards_without_the_table_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("llama-tied", tmp_path / "dense", max_shard_size="16KB")
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) > 3
    streamed, loaded = compress_both(source, tmp_path, monkeypatch, method="svd", rank=5)
    assert_same(streamed, loaded)
    assert sorted(file.name for file in streamed.glob("*.safetensors")) == shards
    changed = [name for name in shards if (source / name).read_bytes() != (streamed / name).read_bytes()]
    assert len(changed) == 1
    index = json.loads((streamed / "model.safetensors.index.json").read_text())
    held = tensors_of(streamed)
    assert index["weight_map"].keys() == held.keys()
    for name, shard in index["weight_map"].items():
        with safe_open(streamed / shard, framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118 (no dict)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(streamed)
    again = transformers.AutoModelForCausalLM.from_pretrained(loaded)
    inputs = FAMILIES["llama-tied"].inputs()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_renamed_tables_are_left_to_loading(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "dense")
    assert StoredTables.find(source) is None
    assert ranks(compress_checkpoint(source, tmp_path / "out", method="svd", rank=5)) == {5}


def cast(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def tied_twice(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [cast, tied_twice])
def test_what_loading_changes_is_loaded(change: Any, tmp_path: Path) -> None:
    source = make("llama-tied", tmp_path / "dense")
    change(source)
    assert StoredTables.find(source) is None
    compress_checkpoint(source, tmp_path / "out", method="svd", rank=5)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_the_generation_config_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("llama-tied", tmp_path / "dense")
    transformers.GenerationConfig(max_new_tokens=77, eos_token_id=2).save_pretrained(source)
    streamed, loaded = compress_both(source, tmp_path, monkeypatch, method="svd", rank=5)
    assert_same(streamed, loaded)
    assert json.loads((streamed / "generation_config.json").read_text())["max_new_tokens"] == 77


def test_mistakes_are_the_same_errors(tmp_path: Path) -> None:
    source = make("bert", tmp_path / "dense")
    with pytest.raises(BudgetError):
        compress_checkpoint(source, tmp_path / "out", bits=0.001)
    compress_checkpoint(source, tmp_path / "out", method="svd", rank=5)
    with pytest.raises(ModelError, match="compressed already"):
        compress_checkpoint(tmp_path / "out", tmp_path / "twice", method="svd", rank=3)
    assert ranks(inspect_checkpoint(tmp_path / "out")) == {5}
