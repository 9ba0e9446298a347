"""Codes by kinds of what is done with them: moved, copied and saved as they are; else refused, by one clear error."""

from __future__ import annotations

import copy
import io
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_guarded_codes import IDS, codes_of, logits, make, train_decoder
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils

import hf_dirembed
from hf_dirembed import CheckpointError, ModelError, OptionError, WeightsError
from hf_dirembed.remote.guarded_dirembed import CodesParameter, CodesView, plain


METHODS = ("transform", "direction")
every_method = pytest.mark.parametrize("method", METHODS)
REFUSED = r"dense_weight\(\).*hf_dirembed.expand|no weights.*hf_dirembed.expand|hf_dirembed.expand makes"
ROWS = torch.tensor([1, 2])

# What has the values of codes still; the dense model multiplies what comes of it, as `test_copies...` does.
COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": lambda w: w.clone(),
    "float": lambda w: w.float(),
    "to": lambda w: w.to(torch.bfloat16),
    "type": lambda w: w.type(torch.float64),
    "cpu": lambda w: w.cpu(),
    "slice": lambda w: w[3:9],
    "cat": lambda w: torch.cat([w, w]),
    "hstack": lambda w: torch.hstack([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "view": lambda w: w.view(-1),
    "flatten": lambda w: w.flatten(),
    "transposed": lambda w: w.t(),
    "T": lambda w: w.T,
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "repeat": lambda w: w.repeat(2, 1),
    "pad": lambda w: F.pad(w, (0, 1)),
    "flip": lambda w: w.flip(0),
    "contiguous": lambda w: w.t().contiguous(),
    "chunk": lambda w: w.chunk(2)[0],
    "like": torch.zeros_like,
    "new": lambda w: w.new_zeros(w.shape),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "parameter": lambda w: nn.Parameter(w.detach().clone(), requires_grad=False),
    "average": lambda w: 0.9 * w + 0.1 * w,
    "buffer": lambda w: torch.empty(w.shape, dtype=w.dtype).copy_(w),
    "a part of a buffer": lambda w: _with_row(torch.zeros(w.shape, dtype=w.dtype), w),
    "out": lambda w: torch.cat([w], out=torch.empty(0, dtype=w.dtype)),
    "vector": lambda w: nn.utils.parameters_to_vector([w, nn.Parameter(torch.ones(3))]),
    "state dict": lambda w: _table(w).state_dict()["weight"],
}

# What reads values as those of weights, or hands them to others.
READINGS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda w: F.linear(torch.ones(2, w.shape[-1]), w.float()),
    "matmul": lambda w: w.float() @ torch.ones(w.shape[-1], 1),
    "rows": lambda w: w[ROWS],
    "list of rows": lambda w: w[[1, 2]],
    "index_select": lambda w: w.index_select(0, ROWS),
    "gather": lambda w: w.gather(0, torch.zeros(w.shape, dtype=torch.int64)),
    "embedding": lambda w: F.embedding(ROWS, w),
    "norm": lambda w: w.float().norm(),
    "sum": lambda w: w.sum(),
    "exp": lambda w: w.float().exp(),
    "square": lambda w: w.float().pow(2),
    "add numbers": lambda w: w + 1,
    "add noise": lambda w: w.float() + torch.randn(w.shape),
    "masked": lambda w: w * torch.ones(w.shape, dtype=w.dtype),
    "where": lambda w: torch.where(w.float() > 0, w.float(), 0.0),
    "largest": lambda w: w.max(dim=0),
    "sorted": torch.sort,
    "unique": torch.unique,
    "numpy": lambda w: w.detach().numpy(),
    "asarray": numpy.asarray,
    "dlpack": torch.from_dlpack,
    "tolist": lambda w: w.tolist(),
    "item": lambda w: w.reshape(-1)[0].item(),
    "float of one": lambda w: float(w.reshape(-1)[0]),
    "einsum": lambda w: torch.einsum("...d->...", w.float()),
    "as index": lambda w: torch.randn(1 << 16)[w.long().abs()],
    "as ids": lambda w: F.embedding(w.long().abs(), torch.randn(1 << 16, 2)),
    "into a dense weight": lambda w: nn.Linear(w.shape[-1], w.shape[0]).weight.copy_(w),
    "into a part of one": lambda w: nn.Linear(w.shape[-1], w.shape[0]).weight.__setitem__(0, w[0]),
}


def _with_row(buffer: Tensor, w: Tensor) -> Tensor:
    buffer[0] = w[0]
    return buffer


_TABLES: dict[int, nn.Module] = {}


def _table(weight: Tensor) -> nn.Module:
    return _TABLES[id(weight)]


@every_method
@pytest.mark.parametrize("copied", COPIES)
@torch.no_grad()
def test_copies_of_codes_are_codes(copied: str, method: str) -> None:
    """They compare, and are refused where they are taken for weights."""
    table = make(method).get_input_embeddings()
    _TABLES[id(table.weight)] = table
    found = COPIES[copied](table.weight)
    assert isinstance(found, (CodesView, CodesParameter)), type(found)
    assert torch.equal(found, found)
    assert (found == found).all()
    for reading in ("exp", "norm", "add noise", "square", *([] if copied == "state dict" else ["tolist", "numpy"])):
        with pytest.raises(ModelError, match=REFUSED):
            READINGS[reading](found)
    if found.dim() == 2:
        for reading in ("linear", "matmul", "rows", "embedding"):
            with pytest.raises(ModelError, match=REFUSED):
                READINGS[reading](found)


@every_method
@pytest.mark.parametrize("reading", READINGS)
@torch.no_grad()
def test_readings_are_refused_whatever_they_are(reading: str, method: str) -> None:
    weight = make(method).get_input_embeddings().weight
    for each in (weight, weight.detach(), weight.clone()):
        with pytest.raises(ModelError, match=REFUSED):
            READINGS[reading](each)


@every_method
@torch.no_grad()
def test_codes_move_and_are_saved_as_codes(method: str, tmp_path: Path) -> None:
    """State dicts by torch.save, safetensors, numpy and deepcopy; comparisons give plain truth values."""
    model, other = make(method), make(method)
    state = model.state_dict()
    key = "model.embed_tokens.weight"
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "state.safetensors")
    ways = {
        "torch.save": torch.load(file, weights_only=True),
        "safetensors": load_file(tmp_path / "state.safetensors"),
        "bytes": safetensors.torch.load(safetensors.torch.save({key: state[key]})),
        "numpy": {name: torch.from_numpy(tensor.cpu().numpy()) for name, tensor in state.items()},
        "deepcopy": copy.deepcopy(state),
        "list": {key: torch.tensor(state[key].tolist()).to(state[key].dtype)},
    }
    expected = logits(model)
    for way, tensors in ways.items():
        assert torch.equal(plain(tensors[key]), plain(state[key])), way
        other.load_state_dict(tensors, strict=False)
        assert torch.equal(logits(other), expected), way
    same = state[key] == other.get_input_embeddings().weight
    assert type(same) is Tensor
    assert same.dtype == torch.bool
    assert torch.testing.assert_close(state[key], other.get_input_embeddings().weight) is None


AVERAGES: dict[str, Callable[[Any, Any], Any]] = {
    "multi swa": lambda mine, theirs: _averaged(mine, theirs, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
    "multi swa, buffers": lambda mine, theirs: _averaged(
        mine, theirs, multi_avg_fn=swa_utils.get_swa_multi_avg_fn(), use_buffers=True
    ),
    "multi ema": lambda mine, theirs: _averaged(mine, theirs, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
    "swa": lambda mine, theirs: _averaged(mine, theirs, avg_fn=swa_utils.get_swa_avg_fn()),
    "lerp of lists": lambda mine, theirs: _in_lists(
        mine, theirs, lambda p, q: torch._foreach_lerp_(p, [each.to(p[0].dtype) for each in q], 0.5)
    ),
    "lists": lambda mine, theirs: _in_lists(
        mine, theirs, lambda p, q: (torch._foreach_mul_(p, 0.5), torch._foreach_add_(p, q, alpha=0.5))
    ),
    "stacked": lambda mine, theirs: _of_states(mine, theirs, lambda *w: torch.stack([x.float() for x in w]).mean(0)),
    "stacked sum": lambda mine, theirs: _of_states(mine, theirs, lambda *w: torch.stack(w).sum(dim=0) / 2),
    "sum": lambda mine, theirs: _of_states(mine, theirs, lambda *w: sum(0.5 * x for x in w)),
    "task vector": lambda mine, theirs: _of_states(mine, theirs, lambda p, q: p + 0.5 * (q.float() - p)),
    "numpy": lambda mine, theirs: _of_states(
        mine, theirs, lambda *w: torch.from_numpy(sum(0.5 * x.cpu().numpy() for x in w))
    ),
    "vectors": lambda mine, theirs: nn.utils.vector_to_parameters(
        0.5 * nn.utils.parameters_to_vector(mine.parameters())
        + 0.5 * nn.utils.parameters_to_vector(theirs.parameters()),
        mine.parameters(),
    ),
}


def _averaged(mine: Any, theirs: Any, **options: Any) -> Any:
    averaged = swa_utils.AveragedModel(mine, **options)
    averaged.update_parameters(mine)
    averaged.update_parameters(theirs)
    return averaged.module


def _in_lists(mine: Any, theirs: Any, average: Callable[[Any, Any], Any]) -> None:
    pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))
    for dtype in {each.dtype for each, _ in pairs}:
        average(*map(list, zip(*((p, q) for p, q in pairs if p.dtype == dtype), strict=True)))


def _of_states(mine: Any, theirs: Any, average: Callable[..., Any]) -> None:
    ours, others = mine.state_dict(), theirs.state_dict()
    mine.load_state_dict({name: average(ours[name], others[name]) for name in ours})


@every_method
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_in_lists_stacks_and_arrays(kind: str, method: str) -> None:
    """Over equal codes they are exact; over others refused."""
    mine, theirs = make(method), train_decoder(make(method))
    codes = codes_of(mine)
    tables = [model.get_input_embeddings().dense_weight() for model in (mine, theirs)]
    with torch.no_grad():
        averaged = AVERAGES[kind](mine, theirs) or mine
    assert all(torch.equal(tensor, codes[name]) for name, tensor in codes_of(averaged).items())
    expected = (tables[0] + tables[1]) / 2
    torch.testing.assert_close(averaged.get_input_embeddings().dense_weight(), expected, rtol=1e-5, atol=1e-6)

    strangers = make(method), make(method, seed=1)
    if method == "direction" and kind in ("stacked", "stacked sum", "sum", "task vector", "numpy"):
        return  # floats of all of a table may be those of another model
    with pytest.raises((ModelError, RuntimeError), match=r"no weights|layout|size"), torch.no_grad():
        logits(AVERAGES[kind](*strangers) or strangers[0])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "l1": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "random": lambda module: prune.random_unstructured(module, "weight", 0.3),
    "structured": lambda module: prune.ln_structured(module, "weight", 0.3, n=2, dim=0),
    "mask": lambda module: prune.custom_from_mask(module, "weight", torch.ones(module.weight.shape)),
    "global": lambda module: prune.global_unstructured([(module, "weight")], prune.L1Unstructured, amount=0.3),
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "parametrised weight norm": parametrizations.weight_norm,
    "parametrised spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "identity": lambda module: parametrize.register_parametrization(module, "weight", nn.Identity()),
    "swapped": lambda module: torch.utils.swap_tensors(
        module.weight, nn.Parameter(torch.zeros(module.weight.shape, dtype=module.weight.dtype), requires_grad=False)
    ),
    "swapped with another's": lambda module: torch.utils.swap_tensors(
        module.weight, make("transform", seed=1).get_input_embeddings().weight
    ),
    "set": lambda module: module.weight.set_(torch.zeros_like(module.weight)),
    "set to memory": lambda module: module.weight.data.set_(
        torch.zeros(999, dtype=module.weight.dtype).untyped_storage()
    ),
    "resized": lambda module: module.weight.resize_(2, 2),
    "uniform": lambda module: nn.init.uniform_(module.weight),
    "xavier": lambda module: nn.init.xavier_uniform_(module.weight),
    "orthogonal values": lambda module: nn.init.orthogonal_(module.weight),
    "truncated": lambda module: nn.init.trunc_normal_(module.weight),
    "eye": lambda module: nn.init.eye_(module.weight),
    "added in a list": lambda module: torch._foreach_add_([module.weight], 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_how_codes_are_had_is_refused(change: str) -> None:
    """At once, or at the next pass; and the mend helps."""
    model = make("transform", "llama-untied")
    table = model.get_input_embeddings()

    def change_and_use() -> None:
        CHANGES[change](table)
        logits(model)

    with pytest.raises(ModelError, match=f"{REFUSED}|load the model again"):
        change_and_use()


def test_decoders_may_be_pruned_and_parametrised() -> None:
    model = make("transform", "llama-untied")
    table = model.get_input_embeddings()
    expected = table.decoder_weight.detach().clone()
    prune.l1_unstructured(table, "decoder_weight", 0.5)
    expected[expected.abs() < expected.abs().median()] = 0
    assert 0.4 < (table.decoder_weight == 0).float().mean() < 0.6
    logits(model)
    prune.remove(table, "decoder_weight")
    assert logits(model).isfinite().all()


def test_an_optimiser_that_has_nothing_but_codes_says_so() -> None:
    """Else a training would do nothing; one that has all parameters of the model works."""
    model = make("transform")
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ModelError, match="unfreeze_codes"):
        torch.optim.SGD([model.get_input_embeddings().weight], lr=0.1).step()
    torch.optim.AdamW(model.parameters()).step()


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_dtype_are_saved_and_load(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    model = make(method).to(dtype)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert next(again.parameters()).dtype == dtype
    tables = [each.get_input_embeddings().dense_weight() for each in (again, model)]
    assert torch.equal(*tables)


@torch.no_grad()
def test_packed_codes_are_not_copied_into_floats() -> None:
    """Not into the memory of a dense weight, where nothing would guard them."""
    weight = make().get_input_embeddings().weight
    for write in (
        lambda data: data.copy_(weight),
        lambda data: data.__setitem__(0, weight[0]),
        lambda d: d.add_(weight),
    ):
        with pytest.raises(ModelError, match=REFUSED):
            write(nn.Embedding(*weight.shape).weight.data)


# --- decoders ----------------------------------------------------------------------------------------------------


def test_a_decoder_of_another_table_is_refused_beside_codes() -> None:
    """One that was trained on the same codes is not."""
    model, trained, other = make(), train_decoder(make()), make(seed=1)
    name = "model.embed_tokens.decoder_weight"
    model.load_state_dict({name: trained.state_dict()[name]}, strict=False)
    assert torch.equal(model.get_input_embeddings().decoder_weight, trained.get_input_embeddings().decoder_weight)

    partial = other.state_dict()
    for key in [key for key in partial if "decoder_weight" not in key]:
        del partial[key]
    mixed = model.state_dict()
    mixed[name] = mixed["lm_head.decoder_weight"] = other.state_dict()[name]
    for state in (partial, mixed):
        with pytest.raises(ModelError, match="decoder of another table"):
            make().load_state_dict(state, strict=False)


@pytest.mark.parametrize("learns", [False, True])
def test_integers_do_not_load_into_float_latents(learns: bool) -> None:
    model = make("direction")
    if learns:
        model.unfreeze_codes()
    integers = torch.zeros(model.get_input_embeddings().weight.shape, dtype=torch.uint8)
    with pytest.raises(ModelError, match="codes of another layout"):
        model.load_state_dict({"model.embed_tokens.weight": integers}, strict=False)


def test_a_file_with_a_decoder_of_another_model_is_warned_of(tmp_path: Path, caplog: Any) -> None:
    """So is one that training wrote without its config, which is right: it loads."""
    name = "model.embed_tokens.decoder_weight"
    model, trained = make(), train_decoder(make())
    model.save_pretrained(tmp_path / "saved")
    trained.save_pretrained(tmp_path / "trained")
    logging.getLogger("transformers").propagate = True
    try:
        for folder in ("saved", "trained"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert not [each for each in caplog.messages if "decoder" in each]

        shutil.copy(tmp_path / "trained" / "model.safetensors", tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    finally:
        logging.getLogger("transformers").propagate = False
    assert "the decoder of model.embed_tokens is not the one that was saved" in caplog.text
    assert torch.equal(again.state_dict()[name], trained.state_dict()[name])


# --- heads, files and options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_heads_and_lookups_have_the_dtypes_of_dense_ones_under_autocast(autocast: torch.dtype, method: str) -> None:
    model = make(method, "llama-untied")
    dense = hf_dirembed.expand(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=autocast):
        found, expected = logits(model), logits(dense)
        rows, dense_rows = model.get_input_embeddings()(IDS), dense.get_input_embeddings()(IDS)
    assert found.dtype == expected.dtype == autocast
    assert rows.dtype == dense_rows.dtype
    torch.testing.assert_close(rows, dense_rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.0])
@pytest.mark.parametrize("learns", [False, True])
def test_states_that_are_no_numbers_meet_the_padding_row(value: float, learns: bool) -> None:
    """As in a dense head: the logit of the row of zeros is NaN, and it is 0 for numbers."""
    head = make().get_output_embeddings()
    row = head.layout.zero_row
    assert row is not None
    states = torch.ones(2, head.in_features)
    states[1, 3] = value
    with torch.set_grad_enabled(learns):
        found, expected = head(states)[:, row], head.to_dense()(states)[:, row]
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_power_of_two_out_of_range_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.exponent_weight"][0] = 127
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        re.sub(r'"checksum": "crc32:\w+",?', "", config).replace(",\n          }", "}")
    )
    with pytest.raises(CheckpointError, match="exponent_weight holds a power of two of 127"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_table_that_no_file_has_is_refused_by_name(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    import json

    config = json.loads((tmp_path / "config.json").read_text())
    tables = config["dirembed"]["tables"]
    tables["model.embed_tokns"] = tables["model.embed_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"model\.embed_tokns is compressed, of which the checkpoint has no codes"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


MISTYPED: dict[str, Callable[[], Any]] = {
    "bits": lambda: hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), bit=4),
    "method": lambda: hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), bits=4, methods="svd"),
    "languages": lambda: hf_dirembed.DirEmbedQuantizationConfig(bits=4, language="en"),
    "ratio": lambda: hf_dirembed.CompressedEmbedding.from_embedding(nn.Embedding(99, 8), ratios=4),
    "rank": lambda: hf_dirembed.CompressedLinear.from_linear(nn.Linear(8, 99), rnk=4),
    "body": lambda: hf_dirembed.export("a", "b", bodies="int8"),
}


@pytest.mark.parametrize("option", MISTYPED)
def test_mistyped_options_name_the_nearest(option: str) -> None:
    with pytest.raises(OptionError, match=f"has no option .*did you mean '{option}'"):
        MISTYPED[option]()


def test_languages_without_a_tokenizer_or_a_word_list_are_refused() -> None:
    model = FAMILIES["bert"].make("AutoModel")
    with pytest.raises(WeightsError, match="no word list for language 'xx'"):
        hf_dirembed.compress(model, bits=5, languages="xx")
    with pytest.raises(OptionError, match="takes a tokenizer"):
        hf_dirembed.compress(model, bits=5, languages="en")
    with pytest.raises(OptionError, match="no tags"):
        hf_dirembed.compress(model, bits=5, languages=5)


def test_messages_that_name_a_table_name_the_mend() -> None:
    """PEFT quotes the module that it cannot adapt; what prints a model shows it alone."""
    table = make().get_input_embeddings()
    assert "hf_dirembed.expand" in f"Target module {table} is not supported."
    assert "expand" not in repr(table) + str(make())


@pytest.mark.parametrize("read", [lambda w: w.detach(), lambda w: w[2:], lambda w: w.view(-1), lambda w: w.T])
def test_what_a_view_is_of_ends_somewhere(read: Any) -> None:
    """Compilers go from a view to what it is a view of, and on."""
    tensor = read(make().get_input_embeddings().weight)
    for _ in range(5):
        if not tensor._is_view():
            return
        tensor = tensor._base
    raise AssertionError("a view of views without end")
