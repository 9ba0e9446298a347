"""Folders that appear when they are complete, or not at all."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from .configuration_dirembed import CheckpointError, DirEmbedError, first_line


@contextmanager
def staged_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A sibling of `out` to write into, renamed to `out` when all of it is written, removed when anything fails.

    What a process that was killed left behind is removed by the next one that writes the same `out` on that machine.

    Raises:
        CheckpointError: If `out` exists, or cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with staged_folder(f"{folder}/out") as staging:
        ...         _ = (staging / "config.json").write_text("{}")
        ...     [file.name for file in Path(folder, "out").iterdir()]
        ['config.json']
    """
    final = Path(out)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists already: remove it, or name another folder")
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
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"{final} cannot be written ({reason}): make room, or name another folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not os.path.lexists(final):
            for folder in made:  # the deepest first
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _stem(final: Path) -> str:
    """What the staging folders of this machine start with; process ids say nothing about those of another."""
    host = re.sub(r"\W", "-", platform.node())[:64]
    return f".{final.name}.{host}."


def _left_behind(final: Path) -> list[Path]:
    """Staging folders of processes that are no more."""
    stem, found = _stem(final), []
    for folder in final.parent.glob(".*.part") if final.parent.is_dir() else ():
        owner = folder.name.removeprefix(stem).removesuffix(".part")
        if folder.name.startswith(stem) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            found.append(folder)
    return found
