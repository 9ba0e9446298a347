"""The reader that docs/format.md prints reads what the package writes: every kind of table, to the bit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TABLE_FAMILIES
from packed import DIM, NUM_ROWS, PACKED_LAYOUT, convert_input, draw_tensors
from transformers import PreTrainedModel

import hf_dirembed
from hf_dirembed.checkpoints.loading import load_model
from hf_dirembed.remote.codes_dirembed import CODE_TENSORS, BlocksLayout, RowClass, TableLayout
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix
from hf_dirembed.remote.tables_dirembed import table_at


PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
READER, EXAMPLE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def drawn(dtype: torch.dtype) -> PreTrainedModel:
    """Three classes of rows, several codes for one latent, a codebook of its own, outliers, a row of zeros."""
    bert = FAMILIES["bert"].make("AutoModelForMaskedLM").to(dtype)
    return convert_input(bert, replace(PACKED_LAYOUT, zero_row=0), draw_tensors())


def fitted(method: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model = FAMILIES["bert"].make("AutoModelForMaskedLM").to(dtype)
    return hf_dirembed.compress(model, method=method, token_weights=1 / torch.arange(1.0, NUM_ROWS + 1), **options)


MODELS = {
    "drawn": lambda: drawn(torch.float32),
    "drawn-bfloat16": lambda: drawn(torch.bfloat16),
    "gaussian": lambda: fitted("transform", torch.float32, bits=6),
    "floats": lambda: fitted("direction", torch.float32, rank=9, latent_dtype="float16"),
    "floats-bfloat16": lambda: fitted("svd", torch.bfloat16, rank=9),
    "untied": lambda: hf_dirembed.compress(TABLE_FAMILIES["llama-untied"].make("AutoModelForCausalLM"), bits=7),
    "blocks": lambda: hf_dirembed.compress(TABLE_FAMILIES["gemma4_text"].make("AutoModelForCausalLM"), bits=12),
    "renamed": lambda: hf_dirembed.compress(FAMILIES["gemma3-vision"].make("AutoModelForImageTextToText"), bits=7),
}
RENAMED = {"renamed": "language_model.model.embed_tokens"}  # by transformers, when it saves


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(READER, "<docs/format.md>", "exec"), names)
    return names


def rows_of(table: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All rows of a compressed module, and their latents, as the package reads them."""
    ids = torch.arange(table.matrices()[0][1].num_rows)
    latents = table.latents_of(ids).float() if isinstance(table, CompressedMatrix) else None
    return torch.cat([matrix.decode(ids) for _, matrix in table.matrices()], dim=-1), latents


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_reader_of_the_page(kind: str, page: dict[str, Any], tmp_path: Path) -> None:
    MODELS[kind]().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    for path, record in model.config.dirembed["record"]["tables"].items():
        expected, latents = rows_of(table_at(model, path))
        table = page["read_table"](tmp_path, path, RENAMED.get(kind))
        assert table.checksum() == record["checksum"]

        rows = torch.from_numpy(np.stack([table.row(number) for number in range(len(expected))]))
        scale = expected.float().abs().max()
        rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[expected.dtype]
        torch.testing.assert_close(rows, expected.float(), rtol=rounding, atol=float(rounding * scale))
        if latents is not None:
            mine = np.stack([table.latents(number) for number in range(len(expected))])
            assert torch.equal(torch.from_numpy(mine), latents)


def test_the_example(page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), bits=6)
    model.save_pretrained("minilm-dirembed")
    exec(EXAMPLE.replace("2023", "23"), {**page})
    checksum = model.config.dirembed["record"]["tables"]["embeddings.word_embeddings"]["checksum"]
    assert capsys.readouterr().out == f"({DIM},) {checksum}\n"


def test_every_field_and_tensor_is_named() -> None:
    for layout in (TableLayout, RowClass, BlocksLayout):
        for field in layout.__dataclass_fields__:
            assert f"`{field}`" in PAGE, field
    for tensor in CODE_TENSORS:
        assert f"`{tensor}`" in PAGE, tensor
