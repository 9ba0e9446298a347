"""Tables of many rows that all count alike: fitted on a sample, coded chunk by chunk, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dirembed import TableError, TransformSettings
from hf_dirembed.compression import compress_table
from hf_dirembed.compression.distortion import Measure
from hf_dirembed.compression.quality import table_quality
from hf_dirembed.compression.row_files import FileRows, FileSink, JoinedRows, MemorySink, memory_sink, split_columns
from hf_dirembed.compression.table import Table
from hf_dirembed.compression.transform import sampled
from hf_dirembed.compression.transform.sampled import PARTS, Fit, code_large, code_parts
from hf_dirembed.compression.transform.transform import transform
from hf_dirembed.remote.kernels_dirembed import pack, row_scales


SMALL = TransformSettings(large_rows=2_000, fitted_rows=1_500)


def rows_of(number: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, dim, generator=generator) * torch.arange(1, dim + 1).pow(-0.5)


def code(rows: Tensor, bits: float = 3, settings: TransformSettings = SMALL, **options: Any) -> sampled.CodedRows:
    measure = options.pop("measure", Measure())
    max_bytes = int(bits * rows.numel() / 8)
    table = Table(rows, **options)
    return code_large(table, max_bytes, memory_sink, dtype=rows.dtype, measure=measure, settings=settings)


class Watched:
    """Rows that remember how many were asked for at once, and how many altogether."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.shape, self.dtype = rows, tuple(rows.shape), rows.dtype
        self.most = self.total = 0

    def __getitem__(self, rows: slice, /) -> Tensor:
        found = self.rows[rows]
        self.most, self.total = max(self.most, len(found)), self.total + len(found)
        return found.clone()


class WatchedSink(MemorySink):
    """A sink that remembers how many rows it was given at once."""

    most = 0

    def put(self, first: int, rows: Tensor) -> None:
        WatchedSink.most = max(WatchedSink.most, len(rows))
        super().put(first, rows)


def sinks_of(fit: Fit) -> dict[str, MemorySink]:
    return {name: MemorySink(shape) for name, shape in fit.coder.shapes(fit.table.num_rows).items()}


@pytest.mark.parametrize("chunk_rows", [7, 50, 4096])
def test_chunks_are_coded_as_all_rows_at_once(chunk_rows: int) -> None:
    rows = rows_of(3_000, 32)
    fit = Fit.of(Table(rows), 3_000 * 12, rows.dtype, Measure(), SMALL)
    codec = fit.coder.codec
    found = codec.encode(rows, 0)
    sinks = sinks_of(fit)
    code_parts(Table(rows, chunk_rows=chunk_rows), fit.coder, sinks, range(PARTS))
    assert torch.equal(sinks["weight"].tensor(), pack(found.symbols, codec.classes[0].counts))
    assert torch.equal(row_scales(sinks["row_weight"].tensor()), found.scales)


def test_parts_coded_apart_are_those_coded_together(tmp_path: Path) -> None:
    rows = rows_of(3_000, 32)
    rows[::100] *= 40
    table = Table(rows)
    fit = Fit.of(table, 3_000 * 14, rows.dtype, Measure(), SMALL)
    together, shapes = sinks_of(fit), fit.coder.shapes(3_000)
    apart = {name: FileSink.create(tmp_path / name, shape) for name, shape in shapes.items()}
    found = code_parts(table, fit.coder, together, range(PARTS))
    whole = fit.finish({name: sink.tensor() for name, sink in together.items()}, found)
    found = code_parts(table, fit.coder, apart, range(1, PARTS, 2))
    found = found.joined(code_parts(table, fit.coder, apart, range(0, PARTS, 2)), fit.coder.capacity)
    parts = fit.finish({name: sink.tensor() for name, sink in apart.items()}, found)
    assert whole.quality == parts.quality
    assert whole.coded.tensors.keys() == parts.coded.tensors.keys()
    for name, tensor in whole.coded.tensors.items():
        assert torch.equal(tensor, parts.coded.tensors[name]), name


@pytest.mark.parametrize("bits", [0.7, 1.5, 2, 3.3])
def test_the_budget_is_kept(bits: float) -> None:
    rows = rows_of(4_000, 48)
    rows[::50] *= 30
    made = code(rows, bits)
    max_bytes = int(bits * rows.numel() / 8)
    num_bytes = sum(tensor.nbytes for tensor in made.coded.tensors.values())
    assert max_bytes - 4_000 - 48 * 6 < num_bytes <= max_bytes  # a byte a row, at most, is left over


@pytest.mark.parametrize("hessian", [False, True])
def test_figures_are_those_of_the_passes_over_the_table(hessian: bool) -> None:
    rows = rows_of(4_000, 48)
    rows[::50] *= 30
    rows[7] = 0
    factor = torch.randn(48, 48, generator=torch.Generator().manual_seed(1)).tril() / 7 + torch.eye(48)
    measure = Measure(hessian=(factor @ factor.T).double() if hessian else None)
    made = code(rows, measure=measure)
    expected = table_quality(Table(rows), made.coded, measure)
    assert made.quality.pop("fitted_rows") == 1_500
    assert made.quality.keys() == expected.keys()
    for name, value in expected.items():
        rel, least = (0.05, 0.01) if name == "bound_bits" else (1e-3, 1e-6)  # over a sample
        assert made.quality[name] == pytest.approx(value, rel=rel, abs=least), name


def test_a_sample_tells_what_all_rows_are_like() -> None:
    rows = rows_of(60_000, 64)
    settings = TransformSettings(large_rows=50_000, fitted_rows=20_000)
    bits = 2.15  # that a whole number of bytes a row fills
    made = code(rows, bits, settings)
    whole = transform(Table(rows), int(bits * rows.numel() / 8), dtype=rows.dtype)
    assert made.quality["distortion"] < 1.05 * table_quality(Table(rows), whole)["distortion"]


def test_memory_does_not_depend_on_the_rows() -> None:
    rows = Watched(rows_of(6_000, 32))
    table = Table(rows, chunk_rows=40)

    def watched(_: str, shape: tuple[int, ...]) -> WatchedSink:
        return WatchedSink(shape)

    code_large(table, 6_000 * 12, watched, dtype=torch.float32, measure=Measure(), settings=SMALL)
    assert rows.most <= 40
    assert WatchedSink.most <= 40
    assert rows.total <= 6_000 + SMALL.fitted_rows + 500  # read once, beside the sample and the outliers


def test_rows_far_out_are_kept_as_far_as_there_is_room() -> None:
    rows = rows_of(3_000, 32)
    rows[::1_000] *= 50
    made = code(rows)
    kept = made.coded.tensors["outlier_rows_weight"].tolist()
    assert {0, 1_000, 2_000} <= set(kept)
    assert torch.equal(made.coded.reconstruct()[kept], rows[kept])
    assert "shortened_rows" not in made.quality


def test_many_long_rows_are_cut_and_the_record_says_so() -> None:
    rows = rows_of(3_000, 32)
    rows[::25] *= 50  # 120 rows, 4 %
    made = code(rows, 2)
    assert made.quality["shortened_rows"] + (made.coded.layout.outliers or 0) >= 120
    assert 0 < made.quality["shortened_cosine"] < 1


def test_bounded_outliers_are_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(3_000, 32)
    rows[5::100] *= torch.linspace(40, 80, 30).unsqueeze(1)
    monkeypatch.setattr(sampled, "_KEPT_BYTES", 10 * (32 * 4 + 4))
    coded = Fit.of(Table(rows), 3_000 * 16, rows.dtype, Measure(), SMALL).coder.code(rows, 0)
    assert coded.cut.sum() == 30
    kept = code(rows, 4).coded.tensors["outlier_rows_weight"].tolist()
    assert kept == torch.where(coded.cut, coded.errors, -1).topk(10).indices.sort().values.tolist()


def test_which_tables_are_large() -> None:
    rows = rows_of(2_500, 32)
    assert "fitted_rows" in compress_table(rows, bits=3, settings=SMALL).record.quality
    weighed = compress_table(rows, bits=3, settings=SMALL, token_weights=torch.ones(2_500))
    assert "fitted_rows" not in weighed.record.quality
    assert "fitted_rows" not in compress_table(rows[:2_000], bits=3, settings=SMALL).record.quality


def test_the_padding_row_is_zero_and_codes_may_be_in_a_file(tmp_path: Path) -> None:
    rows = rows_of(2_500, 32).bfloat16()
    rows[3] = 0
    coded = compress_table(
        rows,
        bits=3,
        settings=SMALL,
        padding_idx=3,
        make_sink=lambda name, shape: FileSink.create(tmp_path / name, shape),
    )
    again = compress_table(rows, bits=3, settings=SMALL, padding_idx=3)
    assert (tmp_path / "weight").read_bytes() == again.tensors["weight"].numpy().tobytes()
    assert torch.equal(coded.reconstruct(), again.reconstruct())
    assert not again.reconstruct()[3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_bad_row_is_named(bad: float) -> None:
    rows = rows_of(2_500, 32)
    rows[1_234] = bad
    with pytest.raises(TableError, match="row 1234"):
        code(rows)


def test_half_precision_is_checked() -> None:
    assert code(rows_of(2_500, 32).half()).fits
    assert not code((rows_of(2_500, 32) * 2e-7).half()).fits


def test_row_files(tmp_path: Path) -> None:
    rows = rows_of(1_000, 12).bfloat16()
    path = tmp_path / "rows"
    path.write_bytes(b"head" + rows.view(torch.uint8).numpy().tobytes())
    stored = FileRows(path, (1_000, 12), torch.bfloat16, 4)
    assert torch.equal(stored[slice(17, 500)], rows[17:500])
    joined = JoinedRows([rows[:10], rows[10:11], rows[11:]])
    for part in (slice(0, 1_000), slice(9, 12), slice(10, 11), slice(5, 5), slice(999, 2_000)):
        assert torch.equal(joined[part], rows[part]), part
    blocks = split_columns(stored, [5, 4, 3], [tmp_path / name for name in "abc"])
    assert torch.equal(torch.cat([block[slice(0, 1_000)] for block in blocks], dim=1), rows)
