"""Every architecture x AutoClass x method: bit-exact round trips, ties, exact sets of saved keys."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, VOCAB, Family
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import hf_dirembed
from hf_dirembed import AutoencoderSettings, CompressedEmbedding, CompressedLinear
from hf_dirembed.remote.codes_dirembed import CODE_TENSORS
from hf_dirembed.remote.guarded_dirembed import plain
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix
from hf_dirembed.remote.tables_dirembed import compressed_tables, tied_modules


METHODS = {
    "transform": {"bits": 7},
    "svd": {"rank": 5},
    "direction": {"ratio": 2.5, "latent_dtype": "float16"},
    "autoencoder": {"rank": 6, "latent_dtype": "bfloat16", "settings": AutoencoderSettings(epochs=1, batch_size=64)},
}
COMPOSITE = ("llava", "gemma3-vision")
CASES = [(family, auto) for family in FAMILIES.values() for auto in family.autos]


@torch.no_grad()
def outputs(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    return {name: value for name, value in model(**family.inputs()).items() if isinstance(value, Tensor)}


def saved(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors(folder / "model.safetensors").items()}


def tensors(file: Path) -> dict[str, Tensor]:
    return {name if STOCK_KEEPS_NAMES else renamed(name): tensor for name, tensor in load_file(file).items()}


def renamed(name: str) -> str:
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def stock_keeps_names() -> bool:
    """Whether stock models are saved with the names that they were loaded with; transformers 5.5 writes older ones."""
    with tempfile.TemporaryDirectory() as folder:
        FAMILIES["bert"].make("AutoModel").save_pretrained(folder)
        transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
        return all(name == renamed(name) for name in load_file(Path(folder, "model.safetensors")))


STOCK_KEEPS_NAMES = stock_keeps_names()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def without_dtype(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: without_dtype(value) for name, value in config.items() if name != "dtype"}


def assert_tied(model: PreTrainedModel) -> None:
    """Every table is compressed, and whatever is tied to it shares the storage of its codes and of its decoder."""
    tables = {table.name: tied_modules(model, table.name) for table in hf_dirembed.find_tables(model)}
    for names in tables.values():
        modules = [model.get_submodule(name) for name in names]
        for tensor in CODE_TENSORS:
            shared = {value.data_ptr() for m in modules if (value := getattr(m, tensor)) is not None}
            assert len(shared) <= 1
            assert len({id(getattr(m, tensor)) for m in modules}) == 1
    compressed = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, CompressedMatrix)}
    assert compressed == set().union(*tables.values())
    groups = {frozenset(names) for names in tables.values()}
    assert len({model.get_submodule(min(names)).weight.data_ptr() for names in groups}) == len(groups)
    assert set(model.config.dirembed["tables"]) == set(compressed_tables(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "auto"), CASES, ids=[f"{family.name}-{auto}" for family, auto in CASES])
def test_round_trip(family: Family, auto: str, method: str, tmp_path: Path) -> None:
    auto_class = getattr(transformers, auto)
    dense = family.make(auto)
    dense.save_pretrained(tmp_path / "dense")
    base, dim = type(dense), dense.get_input_embeddings().embedding_dim

    model = hf_dirembed.compress(dense, method=method, **METHODS[method])
    assert model is dense
    assert_tied(model)
    expected = outputs(model, family)
    model.save_pretrained(tmp_path / "one")

    # The saved keys are those of the dense checkpoint, each table's replaced by the codes' and the decoder's.
    before, after = saved(tmp_path / "dense"), saved(tmp_path / "one")
    changed = {name for name, shape in before.items() if name in after and after[name] != shape}
    tables = {path.rpartition(".")[2]: model.get_submodule(path) for path in compressed_tables(model)}
    assert len(changed) == len(tables)
    new = {}
    for table in changed:
        prefix = table.removesuffix("weight")
        module = tables.pop(prefix[:-1].rpartition(".")[2])
        assert before[table] == (VOCAB, dim)
        new |= {f"{prefix}{name}": shape for name, shape in module.layout.stored_shapes(VOCAB, dim).items()}
    assert after == {**before, **new}

    again = auto_class.from_pretrained(tmp_path / "one").eval()
    assert type(again).__name__ == f"DirEmbed{base.__name__}"
    assert isinstance(again, base)
    assert_tied(again)
    assert_equal(outputs(again, family), expected)

    again.save_pretrained(tmp_path / "two")
    assert {file.name for file in (tmp_path / "two").iterdir()} == {file.name for file in (tmp_path / "one").iterdir()}
    for file in (tmp_path / "one").iterdir():
        twin = tmp_path / "two" / file.name
        if family.name in COMPOSITE and file.name == "config.json":  # loading adds the parts' dtype, stock too
            assert without_dtype(json.loads(twin.read_text())) == without_dtype(json.loads(file.read_text()))
        elif file.suffix == ".safetensors" and not STOCK_KEEPS_NAMES:
            assert_equal(tensors(twin), tensors(file))
        else:
            assert twin.read_bytes() == file.read_bytes(), file.name
    assert_equal(outputs(auto_class.from_pretrained(tmp_path / "two").eval(), family), expected)

    stock = hf_dirembed.expand(again)
    assert type(stock) is base
    assert type(stock.config) is type(family.make_config())
    for name, value in outputs(stock, family).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    stock.save_pretrained(tmp_path / "stock")
    assert saved(tmp_path / "stock") == before
    assert "dirembed" not in (tmp_path / "stock" / "config.json").read_text()
    assert not list((tmp_path / "stock").glob("*.py"))
    assert_equal(outputs(auto_class.from_pretrained(tmp_path / "stock").eval(), family), outputs(stock, family))


@pytest.mark.parametrize("name", ["bert", "llama-tied", "llama-untied", "t5"])
def test_heads(name: str) -> None:
    """A tied head is compressed with the table, an untied one by itself, unless only the other is asked for."""
    family = FAMILIES[name]
    model = hf_dirembed.compress(family.make(family.autos[1]), method="svd", rank=4)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, CompressedEmbedding)
    assert isinstance(head, CompressedLinear)
    tied = name != "llama-untied"
    assert (head.weight is embedding.weight) == (head.decoder_weight is embedding.decoder_weight) == tied
    assert len(model.config.dirembed["tables"]) == (1 if tied else 2)


@pytest.mark.parametrize(
    ("options", "compressed"),
    [
        ({"rank": 4, "tables": ["embed_tokens"]}, {"model.embed_tokens"}),
        ({"rank": 4, "tables": ["lm_head"]}, {"lm_head"}),
        ({"bits": {"embed_tokens": 6.0}}, {"model.embed_tokens"}),
        ({"bits": {"lm_head": 6.0, "model.embed_tokens": 9.0}}, {"lm_head", "model.embed_tokens"}),
    ],
)
def test_tables_that_are_not_named_stay_dense(options: dict[str, Any], compressed: set[str], tmp_path: Path) -> None:
    family = FAMILIES["llama-untied"]
    dense = family.make("AutoModelForCausalLM")
    before = {name: dense.get_submodule(name) for name in ("model.embed_tokens", "lm_head")}
    model = hf_dirembed.compress(dense, method="svd", **options)
    expected = outputs(model, family)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, module in before.items():
        assert (model.get_submodule(name) is module) == (name not in compressed)
        assert isinstance(again.get_submodule(name), CompressedMatrix) == (name in compressed)
    assert set(again.config.dirembed["tables"]) == compressed
    assert_equal(outputs(again, family), expected)
    if isinstance(options.get("bits"), dict):
        for name in compressed:
            asked = options["bits"][name if name in options["bits"] else name.rpartition(".")[2]]
            assert asked * 0.8 < model.get_submodule(name).bits_per_weight <= asked


@pytest.mark.parametrize("name", ["gemma3", "bart"])
def test_scaled_embeddings_keep_their_scale(name: str) -> None:
    family = FAMILIES[name]
    model = family.make("AutoModel").to(torch.bfloat16)
    ids = family.inputs()["input_ids"]
    embedding = hf_dirembed.compress(model, method="svd", rank=8).get_input_embeddings()
    assert torch.equal(embedding(ids), embedding.to_dense()(ids))


def test_inner_models_of_a_head_save_and_load(tmp_path: Path) -> None:
    """`model.bert.save_pretrained` works too: the inner model shares the config of the whole."""
    family = FAMILIES["bert"]
    model = hf_dirembed.compress(family.make("AutoModelForMaskedLM"), method="direction", rank=6)
    model.bert.save_pretrained(tmp_path)
    inner = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert_equal(outputs(inner, family), outputs(model.bert, family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes", ["float32", "float16", "bfloat16"])
def test_code_dtypes(dtype: torch.dtype, codes: str, tmp_path: Path) -> None:
    """Codes are stored in the asked dtype, never wider than the model's, and come back in it."""
    family = FAMILIES["bert"]
    model = hf_dirembed.compress(
        family.make("AutoModelForMaskedLM").to(dtype), method="svd", rank=5, latent_dtype=codes
    )
    asked = getattr(torch, codes)
    expected = asked if asked.itemsize <= dtype.itemsize else dtype
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    for each in (model, again):
        assert each.get_input_embeddings().weight.dtype == expected
        assert each.get_input_embeddings().decoder_weight.dtype == each.dtype == dtype
    assert_equal(outputs(again, family), outputs(model, family))


@pytest.mark.parametrize("name", ["bert", "llama-tied", "llama-untied", "t5"])
@pytest.mark.parametrize("num_tokens", [VOCAB + 7, VOCAB - 7])
def test_resize_token_embeddings(name: str, num_tokens: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    auto = family.autos[1]
    model = hf_dirembed.compress(family.make(auto), method="direction", rank=6)
    before = model.get_input_embeddings().dense_weight()
    mean_codes = plain(model.get_input_embeddings().weight).mean(dim=0)
    embedding = model.resize_token_embeddings(num_tokens)
    assert embedding is model.get_input_embeddings()
    after = embedding.dense_weight()
    kept = min(num_tokens, VOCAB)
    torch.testing.assert_close(after[:kept], before[:kept])
    mean = (mean_codes @ embedding.decoder_weight + embedding.decoder_bias_weight).detach()
    torch.testing.assert_close(after[VOCAB:], mean.expand(max(num_tokens - VOCAB, 0), -1))
    assert_tied(model)
    inputs = {key: value.clamp(max=num_tokens - 1) for key, value in family.inputs().items()}
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.shape[-1] == num_tokens == model.config.vocab_size
        model.save_pretrained(tmp_path)
        again = getattr(transformers, auto).from_pretrained(tmp_path).eval()
        assert torch.equal(again(**inputs).logits, logits)
