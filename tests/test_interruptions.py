"""What is left of a write that was killed, ran out of disk, or was not allowed: all of it, or nothing."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from families import FAMILIES
from transformers import PreTrainedTokenizerFast

from hf_dirembed import CheckpointError
from hf_dirembed.checkpoints import convert as checkpoint
from hf_dirembed.checkpoints.atomic import staged_folder
from hf_dirembed.checkpoints.convert import compress_checkpoint, inspect_checkpoint
from hf_dirembed.cli.commands import main
from hf_dirembed.compression.baselines.autoencoder import AutoencoderSettings
from hf_dirembed.evaluation import DatasetSource, Result, save_result
from hf_dirembed.hub.publishing import write_checkpoint_card


KILLS = 50
MODELS = ("dense", "compressed")
WRITING = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "tempfile.mkstemp"}  # audit events
ROOT = Path(__file__).parents[1]
needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has torch in it")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("source") / "dense"
    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


def write(source: Path, out: Path) -> None:
    compress_checkpoint(source, out, method="svd", rank=6)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def forked(work: Callable[[], object]) -> int:
    """Runs work in a child process that has everything imported; its id. It exits with 0, or 1 after an error."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@needs_fork
def test_kill_9_leaves_all_or_nothing(dense: Path, tmp_path: Path, record_property: Any) -> None:
    outs = [tmp_path / str(number) / "out" for number in range(3)]  # of one name, which the card bears
    write(dense, tmp_path / "warm" / "out")
    start = time.perf_counter()
    os.waitpid(forked(lambda: write(dense, tmp_path / "reference" / "out")), 0)
    duration = time.perf_counter() - start
    expected = contents(tmp_path / "reference" / "out")
    chance = random.Random(0)
    complete = stumps = 0
    for kill in range(KILLS):
        out = outs[kill % 3]
        shutil.rmtree(out, ignore_errors=True)
        child = forked(lambda out=out: write(dense, out))
        time.sleep(chance.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            complete += 1
            assert contents(out) == expected
        stumps += bool(list(out.parent.glob(".out.*.part")))
    record_property("kills", KILLS)
    assert 0 < complete < KILLS
    assert stumps
    for out in outs:  # the next run clears up after those that were killed
        shutil.rmtree(out, ignore_errors=True)
        write(dense, out)
        assert contents(out) == expected
    assert not list(tmp_path.rglob(".*.part"))


@needs_fork
@pytest.mark.parametrize("task", ["autoencoder", "calibration"])
def test_kill_9_costs_what_was_not_yet_saved(
    task: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, record_property: Any
) -> None:
    """Killed again and again, and gone on with: to the same bytes as without."""
    source, file = tmp_path / "dense", tmp_path / "saved"
    FAMILIES["llama-tied"].make("AutoModelForCausalLM").save_pretrained(source)
    tokenizer.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, the dog ran to the green house\n" * 900)
    options: dict[str, Any] = {"bits": 6, "calibration": str(text)}
    if task == "autoencoder":
        options = {"method": "autoencoder", "rank": 6, "settings": AutoencoderSettings(epochs=400)}

    def work(out: str, resume: Path | None = None) -> None:
        compress_checkpoint(source, tmp_path / out / "out", resume=resume, **options)

    work("reference")
    seen: list[bytes] = []
    while len(seen) < 3:
        child = forked(lambda: work("resumed", file))
        while not file.exists() or file.read_bytes() in seen:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
            time.sleep(0.001)
        seen.append(file.read_bytes())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (tmp_path / "resumed" / "out").exists()
    work("resumed", file)
    assert contents(tmp_path / "resumed" / "out") == contents(tmp_path / "reference" / "out")
    assert not list((tmp_path / "resumed").glob(".*"))
    record_property("kills", len(seen))


def test_a_part_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as staging:
        other = staging.with_name(staging.name.replace(str(os.getpid()), str(os.getppid())))
        other.mkdir()
    with staged_folder(tmp_path / "again"):
        pass
    shutil.rmtree(tmp_path / "out")
    with staged_folder(tmp_path / "out"):
        pass
    assert other.is_dir()


@pytest.fixture(scope="module")
def compressed(dense: Path) -> Path:
    """A compressed model with a result beside it, and text to evaluate it on."""
    folder = dense.with_name("compressed")
    write(dense, folder)
    save_result(folder, Result("sts", DatasetSource("nyu-mll/glue"), {"spearman": 0.5}, settings={"num_pairs": 2}))
    write_checkpoint_card(folder)
    dense.with_name("text.txt").write_text("the cat sat on the mat and the dog ran to the green house . " * 9)
    return folder


COMMANDS = {
    "compress": "compress {dense} {new}/out --method svd --rank 6",
    "expand": "expand {compressed} {new}/out",
    "card": "card {compressed} --model-id me/other",
    "evaluate": "evaluate {compressed} --task mlm-perplexity --data {text} --window 32 --device cpu",
}


def fails(arguments: str, message: str) -> None:
    """Runs a command, which must end in one line that says what could not be written and why."""
    done = CliRunner().invoke(main, arguments.split())
    assert done.exit_code == 2, (done.output, done.exception)
    said = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"hf-dirembed: [^()]* cannot be written \([^()]*{message}[^()]*\): make room(, or| or allow it, or) .*", said
    ), said


@needs_fork
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_grow_leaves_nothing(command: str, compressed: Path, tmp_path: Path) -> None:
    """As on a full disk: writing fails in the middle of a file."""
    paths = {name: compressed.with_name(name) for name in MODELS}
    arguments = COMMANDS[command].format(new=tmp_path / "new", text=compressed.with_name("text.txt"), **paths)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
        fails(arguments, "File too large")

    before = contents(compressed.parent)
    assert os.waitpid(forked(limited), 0)[1] == 0
    assert contents(compressed.parent) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_said(command: str, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    paths = {name: compressed.with_name(name) for name in MODELS}
    arguments = COMMANDS[command].format(new=tmp_path / "new", text=compressed.with_name("text.txt"), **paths)
    before = contents(compressed.parent)
    monkeypatch.setattr(os, "fsync", full)  # what a file system may put off until then
    monkeypatch.setattr(checkpoint, "copy_companions", full)
    fails(arguments, "No space left on device")
    assert contents(compressed.parent) == before
    assert not list(tmp_path.iterdir())


@needs_fork
@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_folder_is_said_and_left_alone(command: str, compressed: Path, tmp_path: Path) -> None:
    def as_a_user(arguments: str) -> None:
        if os.geteuid() == 0:  # who writes everywhere, by a capability that is given up here
            version_and_process, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capset(version_and_process, none) == 0
        fails(arguments, "Permission denied")

    closed = Path(shutil.copytree(compressed.parent, tmp_path / "closed"))
    paths = {name: closed / name for name in MODELS}
    arguments = COMMANDS[command].format(new=closed / "new", text=closed / "text.txt", **paths)
    before = contents(closed)
    folders = [closed, *(folder for folder in closed.rglob("*") if folder.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    assert os.waitpid(forked(lambda: as_a_user(arguments)), 0)[1] == 0
    assert contents(closed) == before
    for folder in folders:
        folder.chmod(0o755)


@needs_fork
@pytest.mark.parametrize("command", ["card", "evaluate"])
def test_kill_9_leaves_the_old_file_or_the_new(
    command: str, compressed: Path, tmp_path: Path, record_property: Any
) -> None:
    """Killed before each thing that writing does to the file system."""

    def work(folder: Path) -> None:
        if command == "card":
            write_checkpoint_card(folder, model_id="me/other")
        else:
            save_result(folder, Result("sts", DatasetSource("pairs.csv"), {"spearman": 0.25}, date="2026"))

    def killed(folder: Path, point: int) -> None:
        events = itertools.count()
        sys.addaudithook(lambda event, args: event in WRITING and next(events) == point and os.kill(os.getpid(), 9))
        work(folder)

    work(Path(shutil.copytree(compressed, tmp_path / "reference")))
    old, new = contents(compressed), contents(tmp_path / "reference")
    assert old != new
    folder = Path(shutil.copytree(compressed, tmp_path / "model"))
    for point in itertools.count():
        if os.waitpid(forked(lambda point=point: killed(folder, point)), 0)[1] == 0:
            break  # all of it was done before the kill
        for name, content in contents(folder).items():
            assert name.endswith(".part") or content in (old[name], new[name])
    record_property("kills", point)
    assert point > 5
    assert contents(folder) == new  # the parts of those that were killed are gone, too


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3, 1.0])
def test_an_interrupt_during_the_imports_is_one_line(seconds: float, dense: Path, tmp_path: Path) -> None:
    code = "from hf_dirembed_command import main; print('ready', flush=True); main()"
    command = [sys.executable, "-c", code, "compress", str(dense), str(tmp_path / "out"), "--bits", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the suite runs in the background
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "hf-dirembed: interrupted"
    assert not list(tmp_path.iterdir())


def test_inspecting_what_a_killed_run_left_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".out.host.1.part").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_checkpoint(tmp_path / ".out.host.1.part")
