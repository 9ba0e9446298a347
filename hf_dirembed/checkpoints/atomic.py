"""Folders and files that appear when they are complete, or not at all."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, DirEmbedError, first_line


@contextmanager
def staged_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A sibling of `out` to write into, renamed to `out` when all of it is written, removed when anything fails.

    What a process that was killed left behind is removed by the next one that writes the same `out` on that machine.

    Raises:
        CheckpointError: If `out` exists, or cannot be written to.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with staged_folder(f"{folder}/out") as staging:
        ...         _ = (staging / "config.json").write_text("{}")
        ...     [file.name for file in Path(folder, "out").iterdir()]
        ['config.json']
    """
    final = Path(out)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists already: remove it, or name another folder")

    # Missing folders above `out` are made too, and removed again if writing fails.
    staging = final.with_name(f"{_stem(final)}{os.getpid()}.part")
    made = [folder for folder in final.parents if not os.path.lexists(folder)]

    try:
        for stale in _left_behind(final):
            shutil.rmtree(stale)
        staging.mkdir(parents=True)
        yield staging
        staging.rename(final)
    except DirEmbedError:
        raise
    except (OSError, SafetensorError) as error:
        raise _unwritable(final, error, "folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)

        if not os.path.lexists(final):
            for folder in made:  # the deepest first
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def staged_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A sibling of `file` to write into, which takes its place when it is whole, and is removed when anything fails.

    Readers see the old file or the new one, never a part of it. What a process that was killed left behind is removed
    by the next one that writes the same file on that machine. Errors of writing are left to the caller, who knows what
    the file is.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with staged_file(f"{folder}/README.md") as sibling:
        ...         _ = sibling.write_text("# A card")
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('README.md', '# A card')]
    """
    final = Path(file)
    for stale in _left_behind(final):
        stale.unlink(missing_ok=True)
    # In the same folder, because os.replace is atomic within a file system only.
    descriptor, name = tempfile.mkstemp(prefix=f"{_stem(final)}{os.getpid()}.", suffix=".part", dir=final.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        os.replace(name, final)
    finally:
        Path(name).unlink(missing_ok=True)


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the state of long work, to go on from after an interruption: one safetensors file, whole or not at all.

    Args:
        path: The file; its folder must exist.
        tensors: What to write, by name.
        metadata: What the file's header says.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with staged_file(path) as sibling:
            save_file(held, sibling, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error, "file") from error


def save_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, whole or not at all.

    Raises:
        CheckpointError: If it cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_bytes(f"{folder}/report.json", b"{}")
        ...     Path(folder, "report.json").read_text()
        '{}'
    """
    try:
        with staged_file(path) as sibling:
            sibling.write_bytes(content)
    except OSError as error:
        raise _unwritable(path, error, "file") from error


def _unwritable(path: str | os.PathLike[str], error: Exception, kind: str) -> CheckpointError:
    if isinstance(error, shutil.Error):  # of copying a folder: a list of what went wrong, of which one is enough
        error = OSError(error.args[0][0][2].partition(": ")[0])
    reason = getattr(error, "strerror", None) or first_line(error)
    return CheckpointError(f"{path} cannot be written ({reason}): make room or allow it, or name another {kind}")


def _stem(final: Path) -> str:
    """What the parts of this machine start with; process ids say nothing about those of another."""
    host = re.sub(r"\W", "-", platform.node())[:64]
    return f".{final.name}.{host}."


def _left_behind(final: Path) -> list[Path]:
    """Parts of an output that belong to processes that are no more."""
    stem, found = _stem(final), []
    for part in final.parent.glob(".*.part") if final.parent.is_dir() else ():
        owner = part.name.removeprefix(stem).partition(".")[0]
        if part.name.startswith(stem) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            found.append(part)
    return found
