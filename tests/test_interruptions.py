"""What is left of a write that was killed, ran out of disk, or was not allowed: all of it, or nothing."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from transformers import PreTrainedTokenizerFast

from hf_dirembed import CheckpointError
from hf_dirembed.checkpoint import compress_checkpoint, expand_checkpoint, inspect_checkpoint
from hf_dirembed.compression.autoencoder import AutoencoderSettings
from hf_dirembed.staging import staged_folder


KILLS = 50
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
def test_kill_9_leaves_all_or_nothing(dense: Path, tmp_path: Path) -> None:
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
    print(f"{KILLS} kills: {complete} outputs complete, {stumps} runs left a hidden part, none a mixture")
    assert 0 < complete < KILLS
    assert stumps
    for out in outs:  # the next run clears up after those that were killed
        shutil.rmtree(out, ignore_errors=True)
        write(dense, out)
        assert contents(out) == expected
    assert not list(tmp_path.rglob(".*.part"))


@needs_fork
@pytest.mark.parametrize("task", ["autoencoder", "calibration"])
def test_kill_9_costs_what_was_not_yet_saved(task: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
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


@needs_fork
@pytest.mark.parametrize("task", ["compress", "expand"])
def test_a_file_that_cannot_grow_leaves_nothing(task: str, dense: Path, tmp_path: Path) -> None:
    """As on a full disk: writing fails in the middle of the weights."""
    compressed, out = tmp_path / "compressed", tmp_path / "new" / "out"
    write(dense, compressed)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(CheckpointError, match=r"cannot be written .*: make room"):
            write(dense, out) if task == "compress" else expand_checkpoint(compressed, out)

    before = sorted(tmp_path.rglob("*"))
    assert os.waitpid(forked(limited), 0)[1] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def fill(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match="No space left on device"), staged_folder(tmp_path / "out") as staging:
        fill(staging)
    assert not list(tmp_path.iterdir())


@needs_fork
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_closed_folder_is_said_and_left_alone(mode: int) -> None:
    def as_nobody(out: Path) -> None:
        if os.geteuid() == 0:  # root writes everywhere
            os.setuid(65534)
        with pytest.raises(CheckpointError, match="Permission denied"), staged_folder(out):
            pass

    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which nobody else may enter
        os.chmod(name, mode)
        assert os.waitpid(forked(lambda: as_nobody(Path(name, "out"))), 0)[1] == 0
        os.chmod(name, 0o700)
        assert not os.listdir(name)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_an_interrupt_during_the_imports_is_one_line(seconds: float, dense: Path, tmp_path: Path) -> None:
    code = "from hf_dirembed_command import main; print('ready', flush=True); main()"
    command = [sys.executable, "-c", code, "compress", str(dense), str(tmp_path / "out"), "--bits", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
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
