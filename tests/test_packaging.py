"""What is published: the wheel has the package with its library, the sdist all that it takes to build and test it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
pytest.importorskip("build", reason="extra dev")
pytest.importorskip("twine", reason="extra dev")


def tracked() -> set[str]:
    """The files under version control."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no checkout")
    return set(done.stdout.splitlines())


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as building leaves files beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_has_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        (entries,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert "hf-dirembed = hf_dirembed_command:main" in file.read(entries).decode()
        assert re.search(r"^License(-Expression)?: Apache-2.0$", file.read(metadata).decode(), re.MULTILINE)
    package = {name for name in names if ".dist-info/" not in name}
    built = {"hf_dirembed/kernels/_dirembed.so"} if shutil.which("cc") else set()  # of csrc
    assert package == {name for name in tracked() if name.startswith("hf_dirembed") and "csrc/" not in name} | built
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_has_all_that_is_needed_to_test_it(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    rooms = ("hf_dirembed", "tests/", "benchmarks/", "docs/", "model_cards/")
    needed = {name for name in tracked() if name.startswith(rooms)}
    needed |= {"LICENSE", "README.md", "SECURITY.md", "CITATION.cff", "pyproject.toml", "setup.cfg", "setup.py"}
    needed |= {"constraints.txt"}
    assert needed <= names
    assert not [name for name in names if name.endswith((".pyc", ".safetensors")) or name.startswith(".ci")]


def test_twine_accepts_both(dist: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_compiler_it_builds_without_the_library(tmp_path: Path) -> None:
    for name in tracked():
        if name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE") or "/csrc/" in name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "CC": str(tmp_path / "no-compiler")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))
