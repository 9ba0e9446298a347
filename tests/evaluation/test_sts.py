"""Correlations against scipy on embeddings of one sentence at a time; models as objects and as folders."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed.evaluation import EvaluationError, compare_sts, sts


PAIRS = [
    ("the cat sat", "a dog ran to the green house in a tree", 1.0),
    ("the cat sat", "the cat sat on a mat", 4.5),
    ("blue tree", "blue", 3.0),
    ("a b c d e f g", "h i j", 0.0),
    ("the dog ran", "the dog ran", 5.0),
    ("a house of green", "a tree of green and blue", 3.0),
]


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.3, **sizes))


@torch.no_grad()
def embed(model: BertModel, tokenizer: PreTrainedTokenizerFast, sentence: str, pooling: str) -> Tensor:
    hidden = model.eval()(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
    return hidden[0] if pooling == "cls" else hidden.mean(dim=0)


def cosines(model: BertModel, tokenizer: PreTrainedTokenizerFast, pooling: str, prefix: str = "") -> list[float]:
    return [
        torch.cosine_similarity(*(embed(model, tokenizer, prefix + text, pooling) for text in pair[:2]), dim=0).item()
        for pair in PAIRS
    ]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_correlates_cosines_of_sentence_embeddings_with_gold_scores(model, tokenizer, pooling) -> None:
    model.train()
    figures = sts(model, PAIRS, tokenizer, pooling=pooling, prefix="a cat ", batch_size=3)
    assert model.training
    found, gold = cosines(model, tokenizer, pooling, "a cat "), [score for *_, score in PAIRS]
    assert figures.cosines == pytest.approx(found, abs=1e-5)
    assert figures.spearman == pytest.approx(stats.spearmanr(found, gold).statistic)
    assert figures.pearson == pytest.approx(stats.pearsonr(found, gold).statistic, abs=1e-5)
    assert (figures.num_pairs, figures.pooling, figures.prefix, figures.max_length) == (6, pooling, "a cat ", 32)


def test_limit_takes_the_first_pairs(model, tokenizer) -> None:
    assert sts(model, PAIRS, tokenizer, limit=4) == sts(model, PAIRS[:4], tokenizer)


def test_compares_a_compressed_model_with_its_reference(model, tokenizer) -> None:
    compressed = hf_dirembed.compress(copy.deepcopy(model), method="svd", rank=8)
    both = compare_sts(compressed, model, PAIRS, tokenizer, batch_size=4)
    assert both.model == sts(compressed, PAIRS, tokenizer, batch_size=4)
    assert both.reference == sts(model, PAIRS, tokenizer, batch_size=4)
    assert both.difference["spearman"] == both.model.spearman - both.reference.spearman
    sentences = [sentence for pair in PAIRS for sentence in pair[:2]]
    alike = [
        torch.cosine_similarity(*(embed(each, tokenizer, text, "mean") for each in (compressed, model)), dim=0).item()
        for text in sentences
    ]
    assert both.agreement == {"cosine": pytest.approx(sum(alike) / len(alike), abs=1e-5)}
    assert both.agreement["cosine"] < 0.999
    assert compare_sts(model, model, PAIRS, tokenizer).agreement == {"cosine": pytest.approx(1)}


def test_folder_is_pooled_by_its_own_modules_dense_or_compressed(model, tokenizer, tmp_path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    transformer, mean = sentence_transformers.SentenceTransformer(str(tmp_path / "plain"))
    sentence_transformers.SentenceTransformer(modules=[transformer, type(mean)(32, "cls")]).save(str(tmp_path / "own"))

    own, cls = sts(tmp_path / "own", PAIRS), sts(tmp_path / "plain", PAIRS, pooling="cls")
    assert (own.pooling, sts(tmp_path / "plain", PAIRS).pooling) == ("modules", "mean")
    assert own.spearman == cls.spearman
    assert own.pearson == pytest.approx(cls.pearson)
    assert sts(tmp_path / "own", PAIRS, pooling="mean").pearson == pytest.approx(sts(model, PAIRS, tokenizer).pearson)

    compressed = hf_dirembed.compress(copy.deepcopy(model), method="svd", rank=8)
    compressed.save_pretrained(tmp_path / "own")
    both = compare_sts(tmp_path / "own", tmp_path / "plain", PAIRS, pooling=None)
    assert (both.model.pooling, both.reference.pooling) == ("modules", "mean")
    assert both.model.pearson == pytest.approx(sts(compressed, PAIRS, tokenizer, pooling="cls").pearson)
    with pytest.raises(EvaluationError, match=r"no modules\.json"):
        sts(tmp_path / "plain", PAIRS, pooling="modules")


def test_model_with_a_head_is_read_beneath_it(model, tokenizer) -> None:
    with_head = BertForMaskedLM(model.config)
    with_head.bert.load_state_dict(model.state_dict(), strict=False)
    assert sts(with_head, PAIRS, tokenizer).pearson == pytest.approx(sts(model, PAIRS, tokenizer).pearson)


def test_refuses_what_does_not_fit(model, tokenizer) -> None:
    with pytest.raises(EvaluationError, match="pooling='max' is unknown"):
        sts(model, PAIRS, tokenizer, pooling="max")
    with pytest.raises(EvaluationError, match="comes without a tokenizer"):
        sts(model, PAIRS)
    with pytest.raises(EvaluationError, match="makes no embeddings"):
        sts(torch.nn.Linear(2, 2), PAIRS)
    with pytest.raises(EvaluationError, match="needs the folder"):
        sts(model, PAIRS, tokenizer, pooling="modules")
    with pytest.raises(EvaluationError, match="all alike"):
        sts(model, PAIRS, tokenizer, limit=1)
    with pytest.raises(EvaluationError, match="limit=-1"):
        sts(model, PAIRS, tokenizer, limit=-1)
    with pytest.raises(EvaluationError, match="the same similarity"):
        sts(model, [("a cat", "a cat", 1), ("the dog", "the dog", 2)], tokenizer, pooling="cls", prefix="")
    with pytest.raises(hf_dirembed.DirEmbedError, match="neither a folder"):
        sts("no/such-model", PAIRS)
