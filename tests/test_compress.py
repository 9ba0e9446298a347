"""`compress` on models: what tokenizer, languages and calibration change, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, VOCAB
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed import AutoencoderSettings, CompressedEmbedding, CompressedLinear, OptionError, TransformSettings
from hf_dirembed.calibration.calibrated import Calibration
from hf_dirembed.calibration.statistics import hessian
from hf_dirembed.checkpoints.convert import inspect_checkpoint
from hf_dirembed.compression import compress_table
from hf_dirembed.errors import CalibrationError
from hf_dirembed.remote.codes_dirembed import CODE_TENSORS
from hf_dirembed.remote.tables_dirembed import input_table


TEXTS = ["the cat sat on the mat and the dog ran to the house .", "a green tree , a blue house of the cat ."] * 20


@pytest.fixture
def llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    assert len(tokenizer) <= VOCAB
    return FAMILIES["llama-tied"].make("AutoModelForCausalLM")


def codes_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return model.get_input_embeddings().code_tensors()


def settings_of(model: PreTrainedModel) -> dict[str, Any]:
    """What the record of the input table says that it was made with."""
    record = model.config.dirembed["record"]["tables"]
    return record[input_table(model)]["settings"]


def test_calibration_makes_token_weights_and_a_hessian(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Text, and the statistics of the same text, give the same codes; they lower the error that they measure."""
    statistics = hf_dirembed.calibrate(llama, tokenizer, TEXTS)
    used = Calibration.of(llama, tokenizer, statistics, "en")
    token_weights, hessian = used.measure(llama, tokenizer, "model.embed_tokens", "en")
    assert hessian is not None
    dense = llama.get_input_embeddings().weight.data.clone()

    def error(model: PreTrainedModel) -> float:
        difference = dense.double() - model.get_input_embeddings().dense_weight().double()
        return float((((difference @ hessian) * difference).sum(dim=1) * token_weights.sqrt()).sum())

    def fresh() -> PreTrainedModel:
        return FAMILIES["llama-tied"].make("AutoModelForCausalLM")

    options = {"bits": 5, "languages": "en"}
    by_text = hf_dirembed.compress(llama, tokenizer, calibration=TEXTS, **options)
    by_statistics = hf_dirembed.compress(fresh(), tokenizer, calibration=statistics, **options)
    for name, tensor in codes_of(by_text).items():
        assert torch.equal(tensor, codes_of(by_statistics)[name])
    recorded = settings_of(by_text)
    assert (recorded["hessian"], recorded["languages"], recorded["calibration"]) == (True, ["en"], "given texts")
    recorded = settings_of(by_statistics)
    assert recorded["calibration"] == "given statistics"
    assert recorded["calibration_tokens"] == statistics.num_tokens
    assert error(by_text) < error(hf_dirembed.compress(fresh(), tokenizer, **options))


def test_self_calibration(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    module = sys.modules["hf_dirembed.calibration.calibrated"]

    def few(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        return original(*arguments, **{**options, "num_tokens": 64})

    original = module.self_texts
    monkeypatch.setattr(module, "self_texts", few)
    hf_dirembed.compress(llama, tokenizer, bits=5, languages="en", calibration="self")
    assert settings_of(llama)["hessian"] is True
    assert settings_of(llama)["calibration"] == "self"


def test_self_calibration_of_an_encoder(tokenizer: PreTrainedTokenizerFast) -> None:
    """Words of the lists in no order: nobody has to give text."""
    encoder = FAMILIES["bert"].make("AutoModel")
    hf_dirembed.compress(encoder, tokenizer, bits=6, languages="en", calibration="self")
    recorded = settings_of(encoder)
    assert (recorded["hessian"], recorded["calibration"]) == (True, "self")
    assert recorded["calibration_tokens"] >= 32_768
    with pytest.raises(CalibrationError, match="writes no text"):
        hf_dirembed.compress(
            FAMILIES["bert"].make("AutoModelForMaskedLM"), tokenizer, bits=6, languages="en", calibration="self"
        )


def test_an_untied_head_and_an_encoder(tokenizer: PreTrainedTokenizerFast) -> None:
    """The Hessian of an input table leaves the head out, and that of a head of its own the input."""
    untied = FAMILIES["llama-untied"].make("AutoModelForCausalLM")
    statistics = hf_dirembed.calibrate(untied, tokenizer, TEXTS)
    used = Calibration.of(untied, tokenizer, statistics, "en")
    sides = {"model.embed_tokens": {"use_head": False}, "lm_head": {"use_gradient": False}}
    for path, side in sides.items():
        assert torch.equal(used.measure(untied, tokenizer, path, "en")[1], hessian(statistics, **side))
    hf_dirembed.compress(untied, tokenizer, bits=5, languages="en", calibration=TEXTS)
    embedding, head = untied.get_input_embeddings(), untied.get_output_embeddings()
    assert isinstance(embedding, CompressedEmbedding)
    assert isinstance(head, CompressedLinear)
    assert head.weight is not embedding.weight
    assert set(untied.config.dirembed["tables"]) == set(sides)
    encoder = FAMILIES["bert"].make("AutoModel")
    statistics = hf_dirembed.calibrate(encoder, tokenizer, TEXTS)
    used = Calibration.of(encoder, tokenizer, statistics, "en")
    assert torch.equal(used.measure(encoder, tokenizer, input_table(encoder), "en")[1], hessian(statistics))


def test_the_tokenizer_tells_which_rows_matter(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["bert"].make("AutoModel")
    dense = model.get_input_embeddings().weight.data.clone()
    hf_dirembed.compress(model, tokenizer, bits=6, languages="en")
    rows = nn.functional.cosine_similarity(dense, model.get_input_embeddings().dense_weight())
    frequent = tokenizer.convert_tokens_to_ids(["the", "of", "and", "to", "in", "a"])
    assert rows[frequent].mean() > rows[len(tokenizer) :].mean()


@pytest.mark.parametrize("method", hf_dirembed.compression.METHODS)
def test_from_embedding(method: str) -> None:
    """Any torch model: the module has the shape, the dtype and the padding of the dense one."""
    dense = nn.Embedding(600, 24, padding_idx=3, dtype=torch.float64 if method == "svd" else torch.float32).float()
    before = dense.weight.detach().clone()
    module = CompressedEmbedding.from_embedding(dense, method=method, ratio=4)
    assert torch.equal(dense.weight, before)
    ids = torch.tensor([[0, 599], [3, 7]])
    assert module(ids).shape == (2, 2, 24)
    torch.testing.assert_close(module(ids), module.to_dense()(ids))
    assert module.num_bytes <= before.nbytes / 4
    assert set(module.state_dict()) <= set(CODE_TENSORS)
    assert "bits_per_weight" in repr(module)


def test_training_reaches_the_decoder_and_leaves_packed_codes_alone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    family = FAMILIES["bert"]
    model = hf_dirembed.compress(family.make("AutoModelForMaskedLM"), tokenizer, bits=6).train()
    model.requires_grad_(True)
    codes = {name: tensor.clone() for name, tensor in codes_of(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = family.inputs()["input_ids"]
    losses = []
    for _ in range(8):
        loss = model(**family.inputs(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in codes_of(model).items():
        assert torch.equal(tensor, codes[name]) == (not tensor.is_floating_point()), name
    # What training left needs more than 8 bits to be saved exactly; a fresh decoder does not.
    for trained, dtype in ((True, "float32"), (False, "float8_e4m3fn")):
        saved = model if trained else hf_dirembed.compress(family.make("AutoModelForMaskedLM"), tokenizer, bits=6)
        saved.eval().save_pretrained(tmp_path / dtype)
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / dtype).eval()
        assert again.config.dirembed["tables"][input_table(again)]["decoder"] == dtype
        assert inspect_checkpoint(tmp_path / dtype).bytes == saved.get_input_embeddings().num_bytes
        with torch.no_grad():
            assert torch.equal(again(**family.inputs()).logits, saved(**family.inputs()).logits)


MISTAKES = {
    "compressed already": ({"bits": 6, "twice": True}, hf_dirembed.ModelError, "compressed already"),
    "rank for transform": ({"rank": 4}, hf_dirembed.BudgetError, "rank=4"),
    "latent dtype for transform": (
        {"bits": 6, "latent_dtype": "float16"},
        hf_dirembed.OptionError,
        "transform packs its own",
    ),
    "settings of another": (
        {"bits": 6, "settings": AutoencoderSettings()},
        hf_dirembed.OptionError,
        "AutoencoderSett",
    ),
    "settings for svd": (
        {"rank": 4, "method": "svd", "settings": TransformSettings()},
        hf_dirembed.OptionError,
        "svd",
    ),
    "Hessian for svd": ({"rank": 4, "method": "svd", "hessian": torch.eye(32)}, hf_dirembed.OptionError, "hessian"),
    "calibrated svd": ({"rank": 4, "method": "svd", "calibration": TEXTS}, hf_dirembed.OptionError, "calibration"),
    "no text": ({"bits": 6, "calibration": []}, CalibrationError, "no text"),
    "self of an encoder": ({"bits": 6, "calibration": "self"}, CalibrationError, "no text of its own"),
    "missing file": ({"bits": 6, "calibration": "nowhere.txt"}, CalibrationError, "nowhere.txt"),
    "weights of another table": ({"bits": 6, "token_weights": torch.ones(3)}, hf_dirembed.OptionError, "160"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    options, error, expected = MISTAKES[name]
    options = dict(options)
    model = FAMILIES["bert"].make("AutoModelForMaskedLM")
    if options.pop("twice", False):
        hf_dirembed.compress(model, tokenizer, **options)
    else:
        before = model.get_input_embeddings()
    with pytest.raises(error, match=expected):
        hf_dirembed.compress(model, tokenizer, **options)
    assert name == "compressed already" or model.get_input_embeddings() is before


def test_models_of_one_config_are_apart(tmp_path: Path) -> None:
    config = FAMILIES["llama-tied"].make("AutoModelForCausalLM").config
    first, second = (transformers.LlamaForCausalLM(config) for _ in range(2))
    hf_dirembed.compress(first, method="svd", ratio=4)
    assert first.config is first.model.config is not config
    assert type(config) is type(second.config) is transformers.LlamaConfig
    second.save_pretrained(tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.LlamaModel
    hf_dirembed.compress(second, method="svd", ratio=2)
    ranks = [each.config.dirembed["tables"]["model.embed_tokens"]["rank"] for each in (first, second)]
    assert ranks[0] < ranks[1]


def test_calibration_needs_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="tokenizer"):
        hf_dirembed.compress(FAMILIES["bert"].make("AutoModelForMaskedLM"), bits=6, calibration=TEXTS)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 8)
    if torch.cuda.is_available():
        assert compress_table(rows, method="svd", rank=2).record.settings["device"] == "cuda"
        return
    assert compress_table(rows, method="svd", rank=2).record.settings["device"] == "cpu"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(OptionError, match="device 'cuda' cannot be used"):  # it was tried
            compress_table(rows, method="svd", rank=2)
        assert compress_table(rows, method="svd", rank=2, device="cpu").record.settings["device"] == "cpu"
    with pytest.raises(OptionError, match=r"device 'gpu' cannot be used .*: give cpu"):
        compress_table(rows, method="svd", rank=2, device="gpu")
