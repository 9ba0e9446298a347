"""Codes are no weights: averages of equal ones stay exact, other writes and readings are refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import swa_utils
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_dirembed
from hf_dirembed import ModelError
from hf_dirembed.remote.guarded_dirembed import CodesParameter, plain


AUTO = "AutoModelForCausalLM"
IDS = FAMILIES["llama-tied"].inputs()["input_ids"]
METHODS = {"transform": {"bits": 5}, "direction": {"method": "direction", "rank": 6, "latent_dtype": "float16"}}
every_method = pytest.mark.parametrize("method", METHODS)
MADE: dict[tuple[str, str, int], PreTrainedModel] = {}


def make(method: str = "transform", name: str = "llama-tied", seed: int = 0) -> PreTrainedModel:
    if (name, method, seed) not in MADE:
        MADE[name, method, seed] = hf_dirembed.compress(FAMILIES[name].make(AUTO, seed), **METHODS[method])
    return copy.deepcopy(MADE[name, method, seed])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def codes_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.get_input_embeddings().codes().items()}


def train_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same codes and another decoder."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def average(kind: str, mine: PreTrainedModel, theirs: PreTrainedModel) -> PreTrainedModel:
    """.9 of a model and .1 of another, in one of the ways that people have."""
    if kind in WAYS:
        with torch.no_grad():
            for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                WAYS[kind](one, other)
        return mine
    if kind in ("state dict", "state dict in place"):
        ours, others = mine.state_dict(), theirs.state_dict()
        if kind == "state dict":
            mine.load_state_dict({name: 0.9 * ours[name] + 0.1 * others[name] for name in ours})
        else:
            for name in {tensor.data_ptr(): name for name, tensor in ours.items()}.values():
                ours[name].copy_(0.9 * ours[name] + 0.1 * others[name])
        return mine
    ema = {
        "multi": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
        "avg": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    }
    averaged = swa_utils.AveragedModel(mine, **ema[kind.split()[0]], use_buffers="buffers" in kind)
    averaged.update_parameters(mine)
    averaged.update_parameters(theirs)
    return averaged.module


WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy": lambda p, q: p.copy_(0.9 * p + 0.1 * q),
    "scale and add": lambda p, q: p.mul_(0.9).add_(q, alpha=0.1),
    "scale and add product": lambda p, q: p.mul_(0.9).add_(0.1 * q),
    "data": lambda p, q: p.data.mul_(0.9).add_(q.data, alpha=0.1),
    "subtract": lambda p, q: p.sub_(0.1 * (p - q)),
    "assign data": lambda p, q: setattr(p, "data", 0.9 * p.data + 0.1 * q.data),
    "lerp": lambda p, q: p.lerp_(q.to(p.dtype), 0.1),
    "out": lambda p, q: torch.add(0.9 * p, q, alpha=0.1, out=p) if p.is_floating_point() else p.copy_(q),
}
AVERAGES = (*WAYS, "multi", "avg", "multi buffers", "state dict", "state dict in place")


@every_method
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_over_equal_codes_are_exact(kind: str, method: str) -> None:
    """The table of an average is the average of the tables, for the table is linear in its decoder."""
    mine, theirs = make(method), train_decoder(make(method))
    codes = codes_of(mine)
    tables = [model.get_input_embeddings().dense_weight() for model in (mine, theirs)]
    assert not torch.equal(*tables)
    averaged = average(kind, mine, theirs)
    assert all(torch.equal(tensor, codes[name]) for name, tensor in codes_of(averaged).items())
    expected = 0.9 * tables[0] + 0.1 * tables[1]
    torch.testing.assert_close(averaged.get_input_embeddings().dense_weight(), expected, rtol=1e-5, atol=1e-6)
    logits(averaged)


@every_method
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_over_different_codes_are_refused(kind: str, method: str, tmp_path: Path) -> None:
    mine, theirs = make(method), make(method, seed=1)
    if method == "direction" and kind == "state dict":
        pytest.skip("floats of all of a table may be those of another model")
    with pytest.raises((ModelError, RuntimeError), match=r"no weights|layout|size"):  # sizes of other classes
        logits(average(kind, mine, theirs))


WRITES: dict[str, Callable[[Any], Any]] = {
    "a row": lambda p: p.__setitem__(3, torch.randn(p.shape[1:]).to(p.dtype)),
    "a number": lambda p: p.data.fill_(1),
    "zeros": lambda p: nn.init.zeros_(p),
    "noise": lambda p: p.data.normal_() if p.is_floating_point() else p.data.random_(),
    "a factor": lambda p: p.mul_(2),
    "a part of data": lambda p: p.data[4:9].zero_(),
    "a view": lambda p: p[4].add_(1),
    "other data": lambda p: setattr(p, "data", torch.ones_like(p)),
    "memory": lambda p: p.untyped_storage().__setitem__(3, p.untyped_storage()[3] ^ 1),
    "no Python call": lambda p: torch._foreach_zero_([p.detach().as_subclass(Tensor)]),
    "decay": lambda p: p.mul_(0.99),
}


@every_method
@pytest.mark.parametrize("write", WRITES)
def test_writes_are_refused_or_noticed(write: str, method: str, tmp_path: Path) -> None:
    """At once, or at the next pass; by way of memory, which torch does not see, when the model is saved."""
    model = make(method)

    @torch.no_grad()
    def write_and_use() -> None:
        WRITES[write](model.get_input_embeddings().weight)
        logits(model) if write != "memory" else model.save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=r"codes of a compressed table are no weights.*is_floating_point"):
        write_and_use()
    if write not in ("memory", "no Python call", "a factor", "decay"):
        assert torch.equal(logits(model), logits(make(method))), "a refusal leaves codes as they were"


CASTS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "vectors": lambda model: [setattr(p, "data", p.data.float()) for p in model.parameters() if p.ndim == 1],
    "all": lambda model: [setattr(p, "data", p.data.float()) for p in model.parameters()],
    "to doubles and back": lambda model: model.double().float(),
    "vector": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    ),
    "unfreeze all": lambda model: [setattr(p, "requires_grad", True) for p in model.parameters()],
    "rewrite": lambda model: [p.copy_(p.clone()) for p in model.parameters()],
}


@every_method
@pytest.mark.parametrize("cast", CASTS)
def test_casts_by_hand_load_again(cast: str, method: str, tmp_path: Path) -> None:
    model = make(method)
    expected = logits(model)
    with torch.no_grad():
        CASTS[cast](model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


READINGS: dict[str, Callable[[Any], Any]] = {
    "lookup": lambda w: F.embedding(IDS, w),
    "product": lambda w: torch.randn(2, w.shape[1]) @ w.float().T,
    "linear": lambda w: F.linear(torch.randn(2, 32), w),
    "from_pretrained": nn.Embedding.from_pretrained,
    "norm": lambda w: w.norm(dim=1),
    "norm of floats": lambda w: torch.linalg.norm(w.float(), dim=1),
    "mean": lambda w: w.mean(),
    "mean of data": lambda w: w.data.float().mean(),
    "cosine": lambda w: F.cosine_similarity(w[:1].float(), w.float()),
    "pruned rows": lambda w: w.index_select(0, torch.tensor([1, 2])),
    "a head of one's own": lambda w: setattr(nn.Linear(4, 4), "weight", w),
}


@every_method
@pytest.mark.parametrize("reading", READINGS)
def test_readings_as_weights_name_the_mend(reading: str, method: str) -> None:
    weight = make(method).get_input_embeddings().weight
    for each in (weight, weight.detach()):
        with pytest.raises(ModelError, match=r"dense_weight\(\).*hf_dirembed.expand"):
            READINGS[reading](each)


def test_embeddings_that_were_cast_to_the_dtype_of_codes_are_refused() -> None:
    model = make()
    states = torch.randn(1, 3, 32)
    with pytest.raises(ModelError, match="cast them to the model's dtype"):
        model(inputs_embeds=states.to(model.get_input_embeddings().weight.dtype))


def test_an_assistant_whose_head_is_pruned_is_refused() -> None:
    """Universal assisted decoding takes rows of the assistant's head."""
    from transformers.generation.candidate_generator import _PruneReindexingLMHead

    with pytest.raises(ModelError, match=r"hf_dirembed\.expand"):
        _PruneReindexingLMHead(make().get_output_embeddings(), torch.arange(10))


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
@every_method
def test_parameters_are_counted_as_those_of_the_dense_model(name: str, method: str) -> None:
    model = make(method, name)
    dense = FAMILIES[name].make(AUTO)
    for options in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**options) == dense.num_parameters(**options)
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert model.num_parameters(only_trainable=True) == learning


@every_method
def test_state_dicts(method: str) -> None:
    """Of the same model they load in any way; of other codes as a whole, not without their decoder."""
    model, other = make(method), train_decoder(make(method))
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(model), logits(other))

    stranger = {f"model.embed_tokens.{n}": t for n, t in make(method).get_input_embeddings().code_tensors().items()}
    state = {name: tensor.clone() for name, tensor in stranger.items() if not name.endswith("decoder_weight")}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].flip(0)
    with pytest.raises(ModelError, match="of another table, without decoder_weight: load a state dict of all of it"):
        model.load_state_dict(state, strict=False)


def test_a_state_dict_of_another_layout_is_refused() -> None:
    model = hf_dirembed.compress(FAMILIES["llama-tied"].make(AUTO), bits=3)
    state = make().state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():  # as if all of it fitted
        state[name] = torch.zeros(shape, dtype=model.state_dict()[name].dtype)
    with pytest.raises(ModelError, match="codes of another layout"):
        model.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@every_method
def test_copies_are_guarded(copied: Callable[[Any], Any], method: str, tmp_path: Path) -> None:
    model = copied(make(method))
    assert type(model.get_input_embeddings().weight) is CodesParameter
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.get_input_embeddings().state_dict()["weight"].numpy()[3] = 1
    with pytest.raises(ModelError, match="codes of a compressed table"):
        copy.deepcopy(model).save_pretrained(tmp_path)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "split": lambda data: data.split(10)[0],
    "chunk": lambda data: data.chunk(3)[0],
    "unbind": lambda data: data.unbind(0)[0],
    "iter": lambda data: next(iter(data)),
    "view_as": lambda data: data.view_as(data),
    "diagonal": lambda data: data.diagonal(),
    "movedim": lambda data: data.movedim(0, 1),
    "as_strided": lambda data: data.as_strided((3, 2), (2, 1)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_guarded_whatever_makes_them(view: Callable[[Any], Any]) -> None:
    model = make("transform")
    with pytest.raises(ModelError, match="codes of a compressed table"):
        view(model.get_input_embeddings().weight.data).zero_()
    with pytest.raises(ModelError, match="codes of a compressed table"):
        torch._foreach_add_([view(model.get_input_embeddings().weight.data)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decoders_may_be_written_to_by_any_way(dtype: torch.dtype) -> None:
    model, ids = make("transform").to(dtype).eval(), torch.arange(9).unsqueeze(0)
    model(ids)
    table = model.get_input_embeddings()
    table.decoder_weight.data.mul_(0.5)
    table.decoder_bias_weight.data.zero_()
    found, expanded = model(ids).logits, hf_dirembed.expand(copy.deepcopy(model))(ids).logits
    torch.testing.assert_close(found, expanded, rtol=0.02, atol=0.02 * float(expanded.abs().max()))


@every_method
@torch.no_grad()
def test_codes_of_one_table_and_a_decoder_of_another_are_refused(method: str) -> None:
    sizes = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False)
    budget = {"bits": {"embed_tokens": 6, "lm_head": 6}} if method == "transform" else {"rank": 8}
    model = hf_dirembed.compress(LlamaForCausalLM(config), method=method, **budget)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        swapped = copy.deepcopy(each)
        other = nn.Parameter(torch.zeros_like(plain(swapped.lm_head.weight)), requires_grad=False)
        torch.utils.swap_tensors(swapped.lm_head.weight, other)
        with pytest.raises(ModelError, match="codes of one table"):
            swapped(torch.arange(9).unsqueeze(0))
        with pytest.raises(ModelError, match="codes of one table"):
            copy.deepcopy(swapped)
        try:
            each.lm_head.weight = each.model.embed_tokens.weight
        except ModelError:
            continue
        with pytest.raises(ModelError, match="codes of one table"):
            each(torch.arange(9).unsqueeze(0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@every_method
@torch.no_grad()
def test_tables_that_share_their_decoder_alone_are_copied(method: str, copied: Callable[[Any], Any]) -> None:
    """As untied ones do once they were resized."""
    model = copied(make(method))
    model.config.tie_word_embeddings = False
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.lm_head.decoder_weight is model.get_input_embeddings().decoder_weight
    assert torch.equal(logits(copied(model)), logits(model))


@torch.no_grad()
def test_fake_tensors_and_ids_that_are_no_integers() -> None:
    table = hf_dirembed.CompressedEmbedding.from_embedding(nn.Embedding(500, 32), bits=4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert tuple(table(torch.tensor([[1, 2]])).shape) == (1, 2, 32)
    for ids in (torch.tensor([1.7]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(ModelError, match="no numbers of rows"):
            table(ids)


def test_hooks_stay() -> None:
    model, seen = FAMILIES["llama-tied"].make(AUTO, 0).eval(), []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    ids = torch.arange(5).unsqueeze(0)
    hf_dirembed.compress(model, bits=6)(ids)
    hf_dirembed.expand(model)(ids)
    handle.remove()
    model(ids)
    assert seen == [1, 1]


@every_method
@torch.no_grad()
def test_models_run_on_the_meta_device(method: str) -> None:
    model = make(method).to("meta")
    assert model(input_ids=IDS.to("meta")).logits.shape == (*IDS.shape, model.config.vocab_size)
