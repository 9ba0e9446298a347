"""Several processes, as a launcher starts them, give what one gives: the same bytes, said once."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from families import FAMILIES
from large import N_GRAM, n_gram_model, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_dirembed.cli.commands import main


pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="forks a process that has torch in it"
)
TEXT = "the cat sat on the mat , a dog ran to the green house in a blue tree . of mice and men , and the rest .\n"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "dense"
    FAMILIES["llama-tied"].make("AutoModelForCausalLM").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.with_name("text.txt").write_text("".join(TEXT.replace("cat", word) for word in "abcdefghij" * 9))
    return folder


def run_as(rank: int, world: dict[str, str], said: Path, arguments: list[str]) -> None:
    """What a forked child does: the command in one of the processes; it never returns."""
    code: object = 1
    try:
        sys.stdout, sys.stderr = ((said / f"{rank}.{name}").open("w") for name in ("out", "err"))
        PartialState._reset_state()
        os.environ.update(world | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {}))
        main(["compress", *arguments])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def launch(number: int, *arguments: object) -> list[tuple[int, str, str]]:
    """Runs the command in so many processes, as `torchrun` does; their exit codes, stdouts and stderrs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = str(number)
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(number):  # what is imported is imported already
            child = os.fork()
            if not child:
                run_as(rank, world if number > 1 else {}, Path(folder), list(map(str, arguments)))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said = [[Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(number)]
    return [(code, stdout, stderr) for code, (stdout, stderr) in zip(codes, said, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("options", [("--bits", "6", "--calibrate"), ("--method", "autoencoder", "--rank", "6")])
def test_two_processes_write_the_bytes_of_one(options: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    calibrates = "--calibrate" in options
    given: list[object] = [*options, *([dense.with_name("text.txt")] if calibrates else []), "--json"]
    ((code, alone, stderr),) = launch(1, dense, tmp_path / "one" / "out", *given)
    assert code == 0, stderr
    saved = tmp_path / "saved"
    two = launch(2, dense, tmp_path / "two" / "out", *given, "--resume", saved)
    assert [code for code, _, _ in two] == [0, 0], "".join(stderr for _, _, stderr in two)
    assert [json.loads(alone), ""] == [json.loads(two[0][1]), two[1][1]]
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".")) == []
    assert saved.is_file()
    config = json.loads((tmp_path / "two" / "out" / "config.json").read_text())
    (record,) = config["dirembed"]["record"]["tables"].values()
    settings = record["settings"]
    assert settings.get("calibration") == ("text.txt" if calibrates else None)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Iterator[PreTrainedModel]:
    """A model whose tables count as large; made by one thread, as threads of OpenMP do not come through a fork."""
    monkeypatch.setattr(
        "hf_dirembed.compression.compress.is_large", lambda table, measure, settings: table.num_rows > 1_000
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield n_gram_model()
    torch.set_num_threads(threads)


def test_two_processes_share_the_rows_of_a_large_table(large: PreTrainedModel, tmp_path: Path) -> None:
    source = save(large, tmp_path / "dense")
    ((code, _, stderr),) = launch(1, source, tmp_path / "one" / "out", "--bits", "3")
    assert code == 0, stderr
    two = launch(2, source, tmp_path / "two" / "out", "--bits", "3")
    assert [code for code, _, _ in two] == [0, 0], "".join(stderr for _, _, stderr in two)
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")
    assert b"fitted_rows" in (tmp_path / "two" / "out" / "config.json").read_bytes()


def test_what_fails_in_one_process_ends_all(
    large: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large.get_parameter(f"{N_GRAM}.weight").data[100] = torch.nan  # in the second of the parts, and not in the sample
    monkeypatch.setattr("hf_dirembed.compression.transform.sampled.draw_rows", lambda table, *_: table.rows[:64])
    source = save(large, tmp_path / "dense")
    (first, _, said), (second, stdout, _) = launch(2, source, tmp_path / "out", "--bits", "3")
    assert (first, second, stdout) == (2, 2, "")
    assert "row 100 of the embedding table holds a NaN" in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake", ["the output exists", "the text is missing", "the budget is too small"])
def test_a_mistake_ends_all_and_is_said_once(mistake: str, dense: Path, tmp_path: Path) -> None:
    text = dense.with_name("missing.txt" if mistake == "the text is missing" else "text.txt")
    out, bits = tmp_path / "out", "0.001" if mistake == "the budget is too small" else "6"
    if mistake == "the output exists":
        out.mkdir()
    before = contents(tmp_path)
    (first, _, said), (second, stdout, silent) = launch(2, dense, out, "--bits", bits, "--calibrate", text)
    assert (first, second, stdout) == (2, 2, "")
    assert said.splitlines()[-1].startswith("hf-dirembed: ")
    assert "Traceback" not in said + silent
    assert "hf-dirembed" not in silent
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))
