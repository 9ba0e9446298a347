"""The kernels in C: where their library is, and what is told of where it cannot run."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch


INTERFACE = 3  # DIREMBED_INTERFACE of csrc/dirembed.h: what functions take, and how structs are laid out
LIBRARY = Path(__file__).with_name("_dirembed.so")
SOURCES = Path(__file__).with_name("csrc")
FINE, DAMAGED, NO_SUCH_ID, NO_MEMORY = range(4)  # what functions give back
WORTH_A_THREAD = 100_000.0  # nanoseconds: less work is not worth another thread
_MEND = (
    "torch's plain operations, which are slower, run in its place. With a C compiler, build it by: make kernels (in a "
    "checkout), or pip install --force-reinstall --no-deps --no-cache-dir hf_dirembed"
)


_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "dirembed_interface": (_NUMBER, ()),
    "dirembed_table_bytes": (_NUMBER, ()),
    "dirembed_sources": (_NUMBER, ()),
    "dirembed_kernels_name": (ctypes.c_char_p, (_NUMBER,)),
    "dirembed_choose": (None, (_NUMBER,)),
    "dirembed_share_by": (None, (_ADDRESS,)),
    "dirembed_read": (ctypes.c_int, (_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER)),
    "dirembed_patch": (None, (_ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER)),
    "dirembed_multiply": (ctypes.c_int, (_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER)),
    "dirembed_search": (ctypes.c_int, (*[_ADDRESS] * 3, *[_NUMBER] * 3, _ADDRESS, _ADDRESS, _NUMBER)),
    "dirembed_pack": (ctypes.c_int, (_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER)),
    "dirembed_unpack": (ctypes.c_int, (_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER)),
}


@functools.cache
def library() -> Any:
    """The library, loaded at the first call; None, after a warning, where it cannot be loaded or is another version's.

    It has been built where the package was installed with a C compiler, and it is loaded without Python's lock: its
    functions run beside other threads.
    """
    if not LIBRARY.exists():
        return _do_without(f"there is no {LIBRARY.name}, as there was no C compiler when it was installed")
    try:
        found = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return _do_without(f"{LIBRARY} does not load ({error})")

    if (interface := found.dirembed_interface()) != INTERFACE:
        return _do_without(f"{LIBRARY} has interface {interface}, not {INTERFACE}: it is of another version")
    if SOURCES.is_dir() and found.dirembed_sources() != sources_checksum():
        return _do_without(f"{LIBRARY} was built from other sources than those in {SOURCES}")
    _share_by_pool(found)
    return found


def _share_by_pool(found: Any) -> None:
    """Has work shared out among torch's own threads where these are OpenMP's; after a fork they are not there."""
    pool = torchs_pool()
    if pool is not None and hasattr(os, "register_at_fork"):
        found.dirembed_share_by(pool)
        os.register_at_fork(after_in_child=lambda: found.dirembed_share_by(None))


def torchs_pool() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP that torch is linked with; None where there is none."""
    folder = Path(torch.__file__).parent / "lib"
    for file in (folder / "libtorch_cpu.so", folder / "libtorch.so"):
        try:
            return ctypes.cast(ctypes.CDLL(str(file)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue  # built another way, or without OpenMP
    return None


def sources_checksum() -> int:
    """That of the files that the library is built from, where they are beside the package."""
    files = sorted(each for each in SOURCES.iterdir() if each.suffix in (".c", ".h"))
    return zlib.crc32(b"".join(each.read_bytes() for each in files))


def _do_without(reason: str) -> None:
    warnings.warn(f"hf_dirembed runs without its compiled kernels: {reason}: {_MEND}", stacklevel=3)


def compiled() -> bool:
    """Whether the compiled kernels run on this CPU."""
    return library() is not None


def in_use() -> str:
    """What runs packed codes on this CPU.

    Returns:
        `avx512vnni`, `avx512`, `avx2` or `plain`: the library, for the CPU's instructions that it makes use of; or
        `torch`, where there is no library and plain operations run.

    Example:
        >>> in_use() in ("avx512vnni", "avx512", "avx2", "plain", "torch")
        True
    """
    found = library()
    return "torch" if found is None else found.dirembed_kernels_name(0).decode()


def threads_for(nanoseconds: float) -> int:
    """How many threads work of some length is shared among: all or one, as the pool makes teams of other sizes anew.

    Example:
        >>> threads_for(1000.0)
        1
    """
    return torch.get_num_threads() if nanoseconds >= 2 * WORTH_A_THREAD else 1
