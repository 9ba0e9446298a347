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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compression.table import Table
from ..errors import CalibrationError
from ..processes import process_state
from ..progress import progress_bar
from ..remote.codes_dirembed import with_known_options
from .lookups import FurtherTable
from .probe import Probe
from .statistics import Statistics, read_metadata
from .text import CALIBRATION_TOKENS, Texts, windows


ROUND_WINDOWS = 32  # between two writes of the file to resume from: a minute of a small model on a CPU
LOGIT_ELEMENTS = 1 << 27  # of a batch at most: half a gigabyte in float32, and as much again for its gradient
LOGIT_ELEMENTS_CPU = 1 << 25  # a CPU is no quicker with larger batches, but has to find fresh memory for each


@with_known_options
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    *,
    max_tokens: int = CALIBRATION_TOKENS,
    sequence_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    resume: str | Path | None = None,
) -> Statistics:
    """Gathers what a dense model does with its table: token counts and probabilities, E[h hᵀ] and E[g gᵀ].

    h is the head's input where the model predicts, g the gradient of the loss at the rows that it looked up.

    The gradient is that of the model's own loss, summed over positions, with labels sampled from its predictions: of
    the next token (causal), of masked tokens (masked), of the text itself from the text (encoder-decoder). A model
    without a head has no loss: g is then the gradient of the mean of its last hidden state in a random direction.
    The random numbers of a window depend on `seed` and on its place in the text alone, so batch size and device change
    the statistics by rounding only. Processes take whole batches in turn, and their number changes nothing.

    Args:
        model: A dense model, left as it was: mode, dtype, gradients, hooks and device. It runs on the accelerator's
            device unless it is spread over several; on a CPU it runs in float32.
        tokenizer: Its tokenizer.
        texts: The path of a UTF-8 file, strings, a `datasets` dataset (column `text`, or the only string column), or
            token ids such as `self_texts` gives. Read once, as far as needed.
        max_tokens: Where to stop, at the end of a window. benchmarks/effort.md says what more tokens bring; text of
            another kind is worth more.
        sequence_length: Tokens of a window, special tokens included; no more than the model and tokenizer allow.
        batch_size: Windows at once, fewer where the vocabulary is large.
        seed: Where the random numbers of masks, labels and directions start.
        accelerator: The caller's own; by default the processes that `accelerate launch` or `torchrun` started.
        resume: A file that is written now and then, with the final statistics in the end. If it exists, the work
            goes on from there; model and text must be the same.

    Returns:
        The statistics, the same in every process; moments are float64, on the CPU.

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
    state = accelerator.state if accelerator else process_state()
    probe = Probe(model, tokenizer, seed)
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    length = min([sequence_length, *(limit for limit in limits if limit and limit > 0)])

    # What a file to resume from must have been made with.
    settings = {"kind": probe.kind, "seed": seed, "sequence_length": length, "model": type(model).__name__}
    if resume is not None and not probe.embedding.weight.is_meta:  # offloaded
        settings["table"] = Table(probe.embedding.weight).digest()

    stream = _up_to(max_tokens, windows(texts, tokenizer, length=length, packed=probe.kind != "encoder"))
    digest = hashlib.sha256()  # of the windows so far, to tell other text when work goes on
    statistics = _resumed(resume, settings, stream, probe.num_rows, digest)

    # Only as many windows at once as the logits of a batch may take memory.
    elements = LOGIT_ELEMENTS_CPU if state.device.type == "cpu" else LOGIT_ELEMENTS
    fitting = batch_size if probe.kind == "encoder" else max(1, elements // (length * probe.num_rows))
    per_batch = min(batch_size, fitting)
    bar = progress_bar(
        "Calibrating", max_tokens, unit="token", done=statistics.num_tokens, shown=state.is_main_process
    )

    with bar as progress, _prepared(model, state.device), probe.recording():
        while of_round := list(islice(stream, ROUND_WINDOWS)):
            numbered = list(enumerate(of_round, start=statistics.num_windows))
            numbered.sort(key=lambda each: len(each[1]))  # texts of like length in a batch: little padding
            batches = [numbered[start : start + per_batch] for start in range(0, len(numbered), per_batch)]

            sums = probe.no_sums(of_round)
            for turn in range(0, len(batches), state.num_processes):
                of_turn = batches[turn : turn + state.num_processes]
                of_process = dict(enumerate(of_turn))
                _add_in_order(sums, probe.sums(of_process.get(state.process_index, [])), len(of_turn), state)
                progress.advance(sum(len(ids) for batch in of_turn for _, ids in batch))

            statistics += _as_statistics(sums, probe.further)
            if resume is not None and state.is_main_process:
                statistics.save(resume, metadata={**settings, "text": _update(digest, of_round)})

    state.wait_for_everyone()
    if not statistics.num_tokens:
        raise CalibrationError("texts holds no text: give a path, strings or a dataset with some")
    return statistics


def _add_in_order(sums: dict[str, Tensor], mine: dict[str, Tensor], num_batches: int, state: PartialState) -> None:
    """Adds the batches of the first processes, one after the other: the same sums, to the bit, however many there are.

    Args:
        sums: What the batches are added to.
        mine: The sums of this process's batch.
        num_batches: How many of the processes have a batch.
        state: The processes.
    """
    for owner in range(num_batches):
        part = mine
        if state.num_processes > 1:
            own = owner == state.process_index
            # NCCL sends what is on the device only
            sent = {name: (value if own else torch.empty_like(value)).to(state.device) for name, value in mine.items()}
            part = broadcast(sent, from_process=owner)
        for name, value in part.items():
            sums[name] += value.cpu()


def _as_statistics(sums: dict[str, Tensor], further: Sequence[FurtherTable]) -> Statistics:
    num_tokens, num_predictions, num_windows = (int(number) for number in sums["numbers"])
    head = sums["head"] / max(num_predictions, 1) if "head" in sums else None
    probabilities = sums["probabilities"] / max(num_predictions, 1) if "head" in sums else None
    uncertainty = sums["uncertainty"] / max(num_predictions, 1) if "head" in sums else None
    gradient = sums["gradient"] / max(num_tokens, 1)
    seen = {
        table.name: table.statistics({part: sums[f"{table.name}/{part}"] for part in table.no_sums()})
        for table in further
    }
    if not (gradient.isfinite().all() and (head is None or head.isfinite().all())):
        raise CalibrationError("the model gives NaN or infinity: load it in float32, or mend the checkpoint")
    return Statistics(
        sums["counts"], head, gradient, num_tokens, num_predictions, num_windows, probabilities, uncertainty, seen
    )


def _up_to(max_tokens: int, stream: Iterator[list[int]]) -> Iterator[list[int]]:
    """Windows until they hold `max_tokens`; the last one is whole, so that more tokens can follow later."""
    tokens = 0
    while tokens < max_tokens and (window := next(stream, None)) is not None:
        tokens += len(window)
        yield window


def _resumed(
    path: str | Path | None, settings: dict[str, Any], stream: Iterator[list[int]], num_rows: int, digest: Any
) -> Statistics:
    """Reads the file to resume from, and skips its windows in the stream; statistics are empty without a file."""
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

    On a CPU it runs in float32, whatever its dtype: rounded gradients make worse statistics.
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
