"""What the pages show can be done: every block of Python runs, every command is one, and so does the workflow."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed.cli.commands import main


ROOT = Path(__file__).parent.parent
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
ELSEWHERE = {"format.md", "onnx.md"}  # tests of their own run their Python


def blocks(page: str, *languages: str) -> list[str]:
    """The code of a page in some languages; "" is a block without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def shows_no_output(page: str) -> bool:
    """Whether doctests alone would leave out some of its Python."""
    return any(">>>" not in block for block in blocks(page, "python"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with tiny models under the names that the pages use, which there are folders' then."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    models = {
        "sentence-transformers/all-MiniLM-L6-v2": BertModel(BertConfig(**sizes)),
        "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    compressed = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    hf_dirembed.compress(compressed, bits=4).save_pretrained(tmp_path / "compressed")
    (tmp_path / "mixed.txt").write_text("the cat sat on a mat and the dog ran to the green house\n" * 20)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of exporters and of quantisers on CPUs
@pytest.mark.parametrize("page", sorted(page for page in PAGES if page not in ELSEWHERE and shows_no_output(page)))
def test_python(page: str, place: Path) -> None:
    """Blocks that show no output run with those before them, whose output the doctests compare."""
    if "BitsAndBytesConfig" in PAGES[page]:
        pytest.importorskip("bitsandbytes")
    if "torch.onnx" in PAGES[page]:
        pytest.importorskip("onnxscript")
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        examples = doctest.DocTestParser().get_examples(block) if ">>>" in block else ()
        for code in [example.source for example in examples] or [block]:
            exec(compile(code, page, "exec"), names)
    written = {file.parent.relative_to(place).as_posix() for file in place.rglob("model.safetensors")}
    assert {"README.md": "minilm-dirembed", "serving.md": "compressed-nf4"}[page] in written


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str) -> None:
    """Every `hf-dirembed` is followed by a command, with options that it has."""
    shown = [line for block in blocks(page, "bash", "") for line in block.splitlines() if "hf-dirembed " in line]
    assert shown or page not in ("README.md", "budgets.md", "serving.md")
    for line in shown:
        words = re.split(r"[\s\[\]|]+", line.partition("hf-dirembed ")[2].partition("   ")[0])
        if words[0] not in main.commands:
            assert "hf extensions install" in line, line
            continue
        known = {option for parameter in main.commands[words[0]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_workflow() -> None:
    """It runs the README's command."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands[0] == re.search(r"## Tests\n\n```bash\n(.*)\n```", PAGES["README.md"])[1]
