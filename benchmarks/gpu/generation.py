"""Generation with a dense and a compressed model: speed and memory, with tables on the GPU and on the CPU."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_dirembed  # noqa: F401 (makes compressed folders load)

from .made import compressed_llama, llama


PROMPT = 16
DTYPE = torch.bfloat16


def on_cpu(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A model whose body is on a device and whose tied table stays on the CPU."""
    table = copy.deepcopy(model.get_input_embeddings())
    model = model.to(device)
    model.get_input_embeddings().to("cpu")  # with the head that is tied to it
    assert torch.equal(model.get_input_embeddings().weight, table.weight)
    return model


def contestants(
    num_rows: int, dim: int, layers: int, device: torch.device, folder: Path | None, dense_folder: Path | None
) -> dict[str, Callable[[], tuple[PreTrainedModel, dict[str, Any]]]]:
    """What makes each model, with the options of `generate`, by its name."""

    def dense() -> PreTrainedModel:
        if dense_folder is not None:
            return AutoModelForCausalLM.from_pretrained(dense_folder, dtype=DTYPE).eval()  # type: ignore[no-any-return]
        return llama(num_rows, dim, layers, DTYPE)

    def ours() -> PreTrainedModel:
        if folder is not None:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval()  # type: ignore[no-any-return]
        return compressed_llama(num_rows, dim, layers, DTYPE)

    static = {"cache_implementation": "static"}  # for which transformers compiles, with CUDA graphs

    def body_compiled() -> tuple[PreTrainedModel, dict[str, Any]]:
        model = ours().to(device)
        body = model.get_decoder()
        body.forward = torch.compile(body.forward, mode="reduce-overhead")
        return model, {**static, "disable_compile": True}

    makers: dict[str, Callable[[], tuple[PreTrainedModel, dict[str, Any]]]] = {
        "ours": lambda: (ours().to(device), {}),
        "ours, table on the CPU": lambda: (on_cpu(ours(), device), {}),
        "ours, body compiled with reduce-overhead, static cache": body_compiled,
        "ours, all compiled with reduce-overhead, static cache": lambda: (ours().to(device), static),
    }
    if folder is None or dense_folder is not None:
        makers = {
            "dense": lambda: (dense().to(device), {}),
            "dense, compiled with reduce-overhead, static cache": lambda: (dense().to(device), static),
            **makers,
        }
    return makers


@torch.inference_mode()
def measure(
    make: Callable[[], tuple[PreTrainedModel, dict[str, Any]]], tokens: int, device: torch.device
) -> tuple[list[str], Tensor]:
    """Tokens per second, and megabytes on the GPU after loading and at most; and the tokens."""
    gc.collect()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    model, options = make()
    loaded = (torch.cuda.memory_allocated(device) - before) / 1e6 if gpu else float("nan")
    ids = torch.arange(5, 5 + PROMPT, device=device)[None]
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **options}
    options |= {"min_new_tokens": tokens, "max_new_tokens": tokens}

    for _ in range(2):  # what is compiled, captured and derived
        model.generate(ids, **options)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = model.generate(ids, **options)
    if gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if gpu else float("nan")
    return [f"{tokens / seconds:.1f}", f"{loaded:.0f}", f"{peak:.0f}"], found.cpu()


def race(makers: dict[str, Any], tokens: int, device: torch.device, left: Callable[[], float]) -> list[list[str]]:
    """Rows of a table: the name, tokens per second, memory, and whether the tokens are those of the first of its kind.

    Args:
        makers: As [`contestants`] gives them.
        tokens: To generate.
        device: Where the bodies are.
        left: Seconds that are left: what does not come to its turn is named.
    """
    rows, first = [], {}
    for name, make in makers.items():
        if left() < 60 and rows:
            rows.append([name, "no time was left", "", "", ""])
            continue
        try:
            figures, found = measure(make, tokens, device)
        except Exception as error:
            rows.append([name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}", "", "", ""])
            continue
        finally:
            torch.compiler.reset()
        kind = name.partition(",")[0]
        same = (found == first.setdefault(kind, found)).float().mean()
        rows.append([name, *figures, f"{100 * float(same):.0f} %"])
    return rows
