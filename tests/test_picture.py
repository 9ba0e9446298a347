"""The picture of a compressed table: what it shows, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import FAMILIES
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed.cli.commands import main
from hf_dirembed.cli.picture import TableProfile, save_picture


pytest.importorskip("matplotlib")


@pytest.fixture
def dense(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "dense"
    torch.manual_seed(0)
    config = BertConfig(**{**FAMILIES["bert"].arguments, "vocab_size": 2000})
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    return done.exit_code, done.stderr


@pytest.mark.parametrize("method", ["transform", "direction"])
def test_a_profile_is_that_of_the_rows(method: str, dense: Path, tmp_path: Path) -> None:
    for file in dense.glob("token*"):  # the tokens are then ranked by id
        file.unlink()
    model = BertForMaskedLM.from_pretrained(dense)
    rows = model.get_input_embeddings().weight.detach().clone()
    weights = 1 / (torch.arange(2000.0) + 1)
    hf_dirembed.compress(model, method=method, bits=3, token_weights=weights).save_pretrained(tmp_path / "out")
    profile = TableProfile.of_checkpoint(tmp_path / "out", dense)
    compressed = model.get_input_embeddings().dense_weight()
    for spectrum, table in ((profile.dense_spectrum, rows), (profile.spectrum, compressed)):
        expected = torch.linalg.svdvals(table.double() - table.double().mean(dim=0)).square() / len(table)
        torch.testing.assert_close(spectrum, expected, rtol=1e-5, atol=1e-9)
    assert not profile.by_weights
    cosines = torch.nn.functional.cosine_similarity(rows, compressed)
    assert profile.cosines[1, 0] == pytest.approx(cosines[1].item(), abs=1e-5)  # row 0, the padding, is zero
    assert (profile.cosines.diff(dim=0) >= 0).all()
    assert profile.ranks.diff().min() > 0
    for name in ("a.png", "a.svg"):
        save_picture(profile, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_the_command_line_draws(dense: Path, tmp_path: Path) -> None:
    assert run("compress", dense, tmp_path / "out", "--bits", 3)[0] == 0
    picture = tmp_path / "a.png"
    assert run("inspect", tmp_path / "out", "--plot", picture)[0] == 0
    alone = picture.read_bytes()
    assert alone.startswith(b"\x89PNG")
    assert run("inspect", tmp_path / "out", "--plot", picture, "--reference", dense)[0] == 0
    assert len(picture.read_bytes()) > len(alone), "no third panel"


MISTAKES = {
    "no such folder": (["--plot", "{tmp}/nowhere/a.png"], "cannot be written"),
    "no image format": (["--plot", "{tmp}/a.docx"], "name a .png"),
    "a reference without a picture": (["--reference", "{dense}"], "--plot"),
    "another model": (["--plot", "{tmp}/a.png", "--reference", "{other}"], "name the model that it was made from"),
    "a compressed reference": (["--plot", "{tmp}/a.png", "--reference", "{tmp}/out"], "is compressed itself"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, dense: Path, tmp_path: Path) -> None:
    arguments, expected = MISTAKES[name]
    other = tmp_path / "other"
    FAMILIES["bert"].make("AutoModel").save_pretrained(other)
    assert run("compress", dense, tmp_path / "out", "--method", "svd", "--rank", 4)[0] == 0
    before = sorted(tmp_path.rglob("*"))
    filled = [each.format(tmp=tmp_path, dense=dense, other=other) for each in arguments]
    code, shown = run("inspect", tmp_path / "out", *filled)
    assert code == 2
    assert expected in shown.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("compress", dense, tmp_path / "out", "--method", "svd", "--rank", 4)
    monkeypatch.setattr("hf_dirembed.cli.picture.find_spec", lambda name: None)
    code, shown = run("inspect", tmp_path / "out", "--plot", tmp_path / "a.png")
    assert code == 2
    assert "pip install 'hf_dirembed[plot]'" in shown
