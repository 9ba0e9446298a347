"""A compressed checkpoint with every kind of tensor, to be spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

from attacks.spoiling import save_intact


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small compressed BERT with every kind of tensor."""
    folder = tmp_path_factory.mktemp("intact")
    save_intact(folder)
    AutoModelForMaskedLM.from_pretrained(folder)  # what is imported for it is no part of a refusal
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy of the intact checkpoint, to be spoiled."""
    return Path(shutil.copytree(intact, tmp_path / "above" / "model"))
