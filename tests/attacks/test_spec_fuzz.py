"""Random layouts and configs: each is read, or refused with a typed error; nothing else happens."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig

from hf_dirembed import CompressionSpec, DirEmbedConfig, DirEmbedError, SpecError
from hf_dirembed.remote.configuration_dirembed import CODE_KEYS, read_spec


PATH = "embeddings.word_embeddings"
LAYOUT = {
    "method": "transform",
    "rank": 16,
    "codes": "packed",
    "codebook": "own",
    "decoder": "float16",
    "bias": True,
    "classes": [{"bit_allocation": [4, 4, 4, 4]}, {"bit_allocation": [8, 4, 4, 0], "rows": 100}],
    "outliers": 3,
}
GOOD = {
    "format": 2,
    "base_model_type": "bert",
    "tables": {PATH: LAYOUT, "lm_head": LAYOUT, "per_layer": {"dims": [20, 12], "blocks": [LAYOUT, LAYOUT]}},
    "record": {"tables": {PATH: {"settings": {}, "quality": {"mean_cosine": 0.9}, "checksum": "crc32:00000000"}}},
}
NUMBERS = (
    st.integers(-3, 40)
    | st.sampled_from([2**16, 2**16 + 1, 2**31, 2**63, 2**70, -(2**63), 10**30])
    | st.floats()
    | st.booleans()
)
WORDS = st.sampled_from(["", "bert", "packed", "float16", "svd", "../x", "/etc/passwd", "bert\x00", "a" * 9999])
LEAVES = st.none() | NUMBERS | WORDS | st.text(max_size=20)
KEYS = WORDS | st.text(max_size=9)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
ALLOCATIONS = st.lists(st.integers(-2, 17), min_size=3, max_size=5)


@st.composite
def specs(draw: st.DrawFn) -> Any:
    """Mostly a good spec with a few fields gone, replaced or added, at any depth; at times anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    spec = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        target = draw(st.sampled_from(list(objects_in(spec))))
        name = draw(st.sampled_from(sorted(target) or ["rank"]) | st.text(max_size=9))
        change = draw(st.sampled_from(["drop", "replace", "replace", "allocation"]))
        if change == "drop":
            target.pop(name, None)
        else:
            target[name] = draw(ALLOCATIONS if change == "allocation" else JSON)
    return spec


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """An object and all objects in it."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects_in(each)


def as_read(spec: Any) -> Any:
    """As a JSON file gives it."""
    return json.loads(json.dumps(spec))


@settings(max_examples=600, deadline=None)
@given(specs())
def test_a_spec_is_read_back_or_refused(spec: Any) -> None:
    try:
        base, read = read_spec({"dirembed": as_read(spec)})
    except SpecError:
        return
    # Through JSON on both sides: a figure may be NaN, which is not equal to itself.
    again = CompressionSpec.from_dict(as_read(read.to_dict()))
    assert (base, json.dumps(again.to_dict())) == (spec["base_model_type"], json.dumps(read.to_dict()))
    assert again.tables == read.tables
    assert read.tables.keys() == spec["tables"].keys()
    for _, layout in read.matrices():
        assert 1 <= layout.code_width <= 2**16
        assert 1 <= layout.rank < 2**15
        assert all(each.num_bytes >= layout.code_width for each in layout.classes)


@settings(max_examples=400, deadline=None)
@given(specs())
def test_a_config_of_any_spec_is_made_or_refused(spec: Any) -> None:
    values = {**BertConfig(vocab_size=200).to_dict(), "model_type": "dirembed", "dirembed": as_read(spec)}
    try:
        config = DirEmbedConfig.from_dict(values)
    except SpecError:
        return
    assert config.to_dict()["dirembed"] == read_spec(values)[1].to_dict()


# A malformed auto_map fails in transformers, before it asks this package.
BASE_FIELDS = sorted({*BertConfig().to_dict(), *CODE_KEYS, "text_config", "pruned_heads"} - {"model_type", "auto_map"})


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(BASE_FIELDS) | st.text(max_size=12), JSON, min_size=1, max_size=3))
def test_a_config_file_is_read_or_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Through `AutoConfig`, from a file, with a good layout and any other values."""
    assume(not {"model_type", "auto_map"} & changes.keys())
    values = {**BertConfig(vocab_size=200).to_dict(), "dirembed": GOOD, **changes, "model_type": "dirembed"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    try:
        config = AutoConfig.from_pretrained(tmp_path)
    except DirEmbedError:
        return
    assert type(config).__name__ == "DirEmbedBertConfig"
    assert not CODE_KEYS & {name for name, value in vars(config).items() if value is not None}


@pytest.mark.parametrize("key", sorted(CODE_KEYS))
def test_what_runs_code_is_dropped_from_nested_configs(key: str) -> None:
    values = {
        "model_type": "dirembed",
        "dirembed": {**GOOD, "base_model_type": "llava"},
        "text_config": {"model_type": "llama", key: "evil/kernel"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    text = DirEmbedConfig.from_dict(values).text_config
    assert getattr(text, key, None) is None
