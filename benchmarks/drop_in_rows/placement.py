"""Devices, dtypes, copies, shards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from drop_in_subject import Subject, close, exact, row
from transformers import PreTrainedModel


@row("placement", 'device_map="auto"')
def device_map(subject: Subject) -> str:
    model = subject.load(device_map="auto")
    answer = exact(subject.answer(model), subject.expected)
    model.save_pretrained(subject.work / "mapped")
    return f"{answer}; reloaded {exact(subject.answer(subject.load(subject.work / 'mapped')), subject.expected)}"


@row("placement", "half of it offloaded to disk, run, saved, reloaded")
def disk_offload(subject: Subject) -> str:
    room = sum(parameter.nbytes for parameter in subject.model.parameters()) // 2
    options = {"device_map": "auto", "max_memory": {"cpu": room}, "offload_folder": subject.work / "offload"}
    model = subject.load(**options)
    away = sum(parameter.is_meta for parameter in model.parameters())
    assert away, "nothing was offloaded"
    difference = close(subject.answer(model), subject.expected)
    model.save_pretrained(subject.work / "from-disk")
    reloaded = exact(subject.answer(subject.load(subject.work / "from-disk")), subject.expected)
    return f"{away} tensors on disk; {difference}; reloaded {reloaded}"


def cast(dtype: torch.dtype, within: float, subject: Subject) -> str:
    model = subject.load().half() if dtype == torch.float16 else subject.load(dtype=dtype)
    assert model.dtype == model.get_input_embeddings().dtype == dtype
    difference = close(subject.answer(model).float(), subject.expected, within=within)
    folder = subject.work / str(dtype)
    model.save_pretrained(folder)
    again = subject.load(folder).state_dict()
    for key, tensor in model.state_dict().items():
        exact(again[key], tensor)
    return f"{difference} to float32; reloaded exact"


row("placement", ".half(), saved, reloaded")(partial(cast, torch.float16, 2e-2))
row("placement", "dtype=torch.bfloat16, saved, reloaded")(partial(cast, torch.bfloat16, 1e-1))


def copied(way: Callable[[PreTrainedModel], PreTrainedModel], subject: Subject) -> str:
    model = way(subject.model)
    answer, folder = exact(subject.answer(model), subject.expected), subject.work / "copied"
    model.save_pretrained(folder)
    return f"{answer}; reloaded {exact(subject.answer(subject.load(folder)), subject.expected)}"


row("copies", "copy.deepcopy, saved, reloaded")(partial(copied, copy.deepcopy))
row("copies", "pickle, saved, reloaded")(partial(copied, lambda model: pickle.loads(pickle.dumps(model))))


@row("copies", "saved in shards of 20 MB")
def shards(subject: Subject) -> str:
    folder: Path = subject.work / "shards"
    subject.model.save_pretrained(folder, max_shard_size="20MB")
    files = len(list(folder.glob("*.safetensors")))
    assert files > 1, "one file"
    return f"{exact(subject.answer(subject.load(folder)), subject.expected)}, {files} files"


@row("copies", "the model that all rows above used, saved and reloaded")
def used(subject: Subject) -> str:
    answer = exact(subject.answer(subject.model), subject.expected)
    subject.model.save_pretrained(subject.work / "used")
    return f"{answer}; reloaded {exact(subject.answer(subject.load(subject.work / 'used')), subject.expected)}"
