"""The trained autoencoder of Bałazy et al. 2021, "Direction is what you need" (arXiv 2106.08181)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ...errors import OptionError
from ..subspace import check_rank, length_scale, svd
from ..table import Table
from .factorization import Factorization
from .training_state import TrainingState


_COSINE_EPSILON = 1e-6
_ALPHA_EPSILON = 1e-10  # keeps the gradient of |error|^α finite at an error of zero


@dataclass(frozen=True)
class AutoencoderSettings:
    """How `train_autoencoder` trains.

    Loss, schedule and learning rate are the paper's. Batches are larger, 512 rows for the paper's 32, and as a
    sixteenth of the steps does not bring random weights to the right scale, training starts at the SVD, which the
    paper's code offers too. On all-MiniLM-L6-v2's table that gives a higher mean cosine than the published settings,
    which are `AutoencoderSettings.paper()`.

    Neither Adam's steps nor |x - x̂|^α scale with the table, so the settings fit rows of about one length: that of
    BERT's rows, between 1 and 2. Every table is therefore divided by the power of two that brings the median length of
    its rows there; one whose rows are of that length is trained on as it is, with the published settings as published.

    Attributes:
        cosine_weight: Weight of mean(1 - cos(x, x̂)).
        norm_weight: Weight of the norm term, which alone tells the model how long a vector is.
        norm_loss: `"alpha"`: mean((|x - x̂| + 1e-10)^α), the paper's choice; `"rmse"`: root mean square error.
        alpha_start: α in the first epoch, with `norm_loss="alpha"`.
        alpha_end: α from epoch `alpha_epochs` on.
        alpha_epochs: The epochs in which α goes linearly from `alpha_start` to `alpha_end`.
        epochs: Passes over the table.
        batch_size: Rows per step.
        learning_rate: Adam's, in the first epoch.
        decay_epochs: The learning rate is multiplied by `decay` every so many epochs.
        decay: What the learning rate is multiplied by.
        initialisation: `"random"`: uniform in ±1/√fan_in; `"svd"`: the truncated SVD of the table.
        nonlinear_encoder: ELU after the encoder. The latents are then ELU's outputs, the decoder stays affine. The
            paper's non-linear *decoder* is not offered: its ELU after the decoder is no affine map of the latents,
            so it could be stored neither as `Factorization` nor as the factor of a tied head.
        seed: Where the random numbers of the initial weights and of the order of the rows start.

    Raises:
        OptionError: If a setting is out of its range.

    Example:
        >>> AutoencoderSettings(epochs=5).alpha(0)
        1.0
        >>> AutoencoderSettings(batch_size=0)
        Traceback (most recent call last):
        ...
        hf_dirembed.remote.codes_dirembed.OptionError: autoencoder setting batch_size=0: give an integer of at least 1
    """

    cosine_weight: float = 0.9975 / 5
    norm_weight: float = 0.0025
    norm_loss: Literal["alpha", "rmse"] = "alpha"
    alpha_start: float = 1.0
    alpha_end: float = 0.1
    alpha_epochs: int = 20
    epochs: int = 30
    batch_size: int = 512
    learning_rate: float = 1e-3
    decay_epochs: int = 4
    decay: float = 0.5
    initialisation: Literal["random", "svd"] = "svd"
    nonlinear_encoder: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha_epochs", "epochs", "batch_size", "decay_epochs"):
            value = getattr(self, name)
            self._require(name, _is_integer(value) and value >= 1, "an integer of at least 1")

        for name in ("cosine_weight", "norm_weight"):
            value = getattr(self, name)
            self._require(name, _is_finite(value) and value >= 0, "a finite number >= 0")
        self._require("cosine_weight", self.cosine_weight + self.norm_weight > 0, "a positive cosine or norm weight")

        for name in ("alpha_start", "alpha_end", "learning_rate"):
            value = getattr(self, name)
            self._require(name, _is_finite(value) and value > 0, "a finite number > 0")
        self._require("decay", _is_finite(self.decay) and 0 < self.decay <= 1, "a number in (0, 1]")

        self._require("norm_loss", self.norm_loss in ("alpha", "rmse"), "'alpha' or 'rmse'")
        self._require("initialisation", self.initialisation in ("random", "svd"), "'random' or 'svd'")
        self._require("nonlinear_encoder", isinstance(self.nonlinear_encoder, bool), "True or False")
        self._require("seed", _is_integer(self.seed) and 0 <= self.seed < 2**63, "an integer in [0, 2^63)")

    def _require(self, name: str, holds: bool, mend: str) -> None:
        if not holds:
            raise OptionError(f"autoencoder setting {name}={getattr(self, name)!r}: give {mend}")

    @classmethod
    def paper(cls, **changes: Any) -> AutoencoderSettings:
        """The published settings: batches of 32 rows, random initial weights; `changes` override."""
        return cls(**{"batch_size": 32, "initialisation": "random", **changes})

    def alpha(self, epoch: int) -> float:
        """α of the norm term in `epoch`, counted from 0 (paper, section 3)."""
        done = min(epoch / self.alpha_epochs, 1.0)
        return self.alpha_start + (self.alpha_end - self.alpha_start) * done

    def rate(self, epoch: int) -> float:
        """Adam's learning rate in `epoch`, counted from 0."""
        return self.learning_rate * self.decay ** (epoch // self.decay_epochs)


def autoencoder_loss(rows: Tensor, approximation: Tensor, settings: AutoencoderSettings, epoch: int) -> Tensor:
    """The paper's loss: cosine_weight · mean(1 - cos(x, x̂)) + norm_weight · mean((|x - x̂| + 1e-10)^α).

    Args:
        rows: x, (n, dim) float.
        approximation: x̂, the same shape.
        settings: The weights of the two terms, and which norm term.
        epoch: Counted from 0; sets α.

    Returns:
        A scalar tensor.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> round(float(autoencoder_loss(x, 2 * x, AutoencoderSettings(), epoch=0)), 5)  # 0.0025 · (3 + 4) / 2
        0.00875
    """
    cosine = F.cosine_similarity(rows, approximation, dim=1, eps=_COSINE_EPSILON)
    error = approximation - rows
    if settings.norm_loss == "rmse":
        norm = error.square().mean().sqrt()
    else:
        norm = (error.abs() + _ALPHA_EPSILON).pow(settings.alpha(epoch)).mean()
    return settings.cosine_weight * (1 - cosine).mean() + settings.norm_weight * norm


def train_autoencoder(
    table: Table, rank: int, settings: AutoencoderSettings | None = None, *, resume: str | Path | None = None
) -> Factorization:
    """Trains the paper's autoencoder, x̂ = (x E + e) D + b, on the rows of a table by gradient descent.

    Training reads the rows in random order, so the whole table is held in memory as float32 on `table.device`; the
    latents are computed chunk by chunk afterwards. The last epoch's weights are taken: nothing is chosen on data.
    A table that is twice as large gives the same latents and a decoder that is twice as large.
    The same seed gives the same bits on the same machine, and torch's global random state is not touched.

    Args:
        table: The (num_rows, dim) table.
        rank: The number of latent dimensions, 1 to dim.
        settings: By default `AutoencoderSettings()`: the paper's loss and schedule, in larger batches
            and from the SVD.
        resume: A file that is written after every epoch. If it exists, training goes on from there, to the same bits
            as without the interruption; table, rank and settings must be the same.

    Returns:
        Latents (num_rows, rank), decoder (rank, dim) and bias (dim,), all float32.

    Raises:
        BudgetError: If `rank` is not in 1 to dim.
        CheckpointError: If `resume` was written for another table, rank or settings, is damaged, or cannot be written.
        TableError: If the table holds a NaN or an infinity.

    Source: Bałazy et al. 2021, section 3 and appendix; linear encoder and decoder, both with bias.

    Example:
        >>> rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> train_autoencoder(Table(rows), rank=2, settings=AutoencoderSettings(epochs=2)).reconstruct().shape
        torch.Size([64, 8])
    """
    *_, trained = autoencoder_epochs(table, rank, settings, resume=resume)
    return trained.factorize(table)


def autoencoder_epochs(
    table: Table, rank: int, settings: AutoencoderSettings | None = None, *, resume: str | Path | None = None
) -> Iterator[Autoencoder]:
    """Trains as [`train_autoencoder`] does, and yields the model after each epoch: the same one, which goes on.

    For choosing an epoch, as the paper does by perplexity on its test set; chosen so, that figure flatters. Where an
    interrupted training goes on, the first model is that of the last epoch before.

    Args:
        table: The (num_rows, dim) table.
        rank: The number of latent dimensions, 1 to dim.
        settings: How to train; by default `AutoencoderSettings()`.
        resume: A file that is written after every epoch, and that training goes on from if it exists.

    Raises:
        BudgetError: If `rank` is not in 1 to dim.
        CheckpointError: If `resume` does not belong to this training, is damaged, or cannot be written.
        TableError: If the table holds a NaN or an infinity.

    Example:
        >>> table = Table(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
        >>> epochs = autoencoder_epochs(table, rank=2, settings=AutoencoderSettings(epochs=3))
        >>> [tuple(each.factorize(table).latents.shape) for each in epochs]
        [(64, 2), (64, 2), (64, 2)]
    """
    check_rank(rank, table.dim)
    settings = AutoencoderSettings() if settings is None else settings

    generator = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same order of rows on every device
    model = _initial_model(table, rank, settings, generator)
    rows = torch.cat([chunk / model.scale for _, chunk in table.chunks()])
    optimizer = torch.optim.Adam(model.parameters())

    state = (
        None if resume is None else TrainingState(resume, model, optimizer, generator, table, rank, asdict(settings))
    )
    done = state.restore() if state else 0
    if done:
        yield model

    epochs = range(done, settings.epochs)
    progress = logging.tqdm(epochs, initial=done, total=settings.epochs, desc="Training autoencoder", unit="epoch")
    for epoch in progress:
        optimizer.param_groups[0]["lr"] = settings.rate(epoch)
        total = torch.zeros((), device=table.device)
        for batch in _batches(rows, settings.batch_size, generator):
            with torch.enable_grad():
                loss = autoencoder_loss(batch, model(batch), settings, epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)

        if state:
            state.save(epoch + 1)
        progress.set_postfix(loss=f"{total.item() / table.num_rows:.5f}")
        yield model


class Autoencoder(torch.nn.Module):
    """Encoder (dim, rank) and decoder (rank, dim), each with a bias, stored as they multiply row vectors.

    Args:
        encoder: E.
        decoder: D.
        biases: e and b.
        elu: Whether an ELU follows the encoder.
        scale: What the rows of the table are divided by before they are learnt.
    """

    def __init__(
        self, encoder: Tensor, decoder: Tensor, biases: tuple[Tensor, Tensor], *, elu: bool, scale: float
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Parameter(encoder), torch.nn.Parameter(decoder)
        self.encoder_bias, self.decoder_bias = map(torch.nn.Parameter, biases)
        self.elu = elu
        self.scale = scale

    def encode(self, rows: Tensor) -> Tensor:
        """The latents of scaled rows, (n, dim) to (n, rank)."""
        latents = torch.addmm(self.encoder_bias, rows, self.encoder)
        return F.elu(latents) if self.elu else latents

    def forward(self, rows: Tensor) -> Tensor:
        """The approximated rows, scaled as those given, (n, dim)."""
        return torch.addmm(self.decoder_bias, self.encode(rows), self.decoder)

    @torch.no_grad()
    def factorize(self, table: Table) -> Factorization:
        """What the model makes of a table at this moment, in the table's own scale; training goes on apart from it."""
        latents = torch.cat([self.encode(chunk / self.scale) for _, chunk in table.chunks()])
        return Factorization(latents, self.decoder * self.scale, self.decoder_bias * self.scale)


def _initial_model(table: Table, rank: int, settings: AutoencoderSettings, generator: torch.Generator) -> Autoencoder:
    def uniform(*shape: int, fan_in: int) -> Tensor:  # as torch.nn.Linear does it, which takes no generator
        return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)

    if settings.initialisation == "svd":
        decoder = svd(table, rank).decoder.cpu()
        encoder = decoder.T.clone()
        biases = torch.zeros(rank), torch.zeros(table.dim)
    else:
        encoder, decoder = uniform(table.dim, rank, fan_in=table.dim), uniform(rank, table.dim, fan_in=rank)
        biases = uniform(rank, fan_in=table.dim), uniform(table.dim, fan_in=rank)
    model = Autoencoder(encoder, decoder, biases, elu=settings.nonlinear_encoder, scale=length_scale(table))
    return model.to(table.device)


def _batches(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows in a random order, `batch_size` at a time; the last batch may be smaller."""
    for batch in torch.randperm(rows.shape[0], generator=generator).split(batch_size):
        yield rows[batch.to(rows.device)]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
