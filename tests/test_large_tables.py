"""Checkpoints with large tables: read in chunks, their codes written to files, the same as of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from large import N_GRAM, PER_LAYER, n_gram_model, per_layer_model, save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_dirembed
from hf_dirembed import TransformSettings
from hf_dirembed.checkpoints import convert
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.compression import compress_table
from hf_dirembed.compression.table import Columns
from hf_dirembed.remote.modules_dirembed import CompressedBlocks, CompressedEmbedding


SETTINGS = TransformSettings(large_rows=1_000, fitted_rows=1_200)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("shards", ["10GB", "64KB"])
@pytest.mark.parametrize(("make", "table"), [(n_gram_model, N_GRAM), (per_layer_model, PER_LAYER)])
def test_it_comes_out_as_of_the_loaded_model(
    make: Callable[[], PreTrainedModel], table: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    source, out = save(model, tmp_path / "dense", max_shard_size=shards), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert, "load_model", lambda _: pytest.fail("the model was loaded"))
        summary = compress_checkpoint(source, out, bits=3, tables=[table], settings=SETTINGS)
    assert sorted(file.name for file in out.glob("*.safetensors")) == sorted(
        file.name for file in source.glob("*.safetensors")
    )
    assert not list(out.glob(".*"))

    dense = model.get_parameter(f"{table}.weight").detach().clone()
    loaded = hf_dirembed.compress(model, bits=3, tables=[table], settings=SETTINGS)
    loaded.save_pretrained(tmp_path / "loaded")
    found, expected = tensors_of(out), tensors_of(tmp_path / "loaded")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.float(), found[name].float()), name

    again = AutoModelForCausalLM.from_pretrained(out)  # which compares the checksum
    module = again.get_submodule(table)
    assert isinstance(module, (CompressedEmbedding, CompressedBlocks))
    assert module.record.checksum == again.config.dirembed["record"]["tables"][table]["checksum"]
    assert summary.tables[0].num_embeddings == len(dense)
    width = dense.shape[1] if table == N_GRAM else 16
    blocks = [
        compress_table(Columns(dense, start, start + width), bits=3, settings=SETTINGS).reconstruct()
        for start in range(0, dense.shape[1], width)
    ]
    assert torch.equal(module.decode(torch.arange(len(dense))), torch.cat(blocks, dim=1))
    ids = torch.arange(10, 30).view(2, 10)
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits)


def test_a_changed_file_of_codes_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress_checkpoint(save(n_gram_model(), tmp_path / "dense"), out, bits=3, tables=[N_GRAM], settings=SETTINGS)
    file = out / "model.safetensors"
    codes = load_file(file)[f"{N_GRAM}.shard_2.weight"][:8].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(codes)] ^= 1
    file.write_bytes(content)
    with pytest.raises(hf_dirembed.CheckpointError, match="checksum"):
        AutoModelForCausalLM.from_pretrained(out)
