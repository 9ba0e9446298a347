"""Calibration against brute force: one window at a time, the loss written out, no shared code."""

from collections import Counter

import datasets
import pytest
import torch
from calibrating import DIM, LENGTH, MODELS, ROWS, TEXTS, WORDS, assert_same, build, make_tokenizer
from families import FAMILIES, TABLE_FAMILIES
from torch import nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling, T5ForConditionalGeneration

from hf_dirembed.calibration.calibrate import calibrate
from hf_dirembed.calibration.text import windows
from hf_dirembed.errors import CalibrationError
from hf_dirembed.tables import find_tables


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def brute_force(model, tokenizer, seed=0):
    """Counts, Σ h hᵀ and Σ p / predictions, Σ g gᵀ / tokens: each window alone, through the parameters' graph."""
    model.eval()
    encoder, seq2seq = model.get_output_embeddings() is None, isinstance(model, T5ForConditionalGeneration)
    masked = isinstance(model, BertForMaskedLM)
    counts, hidden, gradients, probabilities = Counter(), [], [], []
    for number, window in enumerate(windows(TEXTS, tokenizer, length=LENGTH, packed=not encoder)):
        counts.update(window)
        random = torch.Generator().manual_seed(seed * 1_000_003 + number)
        ids = torch.tensor([window])
        where = torch.ones_like(ids, dtype=torch.bool)
        where[:, -1] = seq2seq
        if masked:
            collator = DataCollatorForLanguageModeling(tokenizer)
            collator.generator = random
            special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
            ids, labels = collator.torch_mask_tokens(ids, special)
            where = labels != -100
        embed = model.get_input_embeddings()
        embedded = embed(ids).detach().requires_grad_()
        if encoder:
            last = model.base_model(inputs_embeds=embedded).last_hidden_state[0]
            loss = last.mean(0) @ (torch.randint(2, (DIM,), generator=random) * 2.0 - 1)
            gradients.append(torch.autograd.grad(loss, embedded)[0][0])
            continue
        leaves, inputs = [embedded], {"inputs_embeds": embedded}
        if seq2seq:
            leaves.append(embed(torch.cat([torch.zeros(1, 1).long(), ids[:, :-1]], 1)).detach().requires_grad_())
            inputs["decoder_inputs_embeds"] = leaves[1]
        seen = []
        hook = model.get_output_embeddings().register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[0])
        )
        logits = model(**inputs).logits
        hook.remove()
        draws = torch.rand(ids.shape[1], generator=random)
        cdf = logits.softmax(-1).cumsum(-1)
        labels = (cdf <= draws[None, :, None] * cdf[..., -1:]).sum(-1)
        loss = F.cross_entropy(logits[where], labels[where], reduction="sum")
        hidden.append(seen[0][where].detach())
        probabilities.append(logits[where].detach().double().softmax(-1))
        gradients += [gradient[0] for gradient in torch.autograd.grad(loss, leaves)]
    moment = lambda parts: torch.cat(parts).double().T @ torch.cat(parts).double()  # noqa: E731
    head = moment(hidden) / len(torch.cat(hidden)) if hidden else None
    return counts, head, moment(gradients) / counts.total(), torch.cat(probabilities) if probabilities else None


def test_moments_are_those_of_brute_force(model, tokenizer):
    statistics = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, batch_size=3)
    counts, head, gradient, probabilities = brute_force(model, tokenizer)
    assert {index: int(n) for index, n in enumerate(statistics.counts) if n} == counts
    assert statistics.num_tokens == counts.total()
    torch.testing.assert_close(statistics.gradient_moment, gradient, rtol=1e-4, atol=1e-7)
    assert (statistics.head_moment is None) == (head is None)
    if head is not None:
        torch.testing.assert_close(statistics.head_moment, head, rtol=1e-4, atol=1e-6)
        uncertainty = (probabilities * (1 - probabilities)).mean(0)
        torch.testing.assert_close(statistics.probabilities, probabilities.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(statistics.uncertainty, uncertainty, rtol=1e-4, atol=1e-7)
    else:
        assert statistics.probabilities is None
        assert statistics.uncertainty is None


@pytest.mark.parametrize("name", ["gemma3", "gemma3n_text", "gemma4_text", "gemma4"])
def test_gradients_are_those_of_the_rows_that_tables_hold(name, tokenizer):
    """Whatever a model makes of rows after the lookup, as a scale; every table has its own, by blocks of columns."""
    family = {**FAMILIES, **TABLE_FAMILIES}[name]
    model = family.make("AutoModelForImageTextToText" if name == "gemma4" else "AutoModelForCausalLM")
    text = [" ".join(WORDS[3:12])]  # no token that stands for an image
    (window,) = windows(text, tokenizer, length=LENGTH, packed=True)
    assert len(set(window)) == len(window)  # so that the gradient of a row is that of one read
    statistics = calibrate(model, tokenizer, text, sequence_length=LENGTH)

    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # what the head adds is no gradient of a read
    logits = model(torch.tensor([window])).logits[0]
    draws = torch.rand(len(window), generator=torch.Generator().manual_seed(0))
    labels = (logits.softmax(-1).cumsum(-1) <= draws[:, None]).sum(-1)
    F.cross_entropy(logits[:-1], labels[:-1], reduction="sum").backward()

    seen = {table.name: statistics.further.get(table.name) for table in find_tables(model) if "head" not in table.kind}
    assert len(seen) == (1 if name == "gemma3" else 2)
    for path, further in seen.items():
        rows = model.get_parameter(f"{path}.weight").grad[window].double()
        moments = statistics.gradient_moment.unsqueeze(0) if further is None else further.gradient_moment
        if further is not None:
            assert further.num_reads == further.counts.sum() == len(window)
            assert further.counts[window].eq(1).all()
            assert rows.any() == (name != "gemma3n_text")  # whose layers take nothing of them when they are new
        for moment, part in zip(moments, rows.chunk(len(moments), dim=1), strict=True):
            expected = part.T @ part / len(window)
            torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_tables_of_hashed_rows_are_seen_without_counts(tokenizer):
    model = TABLE_FAMILIES["qwen4_exp_text"].make("AutoModelForCausalLM")
    further = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH).further
    names = [table.name for table in find_tables(model) if table.kind == "n-gram"]
    assert names
    for seen in map(further.get, names):
        assert seen.counts is None
        assert seen.num_reads
        assert seen.gradient_moment.diagonal(dim1=1, dim2=2).gt(0).all()


def test_batch_size_and_repetition_change_nothing(model, tokenizer):
    first, again, other = (
        calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, batch_size=size) for size in (1, 1, 5)
    )
    assert torch.equal(first.gradient_moment, again.gradient_moment)
    assert_same(first, other)
    reseeded = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, seed=1)
    assert not torch.allclose(first.gradient_moment, reseeded.gradient_moment, rtol=1e-3)


def test_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.base_model.get_input_embeddings().eval()  # a mixed state
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_runs_in_float32_on_a_cpu(tokenizer):
    model = build("causal").bfloat16()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    found = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
    exact = calibrate(model.float(), tokenizer, TEXTS, sequence_length=LENGTH)
    assert torch.equal(found.head_moment, exact.head_moment)
    assert torch.equal(found.gradient_moment, exact.gradient_moment)


def test_only_predicting_positions_go_through_the_head(tokenizer):
    model, seen = build("masked"), []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    statistics = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)
    assert sum(seen) == statistics.num_predictions < statistics.num_tokens / 3


def test_a_head_that_is_bypassed_is_named(tokenizer):
    model = build("masked")
    model.cls.predictions.forward = lambda h: h @ model.get_output_embeddings().weight.T
    with pytest.raises(CalibrationError, match="beside its head"):
        calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)


@pytest.mark.parametrize("name", ["mobilebert", "fsmt"])
def test_models_with_such_a_head_are_told_how_they_are_compressed(name, tokenizer):
    family = TABLE_FAMILIES[name]
    with pytest.raises(CalibrationError, match="beside its head: compress it without calibration"):
        calibrate(family.make(family.autos[0]), tokenizer, TEXTS, sequence_length=LENGTH)


def test_mistakes_are_named(tokenizer, tmp_path):
    model = build("causal")
    cases = [
        ({"texts": str(tmp_path / "missing.txt")}, "cannot read"),
        ({"texts": []}, "no text"),
        ({"texts": [b"text"]}, "give strings"),
        ({"texts": [[1.5]]}, "token ids"),
        ({"texts": 3}, "texts is a int"),
        ({"texts": [[ROWS]]}, "beyond the table"),
        ({"texts": datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS}))}, "give one of them"),
        ({"texts": datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS})}, "one string column"),
        ({"sequence_length": 2}, "leaves no room"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ]
    for change, message in cases:
        with pytest.raises(CalibrationError, match=message):
            calibrate(**{"model": model, "tokenizer": tokenizer, "texts": TEXTS, **change})
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(model, tokenizer, TEXTS)
    model.set_input_embeddings(nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match="dense model"):
        calibrate(model, tokenizer, TEXTS)
