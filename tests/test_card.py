"""Model cards: metadata, text, results, and who may be overwritten."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from families import FAMILIES
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries
from transformers import PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.cli.commands import main
from hf_dirembed.evaluation.results import DatasetSource, ReferenceResult, save_result
from hf_dirembed.evaluation.results import Result as Measured
from hf_dirembed.hub.publishing import write_checkpoint_card


GOLDEN = Path(__file__).parent / "golden" / "card.md"
CARDS = sorted((Path(__file__).parent.parent / "model_cards").glob("*/README.md"))
HEAD = "---\nlicense: apache-2.0\nlanguage: [en, no]\npipeline_tag: sentence-similarity\nbase_model: other/one\n---\n"
STS = Measured(
    "sts",
    DatasetSource("nyu-mll/glue", config="stsb", split="validation", revision="abc123"),
    {"spearman": 0.8659, "pearson": 0.85, "other": None},
    settings={"pooling": "mean", "num_pairs": 1500, "prefix": "", "max_length": None},
    reference=ReferenceResult("org/base", {"spearman": 0.8672, "pearson": 0.851}),
    agreement={"cosine": 0.98},
    arguments=("evaluate", "small", "--task", "sts", "--data", "nyu-mll/glue"),
    versions={},
    date="2026-11-22T17:50:00+00:00",
)
PERPLEXITY = Measured(
    "mlm-perplexity",
    DatasetSource("held out.txt", sha256="f00d"),
    {"perplexity": 20.5, "nll": 3.02},
    reference=ReferenceResult("org/base", {"perplexity": 20.0, "nll": 2.99}),
    deviations={"perplexity": 0.25},
    versions={},
    date="2026-11-22T17:50:00+00:00",
)


@pytest.fixture
def dense(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "dense"
    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(HEAD)
    return folder


@pytest.fixture
def small(dense: Path, tmp_path: Path) -> Path:
    compress_checkpoint(dense, tmp_path / "small", method="direction", rank=5, base_model="org/base")
    return tmp_path / "small"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_the_card_is_golden(small: Path) -> None:
    """With a test of its figures apart, which depend on the machine in their last digits."""
    config = json.loads((small / "config.json").read_text())
    (record,) = config["dirembed"]["record"]["tables"].values()
    assert record["quality"].keys() == {"dense_bytes", "mean_cosine", "token_cosine", "distortion", "bound_bits"}
    record["quality"] |= {"mean_cosine": 0.4321, "token_cosine": 0.5432, "distortion": 0.25, "bound_bits": 1.25}
    record["settings"]["versions"] = {"torch": "0"}
    (small / "config.json").write_text(json.dumps(config))
    save_result(small, STS)
    save_result(small, PERPLEXITY)
    card = write_checkpoint_card(small).read_text()
    assert card == GOLDEN.read_text(), "if it is meant: write it to tests/golden/card.md"
    assert write_checkpoint_card(small).read_text() == card, "regenerating changed it"


def test_metadata_survives_and_results_come_in(small: Path) -> None:
    data = ModelCard.load(small / "README.md").data
    assert (data.base_model, data.get("base_model_relation")) == ("org/base", "quantized")
    assert (data.license, data.language) == ("apache-2.0", ["en", "no"])
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "sentence-similarity", ["dirembed"])
    assert data.eval_results is None
    assert not (small / ".eval_results").exists()

    save_result(small, STS)
    save_result(small, PERPLEXITY)
    assert run("card", small).exit_code == 0
    data = ModelCard.load(small / "README.md").data
    assert {name: data.get(name) for name in ("base_model", "license", "language")} == {
        "base_model": "org/base", "license": "apache-2.0", "language": ["en", "no"],
    }  # fmt: skip
    found = {result.metric_type: result for result in data.eval_results}
    assert found.keys() == {"spearmanr", "pearsonr", "perplexity"}
    assert (found["spearmanr"].metric_value, found["spearmanr"].dataset_config) == (0.8659, "stsb")
    assert (found["perplexity"].task_type, found["perplexity"].dataset_type) == ("fill-mask", "held out")
    (file,) = (small / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))  # of data on the Hub alone
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "stsb", 0.8659)
    assert entry.date == "2026-11-22T17:50:00+00:00"

    (small / "dirembed_results.json").unlink()
    assert run("card", small).exit_code == 0
    assert list((small / ".eval_results").iterdir()) == []
    assert ModelCard.load(small / "README.md").data.eval_results is None


def test_a_part_of_the_data_is_not_taken_for_all_of_it(small: Path) -> None:
    """A quick look by `--limit` says so wherever its figures go, and goes to no leaderboard."""
    metrics = {"spearman": 0.86591234567890123}
    save_result(small, replace(STS, metrics=metrics, settings={"limit": 50}))
    assert run("card", small).exit_code == 0

    (found,) = ModelCard.load(small / "README.md").data.eval_results
    assert (found.metric_value, found.dataset_args) == (0.865912, {"limit": 50})
    assert "limit 50" in (small / "README.md").read_text()
    assert not (small / ".eval_results").exists()


def test_a_card_written_by_hand_is_replaced_by_force_alone(small: Path) -> None:
    card = small / "README.md"
    card.write_text("---\nlicense: mit\n---\n# By hand\n")
    refused = run("card", small)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert card.read_text().endswith("# By hand\n")
    assert run("card", small, "--force", "--model-id", "me/small").exit_code == 0
    assert "# small" in card.read_text()
    assert metadata_load(card)["license"] == "mit"
    assert metadata_load(card)["base_model"] == "org/base"  # which config.json knows


def test_broken_results_are_named(small: Path) -> None:
    before = (small / "README.md").read_bytes()
    (small / "dirembed_results.json").write_text("{}")
    done = run("card", small)
    assert done.exit_code == 2
    assert "dirembed_results.json holds no results" in done.stderr
    assert (small / "README.md").read_bytes() == before


@pytest.mark.parametrize("head", ["", "---\n: [\n---\n", "---\nlicense: [1, {}]\nlanguage: 3\n---\n", "\x00"])
def test_no_source_card_stops_a_compression(head: str, dense: Path, tmp_path: Path) -> None:
    (dense / "README.md").write_text(head)
    compress_checkpoint(dense, tmp_path / "out", method="svd", rank=4)
    data = metadata_load(tmp_path / "out" / "README.md")
    assert data == {"library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["dirembed"]}


@pytest.mark.parametrize(
    ("family", "auto", "tag", "loader"),
    [
        ("gpt2", "AutoModelForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("llama-tied", "AutoModelForSequenceClassification", "text-classification", None),
        ("t5", "AutoModelForSeq2SeqLM", None, "AutoModelForSeq2SeqLM"),
        ("bert", "AutoModel", "feature-extraction", "AutoModel"),
        ("llava", "AutoModelForImageTextToText", "image-text-to-text", "AutoModelForImageTextToText"),
    ],
)
def test_what_a_model_is_for(family: str, auto: str, tag: str | None, loader: str | None, tmp_path: Path) -> None:
    model = hf_dirembed.compress(FAMILIES[family].make(auto), method="svd", rank=4)
    model.save_pretrained(tmp_path)
    card = write_checkpoint_card(tmp_path).read_text()
    assert metadata_load(tmp_path / "README.md").get("pipeline_tag") == tag
    assert f"import {loader or auto}, AutoTokenizer" in card
    assert ("pipe = pipeline(" in card) == (tag in ("text-generation", "text-classification", "feature-extraction"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_the_cards_that_are_shown_are_valid(card: Path) -> None:
    data = ModelCard.load(card).data
    assert data.get("base_model_relation") == "quantized"
    assert "dirembed" in data.tags
    assert data.license
    assert data.eval_results, "a card without figures"
    for file in (card.parent / ".eval_results").glob("*.yaml"):
        assert parse_eval_result_entries(yaml.safe_load(file.read_text()))


def test_the_script_of_the_shown_cards(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (dense / "README.md").unlink()
    script = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "model_cards.py"))
    options = ["--base-model", "org/base", "--metadata", "license=mit", "--method", "direction", "--user", "me"]
    script["main"]([str(dense), "--bits", "8", *options, "--out", str(tmp_path / "cards")])
    (card,) = (tmp_path / "cards").iterdir()
    assert {file.name for file in card.iterdir()} == {"README.md", "dirembed.png", "config.json"}
    data = metadata_load(card / "README.md")
    assert (data["license"], data["base_model"]) == ("mit", "org/base")
    text = (card / "README.md").read_text()
    assert "(dirembed.png)" in text
    assert 'from_pretrained("me/dense-8bit")' in text


def test_a_folder_of_the_base_models_name_is_in_nobodys_way(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_checkpoint_card(small)
    assert metadata_load(small / "README.md")["base_model"] == "org/base"
