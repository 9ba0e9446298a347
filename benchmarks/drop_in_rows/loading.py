"""Loading: AutoModel, the stock class, the code in the repo, a body that is quantised."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from drop_in_subject import BLOCK_PLUGIN, Skip, Subject, close, exact, row, same_codes, without_package
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, TorchAoConfig

from hf_dirembed import CompressedEmbedding


FRESH = (
    BLOCK_PLUGIN
    + """
import torch, transformers
from safetensors.torch import load_file
source, target, auto, inputs = sys.argv[1:]
inputs = load_file(inputs)
expected = inputs.pop("expected")
for folder in (source, target):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        difference = (model(**inputs)[0] - expected).abs().max()
    print(difference.item(), expected.abs().max().item())
    model.save_pretrained(target)
"""
)


@row("load", "AutoModel, the stock class, saved twice and loaded")
def load(subject: Subject) -> str:
    assert isinstance(subject.model.get_input_embeddings(), CompressedEmbedding)
    assert type(subject.stock).__module__.startswith("transformers.models."), type(subject.stock)
    assert type(subject.stock.get_input_embeddings()) is torch.nn.Embedding
    found = subject.answer(subject.load(auto=getattr(transformers, subject.stock_name)))
    if subject.auto.__name__ == "AutoModel" and found.shape != subject.expected.shape:
        raise Skip(f"{subject.stock_name} has a head of its own")
    exact(found, subject.expected)
    model = subject.model
    for name in ("two", "three"):
        model.save_pretrained(subject.work / name)
        model = subject.load(subject.work / name)
    return f"{exact(subject.answer(model), subject.expected)}; expanded: {close(subject.answer(subject.stock), found)}"


@row("trust_remote_code", "in a fresh process without the plugin, saved there, loaded again")
def trust_remote_code(subject: Subject) -> str:
    with torch.no_grad():
        expected = subject.model(**subject.inputs)[0].contiguous()
    save_file({**subject.inputs, "expected": expected}, subject.work / "inputs.safetensors")
    files = (subject.compressed, subject.work / "resaved", subject.auto.__name__, subject.work / "inputs.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", FRESH, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr.strip().rsplit("\n", 1)[-1]
    return "; ".join(without_package(*map(float, line.split()), subject) for line in done.stdout.splitlines())


def of_torchao(kind: str) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else four)


def quantised(package: str, kind: str, settings: Callable[[], Any], subject: Subject) -> str:
    if importlib.util.find_spec(package) is None:
        raise Skip(f"{package} is not installed")
    model = subject.load(quantization_config=settings(), dtype=torch.float32)
    same_codes(model, subject)
    folder = subject.work / f"{package}-{kind}"
    model.save_pretrained(folder)  # before it runs: bitsandbytes then repacks weights on CPU
    found = subject.answer(model)
    again = subject.load(folder)
    assert again.config.quantization_config.quant_method == package
    exact(subject.answer(again), found)
    difference = (found - subject.expected).norm() / subject.expected.norm()
    assert 0 < difference < 0.5, f"relative difference {difference:.2f} to the unquantised body"
    return f"relative difference {difference:.3f} to the unquantised body; reloaded exact"


for package, kind, make in (
    ("bitsandbytes", "int8", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    ("bitsandbytes", "nf4", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    ("torchao", "int8", partial(of_torchao, "int8")),
    ("torchao", "int4", partial(of_torchao, "int4")),
):
    row("quantised", f"the body in {kind} of {package}: load, save, reload")(partial(quantised, package, kind, make))
