"""The command that does with a real model what people do: some of its rows on tiny ones, and a user's mistakes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"vocab_size": 160, "max_position_embeddings": 64, "initializer_range": 0.3}
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "encoder")
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder / "causal")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    for name in ("encoder", "causal"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def drop_in(place: Path, monkeypatch: pytest.MonkeyPatch):
    """The script as a module, where the models lie."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_MODULES_CACHE", "")  # which the command sets: put back afterwards
    import drop_in

    return drop_in


def read(output: str) -> list[list[str]]:
    rows = [line[2:-2].split(" | ") for line in output.splitlines() if line.startswith("| ")]
    assert rows[0] == ["row", "what was done", "outcome", "seconds"]
    return rows[2:]


@pytest.mark.parametrize(
    ("model", "named", "expected"),
    [
        ("encoder", "load,copies", ["load", *["copies"] * 4]),
        ("encoder", "pipeline,table", [*["pipeline"] * 6, *["table"] * 4]),
        ("causal", "generate,load", ["load", *["generate"] * 6]),
    ],
)
def test_rows(drop_in, capsys: pytest.CaptureFixture[str], model: str, named: str, expected: list[str]) -> None:
    arguments = [model, "--bits", "7", "--rows", named]
    failed = 0
    try:
        drop_in.main(arguments)
    except SystemExit as ended:
        failed = ended.code
    printed = capsys.readouterr()
    assert printed.out.startswith(f"`python benchmarks/drop_in.py {' '.join(arguments)}`\n")
    rows = read(printed.out)
    assert [row[0] for row in rows] == expected
    # A tiny model fits one shard of 20 MB: the row says so, and the command fails for it.
    fails = {row[1]: row[2] for row in rows if row[2].startswith("**fails**")}
    assert fails == ({"saved in shards of 20 MB": "**fails**: AssertionError: one file"} if "copies" in named else {})
    assert failed == len(fails)
    assert ("Traceback" in printed.err) == bool(fails)
    begun = ("exact", "same text", "the expanded model's answer", "refused: ", "loss ", "max difference 0")
    assert all(row[2].startswith((*begun, "this transformers has no")) for row in rows if row[1] not in fails)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("encoder --rows load,magic", "there is no row 'magic': choose from load, trust_remote_code"),
        ("nowhere --rows load", "nowhere is neither a folder here nor a model that the Hub gives out"),
        ("encoder --bits 0 --rows load", "bits=0"),
    ],
)
def test_a_mistake_is_one_line(drop_in, capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        drop_in.main(arguments.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("drop_in.py: ")
    assert error.count("\n") == 1
    assert said in error
