"""Fine-tuning from a dense or a compressed start alike, with transformers' Trainer, once for each seed."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate.utils import set_seed  # type: ignore[import-untyped]
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints.loading import load_model, load_tokenizer, resolve_checkpoint
from ..errors import EvaluationError
from ..remote.matrix_dirembed import CompressedMatrix
from .data import DatasetSource
from .running import check_counts, find_device


Example: TypeAlias = dict[str, Any]  # what a model is given of one example: token ids, and labels
Metrics: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class FineTuningSettings:
    """How a model is fine-tuned; the defaults are those of the published code of Bałazy et al. 2021 on GLUE.

    They are those of transformers' run_glue, with a learning rate of 2e-5 and batches of 16, of which two make a step.
    Two things differ: that code trains with one seed, in float16.

    Attributes:
        epochs: Passes over the training data.
        learning_rate: AdamW's learning rate at the start; it falls linearly to 0.
        batch_size: Examples of a step.
        weight_decay: AdamW's weight decay.
        warmup: The share of the steps in which the learning rate rises.
        max_length: Most tokens of an example, special ones included.
        train_decoder: Whether the decoder of a compressed table trains. The paper's does for its autoencoder, and does
            not for the SVD that it is compared with.
        seeds: Where the random numbers of the new head, of dropout and of the examples' order start; a run for each.
        device: `cpu`, or else the GPUs where there are some.

    Raises:
        EvaluationError: If one of them is out of range.

    Example:
        >>> FineTuningSettings(epochs=0)
        Traceback (most recent call last):
        ...
        hf_dirembed.errors.EvaluationError: epochs=0 is not above 0: give a larger one
    """

    epochs: float = 3.0
    learning_rate: float = 2e-5
    batch_size: int = 32
    weight_decay: float = 0.0
    warmup: float = 0.0
    max_length: int = 128
    train_decoder: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str | None = None

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size, max_length=self.max_length)
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise EvaluationError(f"{name}={getattr(self, name)!r} is not above 0: give a larger one")
        if not 0 <= self.warmup < 1:
            raise EvaluationError(f"warmup={self.warmup!r} is no share of the steps: give one from 0, below 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise EvaluationError(f"seeds={self.seeds!r} are not distinct numbers from 0: give one or more")

    def recorded(self) -> dict[str, Any]:
        """What results say of them: all that figures depend on."""
        settings = {name: value for name, value in asdict(self).items() if name != "device"}
        return {**settings, "seeds": list(self.seeds)}


@dataclass(frozen=True)
class FineTunedFigures:
    """What fine-tuned models reach, and how they were trained.

    Attributes:
        metrics: Means over the seeds.
        deviations: Standard deviations over the seeds (n - 1 in the denominator); empty for a single seed.
        by_seed: The metrics of each run, in the order of the seeds.
        data: What the models were evaluated on.
        training: What they were trained on.
        settings: How they were trained, and how many examples there were of both kinds.
    """

    metrics: Metrics
    deviations: Metrics
    by_seed: tuple[Metrics, ...]
    data: DatasetSource
    training: DatasetSource
    settings: dict[str, Any]


def freeze_codes(model: nn.Module, *, decoders: bool = False) -> None:
    """Leaves decoders trainable and codes as they are, in every method alike.

    Packed codes cannot be trained by gradients, float ones could: frozen, methods differ in what they start from, not
    in what is trained. A dense table is left trainable.

    Args:
        model: Dense or compressed.
        decoders: Freeze them too.

    Example:
        >>> import hf_dirembed
        >>> embedding = hf_dirembed.CompressedEmbedding.from_embedding(nn.Embedding(100, 16), method="svd", rank=4)
        >>> freeze_codes(embedding)
        >>> {name: parameter.requires_grad for name, parameter in embedding.named_parameters()}
        {'decoder_weight': True, 'weight': False}
    """
    for module in model.modules():
        if isinstance(module, CompressedMatrix):
            (module if decoders else module.weight).requires_grad_(False)


def load_start(
    model: str | os.PathLike[str], auto_class: Any, *, seed: int = 0, train_decoder: bool = True, **config: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What fine-tuning starts from: the model in float32 with a new head, its codes frozen, and its tokenizer.

    Args:
        model: A folder or a Hub id.
        auto_class: The AutoModel class of the task.
        seed: Where the random numbers of the new head start.
        train_decoder: Whether the decoder of a compressed table trains.
        **config: Settings of the head, like `num_labels`.

    Raises:
        CheckpointError: If there is no such model, or it cannot be loaded.
        ModelError: If the model cannot have such a head.
        EvaluationError: If it has no tokenizer that pads.
    """
    folder = resolve_checkpoint(model)
    set_seed(seed)
    with _quiet():  # the report would say that the head is new, which is meant
        # A head of another task that is in the checkpoint is replaced, hence mismatched sizes.
        start = load_model(folder, auto_class, dtype=torch.float32, ignore_mismatched_sizes=True, **config)

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise EvaluationError(f"{folder} has no tokenizer: save one beside the model")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise EvaluationError(f"{type(tokenizer).__name__} has no padding token: set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token

    start.config.pad_token_id = tokenizer.pad_token_id
    freeze_codes(start, decoders=not train_decoder)
    return start, tokenizer


def train_and_predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Example],
    evaluated: Sequence[Sequence[Example]],
    settings: FineTuningSettings,
    *,
    seed: int,
) -> list[tuple[np.ndarray, ...]]:
    """Fine-tunes a model, in place, and lets it predict.

    Args:
        model: What [`load_start`] returned.
        tokenizer: Its tokenizer, which pads.
        training: Examples with labels.
        evaluated: Sets of examples without labels.
        settings: How to train.
        seed: One of its seeds.

    Returns:
        The logits for each set, in the order of the set; those of later positions are padded, by -100.

    Raises:
        EvaluationError: If the predictions are not finite.
    """
    from transformers import Trainer, TrainingArguments  # costs seconds to import

    # The Trainer writes its log to stdout, where nothing but results belongs.
    with tempfile.TemporaryDirectory(prefix="dirembed-") as folder, redirect_stdout(sys.stderr):
        arguments = TrainingArguments(
            output_dir=folder, save_strategy="no", logging_strategy="no", report_to="none",
            num_train_epochs=settings.epochs, learning_rate=settings.learning_rate, seed=seed,
            per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=settings.batch_size,
            weight_decay=settings.weight_decay, warmup_steps=settings.warmup,
            remove_unused_columns=False, disable_tqdm=not logging.is_progress_bar_enabled(),
            use_cpu=find_device(settings.device).type == "cpu", dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

        collator = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, arguments, train_dataset=training, data_collator=collator)
        trainer.train()
        found = [trainer.predict(examples).predictions for examples in evaluated]  # type: ignore[arg-type]

    logits: list[tuple[np.ndarray, ...]] = [each if isinstance(each, tuple) else (each,) for each in found]
    if not all(np.isfinite(array).all() for arrays in logits for array in arrays[:1]):
        raise EvaluationError("the fine-tuned model gives NaN: lower the learning rate")
    return logits


def over_seeds(run: Callable[[int], Metrics], seeds: Sequence[int]) -> tuple[Metrics, Metrics, tuple[Metrics, ...]]:
    """Means, standard deviations (n - 1), and the metrics of each seed.

    Example:
        >>> over_seeds(lambda seed: {"accuracy": seed / 10}, (1, 3))[:2]
        ({'accuracy': 0.2}, {'accuracy': 0.1414213562373095})
    """
    runs = tuple(run(seed) for seed in seeds)
    values = {name: [metrics[name] for metrics in runs] for name in runs[0]}
    means = {name: fmean(each) for name, each in values.items()}
    deviations = {name: stdev(each) for name, each in values.items()} if len(runs) > 1 else {}
    return means, deviations, runs


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
