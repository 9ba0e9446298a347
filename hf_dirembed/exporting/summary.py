"""What an exported folder holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file of an exported folder.

    Attributes:
        name: Its path in the folder.
        body: The form of its body: `fp32`, `int8` or `int8-weights`.
        num_bytes: Its size.
        difference: How far what it gives is off what the model gives, of the largest value; of `fp32`.
        cosine: The least cosine between what both give for a text of random tokens; of bodies in 8 bits.
    """

    name: str
    body: str
    num_bytes: int
    difference: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class ExportSummary:
    """What an exported folder holds.

    Attributes:
        model_class: The stock class of the model.
        inputs: The names of its inputs.
        outputs: The names of its outputs.
        files: Its ONNX files.
        dense_bytes: The size of the dense model in float32.
        tables: The paths of the compressed tables.
        table_bytes: What stands for them in the checkpoint.
        dense_table_bytes: Their size in float32.
    """

    model_class: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: tuple[ExportedFile, ...]
    dense_bytes: int
    tables: tuple[str, ...]
    table_bytes: int
    dense_table_bytes: int
