"""Lookups in ONNX: every row of tables of every layout, in onnxruntime, against the definition; codes stay packed."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import DIM, brute_force_rows, draw_rows, make_embedding
from torch import nn

import hf_dirembed
from hf_dirembed.exporting.check import check_lookup, lookup_model, open_session
from hf_dirembed.exporting.packed import Slots
from hf_dirembed.remote.codes_dirembed import BlocksLayout, RowClass, TableLayout
from hf_dirembed.remote.modules_dirembed import CompressedBlocks, CompressedLookup


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
OPSET = 18
MOST_NODES = 30  # that run in a lookup; a node takes microseconds, whatever it does


def look_up(table: CompressedLookup, ids: torch.Tensor) -> torch.Tensor:
    session = open_session(lookup_model("table", table, OPSET).SerializeToString())
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


@torch.no_grad()
def check_rows(table: CompressedLookup) -> None:
    """All rows, in an order that is not theirs, in a batch."""
    ids = torch.randperm(table.num_rows)[: table.num_rows // 2 * 2].view(2, -1)
    torch.testing.assert_close(look_up(table, ids), table.decode(ids).float(), rtol=1e-5, atol=1e-5)


def test_every_row_by_its_definition() -> None:
    """Several classes of rows, several codes of a latent, outliers."""
    table = make_embedding()
    rows, terms = brute_force_rows(table)
    found = look_up(table, torch.arange(len(rows))[None])[0].double()
    assert ((found - rows).abs() <= 1e-6 * terms + 1e-6).all()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[RowClass, ...], int, int]:
    """Classes of rows, a number of rows, a number of latents."""
    num_rows, number = draw(st.integers(4, 200)), draw(st.integers(1, 4))
    counts = st.tuples(*[st.integers(0, 9)] * 4).filter(any)
    allocations = sorted((draw(counts) for _ in range(number)), key=lambda each: RowClass(each).num_bytes)
    rows = [None, *(draw(st.integers(0, num_rows // 4)) for _ in range(number - 1))]
    classes = tuple(RowClass(*each) for each in zip(allocations, rows, strict=True))
    return classes, num_rows, draw(st.integers(1, DIM))


@settings(max_examples=25, deadline=None)
@given(drawn=layouts(), seed=st.integers(0, 99), zero_row=st.sampled_from([None, 0, 3]), half=st.booleans())
def test_every_layout(
    drawn: tuple[tuple[RowClass, ...], int, int], seed: int, zero_row: int | None, half: bool
) -> None:
    classes, num_rows, rank = drawn
    rows, _ = draw_rows(num_rows, classes, rank, seed)
    decoder = "float8_e4m3fn" if half else "float16"
    layout = TableLayout("transform", rank, "packed", decoder, True, classes, codebook="own", zero_row=zero_row)
    if layout.code_width == DIM:
        return
    table = hf_dirembed.CompressedEmbedding(num_rows, DIM, layout)
    torch.manual_seed(seed)
    further = {"class_counts_weight": rows.class_counts, "further_weight": rows.further} if len(classes) > 1 else {}
    tensors = {
        "weight": rows.weight, "codebook_weight": rows.codebook, "latents_weight": rows.latents,
        "steps_weight": rows.steps, "row_weight": rows.rows, **further,
        "decoder_weight": torch.randn(rank, DIM).to(getattr(torch, decoder)).float(),
        "exponent_weight": torch.randint(-9, -4, (rank,)).to(torch.int8), "decoder_bias_weight": torch.randn(DIM),
    }  # fmt: skip
    table.load_state_dict(tensors)
    check_rows(table)


@pytest.mark.parametrize(
    "options",
    [{"bits": 2}, {"method": "svd", "rank": 6}, {"method": "direction", "rank": 6, "latent_dtype": "bfloat16"}],
    ids=["packed", "float32", "bfloat16"],
)
def test_methods(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    check_rows(hf_dirembed.CompressedEmbedding.from_embedding(nn.Embedding(700, 24, padding_idx=1), **options))


def test_blocks_of_columns() -> None:
    torch.manual_seed(0)
    classes = (RowClass((1, 2, 3, 4)), RowClass((4, 4, 4, 4), rows=0))
    packed = TableLayout("transform", 12, "packed", "float16", True, classes, codebook="gaussian")
    floats = TableLayout("svd", 4, "float32", "float32", True)
    check_rows(CompressedBlocks(200, 32, BlocksLayout((20, 12), (packed, floats))))


def test_codes_stay_packed(tmp_path: Path) -> None:
    """onnxruntime folds what it can when it loads a file; no float table is among that, and few nodes are left."""
    torch.manual_seed(0)
    weights = 1 / torch.arange(10.0, 30_010)
    table = hf_dirembed.CompressedEmbedding.from_embedding(nn.Embedding(30_000, 64), bits=2, token_weights=weights)
    assert len(table.layout.classes) > 1
    file = tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(file), 3
    onnxruntime.InferenceSession(lookup_model("table", table, OPSET).SerializeToString(), options)

    graph = onnx.load(file).graph
    assert len(graph.node) <= MOST_NODES, [node.op_type for node in graph.node]
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    assert held["table.codes"].dtype == numpy.uint8
    floats = sum(each.nbytes for each in held.values() if each.dtype == numpy.float32)
    assert floats < 30_000 * 64 * 4 / 20
    of_rows = held["table.begins"].nbytes  # where each begins, which is what the file adds
    packed = sum(each.nbytes for each in held.values() if each.dtype != numpy.float32)
    assert packed <= table.num_bytes + of_rows + 10_000


def test_wrong_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table, of = make_embedding(), Slots.of

    def shifted(matrix: object) -> Slots:
        slots = of(matrix)
        slots.shift[0, 0] ^= 1
        return slots

    check_lookup("table", table, OPSET)
    monkeypatch.setattr(Slots, "of", shifted)
    with pytest.raises(hf_dirembed.ExportError, match=r"rows of table differ by .* in onnxruntime: "):
        check_lookup("table", table, OPSET)
