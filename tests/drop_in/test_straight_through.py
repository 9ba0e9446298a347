"""Packed codes that learn: floats behind the quantiser, and codes that follow them in every pass and every file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from learning import AUTO, LAYOUT, ZERO_ROW, learn, logits, optimiser, rich_model, table
from packed import CLASSES, DIM, NUM_ROWS, fill
from test_fresh_process import WITHOUT_PLUGIN, run
from tiny import Sentences, make
from torch import Tensor, nn

import hf_dirembed
from hf_dirembed import CompressedEmbedding, CompressedLinear, ModelError
from hf_dirembed.compression.transform.trellis import quantise
from hf_dirembed.remote.codes_dirembed import BIT_WIDTHS
from hf_dirembed.remote.guarded_dirembed import plain
from hf_dirembed.remote.kernels_dirembed import row_scales, unpack
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix, unfreeze
from hf_dirembed.remote.stock_dirembed import StockEmbedding


pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


FLOATS = ("weight", "weight_1", "weight_2")  # of the rows of each class


def codes_of(matrix: CompressedMatrix, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a class, the latents that their codes add to, and what the codes of each row are multiplied by."""
    first = sum(each.num_codes for each in CLASSES[:number])
    codes = slice(first, first + CLASSES[number].num_codes)
    latents = plain(matrix.latents_weight)[codes].long()
    steps = 2.0 ** (plain(matrix.steps_weight)[codes].float() / 8 + plain(matrix.exponent_weight).float()[latents])
    rows = (matrix.row_classes() == number).nonzero().squeeze(1)
    return rows, latents, steps * row_scales(plain(matrix.row_weight)[rows]).unsqueeze(1)


def levels_of(matrix: CompressedMatrix, number: int) -> Tensor:
    """What the packed codes of the rows of a class stand for, before their steps."""
    rows, _, _ = codes_of(matrix, number)
    packed = plain(matrix.weight)[rows]
    if number:
        packed = torch.cat([packed, matrix.further_bytes(number)], dim=1)
    return unpack(packed, CLASSES[number].bit_allocation, plain(matrix.codebook_weight)) + 0.5


def quantised(matrix: CompressedMatrix, number: int) -> Tensor:
    """What they should stand for: their floats, quantised section by section."""
    _, latents, steps = codes_of(matrix, number)
    importance = (matrix.decoder_weight[latents] * steps[0].unsqueeze(1)).square().sum(dim=1).detach()
    levels = plain(matrix.codebook_weight).float() + 0.5
    targets, found, first = getattr(matrix.shadow, FLOATS[number]).detach() / steps, [], 0
    for count, width in zip(CLASSES[number].bit_allocation, BIT_WIDTHS, strict=True):
        if count:
            section = slice(first, first + count)
            found.append(quantise(targets[:, section], importance[section], levels, width)[1])
        first += count
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_unfreezing_and_freezing_change_nothing(name: str) -> None:
    model = rich_model(name)
    expected, before = logits(model), table(model)
    model.train().unfreeze_codes()
    assert torch.equal(model(input_ids=Sentences().ids[8:12]).logits, expected)
    assert torch.equal(logits(model.eval()), expected)
    assert model.unfreeze_codes().get_input_embeddings().outlier_weight.requires_grad
    model.freeze_codes()
    assert model.get_input_embeddings().shadow is None
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in table(model).items())
    learning = [key for key, tensor in model.get_input_embeddings().code_tensors().items() if tensor.requires_grad]
    assert learning == ["decoder_weight", "decoder_bias_weight"]
    assert "Shadow" not in repr(model)


def dense_rows(matrix: CompressedMatrix, latents: Tensor, outliers: Tensor) -> Tensor:
    """The table that float latents stand for."""
    rows = latents @ matrix.decoder_weight.detach() + matrix.decoder_bias_weight.detach()
    rows = rows.index_put((plain(matrix.outlier_rows_weight).long(),), outliers)
    return rows.index_fill(0, torch.tensor([ZERO_ROW]), 0)


def test_gradients_are_those_of_float_latents() -> None:
    """Of an embedding with a scale and of the head that is tied to it, once in a batch and more often, in float64."""
    embedding = CompressedEmbedding(NUM_ROWS, DIM, LAYOUT, stock=StockEmbedding(embed_scale=3.0), dtype=torch.float64)
    head = CompressedLinear(DIM, NUM_ROWS, LAYOUT, dtype=torch.float64)
    for module in (embedding, head):
        fill(module).tied = True
    for name in ("weight", "further_weight", "outlier_weight"):
        setattr(head, name, getattr(embedding, name))
    unfreeze([embedding, head])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(NUM_ROWS, (4, 30), generator=generator)
    states = torch.randn(2, 5, DIM, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 5, NUM_ROWS, generator=generator, dtype=torch.float64)
    (embedding(ids).square().sum() + (head(states) * target).sum()).backward()

    latents = embedding.latents_of(torch.arange(NUM_ROWS)).detach().requires_grad_()
    outliers = embedding.outlier_weight.detach().clone().requires_grad_()
    rows = dense_rows(embedding, latents, outliers)
    ((3.0 * rows[ids]).square().sum() + (states @ rows.T * target).sum()).backward()
    for number, name in enumerate(FLOATS):
        rows, of_codes, _ = codes_of(embedding, number)
        found = getattr(embedding.shadow, name).grad
        torch.testing.assert_close(found, latents.grad[rows][:, of_codes])
        assert not found[
            torch.isin(rows, torch.tensor([ZERO_ROW, *plain(embedding.outlier_rows_weight).tolist()]))
        ].any()
    torch.testing.assert_close(embedding.outlier_weight.grad, outliers.grad)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_codes_learn(name: str, tmp_path: Path) -> None:
    """More than the decoder alone; in evaluation and in the file they are what the floats are quantised to."""
    frozen, model = rich_model(name), rich_model(name)
    for each in (frozen, model):
        each.requires_grad_(False).get_input_embeddings().requires_grad_()
    model.unfreeze_codes()
    before, embedding = table(model), model.get_input_embeddings()
    keys, first = set(frozen.state_dict()), learn(frozen, steps=0)
    assert first - learn(model, 10, lr=0.03) > 1.1 * (first - learn(frozen, 10, lr=0.03)) > 0
    for number in range(len(FLOATS)):
        assert torch.equal(levels_of(embedding, number), quantised(embedding, number))
    for layer in ("weight", "further_weight"):
        assert not torch.equal(getattr(embedding, layer), before[layer])
    assert not torch.equal(embedding.outlier_weight, before["outlier_weight"])
    expected, dense = logits(model), embedding.dense_weight()
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(copy.deepcopy(model).freeze_codes()), expected)
    assert torch.equal(hf_dirembed.expand(model).get_input_embeddings().weight, dense)


def test_a_training_pass_is_of_what_a_save_holds(tmp_path: Path) -> None:
    """After a step, without evaluation in between, by an optimiser that leaves no trace in version counters."""
    model = rich_model().train().unfreeze_codes()
    ids = Sentences().ids[:8]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.sub_(0.05 * parameter.grad)
    stepped = model(input_ids=ids).logits.detach()
    codes = table(model)
    state = model.state_dict()
    assert all(torch.equal(state[f"model.embed_tokens.{key}"], tensor) for key, tensor in codes.items())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, stepped)


def test_training_in_evaluation_mode_and_accumulating() -> None:
    """Gradients of two passes add up, and codes follow without `train()`."""
    model = rich_model().eval().unfreeze_codes()
    ids, embedding = Sentences().ids[:8], model.get_input_embeddings()
    for half in ids.chunk(2):
        (model(input_ids=half, labels=half).loss / 2).backward()
    accumulated = embedding.shadow.weight.grad.clone()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(embedding.shadow.weight.grad, accumulated, rtol=1e-4, atol=1e-6)
    codes = embedding.weight.clone()
    optimiser(model).step()
    logits(model)
    assert not torch.equal(embedding.weight, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_half_precision(dtype: torch.dtype | None) -> None:
    """A model in bfloat16, and one in float32 whose passes are in bfloat16."""
    model = rich_model().unfreeze_codes()
    if dtype is not None:
        model = model.to(dtype)
    codes = table(model)["weight"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is None):
        after = learn(model, steps=10)
        assert after < learn(rich_model(), steps=0)
    assert not torch.equal(model.get_input_embeddings().weight, codes)


def test_compiled_while_codes_learn() -> None:
    """Training breaks the graph where codes are quantised; evaluation is one graph, and exports without the floats."""
    model = rich_model("llama-untied").unfreeze_codes()
    learn(model, steps=2)
    ids = Sentences().ids[8:12]
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(input_ids=ids).logits, model(input_ids=ids).logits)
    embedding = copy.deepcopy(model.get_input_embeddings())
    exported = torch.export.export(embedding, (ids,))
    assert torch.equal(exported.module()(ids), embedding(ids))
    compiled, before = torch.compile(embedding.train(), backend="eager"), embedding.weight.clone()
    compiled(ids).square().sum().backward()
    expected = embedding.shadow.weight.grad.clone()
    embedding.shadow.weight.grad = None
    embedding(ids).square().sum().backward()
    assert torch.equal(embedding.shadow.weight.grad, expected)
    optimiser(embedding, lr=0.1).step()
    compiled(ids)
    assert not torch.equal(embedding.weight, before)


def test_what_is_refused(tmp_path: Path) -> None:
    embedding = rich_model().get_input_embeddings()
    with pytest.raises(ModelError, match=r"shared with a tied module: call unfreeze_codes\(\) of the model"):
        embedding.unfreeze_codes()
    embedding.freeze_codes()  # nothing to undo
    model = rich_model().unfreeze_codes()
    with pytest.raises(ModelError, match=r"call freeze_codes\(\) of the model"):
        model.get_input_embeddings().freeze_codes()
    with torch.no_grad():
        model.get_input_embeddings().shadow.weight[5, 7] = torch.nan
    with pytest.raises(ModelError, match="no longer finite"):
        model.save_pretrained(tmp_path / "diverged")
    assert not (tmp_path / "diverged").exists()
    with torch.device("meta"), pytest.raises(ModelError, match="not in memory"):
        CompressedEmbedding(NUM_ROWS, DIM, LAYOUT).unfreeze_codes()
    model.set_input_embeddings(nn.Embedding(NUM_ROWS, DIM))
    with pytest.raises(ModelError, match="replaced by a dense one"):
        model.unfreeze_codes()


def test_without_the_plugin_it_is_refused(tmp_path: Path) -> None:
    rich_model().save_pretrained(tmp_path / "model")
    code = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    model.unfreeze_codes()
except ValueError as error:
    print(error)
"""
    said = run(WITHOUT_PLUGIN + code, tmp_path / "model", modules=tmp_path)
    assert said.startswith("training packed codes needs the package itself: pip install hf_dirembed")


def test_outliers_are_codes_that_stay(tmp_path: Path) -> None:
    """However the model came about: made here, loaded, or loaded as the stock class."""
    model = rich_model()
    model.save_pretrained(tmp_path)
    autos = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM
    for each in (model, *(auto.from_pretrained(tmp_path) for auto in autos)):
        tensors = each.requires_grad_().get_input_embeddings().code_tensors().items()
        assert [name for name, tensor in tensors if tensor.requires_grad] == ["decoder_weight", "decoder_bias_weight"]


@pytest.mark.parametrize("method", ["transform", "direction"])
def test_requires_grad_does_not_unfreeze(method: str) -> None:
    """Float and packed codes alike."""
    model = make("llama-tied", AUTO, method).unfreeze_codes()
    embedding = model.get_input_embeddings()
    floats = embedding.weight if embedding.shadow is None else embedding.shadow.weight
    assert floats.requires_grad
    assert model.requires_grad_().get_input_embeddings().frozen_tensors().keys().isdisjoint({"shadow.weight"})
    assert floats.requires_grad
    model.requires_grad_(False).requires_grad_()
    assert not floats.requires_grad
    ids = Sentences().ids[:4]
    model(input_ids=ids, labels=ids).loss.backward()
    assert floats.grad is None
    model.unfreeze_codes()
    assert floats.requires_grad
