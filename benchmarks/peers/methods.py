"""What a method is to this benchmark; the dense table, and the methods of hf_dirembed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_dirembed import CompressedEmbedding
from hf_dirembed.compression import CodedTable, compress_table
from hf_dirembed.remote.codes_dirembed import TableLayout
from hf_dirembed.remote.modules_dirembed import CompressedLinear


@dataclass(frozen=True)
class Table:
    """What a method is given.

    Attributes:
        rows: (V, d), dense.
        weights: (V,) how often each token is expected; for the methods that can use it.
        hessian: (d, d) what errors are measured in, from calibration text; likewise.
    """

    rows: Tensor
    weights: Tensor | None = None
    hessian: Tensor | None = None

    def save(self, file: Path) -> None:
        """Writes a safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in vars(self).items() if tensor is not None}, file)

    @classmethod
    def load(cls, file: Path) -> Table:
        """Reads what `save` wrote, into memory of its own."""
        return cls(**_read(file)[0])


@dataclass(frozen=True)
class Stored:
    """What a method keeps in place of a table, as it lies in a file.

    Attributes:
        tensors: All that is kept.
        settings: What else is needed to use them; fits JSON.
        shape: (V, d).
        dtype: Of the rows that come out, like `float32`.
        packed_bits: Bits per weight if values were packed that the method's package keeps one to a byte.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    shape: tuple[int, int]
    dtype: str
    packed_bits: float | None = None

    @classmethod
    def of(cls, rows: Tensor, tensors: dict[str, Tensor], packed_bits: float | None = None, **settings: Any) -> Stored:
        """What is kept of a table with these rows."""
        num_rows, dim = rows.shape
        dtype = str(rows.dtype).removeprefix("torch.")
        return cls(tensors, settings, (num_rows, dim), dtype, packed_bits)

    @property
    def kept_bits(self) -> float:
        """Bits per weight of all tensors, as they are."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / (self.shape[0] * self.shape[1])

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the rows that come out."""
        return getattr(torch, self.dtype)

    def save(self, file: Path) -> None:
        """Writes a safetensors file."""
        rest = {name: value for name, value in vars(self).items() if name != "tensors"}
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, file, {"stored": json.dumps(rest)})

    @classmethod
    def load(cls, file: Path) -> Stored:
        """Reads what `save` wrote, into memory of its own."""
        tensors, metadata = _read(file)
        rest = json.loads(metadata["stored"])
        return cls(tensors, **{**rest, "shape": tuple(rest["shape"])})


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:  # copied: pages of a mapped file would be read later, or twice
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


@dataclass(frozen=True)
class Runnable:
    """A table in use.

    Attributes:
        embedding: (...,) token ids to (..., d) rows.
        head: (batch, d) states to (batch, V) logits; None where a method's package has no such product.
    """

    embedding: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None


class Method(ABC):
    """A way to keep a table in fewer bytes.

    Attributes:
        name: As it is called on the command line and in the report.
        package: What it is from, as Python imports it.
        has_budget: Whether it can be told how many bits per weight to take.
        about: What it does, in a line.
    """

    name: str
    package: str = "hf_dirembed"
    has_budget: bool = True
    about: str = ""

    @property
    def family(self) -> str:
        """What its line in a plot is called; the methods of a package that have no budget share one."""
        return self.name if self.has_budget or self.package == "torch" else self.package

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.package) is not None

    @abstractmethod
    def fit(self, table: Table, bits: float | None) -> Stored:
        """Makes what is kept, in at most `bits` bits per weight where the method has a budget."""

    @abstractmethod
    def load(self, stored: Stored) -> Runnable:
        """Makes it ready for use."""


class Dense(Method):
    """The table as it is: what all others are measured against."""

    name = "dense"
    package = "torch"
    has_budget = False
    about = "the table as it is"

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Keeps all."""
        return Stored.of(table.rows, {"weight": table.rows})

    def load(self, stored: Stored) -> Runnable:
        """An `nn.Embedding` and the `nn.Linear` that is tied to it."""
        weight = stored.tensors["weight"]
        return Runnable(lambda ids: F.embedding(ids, weight), lambda states: F.linear(states, weight))


def half(dtype: torch.dtype) -> torch.dtype:
    """A dtype of two bytes for the latents of a table: at equal bytes they serve better than fewer of four."""
    return dtype if dtype.itemsize == 2 else torch.float16


class DirEmbed(Method):
    """A method of hf_dirembed."""

    def __init__(self, method: str, about: str) -> None:
        self.name, self.about = method, about

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Compresses, with token weights and Hessian where the method can use them."""
        options: dict[str, Any] = {}
        if self.name == "transform":
            options = {"token_weights": table.weights, "hessian": table.hessian}
        elif self.name == "direction":
            options = {"token_weights": table.weights}
        if self.name != "transform":
            options["latent_dtype"] = str(half(table.rows.dtype)).removeprefix("torch.")
        return coded_table(table.rows, compress_table(table.rows, method=self.name, bits=bits, **options))

    def load(self, stored: Stored) -> Runnable:
        """The modules that a compressed model has."""
        return coded_modules(stored)


def coded_table(rows: Tensor, coded: CodedTable) -> Stored:
    """What is kept of a table that was coded."""
    return Stored.of(rows, coded.tensors, layout=coded.layout.to_dict())


def coded_modules(stored: Stored) -> Runnable:
    """The embedding and the tied head over codes and a decoder."""
    num_rows, dim = stored.shape
    layout = TableLayout.from_dict(stored.settings["layout"])
    options: dict[str, Any] = {"dtype": stored.torch_dtype, "device": "meta"}
    embedding = CompressedEmbedding(num_rows, dim, layout, **options)
    head = CompressedLinear(dim, num_rows, layout, **options)
    decoder = {"decoder_weight", "decoder_bias_weight"} & stored.tensors.keys()
    tensors = {**stored.tensors, **{name: stored.tensors[name].to(stored.torch_dtype) for name in decoder}}
    for module in (embedding, head):
        module.load_state_dict(tensors, assign=True)
    return Runnable(embedding, head)


OWN: tuple[Method, ...] = (
    Dense(),
    DirEmbed("transform", "packed integer latents; with token weights, and the Hessian where text is given"),
    DirEmbed("direction", "float latents of the subspace that keeps directions best; with token weights"),
    DirEmbed("svd", "float latents, truncated SVD"),
)
