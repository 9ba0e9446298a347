"""Dense checkpoints that are broken: compressing them ends in one line, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import BertConfig, BertForMaskedLM

from attacks.spoiling import FILES, HUGE, Spoil, base, tensor
from hf_dirembed.cli.commands import main


SOURCES: dict[str, Spoil] = {
    "another width": base(hidden_size=16),
    "width as text": base(hidden_size="wide"),
    "no heads": base(num_attention_heads=0),
    "huge vocabulary": base(vocab_size=HUGE),
    "overflowing vocabulary": base(vocab_size=2**70),
    "negative vocabulary": base(vocab_size=-1),
    "padding beyond the table": base(pad_token_id=HUGE),
    "no model type": base(model_type=None),
    "an auto_map that is none": base(auto_map=7),
    **{
        name: FILES[name]
        for name in (
            "truncated weights",
            "empty weights",
            "no weights",
            "a pickle",
            "missing shard",
            "index that points outside",
            "index without a map",
        )
    },
    "NaN in the table": tensor("weight", lambda t: t.index_fill(0, torch.tensor([7]), float("nan"))),
    "a table of fewer rows": tensor("weight", lambda t: t[:-1]),
    "a table in integers": tensor("weight", lambda t: t.to(torch.int8)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_broken_sources_are_not_compressed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "above" / "dense"
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=300, **shape)).save_pretrained(folder)
    SOURCES[name](folder)
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(main, ["compress", str(folder), str(tmp_path / "out"), "--method", "svd", "--rank", "4"])
    assert done.exit_code == 2, done.exception
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-dirembed: ")]
    assert len(lines) == 1
    assert sorted(tmp_path.rglob("*")) == before
