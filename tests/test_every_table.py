"""Tables of every kind, end to end: per-layer, n-gram, untied heads, lookups that compute more, readers of rows."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DIM, TABLE_FAMILIES, VOCAB, Family
from safetensors.torch import load_file, save_file
from test_fresh_process import COMPARE, WITHOUT_PLUGIN, run
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_dirembed
from hf_dirembed import CompressedEmbedding, ModelError
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.remote.modules_dirembed import CompressedBlocks, ids_of
from hf_dirembed.remote.stock_dirembed import DecodedWeight
from hf_dirembed.remote.tables_dirembed import READERS, reading_class


NAMES = sorted(TABLE_FAMILIES)
BITS = 7  # of tables that are this small


@functools.cache
def compressed_once(name: str) -> PreTrainedModel:
    family = TABLE_FAMILIES[name]
    return hf_dirembed.compress(family.make(family.autos[0]), bits=BITS)


def compressed(name: str) -> tuple[Family, PreTrainedModel]:
    return TABLE_FAMILIES[name], copy.deepcopy(compressed_once(name))


@torch.no_grad()
def logits(model: PreTrainedModel, family: Family, **inputs: Tensor) -> Tensor:
    torch.manual_seed(2)
    return model(**(inputs or family.inputs())).logits


def assert_same_tensors(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors, others = found.state_dict(), expected.state_dict()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_compressed_and_survives(name: str, tmp_path: Path) -> None:
    """Two round trips are bit-exact, the stock class loads it too, the expanded model is stock and answers alike."""
    family = TABLE_FAMILIES[name]
    dense = family.make(family.autos[0])
    keys, stock, classes = set(dense.state_dict()), type(dense), [type(module) for module in dense.modules()]
    _, model = compressed(name)
    tables = hf_dirembed.find_tables(model)
    assert len(tables) >= 2
    assert all(table.compressed for table in tables)
    answers = logits(model, family)

    auto = getattr(transformers, family.autos[0])
    model.save_pretrained(tmp_path / "one")
    once = auto.from_pretrained(tmp_path / "one").eval()
    once.save_pretrained(tmp_path / "two")
    twice = auto.from_pretrained(tmp_path / "two").eval()
    by_class = stock.from_pretrained(tmp_path / "two").eval()
    for again in (once, twice, by_class):
        assert type(again) is type(model)
        assert_same_tensors(again, model)
        torch.testing.assert_close(logits(again, family), answers, rtol=1e-5, atol=1e-5)

    expanded = hf_dirembed.expand(twice)
    assert type(expanded) is stock
    assert [type(module) for module in expanded.modules()] == classes
    assert set(expanded.state_dict()) == keys
    torch.testing.assert_close(logits(expanded, family), answers, rtol=1e-4, atol=1e-4)
    expanded.save_pretrained(tmp_path / "dense")
    assert_same_tensors(auto.from_pretrained(tmp_path / "dense"), expanded)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str) -> None:
    family, model = compressed(name)
    answers = logits(model, family)
    assert torch.equal(logits(copy.deepcopy(model), family), answers)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), family), answers)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half, family).isfinite().all()


def test_fresh_processes(tmp_path: Path) -> None:
    """With trust and without the plugin, where only the files of the repo are there; twice over."""
    loads = {name: TABLE_FAMILIES[name].autos[0] for name in NAMES}
    for name in NAMES:
        family, model = compressed(name)
        inputs = family.inputs()
        (tmp_path / name).mkdir()
        expected = {**inputs, "logits": logits(model, family).contiguous()}
        save_file(expected, tmp_path / name / "expected.safetensors")
        model.save_pretrained(tmp_path / name / "one")
    compare = COMPARE.replace("torch.equal(model(**inputs).logits, expected", "close(model(**inputs).logits, expected")
    code = WITHOUT_PLUGIN + compare.replace("LOADS", repr(loads)).replace("TRUST", "True")
    close = "from functools import partial\nimport torch\nclose = partial(torch.allclose, rtol=1e-5, atol=1e-5)\n"
    for source, target in (("one", "two"), ("two", "three")):
        (tmp_path / f"modules-{source}").mkdir()
        run(close + code, tmp_path, source, target, modules=tmp_path / f"modules-{source}")


@pytest.mark.parametrize("name", NAMES)
def test_training_step(name: str) -> None:
    """Decoders move where a dense table would; codes stay as they are."""
    family, model = compressed(name)
    dense = hf_dirembed.expand(copy.deepcopy(model)).train()
    dense(**family.inputs()).logits.square().mean().backward()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=10)
    model(**family.inputs()).logits.square().mean().backward()
    optimizer.step()

    after = model.state_dict()
    for table in hf_dirembed.find_tables(model):
        learns = bool(dense.get_submodule(table.name).weight.grad.any())  # not gemma3n's, before its AltUp learns
        for prefix, matrix in model.get_submodule(table.name).matrices():
            key = f"{table.name}.{prefix}decoder_weight"
            assert torch.equal(after[key], before[key]) != learns, key
            codes = [f"{table.name}.{prefix}{name}" for name in matrix.codes()]
            assert all(torch.equal(after[code], before[code]) for code in codes)


# Those that transformers resizes, and saves after that: not fsmt, not t5gemma2.
@pytest.mark.parametrize("num_tokens", [VOCAB + 8, VOCAB - 8])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fsmt", "t5gemma2")])
def test_resize_token_embeddings(name: str, num_tokens: int, tmp_path: Path) -> None:
    family, model = compressed(name)
    before = {table.name: table for table in hf_dirembed.find_tables(model)}
    rows = model.get_input_embeddings().dense_weight()
    model.resize_token_embeddings(num_tokens)
    for table in hf_dirembed.find_tables(model):
        hashed = table.kind == "n-gram"
        assert table.rows == (before[table.name].rows if hashed else num_tokens), table.name
        assert table.compressed
    kept = min(num_tokens, VOCAB)
    torch.testing.assert_close(model.get_input_embeddings().dense_weight()[:kept], rows[:kept])

    inputs = {key: ids.clamp(max=kept - 1) for key, ids in family.inputs().items()}
    answers = logits(model, family, **inputs)
    assert answers.shape[-1] == num_tokens
    model.save_pretrained(tmp_path)
    again = getattr(transformers, family.autos[0]).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, family, **inputs), answers, rtol=1e-5, atol=1e-5)


def test_a_bias_that_the_file_lacks_is_zero(tmp_path: Path) -> None:
    """As the stock class makes it, and never what happens to be in memory."""
    _, model = compressed("bert-untied")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["cls.predictions.decoder.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert not again.cls.predictions.decoder.bias.any()


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4", "gemma4_text"])
def test_per_layer_tables_are_blocks_of_layers(name: str) -> None:
    """Each layer's columns are decoded from its own block alone."""
    _, model = compressed(name)
    table = next(table for table in hf_dirembed.find_tables(model) if table.kind == "per-layer")
    blocks = model.get_submodule(table.name)
    assert isinstance(blocks, CompressedBlocks)
    text = model.config.get_text_config()
    width = text.hidden_size_per_layer_input
    assert blocks.layout.dims == (width,) * text.num_hidden_layers
    for layer, (_, block) in enumerate(blocks.matrices()):
        assert torch.equal(blocks.dense_weight()[:, layer * width : (layer + 1) * width], block.dense_weight())


@pytest.mark.parametrize("name", ["gemma4_text", "qwen4_exp_text", "gemma4"])
def test_embeddings_alone_are_looked_up_in_reverse(name: str) -> None:
    """These need the ids for further tables: they find them, and say so where there are none."""
    family, model = compressed(name)
    ids = family.inputs()["input_ids"]
    rows = model.get_input_embeddings()(ids)
    torch.testing.assert_close(logits(model, family, inputs_embeds=rows), logits(model, family), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="row 0 of inputs_embeds is that of no token"):
        model(inputs_embeds=rows * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_of(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding = CompressedEmbedding.from_embedding(nn.Embedding(5000, DIM), bits=6).to(dtype)
    ids = torch.randint(5000, (3, 70))
    assert torch.equal(ids_of(embedding, embedding(ids)), ids)


def test_decoded_weight() -> None:
    """It indexes as the dense weight does, and does nothing that would need all of it at once."""
    torch.manual_seed(0)
    embedding = CompressedEmbedding.from_embedding(nn.Embedding(300, DIM), bits=6)
    dense, weight = embedding.dense_weight(), DecodedWeight(embedding)
    assert (weight.shape, weight.dtype, weight.device, len(weight)) == (dense.shape, dense.dtype, dense.device, 300)
    ids, mask = torch.tensor([[3, 299], [0, 3]]), torch.arange(300) % 7 == 0
    for key in (5, -1, slice(4, 9), ids, mask, (5, slice(None)), (slice(2, 4), slice(1, 3)), (ids, 2)):
        torch.testing.assert_close(weight[key], dense[key])
    torch.testing.assert_close(nn.functional.embedding(ids, weight), dense[ids])
    factors = torch.randn(2, 3, 300)
    torch.testing.assert_close(torch.matmul(factors, weight), factors @ dense)
    states = torch.randn(2, 3, DIM)
    torch.testing.assert_close(weight.product(states), states @ dense.T)
    with pytest.raises(TypeError):
        torch.cat([weight, weight])  # type: ignore[list-item]


def test_readers_are_the_classes_of_transformers() -> None:
    """Each is in the module that it is looked for in, and its reading class is found by pickle."""
    for name, (module, _) in READERS.items():
        if not hasattr(transformers.models, module):
            continue  # an older transformers does not have it
        stock = getattr(getattr(transformers.models, module), name, None) or _from_modeling(module, name)
        reading = reading_class(stock)
        assert reading is not stock
        assert pickle.loads(pickle.dumps(reading)) is reading


def _from_modeling(module: str, name: str) -> Any:
    return getattr(__import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name]), name)


class Normed(nn.Embedding):
    """As inkling's, with an attribute, a parameter and a buffer of its own."""

    def __init__(self, num_embeddings: int, embedding_dim: int, shift: float = 0.5) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.shift = shift
        self.norm = nn.LayerNorm(embedding_dim)
        self.first = nn.Parameter(torch.randn(embedding_dim))
        self.register_buffer("offset", torch.randn(embedding_dim))

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.norm(super().forward(input_ids)).to(self.weight.dtype) + self.shift + self.offset
        return torch.where((input_ids == 0).unsqueeze(-1), self.first, rows)


class Functional(nn.Embedding):
    """Looks up by the function, and takes ids that the table has no rows for."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.embedding(input_ids % self.num_embeddings, self.weight)


class Summing(nn.Embedding):
    """Uses all rows of its table."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) - self.weight.mean(dim=0)


@pytest.mark.parametrize("kind", [Normed, Functional])
def test_custom_lookups(kind: type[nn.Embedding]) -> None:
    """The stock class's own forward pass runs around the compressed table; parts of its own stay and come back."""
    torch.manual_seed(0)
    stock = kind(300, DIM)
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    embedding = CompressedEmbedding.from_embedding(stock, bits=6)
    assert all(torch.equal(tensor, state[name]) for name, tensor in stock.state_dict().items())
    assert {name for name in state if name != "weight"} < set(embedding.state_dict()) or len(state) == 1

    ids = torch.tensor([[0, 5, 299], [7, 7, 0]])
    dense = embedding.to_dense()
    assert type(dense) is kind
    assert vars(dense).keys() == vars(stock).keys()
    for each in (embedding, copy.deepcopy(embedding), copy.copy(embedding), pickle.loads(pickle.dumps(embedding))):
        torch.testing.assert_close(each(ids), dense(ids))
    many = torch.randint(300, (4, 100))
    torch.testing.assert_close(embedding(many), dense(many))
    double = copy.deepcopy(embedding).double()
    torch.testing.assert_close(double(ids).float(), dense(ids))
    assert double(ids).dtype == torch.float64


@pytest.mark.parametrize("kind", [Normed, Functional])
def test_custom_lookups_compile(kind: type[nn.Embedding]) -> None:
    torch.manual_seed(0)
    embedding = CompressedEmbedding.from_embedding(kind(300, DIM), bits=6).eval()
    ids = torch.randint(300, (2, 9))
    torch.compiler.reset()
    with torch.no_grad():
        answers = torch.compile(embedding, backend="eager", fullgraph=True)(ids)
        torch.testing.assert_close(answers, embedding(ids))


def test_custom_lookups_learn() -> None:
    torch.manual_seed(0)
    embedding = CompressedEmbedding.from_embedding(Normed(300, DIM), bits=6)
    embedding(torch.tensor([0, 1, 2])).square().sum().backward()
    for name in ("decoder_weight", "first", "norm.weight"):
        assert embedding.get_parameter(name).grad.abs().sum() > 0, name
    embedding.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in embedding.parameters())


def test_lookups_that_use_the_whole_table_are_refused() -> None:
    with pytest.raises(ModelError, match="uses its table otherwise than by looking rows up"):
        CompressedEmbedding.from_embedding(Summing(300, DIM), bits=6)


def test_a_lookup_that_keeps_what_no_file_has_is_refused() -> None:
    stock = nn.Embedding(300, DIM)
    stock.register_buffer("secret", torch.randn(DIM), persistent=False)
    with pytest.raises(ModelError, match="keeps secret in a buffer that no file has"):
        CompressedEmbedding.from_embedding(stock, bits=6)


def llama(tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=tie)).eval()


def t5() -> T5ForConditionalGeneration:
    """As of version 1.1, whose heads have weights of their own, and whose configs always say that they are tied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": DIM, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [lambda: llama(tie=True), t5], ids=["llama", "t5"])
@pytest.mark.parametrize("way", ["loaded", "checkpoint"])
def test_a_head_of_its_own_is_not_thrown_away(make: Callable[[], PreTrainedModel], way: str, tmp_path: Path) -> None:
    """Whatever the config says of ties, it is a table of its own, in memory, in files and after all that."""
    model = make()
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, DIM))
    head, table = model.lm_head.weight.detach().clone(), model.get_input_embeddings().weight.detach().clone()
    path = next(found.name for found in hf_dirembed.find_tables(model) if found.kind == "input")
    if way == "loaded":
        hf_dirembed.compress(model, bits=BITS).save_pretrained(tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "dense")
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", bits=BITS)

    for load in (type(make()), AutoModelForSeq2SeqLM if path == "shared" else AutoModelForCausalLM):
        again = load.from_pretrained(tmp_path / "out")
        again.tie_weights()
        assert set(again.config.dirembed["tables"]) == {path, "lm_head"}
        for found, expected in ((again.lm_head, head), (again.get_input_embeddings(), table)):
            assert (found.dense_weight() - expected).norm() < 0.2 * expected.norm()
    again.save_pretrained(tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    dense = hf_dirembed.expand(again)
    dense.save_pretrained(tmp_path / "stock")
    stock = type(make()).from_pretrained(tmp_path / "stock")
    assert torch.equal(stock.lm_head.weight, dense.lm_head.weight)
    assert not torch.equal(stock.lm_head.weight, stock.get_input_embeddings().weight)


def test_tables_that_were_compressed_apart_are_not_tied_later(tmp_path: Path) -> None:
    """Codes of the one under the decoder of the other would be neither, without a word."""
    apart = hf_dirembed.compress(llama(tie=False), bits=BITS)
    alone = hf_dirembed.compress(llama(tie=False), bits={"embed_tokens": BITS})
    for model in (apart, alone):
        before = model.lm_head.state_dict()
        model.config.tie_word_embeddings = True
        with pytest.raises(ModelError, match=r"ties lm_head to model.embed_tokens, which were not compressed as one"):
            model.tie_weights()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.lm_head.state_dict().items())
        model.config.tie_word_embeddings = False
        model.tie_weights()
        model.save_pretrained(tmp_path / str(model is apart))


@pytest.mark.parametrize("same", [True, False])
def test_an_input_table_that_was_replaced_under_a_tied_head_expands_by_its_values(same: bool, tmp_path: Path) -> None:
    """What saving advises, to expand it, works: tied where both hold the same rows, else untied once told so."""
    model = hf_dirembed.compress(llama(tie=True), bits=BITS).eval()
    rows = model.get_input_embeddings().dense_weight().detach()
    model.set_input_embeddings(nn.Embedding.from_pretrained(rows if same else rows + 1))
    ids = torch.arange(VOCAB)[None]
    expected = model(ids).logits
    with pytest.raises(ModelError, match=r"make a stock model with hf_dirembed\.expand"):
        model.save_pretrained(tmp_path)

    if not same:
        with pytest.raises(ModelError, match=r"set config\.tie_word_embeddings to False, and both stay"):
            hf_dirembed.expand(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
        model.config.tie_word_embeddings = False

    stock = hf_dirembed.expand(model)
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == same
    stock.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_that_was_replaced_by_a_dense_one_is_not_saved(tmp_path: Path) -> None:
    model = hf_dirembed.compress(llama(tie=True), bits=BITS)
    model.set_output_embeddings(nn.Linear(DIM, VOCAB, bias=False))
    with pytest.raises(ModelError, match=r"lm_head is tied to .* but was replaced by a dense one"):
        model.save_pretrained(tmp_path / "out")
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_expanding_throws_no_head_away() -> None:
    model = hf_dirembed.compress(llama(tie=True), bits=BITS)
    model.set_output_embeddings(nn.Linear(DIM, VOCAB, bias=False))
    with pytest.raises(ModelError, match=r"ties lm_head to .* not the same: set config.tie_word_embeddings to False"):
        hf_dirembed.expand(model)
    model.config.tie_word_embeddings = False
    head = model.lm_head.weight.detach().clone()
    assert torch.equal(hf_dirembed.expand(model).lm_head.weight, head)


@pytest.mark.parametrize("num_tokens", [VOCAB + 8, VOCAB - 8])
def test_every_lookup_of_a_table_is_resized(num_tokens: int, tmp_path: Path) -> None:
    """Marian's input embedding is its encoder's, which is tied to `shared`: files have that."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": DIM, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = MarianConfig(**sizes, **heads, decoder_start_token_id=0, eos_token_id=1, max_position_embeddings=40)
    model = hf_dirembed.compress(MarianMTModel(config).eval(), bits=BITS)
    model.resize_token_embeddings(num_tokens)
    ids = torch.randint(2, num_tokens, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = MarianMTModel.from_pretrained(tmp_path)
        assert torch.equal(again(input_ids=ids, decoder_input_ids=ids).logits, expected)
    assert {module.num_rows for module in again.modules() if isinstance(module, CompressedEmbedding)} == {num_tokens}


def test_weights_that_are_shared_against_the_config_are_refused() -> None:
    model = llama(tie=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ModelError, match=r"set config\.tie_word_embeddings = True"):
        hf_dirembed.compress(model, bits=BITS)
    model.config.tie_word_embeddings = True
    assert len({table.tied_to for table in hf_dirembed.find_tables(hf_dirembed.compress(model, bits=BITS))}) == 2
