"""`torch.compile`, `torch.export`, ONNX."""

from __future__ import annotations

import importlib.util

import torch
from drop_in_subject import Skip, Subject, close, row
from torch import Tensor


def other_shape(subject: Subject) -> dict[str, Tensor]:
    ids = subject.inputs["input_ids"][:2, :5].contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def exported(subject: Subject) -> torch.export.ExportedProgram:
    model = subject.load()
    model.config.use_cache = False
    inputs = {key: subject.inputs[key] for key in ("input_ids", "attention_mask")}
    shapes = {key: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for key in inputs}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


@row("export", "torch.export, run with another shape")
@torch.no_grad()
def export(subject: Subject) -> str:
    inputs = other_shape(subject)
    return close(exported(subject).module()(**inputs)[0], subject.stock(**inputs)[0])


@row("ONNX", "exported, run in onnxruntime with another shape")
@torch.no_grad()
def onnx(subject: Subject) -> str:
    if any(importlib.util.find_spec(package) is None for package in ("onnxruntime", "onnxscript")):
        raise Skip("onnxruntime or onnxscript is not installed")
    import onnxruntime

    folder = subject.work / "onnx"
    folder.mkdir()
    torch.onnx.export(exported(subject), dynamo=True, verbose=False).save(folder / "model.onnx")
    inputs = other_shape(subject)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    wanted = {each.name for each in session.get_inputs()}
    found = session.run(None, {key: value.numpy() for key, value in inputs.items() if key in wanted})[0]
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    stock = sum(parameter.nbytes for parameter in subject.stock.parameters()) / 2**20
    difference = close(torch.from_numpy(found), subject.stock(**inputs)[0])
    return f"{difference}; {size:.0f} MiB, the expanded model's tensors {stock:.0f} MiB"


@row("compile", "torch.compile, the whole graph, backend eager")
def compiled(subject: Subject) -> str:
    torch.compiler.reset()
    return close(subject.answer(torch.compile(subject.model, fullgraph=True, backend="eager")), subject.expected)
