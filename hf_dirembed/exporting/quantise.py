"""The bodies of exported models in 8 bits; their lookups, and tables that were not compressed, stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ExportError, OptionError, first_line


if TYPE_CHECKING:
    import onnx

BLOCK_SIZE = 128  # weights that share a scale, where only weights are in 8 bits


@dataclass(frozen=True)
class Body:
    """A form that the body of an exported model has.

    Attributes:
        name: What users call it.
        file: The file below `onnx/`, under the name that transformers.js looks for.
        dtype: What transformers.js calls it.
        description: What it is, for people.
    """

    name: str
    file: str
    dtype: str
    description: str


BODIES = {
    body.name: body
    for body in (
        Body("fp32", "model.onnx", "fp32", "body in float32"),
        Body("int8", "model_quantized.onnx", "q8", "body in 8 bits, weights and activations"),
        Body("int8-weights", "model_int8.onnx", "int8", "weights of the body in 8 bits"),
    )
}


def body_of(name: str) -> Body:
    """The body of a name.

    Raises:
        OptionError: If there is none.

    Example:
        >>> body_of("int8").file
        'model_quantized.onnx'
    """
    if name not in BODIES:
        raise OptionError(f"body {name!r} is not one of {', '.join(BODIES)}: choose one of these")
    return BODIES[name]


def write_quantised(model: onnx.ModelProto, body: Body, lookups: list[str], file: Path) -> None:
    """Writes a model with its matrix products in 8 bits.

    Args:
        model: The model with a body in float32; it is left as it is.
        body: The form that the body is to have.
        lookups: Names of the nodes that look tokens up, whose decoders are not quantised.
        file: Where to write it.

    Raises:
        ExportError: If onnxruntime cannot quantise it.
    """
    with _quiet():
        try:
            if body.name == "int8":
                _quantise_dynamically(model, lookups, file)
            else:
                _quantise_weights(model, lookups, file)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ExportError(
                f"onnxruntime does not quantise this body ({first_line(error)}): leave --body out, or update "
                "onnxruntime"
            ) from error


def _quantise_dynamically(model: onnx.ModelProto, lookups: list[str], file: Path) -> None:
    """Weights in 8 bits, a scale for each column; activations in 8 bits, scaled anew in each pass."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    copy = type(model)()
    copy.CopyFrom(model)
    quantize_dynamic(
        copy, file, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
        nodes_to_exclude=lookups,
    )  # fmt: skip


def _quantise_weights(model: onnx.ModelProto, lookups: list[str], file: Path) -> None:
    """Weights in 8 bits, a scale for each block of a column; activations as they are."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = type(model)()
    copy.CopyFrom(model)
    quantiser = MatMulNBitsQuantizer(
        copy,
        bits=8,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        nodes_to_exclude=lookups,
        op_types_to_quantize=("MatMul",),
    )
    quantiser.process()
    onnx.save(quantiser.model.model, file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what onnxruntime's quantisers report of each node off the screen."""
    root, quantiser = logging.getLogger(), logging.getLogger("onnxruntime.quantization")
    levels = root.level, quantiser.level
    try:
        root.setLevel(logging.ERROR)
        quantiser.setLevel(logging.ERROR)
        yield
    finally:
        root.setLevel(levels[0])
        quantiser.setLevel(levels[1])
