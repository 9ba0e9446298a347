"""Calibration: what a dense model does with its embedding table on text, before the table is compressed.

The head multiplies the table with its input h, so errors of the rows matter along E[h hᵀ]. The layers above the
embedding see it through the gradient g of the loss, so errors matter along E[g gᵀ], which is the Fisher information
if the labels are sampled from the model's own predictions. No label of the text is used, and no parameter is touched.

What text to use: mixed domains, as the model will see them (an encyclopedia, the web, code, every language). Text of
one domain buys accuracy there and loses it elsewhere, so mix the order too: only the beginning of the text is read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import reduce  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from .calibration_text import Texts, windows
from .statistics import CalibrationError, Statistics, read_metadata
from .table import Table


ROUND_WINDOWS = 32  # between two writes of the file to resume from: a minute of a small model on a CPU
LOGIT_ELEMENTS = 1 << 27  # of a batch at most: half a gigabyte in float32, and as much again for its gradient
LOGIT_ELEMENTS_CPU = 1 << 25  # a CPU is no quicker with larger batches, but has to find fresh memory for each
SAMPLED_ROWS = 256  # positions whose distribution over the vocabulary is held in float32 at once
MASKED_SHARE = 0.15  # of the tokens, as masked language models are trained


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    *,
    max_tokens: int = 32_768,
    sequence_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    resume: str | Path | None = None,
) -> Statistics:
    """Gathers what a dense model does with its table: token counts and probabilities, E[h hᵀ] and E[g gᵀ].

    h is the head's input where the model predicts, g the gradient of the loss at the embedding's output.

    The gradient is that of the model's own loss, summed over positions, with labels sampled from its predictions: of
    the next token (causal), of masked tokens (masked), of the text itself from the text (encoder-decoder). A model
    without a head has no loss: g is then the gradient of the mean of its last hidden state in a random direction.
    The random numbers of a window depend on `seed` and on its place in the text alone, so batch size, device and
    number of processes change the statistics by rounding only.

    Args:
        model: A dense model, left as it was: mode, dtype, gradients, hooks and device. It runs on the accelerator's
            device unless it is spread over several; on a CPU it runs in float32.
        tokenizer: Its tokenizer.
        texts: The path of a UTF-8 file, strings, a `datasets` dataset (column `text`, or the only string column), or
            token ids such as `self_generated_texts` gives. Read once, as far as needed.
        max_tokens: Where to stop, at the end of a window. What more tokens of the same kind of text bring beyond the
            default is worth about a hundredth of a bit per weight; text of another kind is worth more.
        sequence_length: Tokens of a window, special tokens included; no more than the model and tokenizer allow.
        batch_size: Windows at once, fewer where the vocabulary is large.
        seed: Of masks, labels and directions.
        accelerator: Of the caller; by default the processes that `accelerate launch` or `torchrun` started.
        resume: A file that is written now and then, with the final statistics in the end. If it exists, the work
            goes on from there; model and text must be the same.

    Returns:
        The statistics; moments are float64, on the CPU. The same in every process.

    Raises:
        CalibrationError: If the model is not a dense model with a last hidden state or a loss, the tokenizer does
            not belong to it, there is no text, or `resume` was written for another table, settings or text.
        CheckpointError: If `resume` cannot be written.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> name = "HuggingFaceTB/SmolLM2-135M"
        >>> tokenizer = AutoTokenizer.from_pretrained(name)  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained(name)  # doctest: +SKIP
        >>> calibrate(model, tokenizer, "mixed.txt").head_moment.shape  # doctest: +SKIP
        torch.Size([576, 576])
    """
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise CalibrationError(f"{name}={value}: give a positive number")
    model = accelerator.unwrap_model(model) if accelerator else model
    state = accelerator.state if accelerator else PartialState()
    probe = _Probe(model, tokenizer, seed)
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    length = min([sequence_length, *(limit for limit in limits if limit and limit > 0)])
    settings = {"kind": probe.kind, "seed": seed, "sequence_length": length, "model": type(model).__name__}
    if resume is not None and not probe.embedding.weight.is_meta:  # offloaded
        settings["table"] = Table(probe.embedding.weight).digest()
    stream = _up_to(max_tokens, windows(texts, tokenizer, length=length, packed=probe.kind != "encoder"))

    digest = hashlib.sha256()  # of the windows so far, to tell other text when work goes on
    statistics = _resumed(resume, settings, stream, probe.num_rows, digest)
    elements = LOGIT_ELEMENTS_CPU if state.device.type == "cpu" else LOGIT_ELEMENTS
    fitting = batch_size if probe.kind == "encoder" else max(1, elements // (length * probe.num_rows))
    per_batch = min(batch_size, fitting)
    bar = logging.tqdm(
        total=max_tokens, initial=statistics.num_tokens, unit="token", desc="Calibrating",
        disable=not state.is_main_process,
    )  # fmt: skip
    with bar, _prepared(model, state.device), probe.recording():
        while of_round := list(islice(stream, ROUND_WINDOWS)):
            numbered = list(enumerate(of_round, start=statistics.num_windows))
            mine = numbered[state.process_index :: state.num_processes]
            sums = probe.sums(mine, per_batch, lambda tokens: bar.update(tokens * state.num_processes))
            statistics += _as_statistics(reduce(sums, "sum") if state.num_processes > 1 else sums)
            if resume is not None and state.is_main_process:
                statistics.save(resume, metadata={**settings, "text": _update(digest, of_round)})
    state.wait_for_everyone()
    if not statistics.num_tokens:
        raise CalibrationError("texts holds no text: give a path, strings or a dataset with some")
    return statistics


@dataclass
class _Probe:
    """Runs a model on windows of token ids, and sums up what its embedding and its head see."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    embedded: list[Tensor] = field(default_factory=list)
    head_inputs: list[Tensor] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))

    def __post_init__(self) -> None:
        embedding, self.head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise CalibrationError(
                f"the input embedding is a {type(embedding).__name__}: calibrate the dense model, then compress"
            )
        self.embedding = embedding
        self.num_rows, self.dim = self.embedding.weight.shape
        self.kind = "encoder" if self.head is None else _language_model_kind(self.model, self.tokenizer)
        if self.kind == "masked" and self.tokenizer.mask_token is None:
            raise CalibrationError("the tokenizer has no mask token: give the one the masked language model came with")
        self.collator = DataCollatorForLanguageModeling(
            self.tokenizer, mlm=self.kind == "masked", mlm_probability=MASKED_SHARE
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Cuts the graph at the embedding's output, so that gradients end there, and keeps the head's input.

        The head is given the positions that predict and no others, as one row (1, n, d): a masked language model
        predicts at one position in seven, and a head is half of the work of a small one.
        """

        def embed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.embedded.append(output.detach().requires_grad_())
            return self.embedded[-1]

        def select(module: nn.Module, args: Any) -> Any:
            if args[0].shape[:2] != self.positions.shape:
                raise CalibrationError(f"the head of {type(self.model).__name__} predicts elsewhere than in the text")
            hidden = args[0][self.positions.to(args[0].device)]
            self.head_inputs.append(hidden.detach())
            return (hidden.unsqueeze(0), *args[1:])

        # encoder and decoder may each have a module for the same table
        shared = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.Embedding) and module.weight is self.embedding.weight
        ]
        hooks = [module.register_forward_hook(embed) for module in shared]
        if self.head is not None:
            hooks.append(self.head.register_forward_pre_hook(select))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sums(self, numbered: list[tuple[int, list[int]]], batch_size: int, progress: Any) -> dict[str, Tensor]:
        """Sums over numbered windows: float64 tensors that processes can add up."""
        device = self.embedding.weight.device
        sums = {"counts": self.count(ids for _, ids in numbered), "gradient": _moment(torch.zeros(0, self.dim))}
        sums["numbers"] = torch.tensor([sums["counts"].sum(), 0, len(numbered)], dtype=torch.float64)
        if self.head is not None:
            head_rows, head_dim = cast(Tensor, self.head.weight).shape
            sums["head"] = _moment(torch.zeros(0, head_dim))
            sums["probabilities"] = torch.zeros(head_rows, dtype=torch.float64)
        for start in range(0, len(numbered), batch_size):
            batch = numbered[start : start + batch_size]
            gradients, hidden, probabilities = self.run(batch)
            sums["gradient"] += _moment(gradients)
            if self.head is not None:
                sums["head"] += _moment(hidden)
                sums["probabilities"] += probabilities.cpu().double()
                sums["numbers"][1] += len(hidden)
            progress(sum(len(ids) for _, ids in batch))
        # NCCL adds up what is on the device only; MPS has no float64
        return {name: value.to(device) for name, value in sums.items()} if device.type == "cuda" else sums

    def count(self, id_lists: Iterable[list[int]]) -> Tensor:
        """Counts token ids, (V,) float64."""
        ids = torch.tensor([index for ids in id_lists for index in ids], dtype=torch.long)
        if len(ids) and ids.max() >= self.num_rows:
            raise CalibrationError(
                f"token id {int(ids.max())} is beyond the table's {self.num_rows} rows: give the model's own tokenizer"
            )
        return torch.bincount(ids, minlength=self.num_rows).double()

    def run(self, batch: list[tuple[int, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """One batch, padding left out.

        Returns:
            The gradients at the embedding's output (n, d), the head's inputs (m, d), and the sum over these of the
            predicted probabilities (V,); the latter two are empty for a model without a head.
        """
        self.embedded.clear()
        self.head_inputs.clear()
        inputs, self.positions, uniforms = self.inputs(batch)
        attended = inputs["attention_mask"].bool()
        hidden = probabilities = torch.zeros(0)
        with torch.enable_grad():
            if self.kind == "encoder":
                output, direction = self.pooled(inputs, batch)
            else:
                outputs = self.model(**inputs, **({} if self.kind == "masked" else {"use_cache": False}))
                # models for pretraining have a second head, and call the language model's by another name
                output = outputs.logits if "logits" in outputs else outputs.prediction_logits
                hidden = self.head_inputs[-1] if self.head_inputs else hidden
                if output.shape[:-1] != (1, len(hidden)):
                    raise CalibrationError(f"{type(self.model).__name__} computes its logits beside its head")
                direction, probabilities = _score(output.detach()[0], uniforms[self.positions])
                direction = direction.unsqueeze(0)
        gradients = torch.autograd.grad(output, self.embedded, direction)
        self.embedded.clear()
        self.head_inputs.clear()
        return torch.cat([gradient[attended] for gradient in gradients]), hidden, probabilities

    def inputs(self, batch: list[tuple[int, list[int]]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Pads a batch: the model's inputs, where it predicts (B, T) bool, and random numbers (B, T) to sample by."""
        width = max(len(ids) for _, ids in batch)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(batch), width), pad)
        attended = torch.zeros_like(ids)
        positions = torch.zeros_like(ids, dtype=torch.bool)
        uniforms = torch.zeros(ids.shape)
        special = set(self.tokenizer.all_special_ids)
        for row, (number, window) in enumerate(batch):
            generator = self.generator(number)
            size = len(window)
            ids[row, :size], attended[row, :size] = torch.tensor(window), 1
            if self.kind == "masked":
                self.collator.generator = generator
                mask = torch.tensor([[index in special for index in window]])
                masked, labels = self.collator.torch_mask_tokens(ids[row : row + 1, :size].clone(), mask)
                ids[row, :size], positions[row, :size] = masked[0], labels[0] != -100
            else:
                positions[row, : size - (self.kind == "causal")] = True  # the last has no next token in the window
            uniforms[row, :size] = torch.rand(size, generator=generator)
        inputs = {"input_ids": ids, "attention_mask": attended}
        if self.model.config.is_encoder_decoder:
            start = getattr(self.model.config, "decoder_start_token_id", None)
            first = torch.full((len(batch), 1), pad if start is None else start)
            inputs |= {"decoder_input_ids": torch.cat([first, ids[:, :-1]], 1), "decoder_attention_mask": attended}
        device = self.embedding.weight.device
        return {name: value.to(device) for name, value in inputs.items()}, positions, uniforms

    def pooled(self, inputs: dict[str, Tensor], batch: list[tuple[int, list[int]]]) -> tuple[Tensor, Tensor]:
        """The mean of each window's last hidden state (B, D), and a random direction of signs (B, D)."""
        outputs = self.model.base_model(**inputs)
        if getattr(outputs, "last_hidden_state", None) is None:
            raise CalibrationError(f"{type(self.model).__name__} has neither a head nor a last hidden state")
        attended = inputs["attention_mask"].unsqueeze(-1)
        mean = (outputs.last_hidden_state * attended).sum(1) / attended.sum(1)
        signs = [torch.randint(2, mean.shape[1:], generator=self.generator(number)) * 2 - 1 for number, _ in batch]
        return mean, torch.stack(signs).to(mean)

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of a window: they depend on its number, not on the batch or process it is in."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)


def _score(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of Σ −log p(y) at the logits, (n, V), each label y sampled from the model's own p, and Σ p, (V,).

    It is p − onehot(y), written down instead of differentiated, which would hold three more tensors of that size.
    Labels are sampled by inverse distribution function, so that the random numbers can come from the CPU whatever
    the device.
    """
    gradient = torch.empty_like(logits)
    total = torch.zeros(logits.shape[-1], device=logits.device)
    draws = uniforms.to(logits.device).unsqueeze(-1)
    for start in range(0, len(logits), SAMPLED_ROWS):
        rows = slice(start, start + SAMPLED_ROWS)
        probabilities = logits[rows].softmax(-1, dtype=torch.float32)
        total += probabilities.sum(0)
        cumulative = probabilities.cumsum(-1)
        labels = torch.searchsorted(cumulative, draws[rows] * cumulative[:, -1:], right=True)
        labels.clamp_(max=logits.shape[-1] - 1)
        gradient[rows] = probabilities.scatter_add_(-1, labels, torch.full_like(draws[rows], -1))
    return gradient, total


def _moment(vectors: Tensor) -> Tensor:
    """Σ v vᵀ over rows, (d, d) float64 on the CPU."""
    vectors = vectors.detach().float()
    return (vectors.T @ vectors).cpu().double()


def _as_statistics(sums: dict[str, Tensor]) -> Statistics:
    sums = {name: value.cpu() for name, value in sums.items()}
    num_tokens, num_predictions, num_windows = (int(number) for number in sums["numbers"])
    head = sums["head"] / max(num_predictions, 1) if "head" in sums else None
    probabilities = sums["probabilities"] / max(num_predictions, 1) if "head" in sums else None
    gradient = sums["gradient"] / max(num_tokens, 1)
    if not (gradient.isfinite().all() and (head is None or head.isfinite().all())):
        raise CalibrationError("the model gives NaN or infinity: load it in float32, or mend the checkpoint")
    return Statistics(sums["counts"], head, gradient, num_tokens, num_predictions, num_windows, probabilities)


def _language_model_kind(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Which loss the model was trained with: "causal", "masked" or "seq2seq"."""
    if model.config.is_encoder_decoder:
        return "seq2seq"
    names = {base.__name__ for base in type(model).__mro__}
    masked = bool(names & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()))
    causal = bool(names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    if masked != causal:
        return "masked" if masked else "causal"
    return "causal" if tokenizer.mask_token is None else "masked"  # in both lists (XLM) or in neither (pretraining)


def _up_to(max_tokens: int, stream: Iterator[list[int]]) -> Iterator[list[int]]:
    """Windows until they hold `max_tokens`; the last one is whole, so that more tokens can follow later."""
    tokens = 0
    while tokens < max_tokens and (window := next(stream, None)) is not None:
        tokens += len(window)
        yield window


def _resumed(
    path: str | Path | None, settings: dict[str, Any], stream: Iterator[list[int]], num_rows: int, digest: Any
) -> Statistics:
    """What a file to resume from holds, its windows skipped in the stream; empty statistics without one."""
    if path is None or not Path(path).exists():
        return Statistics(torch.zeros(num_rows, dtype=torch.float64), None, None, num_tokens=0)
    statistics = Statistics.load(path)
    written = read_metadata(path)
    changed = [name for name, value in settings.items() if written.get(name) != value]
    if changed == ["table"]:
        raise CalibrationError(f"{path} was calibrated on another model's table: give another file")
    if changed:
        was = ", ".join(f"{name}={written.get(name)}" for name in changed)
        raise CalibrationError(f"{path} was calibrated with {was}: go on with that, or give another file")
    skipped = list(islice(stream, statistics.num_windows))
    if len(statistics.counts) != num_rows or _update(digest, skipped) != written.get("text"):
        raise CalibrationError(f"{path} was calibrated on other or more text: go on with that, or give another file")
    return statistics


def _update(digest: Any, id_lists: Iterable[list[int]]) -> str:
    """Adds windows to a running `hashlib` digest."""
    for ids in id_lists:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()


@contextmanager
def _prepared(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Puts a model in evaluation mode on a device, its parameters out of the graph; afterwards as it was.

    On a CPU, where half precision is no faster, it runs in float32: rounded gradients make worse statistics.
    """
    modes = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    home = None if getattr(model, "hf_device_map", None) else model.device
    narrow: dict[Tensor, Tensor] = {}
    try:
        if home is not None and home != device:
            model.to(device)  # type: ignore[arg-type]
        if device.type == "cpu":
            tensors = chain(model.parameters(), model.buffers())
            narrow = {tensor: tensor.data for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)}
        for tensor in narrow:
            tensor.data = tensor.data.float()
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
        for tensor, data in narrow.items():
            tensor.data = data
        if home is not None and home != device:
            model.to(home)  # type: ignore[arg-type]
