"""The demo in examples/, used in a real browser as somebody would; run by `tests/engines/demo.sh`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


pytest.importorskip("gradio", reason="tests/engines/demo.sh makes an environment with Gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="tests/engines/demo.sh makes one with Playwright")
pytestmark = pytest.mark.engines

APP = Path(__file__).parents[2] / "examples" / "gradio_demo" / "app.py"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
PATIENCE = 120_000  # milliseconds: compiling takes some at first


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny encoder."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    """The demo, served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(APP), "--model", os.environ.get("DEMO_MODEL", str(model)), "--port", str(port)]
    with subprocess.Popen(command, env=environment) as served:
        for _ in range(240):
            assert served.poll() is None, "the demo has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
        served.terminate()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """The page in a browser."""
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium, or name one in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        opened = browser.new_page(viewport={"width": 1200, "height": 1500})
        opened.set_default_timeout(PATIENCE)
        opened.goto(address)
        opened.get_by_role("button", name="Compress").wait_for()
        yield opened
        browser.close()


def rows_of(page: Any, table: str) -> list[list[str]]:
    """The cells of a table of the page, once it has any text."""
    cells = page.locator(f"#{table} [role=row] [role=gridcell]")
    cells.filter(has_text=re.compile(r"\S")).first.wait_for()
    rows = page.locator(f"#{table} [role=row]:has([role=gridcell])").all()
    return [[cell.inner_text().strip() for cell in row.get_by_role("gridcell").all()] for row in rows]


def test_what_is_not_there_yet_is_said(page: Any) -> None:
    page.get_by_role("button", name="Compare sentences").click()
    page.get_by_text("press Compress first").wait_for()


def test_a_wrong_name_is_said(page: Any, model: Path) -> None:
    field = page.get_by_label("Model: a name on the Hub, or a folder")
    before = field.input_value()
    field.fill(str(model.parent))
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("name the folder of a transformers model").wait_for()
    field.fill(before)


def test_compress_and_compare(page: Any, tmp_path: Path) -> None:
    page.get_by_label("number input for Bits per weight").fill(os.environ.get("DEMO_BITS", "6"))
    page.get_by_role("button", name="Compress").click()
    page.locator("#report td").first.wait_for()
    assert "MB to" in page.locator("#report").inner_text()
    page.wait_for_function("() => document.querySelector('#picture img')?.naturalWidth > 500")

    page.get_by_role("button", name="Compare sentences").click()
    pairs = rows_of(page, "sentences")
    assert len(pairs) == 10  # of five sentences
    for _, _, dense, compressed, change in pairs:
        assert abs(float(dense) - float(compressed)) <= 0.05
        assert float(change) == pytest.approx(float(compressed) - float(dense), abs=0.0011)
    assert [float(pair[2]) for pair in pairs] == sorted((float(pair[2]) for pair in pairs), reverse=True)

    if "DEMO_MODEL" not in os.environ:
        page.get_by_label("Words that are one token each, with commas between them").fill("dog, green")
    page.get_by_role("button", name="Compare words").click()
    for word, before, after in rows_of(page, "words"):
        assert word not in before.split(", ")
        assert before.split(", ")[0] == after.split(", ")[0]

    # no message of an error is left but those that were asked for, and the page is kept for somebody to look at
    screenshot = Path(os.environ.get("DEMO_SCREENSHOT", tmp_path / "demo.png"))
    page.screenshot(path=screenshot, full_page=True)
    assert screenshot.stat().st_size > 10_000
