"""Which tensors of a checkpoint are those of its compressed tables: their names decide, and what the config states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ...remote.checks_dirembed import AGAIN
from ...remote.codes_dirembed import CODE_TENSORS, CheckpointError, CompressionSpec, Layout


_NAME = re.compile(rf"(?P<prefix>.+?)\.(?P<tensor>(blocks\.\d+\.)?({'|'.join(sorted(CODE_TENSORS, reverse=True))}))")
_DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


class TableTensors:
    """Sets the tensors of compressed tables aside while a checkpoint is read.

    Each table is passed on as one tensor, under the name that the dense table would have: a stand-in of its shape,
    which holds no memory. What gets a stand-in asks for its table by it. Its numbers are NaNs, which show where one
    was taken for a table.

    Args:
        spec: What the config states.
        dtype: The dtype of the stand-ins.

    Example:
        >>> layout = {"method": "svd", "rank": 2, "codes": "float32", "decoder": "float32"}
        >>> spec = CompressionSpec.from_dict({"format": 2, "tables": {"embed_tokens": layout}})
        >>> tables = TableTensors(spec, torch.float32)
        >>> file = {
        ...     "embed_tokens.decoder_weight": torch.ones(2, 4), "embed_tokens.weight": torch.ones(9, 2),
        ...     "norm.weight": torch.ones(4),
        ... }  # fmt: skip
        >>> [(name, tuple(tensor.shape)) for name, tensor in tables.pass_on(file.items())]
        [('embed_tokens.weight', (9, 4)), ('norm.weight', (4,))]
    """

    def __init__(self, spec: CompressionSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.dtype = dtype
        self.found: dict[str, dict[str, Tensor]] = {}
        self._stand_ins: dict[int, tuple[str, Tensor]] = {}

    def pass_on(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint, with a stand-in for all those of a compressed table.

        Raises:
            CheckpointError: If a tensor of a table is missing, or it cannot be told which tensors are a table's.
        """
        exact: dict[str, dict[str, Tensor]] = {path: {} for path in self.spec.tables}
        others: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            match = _NAME.fullmatch(name)
            prefix, part = (match["prefix"], match["tensor"]) if match else ("", "")
            if prefix in exact:
                exact[prefix][part] = tensor
                if set(exact[prefix]) == parts_of_layout(self.spec.tables[prefix]):
                    yield self._stand_in(prefix, prefix, exact[prefix])
            elif any(prefix.rpartition(".")[2] == path.rpartition(".")[2] for path in exact):
                others.setdefault(prefix, {})[part] = tensor  # a file may have more of a path than the config, or less
            else:
                yield name, tensor

        for path in [path for path, own in exact.items() if not own]:
            if prefix := self._match(path, others):
                yield self._stand_in(path, prefix, others.pop(prefix))
        for prefix, own in others.items():
            yield from ((f"{prefix}.{part}", tensor) for part, tensor in own.items())

        lacking = {path: parts_of_layout(layout) - set(exact[path]) for path, layout in self.spec.tables.items()}
        names = sorted(f"{path}.{part}" for path, parts in lacking.items() if path not in self.found for part in parts)
        if names:
            raise CheckpointError(f"the checkpoint lacks {names}: {AGAIN}")

    def _match(self, path: str, others: Mapping[str, dict[str, Tensor]]) -> str | None:
        """Under which prefix a checkpoint has a table that the config has by another path."""
        last, parts = path.rpartition(".")[2], parts_of_layout(self.spec.tables[path])
        fitting = [each for each, own in others.items() if each.rpartition(".")[2] == last and set(own) == parts]
        nested = [each for each in fitting if f".{path}".endswith(f".{each}") or f".{each}".endswith(f".{path}")]
        candidates = nested or fitting
        if len(candidates) > 1:
            raise CheckpointError(f"the checkpoint has {path} as {' or '.join(sorted(candidates))}: {AGAIN}")
        return candidates[0] if candidates else None

    def _stand_in(self, path: str, prefix: str, own: dict[str, Tensor]) -> tuple[str, Tensor]:
        self.found[path] = own
        decoders = [tensor for name, tensor in own.items() if name.rpartition(".")[2] == "decoder_weight"]
        codes = own["weight"] if "decoder_weight" in own else own["blocks.0.weight"]
        shape = len(codes), sum(each.shape[-1] for each in decoders)
        stand_in = torch.full((1, 1), torch.nan, dtype=self.dtype, device="cpu").expand(shape)
        self._stand_ins[stand_in.untyped_storage().data_ptr()] = path, stand_in  # held: addresses are given out again
        return f"{prefix}.weight", stand_in

    def path_of(self, tensor: Tensor) -> str | None:
        """The table that a tensor stands for, or None."""
        path, _ = self._stand_ins.get(tensor.untyped_storage().data_ptr(), (None, None))
        return path


def parts_of_layout(layout: Layout) -> set[str]:
    """The names of the tensors that a table of a layout has."""
    return set(layout.stored_shapes(1, 1))


def check_tensors(path: str, layout: Layout, tensors: Mapping[str, Tensor], num_rows: int, dim: int) -> None:
    """Refuses tensors that do not make a (num_rows, dim) table of a layout.

    Args:
        path: The path of the table, for the message.
        layout: The layout that the config states.
        tensors: The tensors of the table, by name.
        num_rows: The rows that the model's table has.
        dim: The length of a row.

    Raises:
        CheckpointError: If one is missing, or of another shape or kind, each by its name.
        SpecError: If the layout does not fit the table.
    """
    layout.check_table(num_rows, dim)
    shapes = layout.stored_shapes(num_rows, dim)
    if lacking := sorted(f"{path}.{name}" for name in shapes.keys() - tensors.keys()):
        raise CheckpointError(f"the checkpoint lacks {lacking}: {AGAIN}")

    for name, tensor in sorted(tensors.items()):
        if name not in shapes:
            raise CheckpointError(f"{path}.{name} is not part of the layout that the config states: {AGAIN}")
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(f"{path}.{name} is {list(tensor.shape)}, not {list(shapes[name])}: {AGAIN}")
        found, expected = _DTYPES.get(tensor.dtype, str(tensor.dtype)), layout.stored_dtypes(name)
        if found not in expected:
            raise CheckpointError(f"{path}.{name} is of dtype {found}, not {' or '.join(expected)}: {AGAIN}")
