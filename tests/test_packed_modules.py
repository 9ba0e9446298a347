"""Packed heads and embeddings against brute force, reloaded, copied, trained, compiled and exported."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES
from packed import (
    DIM,
    DTYPES,
    NUM_REFINED,
    NUM_ROWS,
    PACKED_LAYOUT,
    TOLERANCE,
    brute_force_rows,
    convert_input,
    draw_tensors,
    make_embedding,
    make_head,
)
from torch import nn
from transformers import AutoModelForCausalLM

from hf_dirembed.checkpoints.convert import inspect_checkpoint
from hf_dirembed.remote.kernels_dirembed import padded_rank
from hf_dirembed.remote.matrix_dirembed import CACHE_LINE, resize_rows
from hf_dirembed.remote.modules_dirembed import CompressedLinear


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 0), (2, 9), (150,)])
def test_a_packed_head_and_embedding_match_brute_force(dtype, shape):
    head, embedding = make_head(dtype), make_embedding(dtype)
    hidden = torch.randn(*shape, DIM).to(dtype)
    rows, sizes = brute_force_rows(head)
    ids = torch.randint(0, NUM_ROWS, shape)
    for found, expected, size in (
        (head(hidden), hidden.double() @ rows.T + head.bias.double(), hidden.double().abs() @ sizes.T),
        (embedding(ids), rows[ids], sizes[ids]),
    ):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert ((found.double() - expected).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 7, 150])
def test_logits_depend_on_codes_and_states_alone(dtype, batch):
    """Not on the cache, on gradients, or on where a file's memory map placed the codes."""
    head, hidden = make_head(dtype), torch.randn(batch, DIM).to(dtype)
    first, second = head(hidden), head(hidden)
    of_refined = NUM_REFINED * padded_rank(PACKED_LAYOUT.refinement.rank)
    assert head.expanded_bytes == NUM_ROWS * padded_rank(PACKED_LAYOUT.base_rank) + of_refined
    with torch.inference_mode():
        inferred = head(hidden)
    tensors = {}
    for name, tensor in head.state_dict().items():
        memory = torch.empty(tensor.nbytes + 2 * CACHE_LINE, dtype=torch.uint8)
        start = -memory.data_ptr() % CACHE_LINE + 8  # what safetensors aligns to
        tensors[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    mapped = make_head(dtype)
    mapped.load_state_dict(tensors, assign=True)
    mapped.align()
    for other in (second, inferred, copy.deepcopy(head)(hidden), mapped(hidden), head.requires_grad_(False)(hidden)):
        assert torch.equal(other, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_model_gives_the_same_logits(dtype, tmp_path):
    family = FAMILIES["llama-tied"]
    # Loaded in its dtype: `.to` would cast the rotary frequencies too, which loading keeps in float32.
    family.make("AutoModelForCausalLM").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    model = convert_input(dense, PACKED_LAYOUT, draw_tensors())
    assert isinstance(model.lm_head, CompressedLinear)
    with torch.no_grad():
        expected = model(**family.inputs()).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        assert torch.equal(again(**family.inputs()).logits, expected)
        assert again.lm_head.expanded_bytes == model.lm_head.expanded_bytes > 0
        hidden = torch.randn(3, DIM).to(dtype)
        before = again.lm_head(hidden)
        again.resize_token_embeddings(90)
        torch.testing.assert_close(again.lm_head(hidden), before[..., :90])


@torch.no_grad()
def test_outliers_that_a_resize_drops():
    """The first row takes their place, as it is."""
    embedding = make_embedding()
    kept = int(embedding.outlier_rows_weight[0])
    rows = embedding.dense_weight()
    for num_rows, outliers in ((kept + 1, [kept]), (kept, [0])):
        resize_rows(embedding, num_rows)
        assert embedding.outlier_rows_weight.tolist() == outliers
        assert embedding.current_layout().outliers == 1
        torch.testing.assert_close(embedding.dense_weight(), rows[:num_rows])


@torch.no_grad()
def test_refined_rows_that_a_resize_drops(tmp_path):
    """The first row takes their place, and stays as it is."""
    family = FAMILIES["llama-tied"]
    tensors = draw_tensors()
    tensors["refined_rows_weight"] = 100 + torch.arange(NUM_REFINED, dtype=torch.int32)
    model = convert_input(family.make("AutoModelForCausalLM").eval(), PACKED_LAYOUT, tensors)
    embedding, hidden = model.get_input_embeddings(), torch.randn(3, DIM)
    rows, logits = embedding.dense_weight(), model.lm_head(hidden)
    for num_rows, refined in ((102, [100, 101]), (100, [0])):
        model.resize_token_embeddings(num_rows)
        assert embedding.refined_rows_weight.tolist() == refined
        torch.testing.assert_close(embedding.dense_weight(), rows[:num_rows])
        torch.testing.assert_close(model.lm_head(hidden), logits[:, :num_rows])
    model.save_pretrained(tmp_path)
    assert [table.refined_rows for table in inspect_checkpoint(tmp_path).tables] == [1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(100).view(4, 25)
    assert torch.equal(again.get_input_embeddings().dense_weight(), embedding.dense_weight())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_copies_of_a_head_and_moves_free_the_expansion():
    head, hidden = make_head(), torch.randn(2, DIM)
    empty, expected = len(pickle.dumps(head)), head(hidden)
    assert len(pickle.dumps(head)) == empty
    assert set(head.state_dict()) == {*draw_tensors(), "bias"}
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other.expanded_bytes == 0
        assert torch.equal(other(hidden), expected)
        other.load_state_dict(draw_tensors(seed=3), strict=False)
        assert not torch.allclose(other(hidden), expected)
    assert torch.equal(head(hidden), expected)
    assert head.expanded_bytes > 0
    nn.Sequential(head).double()
    assert head.expanded_bytes == 0
    torch.testing.assert_close(
        head(hidden.double()).float(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )
    head.reset_parameters()
    assert not torch.allclose(head(hidden.double()).float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_packed_head_trains(dtype):
    head, hidden = make_head(dtype), torch.randn(3, DIM).to(dtype).requires_grad_()
    upstream = torch.randn(3, NUM_ROWS).to(dtype)
    head(hidden).backward(upstream)
    rows, sizes = brute_force_rows(head)
    excess = (hidden.grad.double() - upstream.double() @ rows).abs()
    assert (excess <= TOLERANCE[dtype] * (upstream.double().abs() @ sizes)).all()
    learn = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert learn == {"decoder_weight", "decoder_bias_weight", "bias"}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [make_head, make_embedding])
def test_packed_modules_compile_and_export(make, dtype):
    module = make(dtype)
    arguments = (torch.randn(2, 50, DIM).to(dtype) if make is make_head else torch.randint(0, NUM_ROWS, (2, 50)),)
    compiled = torch.compile(module, fullgraph=True, backend="eager")(*arguments)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(module, arguments, dynamic_shapes=(axes,)).module()
    traced = torch.jit.trace(module, arguments, check_trace=False)
    assert getattr(module, "expanded_bytes", 0) == 0
    expected = module(*arguments)
    _, sizes = brute_force_rows(module)
    size = arguments[0].double().abs() @ sizes.T if make is make_head else sizes[arguments[0]]
    for found in (compiled, exported(*arguments), traced(*arguments)):
        assert found.dtype == dtype
        assert ((found - expected).double().abs() <= TOLERANCE[dtype] * size).all()
    shorter = (arguments[0][:1, :7],)
    torch.testing.assert_close(exported(*shorter), module(*shorter), rtol=0, atol=TOLERANCE[dtype] * size.max().item())


@torch.no_grad()
def test_a_packed_head_under_autocast():
    head, hidden = make_head(), torch.randn(2, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    rows, sizes = brute_force_rows(head)
    excess = (logits.double() - hidden.double() @ rows.T - head.bias.double()).abs()
    assert (excess <= TOLERANCE[torch.bfloat16] * (hidden.double().abs() @ sizes.T)).all()
