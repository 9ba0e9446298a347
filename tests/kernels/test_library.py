"""The library of compiled kernels: missing, broken, of another version, and in an install that nobody may write to."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_dirembed
from hf_dirembed.kernels import compiled, library


PACKAGE = Path(hf_dirembed.__file__).parent
load = library.library.__wrapped__  # what is kept is left alone


def test_interfaces_of_both_sides_are_one() -> None:
    header = (library.SOURCES / "dirembed.h").read_text(encoding="utf-8")
    assert re.findall(r"#define DIREMBED_INTERFACE (\d+)", header) == [str(library.INTERFACE)]


@pytest.mark.skipif(not compiled(), reason="the library is not built")
def test_structs_of_both_sides_are_as_long() -> None:
    from hf_dirembed.kernels.packed_tables import TableStruct

    assert ctypes.sizeof(TableStruct) == library.library().dirembed_table_bytes()


@pytest.mark.parametrize("what", ["missing", "broken", "strange", "another interface", "other sources"])
def test_what_cannot_be_used_is_told_of_and_done_without(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "_dirembed.so"
    said = {"missing": "no C compiler", "broken": "does not load", "strange": "does not load"}.get(what, what)
    if what == "broken":
        file.write_bytes(b"no library")
    elif what == "strange":
        (tmp_path / "empty.c").write_text("int nothing;\n")
        if subprocess.run(["cc", "-shared", "-o", file, tmp_path / "empty.c"], capture_output=True).returncode:
            pytest.skip("no C compiler")
    elif what != "missing" and not compiled():
        pytest.skip("the library is not built")
    if what == "another interface":
        monkeypatch.setattr(library, "INTERFACE", library.INTERFACE + 1)
        said = f"not {library.INTERFACE}"
    elif what == "other sources":
        (tmp_path / "other.c").write_text("int nothing;\n")
        monkeypatch.setattr(library, "SOURCES", tmp_path)
    else:
        monkeypatch.setattr(library, "LIBRARY", file)
    with pytest.warns(UserWarning, match=f"(?s){said}.*pip install"):
        assert load() is None


PROGRAM = """
import sys, warnings
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_dirembed
    from hf_dirembed.kernels import in_use
    from hf_dirembed.remote.products_dirembed import read_rows, rows_product
    from drawn_rows import draw_rows

    rows = draw_rows(300, 40, [(1, 3, 10, 9), (2, 3, 20, 9)])
    ids, states = torch.arange(300), torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    latents, product = read_rows(rows, ids), rows_product(states, rows)
    table = torch.nn.Embedding(600, 24, _weight=torch.randn(600, 24, generator=torch.Generator().manual_seed(0)))
    embedding = hf_dirembed.CompressedEmbedding.from_embedding(table, bits=3)
    cosine = torch.nn.functional.cosine_similarity(embedding(torch.arange(600)), table.weight, dim=1).mean()
said = [str(each.message) for each in caught if "compiled kernels" in str(each.message)]
torch.save((latents, product, embedding.dense_weight().detach(), float(cosine), len(said), in_use()), sys.argv[3])
"""


def test_installs_with_and_without_the_library_do_the_same_and_write_nothing(tmp_path: Path) -> None:
    """Each in a fresh process, over a copy of the package as pip leaves it, which nothing is written to."""
    import torch

    found = []
    for name in ("with", "without"):
        root = tmp_path / name
        ignored = shutil.ignore_patterns("__pycache__", *["_dirembed.so"] * (name == "without"))
        shutil.copytree(PACKAGE, root / "hf_dirembed", ignore=ignored)
        for each in root.rglob("*"):
            each.chmod(0o555 if each.is_dir() else 0o444)
        before = {each: each.stat().st_mtime_ns for each in root.rglob("*")}
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
        run = [sys.executable, "-c", PROGRAM, str(root), str(Path(__file__).parent), str(tmp_path / f"{name}.pt")]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert {each: each.stat().st_mtime_ns for each in root.rglob("*")} == before
        for each in root.rglob("*"):
            each.chmod(0o755)
        found.append(torch.load(tmp_path / f"{name}.pt"))

    ours, theirs = found
    assert (theirs[4:], ours[4] == 0) == ((1, "torch"), compiled())
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-3)
    assert abs(ours[3] - theirs[3]) < 1e-3 < 0.9 < ours[3]  # rounding may choose other codes of the same error
