"""What of the plugin for vLLM needs no vLLM: registering, names of tensors, shards of tables, refusals."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packed import CLASSES, DIM, NUM_ROWS, PACKED_LAYOUT, draw_rows, draw_tensors
from torch import Tensor

import hf_dirembed
from hf_dirembed.integrations import vllm as plugin
from hf_dirembed.integrations.vllm.names import TableTensors, check_tensors
from hf_dirembed.integrations.vllm.shards import parts_of
from hf_dirembed.integrations.vllm.tables import build_table, fitted
from hf_dirembed.remote.codes_dirembed import (
    BlocksLayout,
    CompressionSpec,
    Layout,
    RowClass,
    TableLayout,
    TableRecord,
    checksum,
)


FLOATS = TableLayout(method="svd", rank=6, codes="float16", decoder="float32")


def draw(layout: Layout) -> dict[str, Tensor]:
    """Random tensors of a layout."""
    if isinstance(layout, BlocksLayout):
        tensors = {"weight": torch.tensor(layout.dims, dtype=torch.int32)}
        for prefix, _, block in layout.named_blocks():
            tensors |= {prefix + name: tensor for name, tensor in draw(block).items()}
        return tensors
    if not layout.packed:
        return {"weight": torch.randn(NUM_ROWS, layout.rank).half(), "decoder_weight": torch.randn(layout.rank, DIM)}

    rows, _ = draw_rows(NUM_ROWS, layout.classes, layout.rank)
    own = {
        "weight": rows.weight, "latents_weight": rows.latents, "steps_weight": rows.steps, "row_weight": rows.rows,
        "class_counts_weight": rows.class_counts, "further_weight": rows.further,
    }  # fmt: skip
    return {name: tensor for name, tensor in {**draw_tensors(), **own}.items() if name in layout.stored_shapes(1, 1)}


LAYOUTS: dict[str, Layout] = {
    "classes, outliers and a zero row": replace(PACKED_LAYOUT, zero_row=70),
    "one class": replace(PACKED_LAYOUT, classes=CLASSES[:1], outliers=None, codebook="gaussian"),
    "a class without further bytes": replace(
        PACKED_LAYOUT, classes=(RowClass((2, 0, 8, 0)), RowClass((4, 0, 4, 0), rows=40)), outliers=None
    ),
    "floats": FLOATS,
    "blocks": BlocksLayout((DIM, DIM), (PACKED_LAYOUT, replace(PACKED_LAYOUT, outliers=None))),
}


def build(layout: Layout, tensors: dict[str, Tensor], rows: tuple[int, int] = (0, NUM_ROWS), **options):
    dim = sum(layout.dims) if isinstance(layout, BlocksLayout) else DIM
    record = TableRecord(checksum=options.pop("checksum", None))
    return build_table(
        "model.embed_tokens", layout, record, tensors, shape=(NUM_ROWS, dim), rows=rows,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_make_the_whole(name, parts):
    layout = LAYOUTS[name]
    tensors = draw(layout)
    whole, states = build(layout, tensors), torch.randn(3, DIM)
    rows, logits = [], []
    padded = 64 * -(-NUM_ROWS // 64) if parts != 3 else 192
    for first, last in parts_of(NUM_ROWS, parts, padded):
        shard = build(layout, tensors, (first, last))
        rows.append(shard.decode(torch.arange(last - first)))
        if name != "blocks":
            logits.append(fitted(shard.logits(states), padded // parts))
    expected = whole.decode(torch.arange(NUM_ROWS))
    assert torch.allclose(torch.cat(rows), expected, atol=1e-5 * float(expected.abs().max()))
    if name != "blocks":
        expected = whole.logits(states)
        found = torch.cat(logits, dim=-1)[:, :NUM_ROWS]
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_the_whole_is_what_transformers_runs():
    tensors = draw_tensors()
    embedding = hf_dirembed.CompressedEmbedding(NUM_ROWS, DIM, PACKED_LAYOUT)
    embedding.load_state_dict(tensors)
    assert torch.equal(build(PACKED_LAYOUT, tensors).decode(torch.arange(NUM_ROWS)), embedding.dense_weight())


def stated(*paths: str) -> CompressionSpec:
    return CompressionSpec(dict.fromkeys(paths, FLOATS))


def stored(*prefixes: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for prefix in prefixes for name, tensor in draw(FLOATS).items()}


@pytest.mark.parametrize(
    ("paths", "prefixes", "dense"),
    [
        (["model.embed_tokens", "lm_head"], ["model.embed_tokens", "lm_head"], []),
        (["embeddings.word_embeddings"], ["bert.embeddings.word_embeddings"], ["decoder.word_embeddings"]),
        (["bert.embeddings.word_embeddings"], ["embeddings.word_embeddings"], []),
        (["model.embed_tokens"], ["model.embed_tokens"], ["vision.model.embed_tokens", "embed_tokens"]),
        (["model.language_model.embed_tokens"], ["language_model.model.embed_tokens"], ["model.other.embed_tokens"]),
        (["encoder.embed", "decoder.embed"], ["model.encoder.embed", "model.decoder.embed"], []),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_names_decide_what_is_a_table(paths, prefixes, dense, backwards):
    """Dense tables of the same size and last name stay what they are, in whichever order a file has them."""
    file = stored(*prefixes) | {f"{prefix}.weight": torch.randn(NUM_ROWS, DIM) for prefix in dense}
    file["layers.0.mlp.weight"] = torch.randn(DIM, DIM)
    tables = TableTensors(stated(*paths), torch.bfloat16)
    passed = dict(tables.pass_on(list(file.items())[:: -1 if backwards else 1]))
    assert passed.keys() == {f"{prefix}.weight" for prefix in (*prefixes, *dense)} | {"layers.0.mlp.weight"}
    for path, prefix in zip(paths, prefixes, strict=True):
        stand_in = passed[f"{prefix}.weight"]
        assert tables.path_of(stand_in) == tables.path_of(stand_in[:5].T) == path
        assert (stand_in.shape, stand_in.dtype) == ((NUM_ROWS, DIM), torch.bfloat16)
        assert stand_in.untyped_storage().nbytes() == 2
        assert torch.equal(tables.found[path]["weight"], file[f"{prefix}.weight"])
    for prefix in dense:
        assert passed[f"{prefix}.weight"] is file[f"{prefix}.weight"]
        assert tables.path_of(passed[f"{prefix}.weight"]) is None


def test_a_table_that_might_be_two_is_refused():
    tables = TableTensors(stated("shared.embed"), torch.float32)
    with pytest.raises(hf_dirembed.CheckpointError, match=r"shared.embed as a.embed or b.embed"):
        list(tables.pass_on(stored("a.embed", "b.embed").items()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_missed_by_its_name(name):
    layout = LAYOUTS[name]
    tensors = draw(layout)
    for missing in tensors:
        file = {f"model.embed_tokens.{name}": tensor for name, tensor in tensors.items() if name != missing}
        tables = TableTensors(CompressionSpec({"model.embed_tokens": layout}), torch.float32)
        with pytest.raises(hf_dirembed.CheckpointError, match=rf"lacks .*model\.embed_tokens\.{missing}'"):
            list(tables.pass_on(file.items()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_that_does_not_fit_is_named(name):
    layout = LAYOUTS[name]
    tensors = draw(layout)
    dim = sum(layout.dims) if isinstance(layout, BlocksLayout) else DIM
    check_tensors("embed", layout, tensors, NUM_ROWS, dim)
    for spoilt, tensor in tensors.items():
        longer = tensor.new_zeros(len(tensor) + 1, *tensor.shape[1:])
        for other, said in ((longer, "is \\["), (tensor.bool(), "is of dtype")):
            with pytest.raises(hf_dirembed.CheckpointError, match=rf"embed\.{spoilt} {said}"):
                check_tensors("embed", layout, {**tensors, spoilt: other}, NUM_ROWS, dim)
    with pytest.raises(hf_dirembed.CheckpointError, match=r"is \["):
        check_tensors("embed", layout, tensors, NUM_ROWS + 1, dim)
    with pytest.raises(hf_dirembed.CheckpointError, match=r"embed.other_weight is not part"):
        check_tensors("embed", layout, {**tensors, "other_weight": torch.ones(1)}, NUM_ROWS, dim)


def test_changed_codes_are_found_out():
    tensors = draw_tensors()
    beside = ("decoder_weight", "decoder_bias_weight", "outlier_weight")
    right = checksum({name: tensor for name, tensor in tensors.items() if name not in beside})
    build(PACKED_LAYOUT, tensors, checksum=right)
    tensors["weight"][3, 1] ^= 4
    with pytest.raises(hf_dirembed.CheckpointError, match=r"model\.embed_tokens have the checksum"):
        build(PACKED_LAYOUT, tensors, checksum=right)
    tensors["decoder_weight"][0, 0] = torch.nan
    with pytest.raises(hf_dirembed.CheckpointError, match=r"model\.embed_tokens: decoder_weight .* holds a NaN"):
        build(PACKED_LAYOUT, tensors)


def test_the_package_imports_no_vllm():
    code = "import hf_dirembed, sys; sys.exit(any(name.partition('.')[0] == 'vllm' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_without_vllm(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.INFO):
        plugin.register()
    assert not caplog.records


def test_registering_with_a_vllm_of_other_insides(monkeypatch, caplog):
    """It says so once in a line, and does not raise."""
    other = ModuleType("vllm")
    other.__version__, other.__path__ = "9.9.1", []
    monkeypatch.setitem(sys.modules, "vllm", other)
    monkeypatch.delitem(sys.modules, "hf_dirembed.integrations.vllm.hooks", raising=False)
    plugin.register()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("hf_dirembed does not know this vLLM, 9.9.1 (ModuleNotFoundError")
    assert "\n" not in record.getMessage()


def test_what_registers_is_an_entry_point():
    setup = (Path(__file__).parents[1] / "setup.cfg").read_text(encoding="utf-8")
    assert "vllm.general_plugins =\n    hf_dirembed = hf_dirembed.integrations.vllm:register" in setup
