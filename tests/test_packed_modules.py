"""Packed heads and embeddings against brute force, reloaded, copied, resized, trained, compiled and exported."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from packed import (
    CLASSES,
    DIM,
    DTYPES,
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
from hf_dirembed.errors import CheckpointError
from hf_dirembed.remote.codes_dirembed import RowClass
from hf_dirembed.remote.guarded_dirembed import plain
from hf_dirembed.remote.kernels_dirembed import count_classes
from hf_dirembed.remote.matrix_dirembed import CACHE_LINE, CompressedMatrix
from hf_dirembed.remote.modules_dirembed import CompressedLinear
from hf_dirembed.remote.resizing_dirembed import resize_rows


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
    """Not on gradients, on copies that are kept, or on where a file's memory map placed the codes."""
    head, hidden = make_head(dtype), torch.randn(batch, DIM).to(dtype)
    first, second = head(hidden), head(hidden)
    with torch.inference_mode():
        inferred = head(hidden)
    with torch.no_grad():
        without, again = head(hidden), head(hidden)
    tensors = {}
    for name, tensor in head.state_dict().items():
        memory = torch.empty(tensor.nbytes + 2 * CACHE_LINE, dtype=torch.uint8)
        start = -memory.data_ptr() % CACHE_LINE + 8  # what safetensors aligns to
        tensors[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    mapped = make_head(dtype)
    mapped.load_state_dict(tensors, assign=True)
    mapped.align()
    others = (second, inferred, without, again, copy.deepcopy(head)(hidden), mapped(hidden))
    for other in (*others, head.requires_grad_(False)(hidden)):
        assert torch.equal(other, first)


@torch.no_grad()
@pytest.mark.parametrize("make", [make_head, make_embedding])
def test_what_follows_a_changed_decoder(make):
    """The float32 copy of a bfloat16 decoder does, however the decoder is written to."""
    module, ids = make(torch.bfloat16), torch.arange(NUM_ROWS)
    inputs = torch.randn(3, DIM).bfloat16() if make is make_head else ids

    def is_current() -> bool:
        fresh = make(torch.bfloat16)
        fresh.load_state_dict(module.state_dict())
        return torch.equal(module(inputs), fresh(inputs))

    module(inputs)
    module.decoder_weight.mul_(2)
    assert is_current()
    module.decoder_weight = nn.Parameter(module.decoder_weight * 2)
    module.decoder_bias_weight.add_(1)
    assert is_current()
    module.load_state_dict(draw_tensors(seed=3), strict=False)
    assert is_current()
    with torch.enable_grad():  # an optimiser that leaves no trace in version counters
        module(inputs).sum().backward()
    module.decoder_weight.data.sub_(module.decoder_weight.grad)
    assert is_current()
    module.float()
    assert module(inputs.float() if make is make_head else inputs).dtype == torch.float32
    module.bfloat16()
    assert is_current()


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
        (table,) = inspect_checkpoint(tmp_path).tables
        found = [(each.rows, each.bits_per_weight) for each in table.classes]
        assert found == [(112, 2.0), (37, 2.75), (11, 3.5)]
        assert sum(rows * bits for rows, bits in found) * DIM / 8 < table.code_bytes
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        assert torch.equal(again(**family.inputs()).logits, expected)
        hidden = torch.randn(3, DIM).to(dtype)
        before = again.lm_head(hidden)
        again.resize_token_embeddings(90)
        torch.testing.assert_close(again.lm_head(hidden), before[..., :90])


def layout_of(*classes, **changes):
    return replace(PACKED_LAYOUT, classes=tuple(classes), outliers=None, **changes)


LAYOUTS = {
    "one class": layout_of(CLASSES[0]),
    "two classes of the same bytes": layout_of(RowClass((2, 0, 8, 0)), RowClass((4, 0, 4, 0), rows=40)),
    "a class without rows": layout_of(CLASSES[0], RowClass((6, 10, 12, 5), rows=0), RowClass((20, 0, 0, 0), rows=9)),
    "no row of the first class": layout_of(CLASSES[0], RowClass((6, 10, 12, 5), rows=NUM_ROWS)),
    "four classes and a zero row": layout_of(*CLASSES, RowClass((40, 0, 0, 0), rows=3), zero_row=5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_fresh_modules_of_any_layout(name, tmp_path):
    """A model that is built from its config alone has sound codes, and is what it is again after it was saved."""
    layout = LAYOUTS[name]
    matrix = CompressedMatrix(NUM_ROWS, DIM, layout)
    matrix.check_codes()
    shapes = {key: tuple(tensor.shape) for key, tensor in matrix.code_tensors().items()}
    assert shapes == layout.stored_shapes(NUM_ROWS, DIM)
    counts = matrix.row_classes().bincount(minlength=len(layout.classes)).tolist()
    assert counts[1:] == [each.rows for each in layout.classes[1:]]
    family = FAMILIES["llama-tied"]
    model = convert_input(family.make("AutoModelForCausalLM").eval(), layout, matrix.code_tensors())
    rows, logits = model.get_input_embeddings().dense_weight(), model(**family.inputs()).logits
    assert torch.equal(rows, matrix.dense_weight())
    hidden = torch.randn(3, DIM)
    torch.testing.assert_close(model.lm_head(hidden), hidden @ rows.T, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**family.inputs()).logits, logits)
    assert again.get_input_embeddings().layout == model.get_input_embeddings().current_layout()


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(100,), (64, 1), (NUM_ROWS + 70,), (131, 200, 90), (3, 64)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_resizing_rows_of_classes(name, sizes, tmp_path):
    """Rows that stay are what they were; new ones are like an old one, of the first class if there is such."""
    family = FAMILIES["llama-tied"]
    made = CompressedMatrix(NUM_ROWS, DIM, LAYOUTS[name]).code_tensors()
    tensors = {each: plain(tensor) for each, tensor in made.items()}
    tensors["row_weight"] = tensors["row_weight"][torch.randperm(NUM_ROWS)] + 4 * torch.randint(0, 3, (NUM_ROWS,))
    tensors["row_weight"] = tensors["row_weight"].to(torch.uint8)
    if "class_counts_weight" in tensors:
        tensors["class_counts_weight"] = count_classes(tensors["row_weight"], len(LAYOUTS[name].classes))
    model = convert_input(family.make("AutoModelForCausalLM").eval(), LAYOUTS[name], tensors)
    embedding, hidden = model.get_input_embeddings(), torch.randn(3, DIM)
    for size in sizes:
        rows, logits, classes = embedding.dense_weight(), model.lm_head(hidden), embedding.row_classes()
        model.resize_token_embeddings(size)
        kept = min(size, len(rows))
        embedding.check_codes()
        assert torch.equal(embedding.row_classes()[:kept], classes[:kept])
        torch.testing.assert_close(embedding.dense_weight()[:kept], rows[:kept])
        torch.testing.assert_close(model.lm_head(hidden)[:, :kept], logits[:, :kept])
        for row, of_class in zip(embedding.dense_weight()[kept:], embedding.row_classes()[kept:], strict=True):
            like = torch.isclose(rows, row, rtol=1e-5, atol=1e-5).all(dim=1)
            assert (of_class == 0) == bool((classes == 0).any())
            assert (classes[like] == of_class).any()
        layout = embedding.current_layout()
        counts = embedding.row_classes().bincount(minlength=len(layout.classes)).tolist()
        assert [each.rows for each in layout.classes[1:]] == counts[1:]
        assert model.lm_head.current_layout() == layout
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.get_input_embeddings().dense_weight(), embedding.dense_weight())
    torch.testing.assert_close(again.lm_head(hidden), model.lm_head(hidden))


@torch.no_grad()
def test_outliers_that_a_resize_drops():
    """The first row takes their place, as it is."""
    embedding = make_embedding()
    kept = int(plain(embedding.outlier_rows_weight)[0])
    rows = embedding.dense_weight()
    for num_rows, outliers in ((kept + 1, [kept]), (kept, [0])):
        resize_rows(embedding, num_rows)
        assert plain(embedding.outlier_rows_weight).tolist() == outliers
        assert embedding.current_layout().outliers == 1
        torch.testing.assert_close(embedding.dense_weight(), rows[:num_rows])


@pytest.mark.parametrize("name", ["latents_weight", "row_weight", "class_counts_weight"])
def test_codes_that_point_beyond_the_table_are_not_taken(name):
    tensors = draw_tensors()
    tensors[name].view(-1)[0] = 3 if name == "row_weight" else 10**4
    with pytest.raises(CheckpointError, match=r"codes .*: (pass|compress)"):
        make_head().load_state_dict(tensors, strict=False)


def test_copies_of_a_head_hold_nothing_else():
    head, hidden = make_head(torch.bfloat16), torch.randn(2, DIM).bfloat16()
    with torch.no_grad():
        empty, expected = len(pickle.dumps(head)), head(hidden)
    assert len(pickle.dumps(head)) == empty
    assert set(head.state_dict()) == {*draw_tensors(), "bias"}
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(hidden), expected)
        other.load_state_dict(draw_tensors(seed=3), strict=False)
        assert not torch.allclose(other(hidden), expected)
    assert torch.equal(head(hidden), expected)
    head.reset_parameters()
    assert not torch.allclose(head(hidden), expected)


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
    """States and logits are in 16 bits then, as a dense head's."""
    head, hidden = make_head(), torch.randn(2, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    rows, sizes = brute_force_rows(head)
    excess = (logits.double() - hidden.double() @ rows.T - head.bias.double()).abs()
    assert (excess <= 3 * TOLERANCE[torch.bfloat16] * (hidden.double().abs() @ sizes.T)).all()
