"""Broken and hostile checkpoints: each ends in a typed error, before anything of the claimed size is allocated."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertForMaskedLM

from attacks.spoiling import ATTACKS, base, weight_bytes
from benchmarks.peers.measure import PeakMemory
from hf_dirembed import DirEmbedError
from hf_dirembed.cli.commands import main


@pytest.mark.parametrize("name", ATTACKS)
def test_loading_refuses(name: str, folder: Path, record_property: Any) -> None:
    ATTACKS[name](folder)
    memory, start = PeakMemory(), time.perf_counter()
    with pytest.raises(ValueError, match=r".{20}") as caught:
        AutoModelForMaskedLM.from_pretrained(folder)
    record_property("most seconds to a refusal", time.perf_counter() - start)  # on a busy machine: nothing to assert
    share = (memory.bytes() or 0) / weight_bytes(folder)
    record_property("most memory of a refusal over the file's size", share)
    assert share <= 2
    ours = isinstance(caught.value, DirEmbedError)
    assert ours or name in TRANSFORMERS_REFUSES
    assert not ours or ": " in str(caught.value), "it does not name the mend"
    assert not list(folder.rglob("executed"))


# Whose own ValueError says it well enough, before or while this package looks.
TRANSFORMERS_REFUSES = {
    "layout: another base",
    "layout: a base without text",
    "base: an integer dtype",
    "base: weights outside of the folder",
    "base: weights in a pickle",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_command_line_refuses(name: str, folder: Path, tmp_path: Path) -> None:
    ATTACKS[name](folder)
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(main, ["expand", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 2, done.exception
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("hf-dirembed: ")
    assert sorted(tmp_path.rglob("*")) == before
    # Reading headers alone may find nothing wrong, but must not fail in another way.
    looked = CliRunner().invoke(main, ["inspect", str(folder)])
    assert looked.exit_code in (0, 2), looked.exception


@pytest.mark.parametrize("name", [name for name in ATTACKS if name.startswith(("layout: ", "tensor: "))])
def test_a_stock_class_refuses(name: str, folder: Path) -> None:
    """By the quantiser that answers for it; what has the wrong shape is refused by transformers itself."""
    ATTACKS[name](folder)
    with pytest.raises((ValueError, RuntimeError, OSError), match=r".{20}"):
        BertForMaskedLM.from_pretrained(folder)


def test_a_damaged_config_is_refused(folder: Path) -> None:
    """Without its JSON nobody knows that the checkpoint is a compressed one: `AutoModel` raises an OSError."""
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-20])
    with pytest.raises(OSError, match="JSON"):
        AutoModelForMaskedLM.from_pretrained(folder)
    done = CliRunner().invoke(main, ["inspect", str(folder)])
    assert done.exit_code == 2
    assert "does not load" in done.stderr


def test_a_body_that_is_mostly_missing_is_refused(folder: Path) -> None:
    base(num_hidden_layers=900)(folder)
    with pytest.raises(DirEmbedError, match="most of the model"):
        AutoModelForMaskedLM.from_pretrained(folder)


def test_a_fresh_head_may_be_missing(folder: Path) -> None:
    """What transformers allows, a head that the checkpoint has no weights for, stays allowed."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model.classifier.weight.isfinite().all()
