"""`effort=`: presets that cost more give less error, are recorded, and do not go with what says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import FAMILIES
from transformers import AutoModel, PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed import DirEmbedQuantizationConfig, OptionError, TransformSettings
from hf_dirembed.cli import main
from hf_dirembed.compression import compress_table
from hf_dirembed.compression.transform.transform import EFFORTS


def rows(number: int = 12_000) -> torch.Tensor:
    """Rows with a decaying spectrum, a few of them far from all others, so that some are kept as they are."""
    made = torch.randn(number, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.05, 32)
    made[:7] = made[:7].flip(1) * 2
    return made


def test_more_effort_leaves_less_error_in_the_same_bytes() -> None:
    weights = 1 / (torch.arange(12_000) + 50.0)
    made = {effort: compress_table(rows(), bits=2, token_weights=weights, effort=effort) for effort in EFFORTS}  # type: ignore[arg-type]
    errors = [coded.record.quality["distortion"] for coded in made.values()]
    assert errors[0] > 1.01 * errors[1] > 1.01 * errors[2]
    for effort, coded in made.items():
        assert coded.record.settings["effort"] == effort
        assert sum(tensor.nbytes for tensor in coded.tensors.values()) <= 2 * 12_000 * 32 / 8
        # what the record says of the error is what the codes stand for, also of rows whose class has changed
        error = (coded.reconstruct() - rows()).square().sum(dim=1) / rows().square().sum(dim=1)
        assert float(error.median()) < 0.3

    default = compress_table(rows(), bits=2, token_weights=weights)
    assert "effort" not in default.record.settings
    assert all(torch.equal(default.tensors[name], each) for name, each in made["balanced"].tensors.items())


@pytest.mark.parametrize("large_rows", [4_000, 100_000])
def test_fast_keeps_outliers_too(large_rows: int) -> None:
    table = rows()
    table[100] = 40 * torch.ones(32)  # far longer than all others
    settings = TransformSettings(passes=0, sample_rows=4_000, large_rows=large_rows, fitted_rows=3_000)
    coded = compress_table(table, bits=3, settings=settings, effort="fast")
    assert 100 in coded.tensors["outlier_rows_weight"].tolist()
    assert float((coded.reconstruct() - table).square().sum() / table.square().sum()) < 0.05


def test_it_is_recorded_wherever_it_is_said(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def settings_of(model: Any) -> dict[str, Any]:
        (record,) = model.config.dirembed["record"]["tables"].values()
        return record["settings"]

    dense = tmp_path / "dense"
    FAMILIES["bert"].make("AutoModel").save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    model = FAMILIES["bert"].make("AutoModel")
    in_python = settings_of(hf_dirembed.compress(model, tokenizer, bits=6, languages="en", effort="thorough"))
    config = DirEmbedQuantizationConfig(bits=6, languages="en", effort="thorough")
    assert DirEmbedQuantizationConfig.from_dict(json.loads(config.to_json_string())) == config
    on_load = settings_of(AutoModel.from_pretrained(dense, quantization_config=config))
    options = ["--bits", "6", "--languages", "en", "--effort", "thorough", "--seed", "3"]
    done = CliRunner().invoke(main, ["compress", str(dense), str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.stderr
    by_command = settings_of(AutoModel.from_pretrained(tmp_path / "out"))
    for found, seed in ((in_python, 0), (on_load, 0), (by_command, 3)):
        assert found["effort"] == "thorough"
        assert found["transform"]["passes"] == EFFORTS["thorough"].passes
        assert found["transform"]["seed"] == seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2, "effort": "quick"}, "effort='quick' is unknown: choose one of fast, balanced, thorough"),
        ({"bits": 2, "effort": 3}, "effort=3 is unknown"),
        ({"rank": 2, "method": "svd", "effort": "fast"}, "method 'svd' takes no effort"),
        ({"bits": 2, "effort": "fast", "settings": TransformSettings()}, "stands for passes=0 and sample_rows=4000"),
    ],
)
def test_what_it_does_not_go_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), **options)
