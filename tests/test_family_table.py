"""The script behind docs/families.md, on a sample; and what the page says of the whole."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers

import hf_dirembed
from hf_dirembed import ModelError
from hf_dirembed.remote import modeling_dirembed


ROOT = Path(__file__).parent.parent
SAMPLE = {
    ("xlnet", "AutoModelForCausalLM"): "works",
    ("iquestcoder", "AutoModelForCausalLM"): "works",  # after llama, whose class it uses
    ("mamba", "AutoModelForCausalLM"): "works",
    ("deberta-v2", "AutoModelForMaskedLM"): "works",
    ("ibert", "AutoModelForMaskedLM"): "QuantEmbedding",
    ("mobilebert", "AutoModelForMaskedLM"): "works",
    ("gemma4", "AutoModelForCausalLM"): "works",
    ("inkling_text", "AutoModelForCausalLM"): "works",
    ("t5gemma2", "AutoModelForSeq2SeqLM"): "works",
    ("got_ocr2", "AutoModelForImageTextToText"): "works",
    ("pegasus", "AutoModelForSeq2SeqLM"): "works",
}


@pytest.fixture(scope="module")
def script():
    # By its path: the tests have a module of the same name.
    spec = importlib.util.spec_from_file_location("benchmark_families", ROOT / "benchmarks" / "families.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("model_type", "auto"), SAMPLE, ids=["-".join(case) for case in SAMPLE])
def test_sample(script, model_type: str, auto: str) -> None:
    if model_type not in script.TASKS[auto]:
        pytest.skip("this transformers does not have it")
    outcome = script.outcome(model_type, auto)
    assert outcome.built, outcome.reason
    expected = SAMPLE[model_type, auto]
    assert outcome.works == (expected == "works"), outcome.reason
    assert outcome.reason == "" if expected == "works" else expected in outcome.reason


def test_page() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `AutoModel\w+` \| \d+ \| (\d+) \| (\d+) \(\d+ %\) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    built, works = (sum(map(int, column)) for column in zip(*rows, strict=True))
    assert works >= 0.95 * built


def test_what_is_refused_stays_as_it_was(script) -> None:
    model = script.build("ibert", transformers.AutoModelForMaskedLM)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match="QuantEmbedding"):
        hf_dirembed.compress(model, bits=7)
    assert [type(module) for module in model.modules()] == modules


def test_a_class_that_two_architectures_use_is_found_by_name(script) -> None:
    """As unpickling does; the plain name stays that of the architecture whose own class it is."""
    if "iquestcoder" not in script.TASKS["AutoModelForCausalLM"]:
        pytest.skip("this transformers does not have it")
    for model_type in ("iquestcoder", "llama"):
        model = hf_dirembed.compress(script.build(model_type, transformers.AutoModelForCausalLM), bits=7)
        assert getattr(modeling_dirembed, type(model).__name__) is type(model)
        assert type(model).base_class is transformers.LlamaForCausalLM
        assert type(model.config).model_type == model_type
    assert type(model).__name__ == "DirEmbedLlamaForCausalLM"
