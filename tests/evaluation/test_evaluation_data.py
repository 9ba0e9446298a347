"""Text and sentence pairs from files, datasets and memory; what is malformed is named."""

from __future__ import annotations

import hashlib
import json

import datasets
import pytest

from hf_dirembed.evaluation import DatasetSource, EvaluationError, load_pairs, load_text


def test_reads_pairs_alike_from_csv_dataset_and_memory(tmp_path) -> None:
    first = 'A "cat", sitting.\u2028Still.'  # a comma, quotes, and what str.splitlines would cut
    triples = [(first, "A\ncat.", 4.5), ("Prices rose.", "", 0.0)]
    file = tmp_path / "pairs.csv"
    file.write_text('"A ""cat"", sitting.\u2028Still.","A\ncat.",4.5\nPrices rose.,,0\n', encoding="utf-8")
    columns = {"sentence1": [first, "Prices rose."], "sentence2": ["A\ncat.", ""], "label": [4.5, 0.0], "idx": [0, 1]}
    for source in (file, str(file), datasets.Dataset.from_dict(columns), triples):
        pairs = load_pairs(source)
        assert list(zip(pairs.first, pairs.second, pairs.scores, strict=True)) == triples
    assert load_pairs(file).name == str(file)
    assert load_pairs(pairs) is pairs


def test_reads_text_alike_from_file_dataset_and_memory(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\n\nTwo.", encoding="utf-8-sig")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("One.", "Two.")))
    rows = datasets.Dataset.from_dict({"body": ["One.", "Two."]})
    for text in (
        load_text(file),
        load_text(str(folder), split="validation"),
        load_text(rows, column="body"),
        load_text(rows.to_iterable_dataset(), column="body"),
        load_text(iter(["One.", "Two."])),
    ):
        assert text.content == "One.\n\nTwo."
    assert load_text(str(folder), split="validation").name == f"{folder}/validation"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence1,sentence2,score\na,b,1\n", r"row 1 .* score 'score', which is no finite number"),
        ("a,b,1\na,b\n", r"row 2 .* give sentence1, sentence2 and score"),
        ("a,b,nan\n", "no finite number"),
        ("", "holds no sentence pairs"),
        ('"' + "a" * 200_000, "is no CSV file"),
    ],
)
def test_names_the_malformed_row(tmp_path, content, message) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(content)
    with pytest.raises(EvaluationError, match=message):
        load_pairs(file)


def test_names_missing_columns_files_and_splits(tmp_path) -> None:
    rows = datasets.Dataset.from_dict({"sentence1": ["a"], "score": [1.0]})
    with pytest.raises(EvaluationError, match=r"no column 'sentence2', only \['score', 'sentence1'\]"):
        load_pairs(rows)
    with pytest.raises(EvaluationError, match=r"no column 'text', only \['score', 'sentence1'\]"):
        load_text(rows)
    with pytest.raises(EvaluationError, match="where text is due"):
        load_text(rows, column="score")
    for missing in (tmp_path / "none.txt", "no-such-file.csv", "nobody/nothing", "some words\n" * 1000):
        with pytest.raises(EvaluationError, match=r"there is no file|neither a file here nor a dataset"):
            load_text(missing)
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(EvaluationError, match="split 'dev'"):
        load_text(str(tmp_path), split="dev")


def test_refuses_what_is_no_text(tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EvaluationError, match="not UTF-8 at byte 3"):
        load_text(tmp_path / "latin.txt")
    for empty in ([], [" ", "\n"]):
        with pytest.raises(EvaluationError, match="holds no text"):
            load_text(empty)
    with pytest.raises(EvaluationError, match="is no data"):
        load_text(5)


def test_says_which_file_or_dataset_it_was(tmp_path, monkeypatch) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("a,b,1\n")
    expected = DatasetSource("pairs.csv", sha256=hashlib.sha256(b"a,b,1\n").hexdigest())
    assert load_pairs(file).source == expected
    assert load_text(file).source == expected
    assert load_text(["a"]).source == DatasetSource("memory")

    commit = "0123456789abcdef" * 2 + "01234567"
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    rows.info.download_checksums = {f"hf://datasets/me/text@{commit}/test.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    source = load_text("me/text", config="raw").source
    assert source == DatasetSource("me/text", "raw", "test", revision=commit)
    assert str(source) == "me/text/raw/test"
