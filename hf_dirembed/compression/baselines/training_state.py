"""Where the training of the autoencoder stands, in a file that an interrupted run goes on from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...checkpoints.atomic import save_state
from ...errors import CheckpointError, first_line
from ..table import Table


FORMAT = "dirembed-autoencoder-2"


@dataclass
class TrainingState:
    """Saves and restores all that the next epoch depends on.

    That is the weights, Adam's moments and steps, and the random numbers of the order of the rows; learning rate and α
    follow from the epoch's number.

    Attributes:
        path: The file.
        model: What is trained.
        optimizer: The Adam that trains it.
        generator: What draws the order of the rows.
        table: What is learnt; the file has its digest.
        rank: The number of latents.
        settings: How it is trained, seed included, by name.
    """

    path: str | Path
    model: torch.nn.Module
    optimizer: torch.optim.Adam
    generator: torch.Generator
    table: Table
    rank: int
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.run: dict[str, Any] = {"rank": self.rank, **self.settings, "table": self.table.digest()}

    def save(self, epochs: int) -> None:
        """Writes the file, whole or not at all.

        Args:
            epochs: How many are done.

        Raises:
            CheckpointError: If it cannot be written.
        """
        header = {"format": FORMAT, "run": json.dumps(self.run), "epochs": str(epochs)}
        save_state(self.path, self._tensors(), header)

    def restore(self) -> int:
        """Puts model, optimizer and generator where the file says training stood.

        Returns:
            How many epochs are done: 0, and nothing is changed, if there is no file.

        Raises:
            CheckpointError: If the file is damaged, something else, or of another table, rank or settings.
        """
        if not Path(self.path).exists():
            return 0

        header, tensors = self._read()
        self._check_run(header)
        epochs = header.get("epochs", "")
        if not epochs.isdecimal() or not 0 < int(epochs) <= self.settings["epochs"]:
            raise CheckpointError(f"{self.path} says epochs={epochs!r:.20}: remove it, and train anew")

        for parameter in self.model.parameters():  # Adam makes its moments at the first step only
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **zeros}
        places = self._tensors()
        stored = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if stored != {name: (tensor.shape, tensor.dtype) for name, tensor in places.items()}:
            raise CheckpointError(f"{self.path} holds other tensors than this training: remove it, and train anew")

        try:
            self.generator.set_state(tensors["generator"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.path} holds no state of random numbers ({first_line(error)}): remove it, and train anew"
            ) from error

        with torch.no_grad():
            for name in places.keys() - {"generator"}:
                places[name].copy_(tensors[name])
        return int(epochs)

    def _tensors(self) -> dict[str, Tensor]:
        """The state by name; but for the generator's, the very tensors that training changes."""
        tensors = {"generator": self.generator.get_state()}
        for name, parameter in self.model.named_parameters():
            moments = {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
            tensors |= {name: parameter, **moments}
        return tensors

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata() or {}
                return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path} is no readable state of a training ({first_line(error)}): remove it, and train anew"
            ) from error

    def _check_run(self, header: dict[str, str]) -> None:
        try:
            run = json.loads(header.get("run", ""))
        except ValueError:
            run = None
        if header.get("format") != FORMAT or not isinstance(run, dict):
            raise CheckpointError(f"{self.path} holds no {FORMAT}: give a file that the autoencoder's training wrote")
        changed = [name for name, value in self.run.items() if run.get(name) != value]
        if changed == ["table"]:
            raise CheckpointError(f"{self.path} was trained on another table: go on with that, or give another file")
        if changed:
            was = ", ".join(f"{name}={run.get(name)!r:.40}" for name in changed if name != "table")
            raise CheckpointError(f"{self.path} was trained with {was}: go on with that, or give another file")
