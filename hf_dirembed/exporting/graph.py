"""A part of an ONNX graph while it is made: its nodes, and the tensors that they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy


if TYPE_CHECKING:
    import onnx


class GraphPart:
    """Nodes and initializers, under names that start alike.

    Args:
        prefix: What all names start with.

    Attributes:
        nodes: In an order in which they can run.
        initializers: The tensors that the file holds.

    Example:
        >>> part = GraphPart("scale")
        >>> part.add("Mul", "rows", part.constant("factor", numpy.float32(2)))
        'scale.Mul'
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._counts: dict[str, int] = {}

    def constant(self, name: str, values: Any) -> str:
        """Adds a tensor, and gives its name."""
        from onnx import numpy_helper

        name = self._unused(name)
        self.initializers.append(numpy_helper.from_array(numpy.asarray(values, order="C"), name))
        return name

    def shape(self, *sizes: int) -> str:
        """Adds the shape for a `Reshape`, and gives its name."""
        return self.constant("shape", numpy.array(sizes, dtype=numpy.int64))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, and gives the output's name."""
        from onnx import helper

        name = self._unused(operator)
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def cast(self, value: str, dtype: type[numpy.generic]) -> str:
        """Adds a cast, and gives its output's name."""
        from onnx import helper

        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(numpy.dtype(dtype)))

    def _unused(self, name: str) -> str:
        number = self._counts[name] = self._counts.get(name, 0) + 1
        return f"{self.prefix}.{name}" if number == 1 else f"{self.prefix}.{name}_{number}"
