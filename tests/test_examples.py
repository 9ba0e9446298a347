"""The notebook runs, on a tiny model; the demo has a test among those of engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


pytest.importorskip("matplotlib")
NOTEBOOK = Path(__file__).parent.parent / "examples" / "compress_and_compare.ipynb"


def test_notebook(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its cells are plain Python, so they are run as one program."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    program = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")

    environment = {**os.environ, "MODEL": str(tmp_path / "model"), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", program.replace("bits=2,", "bits=6,")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "dog:\n  before [" in done.stdout
    assert "the same similarities: True" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("largest difference: ")
