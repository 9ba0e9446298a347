"""A compressed model -> its ONNX graph: the body as torch exports it, lookups as `lookup` makes them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DirEmbedError, ExportError, first_line
from .graph import GraphPart
from .lookup import Lookup, add_lookup


if TYPE_CHECKING:
    import onnx

_STAND_IN = "exported_table"  # the name of what stands in for a table while the body is exported
_AXES = {0: "batch_size", 1: "sequence_length"}
_LARGEST = 2**31 - 1  # bytes of a protobuf message
OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits")  # those that engines ask for by name


class _Body(nn.Module):
    """A model as engines call it: tensors by name to tensors in an order."""

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs of the model."""
        further = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **further)
        return tuple(found[name] for name in self.outputs)


def lookups_of(model: PreTrainedModel) -> dict[str, Lookup]:
    """The compressed tables that a model looks tokens up in, by the path of the first module that has each."""
    found, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, Lookup) and id(module.weight) not in seen:
            found[name] = module
            seen.add(id(module.weight))
    return found


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model answers, of what engines ask for.

    Args:
        model: In evaluation mode.
        inputs: Its inputs by name, (batch, length) int64 each.

    Raises:
        ExportError: If it answers nothing of that.
    """
    with torch.no_grad():
        found = model(**inputs, return_dict=True)
    named = {name: found[name] for name in OUTPUTS if isinstance(found.get(name), Tensor)}
    if not named:
        raise ExportError(
            f"{type(model).__name__} gives {', '.join(found)}, none of which engines for text ask for: export an "
            "encoder, or a classifier of sequences or tokens"
        )
    return named


def make_graph(model: PreTrainedModel, inputs: Mapping[str, Tensor], opset: int | None) -> onnx.ModelProto:
    """Exports a compressed model, whose codes stay packed.

    Args:
        model: On the CPU, in float32, in evaluation mode; it is left as it is.
        inputs: An example of its inputs by name, of more than one text and token.
        opset: The version of ONNX's operators; by default the exporter's.

    Raises:
        ExportError: If torch cannot export it, or the file would be larger than ONNX files may be.
    """
    # the body, with a table of one row in the place of each compressed one
    outputs = tuple(outputs_of(model, inputs))
    dynamic = dict.fromkeys(_AXES, torch.export.Dim.DYNAMIC)
    with _tables_stood_in(model) as tables, _plain_attention(model), _quiet():
        try:
            program = torch.onnx.export(
                _Body(model, outputs).eval(), (), kwargs=dict(inputs),
                dynamic_shapes=dict.fromkeys(inputs, dynamic), input_names=list(inputs),
                output_names=list(outputs), opset_version=opset, dynamo=True, verbose=False,
            )  # fmt: skip
        except DirEmbedError:
            raise
        except Exception as error:  # torch's exporters fail in as many ways as models do
            raise ExportError(
                f"torch does not export {type(model).__name__} to ONNX ({_reason(error)}): try another --opset, or "
                "another release of torch, or expand the model and export it by other means"
            ) from error

    # the lookups
    assert program is not None
    graph = program.model_proto
    read = [_splice(graph, name, table) for name, table in tables.items()]
    if tables and not any(read):
        raise ExportError(f"{type(model).__name__} looks no token up in its compressed tables: expand the model first")
    _name_axes(graph)
    if graph.ByteSize() > _LARGEST:
        raise ExportError(
            f"the file of {type(model).__name__} would have {graph.ByteSize():,} bytes, more than the 2 GiB of an "
            "ONNX file: choose a smaller model"
        )
    return graph


@contextmanager
def _tables_stood_in(model: PreTrainedModel) -> Iterator[dict[str, Lookup]]:
    """Puts a lookup in a table of one row in the place of each compressed one, by the name of its initializer."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, Lookup)}
    for table in tables.values():
        table.register_parameter(_STAND_IN, nn.Parameter(torch.zeros(1, table.dim), requires_grad=False))
        vars(table)["decode"] = lambda ids, table=table: F.embedding(ids, getattr(table, _STAND_IN))
    try:
        yield {f"model.{name}.{_STAND_IN}": table for name, table in tables.items()}
    finally:
        for table in tables.values():
            del vars(table)["decode"]
            delattr(table, _STAND_IN)


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Has a model compute attention by products and softmax, which is what files hold, and what all models export."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _splice(model: onnx.ModelProto, name: str, table: Lookup) -> int:
    """Replaces every lookup in a stand-in by that in the table, and says how many there were.

    There are none where another module shares the table, as in T5, and looks tokens up.
    """
    graph = model.graph
    prefix = name.removesuffix(f".{_STAND_IN}").removeprefix("model.")
    readers = [node for node in graph.node if name in node.input]
    if any(node.op_type != "Gather" for node in readers):
        kinds = ", ".join(sorted({node.op_type for node in readers}))
        raise ExportError(f"{prefix} is used otherwise than by looking rows up ({kinds}): expand the model first")

    # each lookup in the place of the node that it replaces
    nodes = list(graph.node)
    for number, reader in enumerate(readers):
        part = GraphPart(prefix if number == 0 else f"{prefix}.{number}")
        rows = add_lookup(part, table, reader.input[1])
        for node in nodes:
            node.input[:] = [rows if each == reader.output[0] else each for each in node.input]
        place = nodes.index(reader)
        nodes[place : place + 1] = part.nodes
        graph.initializer.extend(part.initializers)

    # the graph without the stand-in
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [each for each in graph.initializer if each.name != name]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return len(readers)


def _name_axes(model: onnx.ModelProto) -> None:
    """Calls the axes of inputs what engines call them."""
    for value in model.graph.input:
        for axis, name in _AXES.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch's exporter tells its own developers off the screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def example_inputs(names: tuple[str, ...], vocabulary: int, **options: Any) -> dict[str, Tensor]:
    """Texts of random tokens.

    Args:
        names: Of the inputs.
        vocabulary: How many tokens there are.
        **options: `batch`, `length`: how many texts of how many tokens; the last text is half as long.
    """
    batch, length = options.get("batch", 2), options.get("length", 7)
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, length - length // 2 :] = 0
    of_name = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: of_name[name] for name in names}
