"""Fine-tuning on GLUE: what trains and what stays, what is learned, the metrics, and the data in all its forms."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from statistics import fmean, stdev

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.evaluation import GLUE, EvaluationError, FineTuningSettings, SquadSettings, glue, squad
from hf_dirembed.evaluation.finetuning import load_start, train_and_predict
from hf_dirembed.evaluation.glue_data import load_labelled
from hf_dirembed.remote.modules_dirembed import CompressedEmbedding


FAST = {"epochs": 6, "learning_rate": 5e-3, "batch_size": 8, "device": "cpu"}
BUDGETS = {"transform": {"bits": 4}, "direction": {"rank": 8}, "autoencoder": {"rank": 8}, "svd": {"rank": 8}}


def sentences(number: int, seed: int) -> list[dict[str, object]]:
    """Whether there is a cat in it."""
    draw = random.Random(seed)
    words = ["the", "a", "dog", "mat", "tree", "green", "on", "sat"]
    rows = [[*draw.choices(words, k=4), *(["cat"] if index % 2 else [])] for index in range(number)]
    for row in rows:
        draw.shuffle(row)
    return [{"sentence": " ".join(row), "label": index % 2} for index, row in enumerate(rows)]


def write(file: Path, lines: list[tuple[object, ...]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("method", BUDGETS)
def test_the_decoder_trains_and_codes_stay_in_every_method(method: str, dense: Path, tmp_path: Path) -> None:
    compress_checkpoint(dense, tmp_path / method, method=method, **BUDGETS[method])
    model, tokenizer = load_start(tmp_path / method, AutoModelForSequenceClassification, num_labels=2)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, CompressedEmbedding)
    before = {name: tensor.clone() for name, tensor in embedding.state_dict().items()}
    inputs = tokenizer([str(row["sentence"]) for row in sentences(8, 0)])["input_ids"]
    examples = [{"input_ids": ids, "labels": index % 2} for index, ids in enumerate(inputs)]
    train_and_predict(model, tokenizer, examples, [], FineTuningSettings(**{**FAST, "epochs": 1}), seed=0)
    trained = {name for name, tensor in embedding.state_dict().items() if not torch.equal(tensor, before[name])}
    assert trained == {name for name in before if name.startswith("decoder")}
    assert {"weight", "decoder_weight"} <= before.keys()


def test_the_decoder_stays_where_it_is_asked_to(compressed: Path) -> None:
    seen = []
    model, _ = load_start(compressed, AutoModelForSequenceClassification, train_decoder=False, num_labels=2)
    for name, parameter in model.named_parameters():
        seen.append(name)
        assert parameter.requires_grad == ("word_embeddings" not in name), name
    assert any("word_embeddings.decoder_weight" in name for name in seen)


def test_glue_and_squad_pass_it_on(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model, tokenizer, *rest, **options):
        assert not model.get_input_embeddings().decoder_weight.requires_grad
        raise InterruptedError

    rows = sentences(4, 0)
    for function in (glue, squad):  # each of the name of its module
        monkeypatch.setattr(sys.modules[function.__module__], "train_and_predict", refuse)
    question = {"id": "1", "question": "who", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [2]}}
    with pytest.raises(InterruptedError):
        glue(compressed, "sst2", rows, rows, settings=FineTuningSettings(train_decoder=False))
    settings = SquadSettings(train_decoder=False, max_length=24, doc_stride=4)
    with pytest.raises(InterruptedError):
        squad(compressed, [question], [question], settings=settings)


def test_the_table_of_a_dense_model_trains(dense: Path) -> None:
    model, tokenizer = load_start(dense, AutoModelForSequenceClassification, num_labels=2)
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    examples = [{"input_ids": tokenizer("the cat")["input_ids"], "labels": 0}]
    train_and_predict(model, tokenizer, examples, [], FineTuningSettings(**{**FAST, "epochs": 1}), seed=0)
    assert not torch.equal(table, before)


@pytest.mark.parametrize("start", ["dense", "compressed"])
def test_learns_what_can_be_learned(start: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(start)
    few = FineTuningSettings(**{**FAST, "epochs": 1e-6, "seeds": (0,)})  # one step
    enough = FineTuningSettings(**{**FAST, "seeds": (0,)})
    data, train = sentences(60, 1), sentences(120, 2)
    assert glue(folder, "sst2", data, train, settings=few).metrics["accuracy"] < 0.7
    found = glue(folder, "sst2", data, train, settings=enough)
    assert found.metrics["accuracy"] > 0.95
    assert found.settings["num_train"] == 120
    assert found.deviations == {}


def test_the_same_seed_gives_the_same_figure_and_seeds_are_averaged(compressed: Path) -> None:
    rows = [
        {"sentence1": row["sentence"], "sentence2": "the cat", "label": 5.0 * int(str(row["label"])) + index / 50}
        for index, row in enumerate(sentences(40, 3))
    ]

    def run(*seeds: int):
        settings = FineTuningSettings(**{**FAST, "epochs": 1, "seeds": seeds})
        return glue(compressed, "stsb", rows, rows, settings=settings)

    one, both = run(4), run(4, 5)
    assert both.by_seed[0] == one.metrics
    assert both.by_seed[1] != one.metrics
    for name in ("pearson", "spearman"):
        values = [metrics[name] for metrics in both.by_seed]
        assert both.metrics[name] == pytest.approx(fmean(values))
        assert both.deviations[name] == pytest.approx(stdev(values))


def test_limit_takes_the_first_and_mnli_has_two_sets(dense: Path, tmp_path: Path) -> None:
    header = ("index", "sentence1", "sentence2", "gold_label")
    rows = [(index, "the cat", "a dog", ["entailment", "neutral", "contradiction"][index % 3]) for index in range(9)]
    for file in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"):
        write(tmp_path / "MNLI" / file, [header, *rows])
    settings = FineTuningSettings(**{**FAST, "epochs": 1, "seeds": (0,)})
    found = glue(dense, "mnli", tmp_path, settings=settings, limit=6)
    assert found.metrics == {"accuracy": pytest.approx(1 / 3), "accuracy_mismatched": pytest.approx(1 / 3)}
    assert (found.settings["num_train"], found.settings["num_eval"]) == (6, 12)
    assert (found.data.name, found.training.name) == ("dev_matched.tsv", "train.tsv")


def test_metrics_are_the_definitions() -> None:
    draw = np.random.default_rng(0)
    gold, logits = draw.integers(0, 2, 50), draw.normal(size=(50, 2))
    predicted = logits.argmax(axis=1)
    tp, tn = (int(((predicted == value) & (gold == value)).sum()) for value in (1, 0))
    fp, fn = (int(((predicted == value) & (gold != value)).sum()) for value in (1, 0))
    accuracy, f1 = pytest.approx((tp + tn) / 50), pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    for subset in ("sst2", "mnli", "qnli", "rte", "wnli"):
        assert GLUE[subset].score(logits, gold) == {"accuracy": accuracy}
    for subset in ("mrpc", "qqp"):
        assert GLUE[subset].score(logits, gold) == {"accuracy": accuracy, "f1": f1}
    assert GLUE["cola"].score(logits, gold) == {"matthews_correlation": pytest.approx(matthews)}

    scores, wanted = draw.normal(size=(50, 1)), draw.permutation(50) / 10
    ranks = scores[:, 0].argsort().argsort()
    expected = [np.corrcoef(values, wanted)[0, 1] for values in (scores[:, 0], ranks)]
    assert list(GLUE["stsb"].score(scores, wanted).values()) == pytest.approx(expected)
    assert len(GLUE) == 9


# The official files: their header (None where there is none), a row, and what it says.
PAIR = ("a cat", "a dog")
OFFICIAL = {
    "cola": (None, ("gj04", "1", "", "the cat sat"), ("the cat sat",), 1),
    "sst2": (("sentence", "label"), ('a "cat', "0"), ('a "cat',), 0),
    "mrpc": (("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "7", "8", *PAIR), None, 1),
    "stsb": (("index", "genre", "sentence1", "sentence2", "score"), ("0", "news", *PAIR, "2.5"), None, 2.5),
    "qqp": (("id", "qid1", "question1", "question2", "is_duplicate"), ("0", "1", *PAIR, "0"), None, 0),
    "mnli": (("sentence1", "sentence2", "label1", "gold_label"), (*PAIR, "neutral", "contradiction"), None, 2),
    "qnli": (("index", "question", "sentence", "label"), ("0", *PAIR, "not_entailment"), None, 1),
    "rte": (("index", "sentence1", "sentence2", "label"), ("0", *PAIR, "entailment"), None, 0),
    "wnli": (("index", "sentence1", "sentence2", "label"), ("0", *PAIR, "1"), None, 1),
}  # fmt: skip


@pytest.mark.parametrize("subset", GLUE)
def test_reads_official_files_plain_files_and_datasets_alike(subset: str, tmp_path: Path) -> None:
    header, row, texts, label = OFFICIAL[subset]
    texts = texts or PAIR
    task = GLUE[subset]
    columns = dict(zip((names[0] for names in task.columns), ([text] for text in texts), strict=True))
    sources = [
        write(tmp_path / "official.tsv", [row] if header is None else [header, row]),
        write(tmp_path / "plain.tsv", [(*texts, task.labels[label] if task.labels else label)]),
        datasets.Dataset.from_dict({**columns, "label": [label]}),
    ]
    for source in sources:
        examples = load_labelled(task, source, None, "train")
        assert examples.texts == tuple((text,) for text in texts)
        assert examples.labels == (label,)


def test_names_what_is_wrong_with_the_data(dense: Path, tmp_path: Path) -> None:
    rows = sentences(4, 0)
    for subset, data, message in (
        ("sst3", rows, "subset='sst3' is no task of GLUE"),
        ("qnli", rows, "no column 'question', only"),
        ("sst2", [{"sentence": "a cat", "label": -1}], "choose another split"),
        ("sst2", [{"sentence": "a cat", "label": 2}], "has the label 2: it must be one of negative, positive"),
        ("sst2", [{"sentence": None, "label": 1}], "where text is due"),
        ("sst2", ["a cat"], "no column 'sentence'"),
        ("sst2", [], "holds no examples"),
        ("stsb", [{"sentence1": "a", "sentence2": "b", "label": math.nan}], "a finite number"),
        ("rte", write(tmp_path / "few.tsv", [("a cat", "1")]), "row 1 of .* has 2 columns: .* sentence1, sentence2"),
        ("sst2", write(tmp_path / "text.tsv", [("a cat", "good")]), "has the label 'good'"),
        ("sst2", tmp_path / "none.tsv", "there is no file .*none.tsv: check its name"),
    ):
        with pytest.raises(EvaluationError, match=message):
            glue(dense, subset, data, data)
    with pytest.raises(EvaluationError, match="do not say what to train on"):
        glue(dense, "sst2", rows)
    for wrong in ({"epochs": -1}, {"warmup": 1}, {"seeds": ()}, {"seeds": (1, 1)}, {"batch_size": 0}):
        with pytest.raises(EvaluationError, match=next(iter(wrong))):
            FineTuningSettings(**wrong)


def test_short_rows_below_a_header_are_left_out_as_in_qqp(tmp_path: Path) -> None:
    file = write(tmp_path / "dev.tsv", [("sentence", "label"), ("a cat",), ("a dog", "1")])
    assert load_labelled(GLUE["sst2"], file, None, "").texts == (("a dog",),)
