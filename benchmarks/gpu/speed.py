"""Lookups and heads against dense ones and those of other packages, in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..turns import best_seconds
from .made import modules, table_rows


IDS = (1, 16, 512, 4096)
STATES = (1, 4, 16, 64, 128)
DTYPE = torch.bfloat16


class Competitor(NamedTuple):
    """A table that is timed.

    Attributes:
        run: Lookup, or head.
        num_bytes: Of the tensors that stand for the table.
    """

    run: Callable[[Tensor], Tensor]
    num_bytes: int


def bytes_of(module: nn.Module) -> int:
    """Bytes of all tensors of a module; subclasses of tensors say what theirs are made of."""

    def each(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):
            return sum(each(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return int(tensor.numel() * tensor.element_size())

    state = getattr(getattr(module, "weight", None), "quant_state", None)
    scales = 0 if state is None else state.absmax.numel() * state.absmax.element_size()
    return scales + sum(each(tensor) for tensor in (*module.parameters(), *module.buffers()))


def lookups(num_rows: int, dim: int, device: torch.device) -> dict[str, Callable[[], Competitor]]:
    """What makes each lookup, by its name."""

    def dense() -> nn.Module:
        return nn.Embedding(num_rows, dim, dtype=DTYPE)

    def bitsandbytes(name: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            import bitsandbytes.nn

            source, module = dense(), getattr(bitsandbytes.nn, name)(num_rows, dim, dtype=DTYPE)
            module.load_state_dict(source.state_dict())
            return module  # type: ignore[no-any-return]

        return make

    def torchao() -> nn.Module:
        return _torchao(dense(), nn.Embedding)

    makers = {
        "dense, bfloat16": dense,
        "ours": lambda: modules(table_rows(num_rows, dim), dim, 16, DTYPE)[0],
        "bitsandbytes, 8 bits": bitsandbytes("Embedding8bit"),
        "bitsandbytes, NF4": bitsandbytes("EmbeddingNF4"),
        "torchao, int4 kept as bytes": torchao,
    }
    return {name: _competitor(make, device) for name, make in makers.items()}


def heads(num_rows: int, dim: int, device: torch.device) -> dict[str, Callable[[], Competitor]]:
    """What makes each head, by its name."""

    def dense() -> nn.Linear:
        return nn.Linear(dim, num_rows, bias=False, dtype=DTYPE)

    def bitsandbytes(name: str, **options: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            import bitsandbytes.nn

            source, module = dense(), getattr(bitsandbytes.nn, name)(dim, num_rows, bias=False, **options)
            module.load_state_dict(source.state_dict())
            return module  # type: ignore[no-any-return]

        return make

    def torchao() -> nn.Module:
        return _torchao(dense(), nn.Linear)

    makers = {
        "dense, bfloat16": dense,
        "ours": lambda: modules(table_rows(num_rows, dim), dim, 16, DTYPE)[1],
        "bitsandbytes, 8 bits": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        "bitsandbytes, NF4": bitsandbytes("LinearNF4", compute_dtype=DTYPE),
        "torchao, int8 weights": torchao,
    }
    return {name: _competitor(make, device) for name, make in makers.items()}


def _torchao(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module whose weight torchao has quantised."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = (
        Int8WeightOnlyConfig() if kind is nn.Linear else IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32))
    )
    holder = nn.Sequential(module)
    quantize_(holder, config, filter_fn=lambda each, _: isinstance(each, kind))
    return holder[0]


def _competitor(make: Callable[[], nn.Module], device: torch.device) -> Callable[[], Competitor]:
    def made() -> Competitor:
        torch.manual_seed(0)
        module = make().to(device).eval().requires_grad_(False)
        return Competitor(module, bytes_of(module))

    return made


@torch.inference_mode()
def race(
    makers: dict[str, Callable[[], Competitor]], inputs: dict[int, Tensor], repeats: int, device: torch.device
) -> list[list[str]]:
    """Times competitors on each input, in turns.

    Returns:
        Rows of a table: the name, megabytes, microseconds for each input; of what failed, why.
    """
    made, failed = {}, []
    for name, make in makers.items():
        try:
            made[name] = make()
            made[name].run(next(iter(inputs.values())))
        except Exception as error:
            failed.append([name, f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"])
            made.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in made}
    for value in inputs.values():
        contest = {name: (lambda run=each.run, value=value: run(value)) for name, each in made.items()}
        for name, seconds in best_seconds(contest, repeats, device).items():
            times[name].append(1e6 * seconds)
    rows = [[name, f"{made[name].num_bytes / 1e6:.1f}", *(f"{each:.1f}" for each in times[name])] for name in made]
    return rows + [[*each, *[""] * (len(inputs))] for each in failed]


def race_lookups(num_rows: int, dim: int, repeats: int, device: torch.device) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of lookups' times."""
    inputs = {count: torch.randint(0, num_rows, (1, count), device=device) for count in IDS}
    return ["lookup", "MB", *(f"µs, {count} ids" for count in IDS)], race(
        lookups(num_rows, dim, device), inputs, repeats, device
    )


def race_heads(num_rows: int, dim: int, repeats: int, device: torch.device) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of heads' times."""
    inputs = {count: torch.randn(count, dim, device=device, dtype=DTYPE) for count in STATES}
    return ["head", "MB", *(f"µs, {count} states" for count in STATES)], race(
        heads(num_rows, dim, device), inputs, repeats, device
    )


@torch.inference_mode()
def check_graph(num_rows: int, dim: int, device: torch.device) -> bool:
    """Captures lookup and head in one CUDA graph, replays it on other ids, and compares with what runs without."""
    embedding, head = (each.to(device) for each in modules(table_rows(num_rows, dim), dim, 16, DTYPE))
    ids = torch.randint(0, num_rows, (1, 90), device=device)
    other = torch.randint(0, num_rows, (1, 90), device=device)
    expected = F.log_softmax(head(embedding(other)).float(), dim=-1)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # what is compiled and derived has to be there before
        head(embedding(ids))
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        logits = F.log_softmax(head(embedding(ids)).float(), dim=-1)
    ids.copy_(other)
    graph.replay()
    torch.cuda.synchronize(device)
    return torch.equal(logits, expected)
