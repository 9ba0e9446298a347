"""Several processes, as a launcher starts them, give what one gives: the same bytes, said once."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from families import FAMILIES
from transformers import PreTrainedTokenizerFast

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
    assert [code for code, _, _ in two] == [0, 0], two
    assert [json.loads(alone), ""] == [json.loads(two[0][1]), two[1][1]]
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".")) == []
    assert saved.is_file()
    settings = json.loads((tmp_path / "two" / "out" / "config.json").read_text())["dirembed"]["settings"]
    assert settings.get("calibration") == ("text.txt" if calibrates else None)


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
