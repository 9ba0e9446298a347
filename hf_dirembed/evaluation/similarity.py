"""Semantic textual similarity: how well cosines of sentence embeddings rank pairs as people do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints.loading import load_model, load_tokenizer, resolve_checkpoint
from ..errors import EvaluationError
from .data import SentencePairs, load_pairs, require
from .running import Comparison, check_counts, find_device, inference, longest_input, side_by_side


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .data import PairSource

Pooling = Literal["mean", "cls", "modules"]
POOLINGS = ("mean", "cls", "modules")
NOISE = 1e-6  # the spread of cosines that rounding in float32 makes by itself


@dataclass(frozen=True)
class STSFigures:
    """Correlations between cosine similarities and gold scores, and how they were taken.

    Attributes:
        spearman: The rank correlation, -1 to 1.
        pearson: The linear correlation, -1 to 1.
        num_pairs: Pairs of sentences.
        data: Where the pairs are from.
        pooling: `mean` over tokens, `cls` (the first token), or `modules`, the model's own.
        prefix: What was put before every sentence.
        max_length: Most tokens of a sentence, special ones included; None where the model's own modules say.
        cosines: The similarity of each pair.
    """

    MEASURES: ClassVar[tuple[str, ...]] = ("spearman", "pearson")
    ITEMS: ClassVar[tuple[str, ...]] = ("cosines",)

    spearman: float
    pearson: float
    num_pairs: int
    data: str
    pooling: str
    prefix: str
    max_length: int | None
    cosines: tuple[float, ...] = field(repr=False)


class STSOptions(TypedDict, total=False):
    """How similarity is taken: what [`sts`] and [`compare_sts`] take by name.

    Attributes:
        pooling: `mean` over the tokens that are no padding, `cls` (the first token), or `modules`: those that
            `modules.json` in the folder names, run by sentence_transformers. By default `modules` where there are
            some, else `mean`.
        prefix: Put before every sentence; e5 models want `"query: "`. Nothing by default.
        limit: Take only so many pairs, from the first on, for a quick look.
        max_length: Most tokens of a sentence; by default as many as model and tokenizer take.
        batch_size: Sentences at once, by default 32.
        device: Where a model runs that is given by its name; by default a GPU where there is one. One that is given
            as an object runs where it is.
    """

    pooling: Pooling | None
    prefix: str
    limit: int | None
    max_length: int | None
    batch_size: int
    device: str | None


def sts(
    model: PreTrainedModel | str | os.PathLike[str] | Any,
    pairs: PairSource | SentencePairs,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Unpack[STSOptions],
) -> STSFigures:
    """Spearman and Pearson correlation of cosine similarity with gold scores.

    Args:
        model: A transformers model; a folder or Hub id of one; or whatever has `encode`, as SentenceTransformer and
            model2vec do, which pools by itself.
        pairs: Whatever `load_pairs` takes, or what it returned.
        tokenizer: The tokenizer of a transformers model that is given as an object.
        **options: See [`STSOptions`].

    Raises:
        EvaluationError: If the pairs, the model or a setting does not fit, or correlations are undefined.
        CheckpointError: If there is no such folder or model, or it cannot be loaded.

    Example:
        >>> from transformers import BertConfig, BertModel, ByT5Tokenizer
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertModel(BertConfig(vocab_size=384, **sizes))
        >>> pairs = [("a cat", "a cat", 5), ("a cat", "prices rose", 0), ("a cat", "a kitten", 4)]
        >>> figures = sts(model, pairs, ByT5Tokenizer())
        >>> figures.num_pairs, figures.pooling, figures.pearson > 0
        (3, 'mean', True)
    """
    ((figures, _),) = _evaluate((model,), pairs, tokenizer, **options)
    return figures


def compare_sts(
    model: PreTrainedModel | str | os.PathLike[str] | Any,
    reference: PreTrainedModel | str | os.PathLike[str] | Any,
    pairs: PairSource | SentencePairs,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Unpack[STSOptions],
) -> Comparison[STSFigures]:
    """[`sts`] of a model and of its reference; `agreement["cosine"]` is the mean cosine between their embeddings.

    Args:
        model: As in [`sts`].
        reference: The model it is compared with, in any of the same forms, with embeddings of the same size.
        pairs: As in [`sts`].
        tokenizer: The tokenizer of both models, where they are given as objects.
        **options: The settings of both models; see [`STSOptions`].

    Raises:
        EvaluationError: As [`sts`] does, or if the embeddings are of different sizes.
        CheckpointError: As [`sts`] does.
    """
    (figures, ours), (expected, theirs) = _evaluate((model, reference), pairs, tokenizer, **options)
    if ours.shape != theirs.shape:
        raise EvaluationError(
            f"the model's embeddings have {ours.shape[-1]} dimensions, the reference's {theirs.shape[-1]}: "
            "give the dense model that this one was compressed from"
        )
    agreement = F.cosine_similarity(ours.double(), theirs.double(), dim=-1).mean().item()
    return side_by_side(figures, expected, {"cosine": agreement})


def _evaluate(
    models: Sequence[Any],
    pairs: PairSource | SentencePairs,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pooling: Pooling | None = None,
    prefix: str = "",
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> list[tuple[STSFigures, Tensor]]:
    """Figures and embeddings, (2, pairs, dim), of each model."""
    gold = _limited(load_pairs(pairs), limit)
    encoders = [_Encoder.of(model, tokenizer, pooling, max_length, device) for model in models]
    both = (*gold.first, *gold.second)
    embeddings = [encoder.embed(both, prefix, batch_size).view(2, len(gold.scores), -1) for encoder in encoders]
    return [(_figures(*each, gold, prefix), each[1]) for each in zip(encoders, embeddings, strict=True)]


def embed_sentences(
    model: PreTrainedModel | str | os.PathLike[str] | Any,
    sentences: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pooling: Pooling | None = None,
    prefix: str = "",
    max_length: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> Tensor:
    """The embeddings of sentences, (n, dim) float32 on the CPU.

    Args:
        model: As in [`sts`].
        sentences: Strings.
        tokenizer: The tokenizer of a transformers model that is given as an object.
        pooling: This and the following: see [`STSOptions`].
        prefix: Likewise.
        max_length: Likewise.
        batch_size: Likewise.
        device: Likewise.

    Raises:
        EvaluationError: If the model or a setting does not fit.
        CheckpointError: If there is no such folder or model, or it cannot be loaded.

    Example:
        >>> from transformers import BertConfig, BertModel, ByT5Tokenizer
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> embed_sentences(BertModel(BertConfig(vocab_size=384, **sizes)), ["a cat", "a dog"], ByT5Tokenizer()).shape
        torch.Size([2, 16])
    """
    return _Encoder.of(model, tokenizer, pooling, max_length, device).embed(sentences, prefix, batch_size)


def movement(embeddings: Tensor, reference: Tensor) -> float:
    """How far embeddings have moved from a reference's, as a share of how far those lie apart.

    Embeddings are compared by direction, so all are made of length 1. Movement is the root of their mean squared
    distance from the reference's, over the root of the mean squared distance of the reference's from their mean. At 0
    nothing has moved; at 1 a text is as far from where it was as texts are from their middle. The spread makes models
    comparable: where all embeddings fill a narrow cone, a small angle is a long way.

    Args:
        embeddings: (n, dim).
        reference: (n, dim), of the same texts by the reference model.

    Example:
        >>> reference = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> movement(2 * reference, reference), round(movement(reference.roll(1, 1), reference), 3)
        (0.0, 1.414)
    """
    ours, theirs = (F.normalize(each.double(), dim=1) for each in (embeddings, reference))
    spread = (theirs - theirs.mean(dim=0)).square().sum(dim=1).mean()
    return float(((ours - theirs).square().sum(dim=1).mean() / spread).sqrt())


def similarity_error(cosines: Any, reference: Any, axis: int = -1) -> Any:
    """How far the similarities of pairs are from a reference model's: root mean square of the differences, x 100.

    It tells two nearly equal models apart where the noise of gold scores does not.

    Args:
        cosines: (..., pairs) as [`STSFigures`] has them, or an array.
        reference: The similarities of the same pairs by the reference.
        axis: Which axis the pairs are on.

    Returns:
        (...) floats.

    Example:
        >>> round(float(similarity_error([0.5, 0.7], [0.5, 0.6])), 3)
        7.071
    """
    return 100 * np.sqrt(np.square(np.asarray(cosines) - np.asarray(reference)).mean(axis))


def _limited(pairs: SentencePairs, limit: int | None) -> SentencePairs:
    check_counts(limit=limit)
    scores = pairs.scores[:limit]
    if len(set(scores)) < 2:
        raise EvaluationError(f"the {len(scores)} gold scores of {pairs.name} are all alike: give more pairs")
    return replace(pairs, first=pairs.first[:limit], second=pairs.second[:limit], scores=scores)


def _figures(encoder: _Encoder, embeddings: Tensor, pairs: SentencePairs, prefix: str) -> STSFigures:
    """Scores embeddings, (2, pairs, dim)."""
    stats = require("scipy.stats")
    cosines = F.cosine_similarity(embeddings[0].double(), embeddings[1].double(), dim=-1).numpy()
    if not cosines.std() > NOISE:  # NaN is not either
        raise EvaluationError("the model gives all pairs the same similarity, or NaN: check how it was loaded")
    return STSFigures(
        spearman=float(stats.spearmanr(cosines, pairs.scores).statistic),
        pearson=float(stats.pearsonr(cosines, pairs.scores).statistic),
        num_pairs=len(pairs.scores),
        data=pairs.name,
        pooling=encoder.pooling,
        prefix=prefix,
        max_length=encoder.max_length,
        cosines=tuple(cosines.tolist()),
    )


@dataclass(frozen=True)
class _Encoder:
    """A model that makes embeddings of sentences. With `modules`, `model` has `encode`, and no tokenizer is needed."""

    model: Any
    tokenizer: Any
    pooling: str
    max_length: int | None

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, pooling: str | None, max_length: int | None, device: str | None
    ) -> _Encoder:
        check_counts(max_length=max_length)
        if pooling not in (None, *POOLINGS):
            raise EvaluationError(f"pooling={pooling!r} is unknown: choose one of {', '.join(POOLINGS)}")

        if isinstance(model, (str, os.PathLike)):
            folder = resolve_checkpoint(model)
            modules = (folder / "modules.json").is_file()
            if pooling == "modules" or (pooling is None and modules):
                if not modules:
                    raise EvaluationError(f"{folder} has no modules.json: choose pooling mean or cls")
                model = _sentence_transformer(os.fspath(folder)).to(find_device(device))
            else:
                model = load_model(folder).to(find_device(device))  # type: ignore[arg-type]
                tokenizer = tokenizer or load_tokenizer(folder)

        if not isinstance(model, PreTrainedModel):
            return cls._with_modules(model, pooling, max_length)
        if pooling == "modules":
            raise EvaluationError("pooling='modules' needs the folder that holds modules.json: give it as the model")
        if tokenizer is None:
            raise EvaluationError(f"{type(model).__name__} comes without a tokenizer: give one")
        return cls(model, tokenizer, pooling or "mean", max_length or longest_input(model, tokenizer))

    @classmethod
    def _with_modules(cls, model: Any, pooling: str | None, max_length: int | None) -> _Encoder:
        if not hasattr(model, "encode"):
            raise EvaluationError(f"a {type(model).__name__} makes no embeddings: give a transformers model")
        if pooling not in (None, "modules") or max_length is not None:
            raise EvaluationError(f"a {type(model).__name__} pools and truncates by itself: leave out both settings")
        return cls(model, None, "modules", None)

    def embed(self, texts: Sequence[str], prefix: str, batch_size: int) -> Tensor:
        """The embeddings of texts, (n, dim), in float32 on the CPU."""
        check_counts(batch_size=batch_size)
        sentences = [prefix + text for text in texts]
        if self.tokenizer is None:
            return torch.as_tensor(self.model.encode(sentences, batch_size=batch_size)).float().cpu()
        return self._embed(sentences, batch_size)

    def _embed(self, sentences: Sequence[str], batch_size: int) -> Tensor:
        if self.tokenizer.pad_token is None:
            raise EvaluationError(f"{type(self.tokenizer).__name__} has no padding token: set its pad_token")

        # Alike lengths together, the longest first: little padding, and what does not fit into memory shows at once.
        order = sorted(range(len(sentences)), key=lambda index: -len(sentences[index]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

        encoder = self.model.base_model  # beneath whatever head there is
        embeddings: list[Tensor] = [torch.empty(0)] * len(sentences)
        with inference(self.model):
            for batch in logging.tqdm(batches, desc=f"embeddings ({self.pooling})"):
                inputs = self.tokenizer(
                    [sentences[index] for index in batch], padding=True, padding_side="right", truncation=True,
                    max_length=self.max_length, return_tensors="pt",
                ).to(self.model.device)  # fmt: skip
                hidden = encoder(**inputs).last_hidden_state.float()
                for index, row in zip(batch, _pool(hidden, inputs["attention_mask"], self.pooling).cpu(), strict=True):
                    embeddings[index] = row

        return torch.stack(embeddings)


def _sentence_transformer(folder: str) -> Any:
    if find_spec("sentence_transformers") is None:
        raise EvaluationError(
            "the model's own modules need sentence_transformers: pip install 'hf_dirembed[demo]', "
            "or choose pooling mean or cls"
        )
    return require("sentence_transformers", extra="demo").SentenceTransformer(folder)


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector for each sequence: (batch, length, dim) to (batch, dim)."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
