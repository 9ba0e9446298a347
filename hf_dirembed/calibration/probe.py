"""What a model's embedding and head see on text: the measuring part of calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..errors import CalibrationError
from .lookups import FurtherTable, RecordedLookups


SAMPLED_ELEMENTS = 1 << 22  # of distributions over the vocabulary that are held in float32 at once: 16 MB
_INPUT = ""  # what the input embedding is called among the tables that are looked up
MASKED_SHARE = 0.15  # of the tokens, as masked language models are trained


@dataclass
class Probe:
    """Runs a model on windows of token ids, and sums up what its embedding and its head see."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    head_inputs: list[Tensor] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))

    def __post_init__(self) -> None:
        embedding, self.head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise CalibrationError(
                f"the input embedding is a {type(embedding).__name__}: calibrate the dense model, then compress"
            )
        if isinstance(self.head, nn.Embedding):  # FSMT's: what it is given are ids
            raise CalibrationError(_beside_its_head(self.model))
        self.embedding = embedding
        self.further = FurtherTable.all_of(self.model)
        # encoder and decoder may each have a module for the same table
        shared = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.Embedding) and module.weight is embedding.weight
        ]
        self.lookups = RecordedLookups({_INPUT: shared} | {table.name: table.modules for table in self.further})
        self.num_rows, self.dim = self.embedding.weight.shape
        self.kind = "encoder" if self.head is None else _language_model_kind(self.model, self.tokenizer)
        if self.kind == "masked" and self.tokenizer.mask_token is None:
            raise CalibrationError("the tokenizer has no mask token: give the one the masked language model came with")
        self.collator = DataCollatorForLanguageModeling(
            self.tokenizer, mlm=self.kind == "masked", mlm_probability=MASKED_SHARE
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Cuts the graph at the rows that tables give, so that gradients end there, and keeps the head's input.

        The head is given the positions that predict and no others, as one row (1, n, d): a masked language model
        predicts at one position in seven, and a head is half of the work of a small one.
        """

        def select(module: nn.Module, args: Any) -> Any:
            if args[0].shape[:2] != self.positions.shape:
                raise CalibrationError(f"the head of {type(self.model).__name__} predicts elsewhere than in the text")
            hidden = args[0][self.positions.to(args[0].device)]
            self.head_inputs.append(hidden.detach())
            return (hidden.unsqueeze(0), *args[1:])

        hook = None if self.head is None else self.head.register_forward_pre_hook(select)
        try:
            with self.lookups:
                yield
        finally:
            if hook is not None:
                hook.remove()

    def no_sums(self, id_lists: list[list[int]]) -> dict[str, Tensor]:
        """The counts of windows, and sums that are still zero, float64: the sums of batches are added to them."""
        sums = {"counts": self.count(id_lists), "gradient": _moment(torch.zeros(0, self.dim))}
        for table in self.further:
            sums |= {f"{table.name}/{part}": zeros for part, zeros in table.no_sums().items()}
        sums["numbers"] = torch.tensor([sums["counts"].sum(), 0, len(id_lists)], dtype=torch.float64)
        if self.head is not None:
            head_rows, head_dim = cast(Tensor, self.head.weight).shape
            sums["head"] = _moment(torch.zeros(0, head_dim))
            sums["probabilities"] = torch.zeros(head_rows, dtype=torch.float64)
            sums["uncertainty"] = torch.zeros(head_rows, dtype=torch.float64)
        return sums

    def sums(self, batch: list[tuple[int, list[int]]]) -> dict[str, Tensor]:
        """The sums over a batch of numbered windows, (...) float64 on the CPU; counts stay zero."""
        sums = self.no_sums([])
        if batch:
            reads, hidden, probabilities, uncertainty = self.run(batch)
            sums["gradient"] += _moment(reads[_INPUT][1])
            for table in self.further:
                for part, value in table.sums(*reads[table.name]).items() if table.name in reads else ():
                    sums[f"{table.name}/{part}"] += value
            if self.head is not None:
                sums["head"] += _moment(hidden)
                sums["probabilities"] += probabilities.cpu().double()
                sums["uncertainty"] += uncertainty.cpu().double()
                sums["numbers"][1] += len(hidden)
        return sums

    def count(self, id_lists: Iterable[list[int]]) -> Tensor:
        """Counts token ids, (V,) float64."""
        ids = torch.tensor([index for ids in id_lists for index in ids], dtype=torch.long)
        if len(ids) and ids.max() >= self.num_rows:
            raise CalibrationError(
                f"token id {int(ids.max())} is beyond the table's {self.num_rows} rows: give the model's own tokenizer"
            )
        return torch.bincount(ids, minlength=self.num_rows).double()

    def run(
        self, batch: list[tuple[int, list[int]]]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]:
        """Runs the model, forward and backward, on one batch; padding is left out of what comes back.

        Returns:
            For each table that was looked up the ids (n,) and the gradients at their rows (n, d), under the empty name
            for the input embedding; the head's inputs (m, d), and the sums over these of the predicted probabilities p
            (V,) and of p (1 - p); the latter three are empty for a model without a head.

        Raises:
            CalibrationError: If the model looks its tokens up, or predicts, in a way that is not seen here.
        """
        self.lookups.found.clear()
        self.head_inputs.clear()
        inputs, self.positions, uniforms = self.inputs(batch)
        attended = inputs["attention_mask"].bool()
        hidden = probabilities = uncertainty = torch.zeros(0)

        with torch.enable_grad():
            if self.kind == "encoder":
                output, direction = self.pooled(inputs, batch)
            else:
                outputs = self.model(**inputs, **({} if self.kind == "masked" else {"use_cache": False}))
                # models for pretraining have a second head, and call the language model's by another name
                output = outputs.logits if "logits" in outputs else outputs.prediction_logits
                hidden = self.head_inputs[-1] if self.head_inputs else hidden
                if output.shape[:-1] != (1, len(hidden)):
                    raise CalibrationError(_beside_its_head(self.model))
                direction, probabilities, uncertainty = _score(output.detach()[0], uniforms[self.positions])
                direction = direction.unsqueeze(0)

        if not any(name == _INPUT for name, _, _ in self.lookups.found):
            raise CalibrationError(f"{type(self.model).__name__} reads its table beside its embedding's lookups")
        rows = [rows for _, _, rows in self.lookups.found]
        gradients = torch.autograd.grad(output, rows, direction, allow_unused=True, materialize_grads=True)
        reads = self.reads(gradients, attended)

        self.lookups.found.clear()
        self.head_inputs.clear()
        return reads, hidden, probabilities, uncertainty

    def reads(self, gradients: Sequence[Tensor], attended: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The ids (n,) and gradients (n, d) of all lookups in each table, without those of padding, (B, T) bool."""
        kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (name, ids, _), gradient in zip(self.lookups.found, gradients, strict=True):
            if ids.shape[:2] == attended.shape:
                ids, gradient = ids[attended.to(ids.device)], gradient[attended.to(gradient.device)]
            kept.setdefault(name, []).append((ids.flatten(), gradient.reshape(-1, gradient.shape[-1])))
        return {
            name: (torch.cat([ids for ids, _ in parts]), torch.cat([gradients for _, gradients in parts]))
            for name, parts in kept.items()
        }

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


def _beside_its_head(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} computes its logits beside its head: compress it without calibration"


def _score(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of Σ −log p(y) at the logits, (n, V), with labels y sampled from p, Σ p, (V,), and Σ p (1 - p).

    The gradient is p − onehot(y), written down instead of differentiated, which would hold three more tensors of that
    size.
    Labels are sampled by inverse distribution function, so that the random numbers can come from the CPU whatever
    the device.
    """
    gradient = torch.empty_like(logits)
    total, uncertainty = torch.zeros(2, logits.shape[-1], device=logits.device)
    draws = uniforms.to(logits.device).unsqueeze(-1)
    number = max(1, SAMPLED_ELEMENTS // logits.shape[-1])
    for start in range(0, len(logits), number):
        rows = slice(start, start + number)
        probabilities = logits[rows].softmax(-1, dtype=torch.float32)
        expected = probabilities.sum(0)
        total += expected
        uncertainty += (expected - probabilities.square().sum(0)).clamp_min(0)
        cumulative = probabilities.cumsum(-1)
        labels = torch.searchsorted(cumulative, draws[rows] * cumulative[:, -1:], right=True)
        labels.clamp_(max=logits.shape[-1] - 1)
        gradient[rows] = probabilities.scatter_add_(-1, labels, torch.full_like(draws[rows], -1))
    return gradient, total, uncertainty


def _moment(vectors: Tensor) -> Tensor:
    """Σ v vᵀ over rows, (d, d) float64 on the CPU."""
    vectors = vectors.detach().float()
    return (vectors.T @ vectors).cpu().double()


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
