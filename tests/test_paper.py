"""The command that makes the paper's table: all of its columns on a tiny model, both protocols, a user's mistakes."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from markdown_tables import read_table
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_dirembed.compression.baselines.autoencoder import AutoencoderSettings, autoencoder_epochs
from hf_dirembed.compression.coded import CodedTable
from hf_dirembed.compression.table import Table


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "paper.py"
SENTENCES = (
    "the cat sat on the mat",
    "a dog ran to the green tree",
    "the house and the blue tree",
    "a cat in a house",
)
METHODS = (
    "SVD",
    "autoencoder, RMSE",
    "autoencoder, cosine",
    "autoencoder, cosine + α-norm",
    "direction",
    "direction, token weights",
    "transform, token weights",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with tiny models, and a little data of each kind."""
    folder = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"vocab_size": 160, "max_position_embeddings": 512, "initializer_range": 0.3}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(folder / "masked")
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(folder / "causal")
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "headless")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 512
    for name in ("masked", "causal", "headless"):
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(" . ".join(SENTENCES * 30), encoding="utf-8")
    pairs = [(one, other, 5.0 - abs(i - j)) for i, one in enumerate(SENTENCES) for j, other in enumerate(SENTENCES)]
    (folder / "pairs.csv").write_text("".join(f"{one},{other},{score}\n" for one, other, score in pairs))
    (folder / "sst2.tsv").write_text("".join(f"{text}\t{int('cat' in text)}\n" for text in SENTENCES * 4))
    asked = []
    for text in SENTENCES:
        answer = {"text": text.split()[1], "answer_start": text.index(" ") + 1}
        asked.append({"context": text, "qas": [{"id": text, "question": "who", "answers": [answer]}]})
    (folder / "squad.json").write_text(json.dumps({"data": [{"title": "animals", "paragraphs": asked}]}))
    return folder


@pytest.fixture
def paper(place: Path, monkeypatch: pytest.MonkeyPatch):
    """The script as a module, where the data lies."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.chdir(place)
    import paper

    return paper


def test_all_columns_of_a_masked_model(paper, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--text", "text.txt", "--pairs", "pairs.csv", "--json", "found.json"]
    paper.main(["masked", *data, "--ratios", "2.5", "--max-tokens", "200"])
    output = capsys.readouterr().out
    assert output.startswith(f"`python benchmarks/paper.py masked {' '.join(data)} --ratios 2.5 --max-tokens 200`\n")
    titles, dense, *rows = read_table(output)
    assert titles[8:] == [
        "text.txt whole-word perplexity, input only",
        "text.txt whole-word perplexity, tied",
        "text.txt 15 % perplexity, input only",
        "text.txt 15 % perplexity, tied",
        "pairs.csv Spearman x 100",
    ]
    assert [row[0] for row in rows] == list(METHODS)
    assert {len(row) for row in (dense, *rows)} == {len(titles)}

    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    assert found["protocol"] == "mended"
    assert f"`{found['command']}`" == output.splitlines()[0]
    assert all(f"- {note}" in output for note in found["notes"])
    assert list(found["settings"]) == ["text.txt whole-word", "text.txt 15 %", "pairs.csv"]
    assert found["settings"]["pairs.csv"]["num_pairs"] == 16
    assert f"- text.txt 15 %: masked_tokens {found['settings']['text.txt 15 %']['masked_tokens']}, " in output
    dense, *rows = found["rows"]
    assert [list(row["metrics"]) for row in (dense, *rows)] == [titles[8:]] * 8
    # 160 x 32 numbers over 2.5, in ranks of 160 + 32: what float16 latents and a float32 decoder take.
    assert {row["rank"] for row in rows[:-1]} == {10}
    assert rows[0]["bits_per_weight"] == 8 * (160 * 10 * 2 + 10 * 32 * 4) / (160 * 32)
    assert rows[-1]["rank"] is None
    assert rows[-1]["bits_per_weight"] <= rows[0]["bits_per_weight"]
    by_method = {row["method"]: row for row in rows}
    errors = {name: row["rmse"] for name, row in by_method.items() if not name.startswith("transform")}
    assert by_method["transform, token weights"]["rmse"] < min(errors.values())
    assert by_method["direction"]["mean_cosine"] > by_method["SVD"]["mean_cosine"]
    weighted = by_method["direction, token weights"]
    assert weighted["token_cosine"] == max(row["token_cosine"] for row in rows[:-1])
    only, tied = titles[8:10]
    assert dense["metrics"][only] == dense["metrics"][tied]
    assert all(row["metrics"][only] != row["metrics"][tied] for row in rows)


def test_fine_tuned_columns_have_deviations(paper, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--fine-tune", "sst2=sst2.tsv,sst2.tsv", "--squad", "squad.json,squad.json", "--json", "tuned.json"]
    paper.main(["masked", *data, "--seeds", "0,1", "--epochs", "1", "--ratios", "5", "--methods", "transform"])
    titles, *rows = read_table(capsys.readouterr().out)
    assert titles[8:] == ["sst2 accuracy x 100", "SQuAD exact_match", "SQuAD f1"]
    found = json.loads(Path("tuned.json").read_text())
    assert found["settings"]["sst2"]["epochs"] == found["settings"]["SQuAD"]["epochs"] == 1
    assert found["settings"]["SQuAD"]["num_train"] == 4
    for cells, row in zip(rows, found["rows"], strict=True):
        assert list(row["metrics"]) == list(row["deviations"]) == titles[8:]
        assert cells[8] == f"{row['metrics'][titles[8]]:.2f} ± {row['deviations'][titles[8]]:.2f}"
        assert 0 <= row["metrics"]["SQuAD exact_match"] <= row["metrics"]["SQuAD f1"] <= 100


def test_the_published_protocol(paper, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import paper_protocol

    trained, glue = [], paper_protocol.glue

    def spy(*args, settings, **options):
        trained.append(settings.train_decoder)
        return glue(*args, settings=settings, **options)

    monkeypatch.setattr(paper_protocol, "glue", spy)
    options = ["--ratios", "5", "--methods", "svd", "autoencoder-alpha", "transform", "--text", "text.txt"]
    fine_tuning = ["--fine-tune", "sst2=sst2.tsv,sst2.tsv", "--epochs", "1", "--seeds", "0"]
    paper.main(["masked", *options, *fine_tuning, "--faithful", "--json", "faithful.json"])
    assert trained == [True, False, True, True]  # dense, svd, autoencoder, transform
    titles, *_ = read_table(capsys.readouterr().out)
    assert titles[8:] == ["text.txt whole-word perplexity, input only", "sst2 accuracy x 100"]
    chosen = json.loads(Path("faithful.json").read_text())["rows"][2]["metrics"][titles[8]]

    dense = paper_protocol.Dense.load("masked", None, None)
    measures = paper_protocol.Measures(dense, paper.make_parser().parse_args(["masked", *options, "--faithful"]))
    perplexities = []
    for each in autoencoder_epochs(Table(dense.rows), 5, AutoencoderSettings.paper()):
        coded = CodedTable.of(each.factorize(Table(dense.rows)), "autoencoder", codes="float16", decoder="float32")
        ((figure, _),) = next(measures.perplexities(dense.compressed(coded))).values()
        perplexities.append(figure)
    assert len(perplexities) == 30
    assert chosen == min(perplexities) < max(perplexities)


def test_a_causal_model_with_an_untied_head(paper, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ratios", "4", "8", "--methods", "svd", "direction-weighted", "transform"]
    paper.main(["causal", "--text", "text.txt", "--calibrate", "text.txt", *options])
    output = capsys.readouterr().out
    said = "no head is tied to it. Token weights: counts of text.txt; `transform` measures errors by the Hessian of"
    assert said in output
    titles, dense, *rows = read_table(output)
    assert titles[8:] == ["text.txt perplexity, input only"]
    assert [row[1] for row in rows] == ["4", "4", "bytes of 4", "8", "8", "bytes of 8"]
    assert all(float(row[8].replace(",", "")) > 0 for row in (dense, *rows))


def test_the_tables_alone(paper, capsys: pytest.CaptureFixture[str]) -> None:
    paper.main(["masked", "--ratios", "3", "--methods", "svd", "direction"])
    titles, dense, *rows = read_table(capsys.readouterr().out)
    assert titles == list(paper.COLUMNS)
    assert dense == ["dense", "", "", "32.00", "", "", "", ""]
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("masked --ratios 0.5", "argument --ratios: 0.5 does not compress: give a ratio above 1, like 2.5"),
        ("masked --ratios few", "argument --ratios: invalid ratio value: 'few'"),
        ("masked --fine-tune sst3=a.tsv", "'sst3=a.tsv' is not SUBSET=DATA, SUBSET one of cola"),
        ("masked --methods magic", "argument --methods: invalid choice: 'magic'"),
        ("masked --max-tokens 0", "0 leaves nothing: give a whole number from 1"),
        ("masked --text nowhere.txt", "nowhere.txt"),
        ("nowhere", "nowhere"),
        ("masked --json nowhere/found.json", "there is no folder nowhere: make it first"),
        ("headless --text text.txt", "headless has no language-model head for perplexity: leave --text out"),
        ("masked --ratios 1000", "rank=0 is not a positive whole number"),
    ],
)
def test_a_mistake_is_one_line(paper, capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        paper.main(arguments.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("paper.py: ")
    assert error.count("\n") == 1
    assert said in error


def test_it_runs_as_a_script(paper, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "masked", "--ratios", "4", "--methods", "svd"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.startswith("`python benchmarks/paper.py masked --ratios 4 --methods svd`\n")
