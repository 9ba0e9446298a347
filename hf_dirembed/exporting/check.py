"""What was exported is run in onnxruntime, and compared with the model that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ExportError, first_line
from .graph import GraphPart
from .lookup import Lookup, add_lookup
from .quantise import Body


if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

TOLERANCE = 1e-4  # of the largest value: what float32 may be off
LEAST_COSINE = 0.9  # of a body in 8 bits, for texts of random tokens, which are harder than any that people write
_CHECKED_ROWS = 4_096
_IR_VERSION = 10  # of ONNX files, which engines of the last years read


def open_session(model: Path | bytes) -> InferenceSession:
    """Loads a model into onnxruntime, on CPUs.

    Raises:
        ExportError: If onnxruntime does not load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base but this
        raise ExportError(
            f"onnxruntime does not load what was exported ({first_line(error)}): update onnxruntime, or try a lower "
            "--opset"
        ) from error


def lookup_model(name: str, table: Lookup, opset: int) -> onnx.ModelProto:
    """A model that does nothing but look rows of a table up: `input_ids` to rows, unscaled.

    Args:
        name: The path of the table.
        table: It.
        opset: The version of ONNX's operators.
    """
    from onnx import TensorProto, helper

    part = GraphPart(name)
    rows = add_lookup(part, table, "input_ids")
    axes = ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        part.nodes,
        "lookup",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, axes)],
        [helper.make_tensor_value_info(rows, TensorProto.FLOAT, [*axes, table.dim])],
        part.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION)


def check_lookup(name: str, table: Lookup, opset: int) -> None:
    """Looks rows from all over a table up, and compares them with those that torch decodes.

    Args:
        name: The path of the table.
        table: It.
        opset: The version of ONNX's operators.

    Raises:
        ExportError: If a row differs by more than rounding.
    """
    session = open_session(lookup_model(name, table, opset).SerializeToString())
    ids = torch.linspace(0, table.num_rows - 1, min(table.num_rows, _CHECKED_ROWS)).round().long()[None]
    found = session.run(None, {"input_ids": ids.numpy()})[0]
    with torch.no_grad():
        expected = table.decode(ids).float().numpy()
    if (difference := _difference(found, expected)) > TOLERANCE:
        raise ExportError(
            f"rows of {name} differ by {difference:.1e} of the largest in onnxruntime: load the checkpoint again, and "
            "report this if it stays so"
        )


def compare(file: Path, body: Body, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Runs an exported file, and compares what it gives with what the model gives.

    Args:
        file: The file.
        body: The form of its body.
        inputs: By name, (batch, length) int64 each.
        expected: What the model gives, by name.

    Returns:
        The largest difference, of the largest value; for bodies in 8 bits the least cosine of the outputs of a text.

    Raises:
        ExportError: If the file does not run, lacks an output, or answers otherwise than the model does.
    """
    # what both give
    session = open_session(file)
    names = list(expected)
    try:
        answers = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    except Exception as error:  # its errors have no base but this
        raise ExportError(
            f"onnxruntime does not run {file.name} ({first_line(error)}): update onnxruntime, or try a lower --opset"
        ) from error
    pairs = [(found, expected[name].numpy()) for name, found in zip(names, answers, strict=True)]

    # how far it is off
    if body.name == "fp32":
        if (worst := max(_difference(*pair) for pair in pairs)) > TOLERANCE:
            raise ExportError(
                f"{file.name} answers otherwise than the model, by {worst:.1e} of the largest value: export it with "
                "another release of torch, or another --opset"
            )
        return worst
    if (worst := min(_cosine(*pair, inputs["attention_mask"].numpy()) for pair in pairs)) < LEAST_COSINE:
        raise ExportError(
            f"{file.name} answers otherwise than the model, with a cosine of {worst:.3f}: its body does not bear "
            f"8 bits, choose {'--body int8-weights' if body.name == 'int8' else '--body fp32'}"
        )
    return worst


def _difference(found: NDArray[numpy.floating], expected: NDArray[numpy.floating]) -> float:
    """The largest difference of two arrays, of the largest value; infinite where one holds no numbers."""
    if found.shape != expected.shape:
        return float("inf")
    difference = float(numpy.abs(found - expected).max() / max(1e-6, float(numpy.abs(expected).max())))
    return difference if numpy.isfinite(difference) else float("inf")


def _cosine(found: NDArray[numpy.floating], expected: NDArray[numpy.floating], mask: NDArray[numpy.integer]) -> float:
    """The least cosine of what two models give for a text, of all of its tokens that are none of padding."""
    if found.shape != expected.shape:
        return -1.0
    if found.ndim > 1 and found.shape[:2] == mask.shape:
        found, expected = (each * mask.reshape(*mask.shape, *[1] * (each.ndim - 2)) for each in (found, expected))
    flat = [each.reshape(len(each), -1).astype(numpy.float64) for each in (found, expected)]
    lengths = numpy.linalg.norm(flat[0], axis=1) * numpy.linalg.norm(flat[1], axis=1)
    cosine = float(((flat[0] * flat[1]).sum(axis=1) / numpy.maximum(lengths, 1e-12)).min())
    return cosine if numpy.isfinite(cosine) else -1.0
