"""The registry and the command: one result in one form, what is printed, what is kept, what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from families import FAMILIES
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from hf_dirembed import DirEmbedError
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.cli.commands import main
from hf_dirembed.cli.evaluate import flag
from hf_dirembed.evaluation import (
    TASKS,
    DatasetSource,
    compare_sts,
    evaluate,
    load_results,
    masked_perplexity,
    perplexity,
)
from hf_dirembed.evaluation.results import RESULTS_NAME
from hf_dirembed.evaluation.tasks import parse_seeds


TEXT = "the cat sat on a mat and the dog ran to the green house in a tree of blue . " * 6
PAIRS = "the cat sat,the cat ran,4\na dog,a blue tree,1\na green mat,the green mat,5\nof a house,to a dog,2\n"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "text.txt": TEXT,
        "pairs.csv": PAIRS,
        "sst2.tsv": "the cat\t1\na dog\t0\na cat ran\t1\nthe dog sat\t0\n",
        "wide.tsv": "a\tb\tc\td\n",
        "squad.json": "{}",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return {name.partition(".")[0]: tmp_path / name for name in contents}


@pytest.fixture
def model(compressed: Path, tmp_path: Path) -> Path:
    """A copy of the compressed model, to keep results in."""
    return Path(shutil.copytree(compressed, tmp_path / "model"))


@pytest.fixture
def causal(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    FAMILIES["llama-tied"].make("AutoModelForCausalLM").save_pretrained(tmp_path / "causal")
    unmasked = copy.deepcopy(tokenizer)
    unmasked.mask_token = None
    unmasked.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_sts_with_a_reference(model: Path, dense: Path, files: dict[str, Path]) -> None:
    result = evaluate("sts", model, files["pairs"], dense, pooling="cls", device="cpu")
    both = compare_sts(model, dense, files["pairs"], pooling="cls", device="cpu")
    assert result.metrics == {"spearman": both.model.spearman, "pearson": both.model.pearson}
    assert result.reference is not None
    assert result.reference.metrics == {"spearman": both.reference.spearman, "pearson": both.reference.pearson}
    assert result.reference.model == "dense"
    assert result.difference == both.difference
    assert result.agreement == both.agreement
    assert result.settings == {"num_pairs": 4, "pooling": "cls", "prefix": "", "max_length": 32}
    assert result.dataset.name == "pairs.csv"


def test_masked_perplexity_tied_and_input_only(
    model: Path, dense: Path, files: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    options = {"window": 16, "seed": 3}
    result = evaluate("mlm-perplexity", model, files["text"], dense, masking="token", device="cpu", **options)
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(folder) for folder in (model, dense))
    expected = {
        "perplexity": masked_perplexity(ours, tokenizer, files["text"], whole_word=False, **options),
        "input_only_perplexity": masked_perplexity(
            ours, tokenizer, files["text"], whole_word=False, head="dense", reference=theirs, **options
        ),
    }
    assert {name: result.metrics[name] for name in expected} == {
        name: pytest.approx(figures.perplexity) for name, figures in expected.items()
    }
    assert result.metrics["perplexity"] != result.metrics["input_only_perplexity"]
    assert result.reference is not None
    dense_perplexity = masked_perplexity(theirs, tokenizer, files["text"], whole_word=False, **options).perplexity
    assert result.reference.metrics["perplexity"] == pytest.approx(dense_perplexity)
    assert result.reference.metrics["input_only_perplexity"] == pytest.approx(dense_perplexity)
    alone = evaluate("mlm-perplexity", model, files["text"], masking="token", device="cpu", **options)
    assert set(alone.metrics) == {"perplexity", "nll"}


def test_perplexity_of_a_causal_model(causal: Path, files: dict[str, Path], tokenizer, tmp_path: Path) -> None:
    compress_checkpoint(causal, tmp_path / "small", method="svd", rank=8)
    result = evaluate("perplexity", tmp_path / "small", files["text"], causal, window=16, limit=50, device="cpu")
    assert result.settings["limit"] == 50
    torch.manual_seed(0)
    model = FAMILIES["llama-tied"].make("AutoModelForCausalLM")
    figures = perplexity(model, tokenizer, files["text"], window=16, max_tokens=50)
    assert result.reference is not None
    assert result.reference.metrics["perplexity"] == pytest.approx(figures.perplexity)
    assert result.settings["text_tokens"] == 50
    assert result.reference.metrics != result.metrics


def test_command_prints_a_table_and_keeps_the_result(model: Path, dense: Path, files: dict[str, Path]) -> None:
    arguments = (model, "--task", "sts", "--data", files["pairs"], "--reference", dense, "--device", "cpu")
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    (result,) = load_results(model)
    title, _, header, *rows = done.stdout.splitlines()
    assert title == "sts on pairs.csv"
    assert header.split() == ["dense", "compressed", "difference"]
    for row, (name, value) in zip(rows, result.metrics.items(), strict=False):
        assert row.split()[:3] == [name, f"{result.reference.metrics[name]:.4f}", f"{value:.4f}"]
    assert result.arguments == (
        "evaluate", "model", "--task", "sts", "--data", "pairs.csv", "--reference", "dense", "--device", "cpu",
    )  # fmt: skip

    run(*arguments)
    assert len(load_results(model)) == 1
    run(*arguments, "--limit", 3)
    assert len(load_results(model)) == 2
    run(*arguments, "--limit", 2, "--no-save")
    assert len(load_results(model)) == 2
    assert run(dense, *arguments[1:]).exit_code == 0
    assert not (dense / RESULTS_NAME).exists()


def test_command_prints_json_alone_in_a_process_of_its_own(model: Path, dense: Path, files: dict[str, Path]) -> None:
    """Fine-tuning, whose Trainer prints a log by itself."""
    arguments = ["--task", "glue", "--subset", "sst2", "--data", files["sst2"], "--train", files["sst2"], "--json"]
    arguments += ["--reference", dense, "--epochs", "1", "--seeds", "0,1", "--device", "cpu"]
    command = "import sys; sys.argv[0] = 'hf-dirembed'; from hf_dirembed.cli.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "evaluate", *map(str, [model, *arguments])],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    (result,) = load_results(model)
    assert values.pop("model") == str(model)
    assert values.pop("difference") == result.difference
    assert values == result.to_dict()
    assert result.training == DatasetSource("sst2.tsv", sha256=result.dataset.sha256)
    assert result.settings["seeds"] == [0, 1]
    assert set(result.deviations) == {"accuracy"}
    assert "train_runtime" in done.stderr


def test_every_option_reaches_its_task() -> None:
    examples = {int: 1, float: 0.5, str: "x", parse_seeds: (0,)}
    for task in TASKS.values():
        for option in task.options:
            options = {"subset": "sst2"} if task.name == "glue" else {}
            options[option.name] = examples[option.type]
            with pytest.raises(DirEmbedError) as raised:  # of the data that there is not, at the latest
                evaluate(task.name, "no/such-model", "no-such-data", **options)
            assert "takes no" not in str(raised.value), option.name


MISTAKES = {
    "no such task": (["{model}", "--task", "rouge", "--data", "{text}"], "task 'rouge' is unknown"),
    "no such model": (["no/model", "--task", "sts", "--data", "{pairs}"], "no/model is neither a folder"),
    "no such data": (["{model}", "--task", "sts", "--data", "no.csv"], "there is no file no.csv: check its name"),
    "no such reference": (["{model}", "--task", "sts", "--data", "{pairs}", "--reference", "x"], "x is neither"),
    "an option of another task": (
        ["{model}", "--task", "sts", "--data", "{pairs}", "--doc-stride", "8"],
        "sts takes no doc_stride",
    ),
    "data of another task": (["{model}", "--task", "sts", "--data", "{text}"], "give sentence1"),
    "malformed data": (["{model}", "--task", "squad", "--data", "{squad}", "--train", "{squad}"], "is no SQuAD file"),
    "causal task, masked model": (["{model}", "--task", "perplexity", "--data", "{text}"], "no causal language"),
    "no mask token": (
        ["{causal}", "--task", "mlm-perplexity", "--data", "{text}", "--window", "16"],
        "with a mask and a padding",
    ),
    "no tokenizer": (["{bare}", "--task", "mlm-perplexity", "--data", "{text}"], "has no tokenizer"),
    "no head of that kind": (
        ["{translator}", "--task", "glue", "--subset", "sst2", "--data", "{sst2}", "--train", "{sst2}"],
        "without AutoModelForSequenceClassification",
    ),
    "no subset": (["{model}", "--task", "glue", "--data", "{sst2}"], "glue needs a subset"),
    "nothing to train on": (["{model}", "--task", "glue", "--subset", "sst2", "--data", "{sst2}"], "what to train on"),
    "wrong columns": (
        ["{model}", "--task", "glue", "--subset", "sst2", "--data", "{wide}", "--train", "{sst2}"],
        "row 1 of",
    ),
    "window too long": (["{model}", "--task", "mlm-perplexity", "--data", "{text}", "--window", "64"], "window=64"),
    "unknown masking": (["{model}", "--task", "mlm-perplexity", "--data", "{text}", "--masking", "x"], "masking='x'"),
    "unknown device": (["{model}", "--task", "sts", "--data", "{pairs}", "--device", "abacus"], "device='abacus'"),
    "a model that is broken": (["{broken}", "--task", "sts", "--data", "{pairs}"], "does not load"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_that_names_the_mend(
    name: str, model: Path, dense: Path, causal: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    arguments, expected = MISTAKES[name]
    places = {**files, "model": model, "causal": causal, "translator": tmp_path / "translator"}
    if "{translator}" in arguments:
        FAMILIES["marian"].make("AutoModelForSeq2SeqLM").save_pretrained(places["translator"])
    for name in ("bare", "broken"):
        places[name] = Path(shutil.copytree(dense, tmp_path / name))
    for file in places["bare"].glob("token*"):
        file.unlink()
    (places["broken"] / "model.safetensors").write_bytes(b"cut")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = run(*(argument.format(**places) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("hf-dirembed: ")
    assert expected in line
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_flags() -> None:
    shown = run("--help").stdout
    for task in TASKS.values():
        assert task.help in shown.replace("\n", " ")
        for option in task.options:
            assert flag(option.name) in shown
