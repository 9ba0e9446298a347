"""Messages whose mend helps in that very case, and outputs that leave nothing of ours where it does not belong."""

from __future__ import annotations

import copy
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from safetensors.torch import load_file, save_file

import hf_dirembed
from hf_dirembed.checkpoints.convert import compress_checkpoint, expand_checkpoint
from hf_dirembed.errors import BudgetError, CalibrationError, CheckpointError, EvaluationError, OptionError
from hf_dirembed.evaluation.data import load_text
from hf_dirembed.hub.publishing import write_checkpoint_card


AUTO = "AutoModelForCausalLM"
IDS = FAMILIES["llama-tied"].inputs()["input_ids"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_pickled_weights_are_told_how_to_convert(dense: Path, tmp_path: Path) -> None:
    """The mend is run."""
    state = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    torch.save(state, dense / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refusal:
        compress_checkpoint(dense, tmp_path / "out", bits=4)
    said = str(refusal.value)
    assert "its weights are in pytorch_model.bin" in said
    mend = said[said.index("transformers.") : said.index(", and copy")].replace("a-new-folder", str(tmp_path / "new"))
    eval(mend, {"transformers": transformers})
    assert compress_checkpoint(tmp_path / "new", tmp_path / "out", bits=4).tables


def test_the_old_layout_of_sentence_transformers_is_told_how_to_convert(dense: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    dense.rename(old / "0_Transformer")
    (old / "modules.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"model in 0_Transformer: save it .*SentenceTransformer\(.*\)\.save\("):
        compress_checkpoint(old, tmp_path / "out", bits=4)


@pytest.mark.parametrize("budget", [{"bits": 32}, {"bits": 40}, {"ratio": 0.5}, {"ratio": 1}])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("method", ["transform", "svd"])
def test_budgets_that_make_nothing_smaller(budget: dict[str, float], name: str, method: str) -> None:
    with pytest.raises(BudgetError, match=r"makes nothing smaller: the tables? takes? 32 bits per weight as"):
        hf_dirembed.compress(FAMILIES[name].make(AUTO), method=method, **budget)


def test_files_that_are_missing() -> None:
    with pytest.raises(CalibrationError, match=r"cannot read the calibration text missing.txt \(No such file"):
        hf_dirembed.compress(FAMILIES["llama-tied"].make(AUTO), bits=2, calibration="missing.txt")
    for name in ("missing.txt", "./pairs", "/data/held-out", "a/b/c"):
        with pytest.raises(EvaluationError, match=f"there is no file {name}: check its name"):
            load_text(name)


@pytest.mark.parametrize("name", ["wpe", "transformer.wpe", "transformer.h.0.ln_1", "nope"])
def test_what_is_no_vocabulary_table_is_refused_with_the_list(name: str) -> None:
    for options in ({"bits": 4, "tables": [name]}, {"bits": {name: 4}}):
        with pytest.raises(OptionError, match=f"'{name}' names no table: the model has transformer.wte, lm_head"):
            hf_dirembed.compress(FAMILIES["gpt2"].make(AUTO), **options)


def test_another_vocabulary_is_had_after_loading(tmp_path: Path) -> None:
    hf_dirembed.compress(FAMILIES["llama-tied"].make(AUTO), bits=4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="leave out what from_pretrained was told of the config"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=600)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.resize_token_embeddings(600).num_embeddings == 600
    assert model(input_ids=IDS).logits.shape[-1] == 600


def test_outputs_inside_of_their_source_are_refused(dense: Path, tmp_path: Path) -> None:
    before = sorted(dense.rglob("*"))
    with pytest.raises(CheckpointError, match=r"is inside of .*: name a folder beside it"):
        compress_checkpoint(dense, dense / "sub" / "out", bits=4)
    assert sorted(dense.rglob("*")) == before


def test_outputs_of_read_only_sources_are_writable(dense: Path, tmp_path: Path) -> None:
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text("{}")
    everything = [dense, *dense.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        compress_checkpoint(dense, tmp_path / "out", bits=4)
    finally:
        for path in everything:
            path.chmod(0o755)
    for path in (tmp_path / "out").rglob("*"):
        assert os.stat(path).st_mode & stat.S_IWUSR, path


def test_an_expanded_folder_holds_nothing_of_ours(dense: Path, tmp_path: Path) -> None:
    compress_checkpoint(dense, tmp_path / "out", bits=4)
    (tmp_path / "out" / "dirembed.png").write_bytes(b"")
    (tmp_path / "out" / "vocab.txt").write_text("a")
    expand_checkpoint(tmp_path / "out", tmp_path / "stock")
    names = {file.name for file in (tmp_path / "stock").rglob("*")}
    assert names == {"README.md", "config.json", "model.safetensors", "vocab.txt"}
    assert "dirembed" not in (tmp_path / "stock" / "config.json").read_text()


def test_a_stock_model_saved_over_a_compressed_one_leaves_nothing_of_ours(tmp_path: Path) -> None:
    """However often it is copied before; what somebody wrote by hand stays."""
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), bits=4)
    for number, copied in enumerate((copy.deepcopy, lambda each: each)):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        write_checkpoint_card(folder)
        (folder / "mine_dirembed.py").write_text("")
        copied(hf_dirembed.expand(copy.deepcopy(model))).save_pretrained(folder)
        assert {file.name for file in folder.rglob("*")} == {"config.json", "model.safetensors", "mine_dirembed.py"}
    assert pickle.loads(pickle.dumps(hf_dirembed.expand(model))).save_pretrained


@pytest.mark.parametrize("tied_config", [True, False])
def test_a_head_of_its_own_is_never_lost(tied_config: bool, tmp_path: Path) -> None:
    """In Python, from a checkpoint and at the command line; whatever the config says."""
    model = FAMILIES["llama-tied"].make(AUTO)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = tied_config
    expected = model(input_ids=IDS).logits
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file(
        {**state, "lm_head.weight": model.lm_head.weight.detach()}, folder / "model.safetensors", {"format": "pt"}
    )

    compress_checkpoint(folder, tmp_path / "out", bits=12)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for ours in (
        hf_dirembed.compress(model, bits=12),
        hf_dirembed.compress(loaded, bits=12),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    ):
        assert (ours(input_ids=IDS).logits - expected).norm() < 0.03 * expected.norm()
        assert {table.name for table in hf_dirembed.find_tables(ours) if table.compressed} == {
            "model.embed_tokens",
            "lm_head",
        }


def test_codes_that_are_shared_are_saved_whatever_the_config_says(tmp_path: Path) -> None:
    """A stock model whose config unties what is shared loads with a random head."""
    for name, auto in (("llama-tied", AUTO), ("gpt2", AUTO), ("t5", "AutoModelForSeq2SeqLM")):
        family = FAMILIES[name]
        model = hf_dirembed.compress(family.make(auto), bits=4)
        expected = model(**family.inputs()).logits
        model.config.tie_word_embeddings = False
        model.save_pretrained(tmp_path / name)
        again = getattr(transformers, auto).from_pretrained(tmp_path / name)
        assert torch.equal(again(**family.inputs()).logits, expected)
