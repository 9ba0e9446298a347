"""How a table comes into one of vLLM's models: its layer waits, and the checkpoint's names say what becomes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ...remote.checks_dirembed import AGAIN
from ...remote.codes_dirembed import CheckpointError, CompressionSpec, ModelError
from ...remote.guarded_dirembed import plain
from .names import TableTensors
from .tables import ServedTable, build_table, fitted


class TableMethod(QuantizeMethodBase):
    """What vLLM's vocabulary layers do with a compressed table.

    Args:
        table: The table, or this process's shard of it.
    """

    def __init__(self, table: ServedTable) -> None:
        self.table = table

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Makes nothing: the table is made of the checkpoint's tensors."""

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Rows of the shard: (...,) row numbers to (..., dim)."""
        return self.table.decode(input_)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of the shard, padded as vLLM pads it: (..., dim) states to (..., padded rows)."""
        logits = fitted(self.table.logits(x), layer.num_embeddings_per_partition)
        return logits if bias is None else logits + bias

    def tie_weights(self, layer: Any, embed_tokens: Any) -> nn.Module:
        """Makes a head of the lookup's table."""
        put_table(layer, self.table)
        head: nn.Module = layer
        return head


def put_table(layer: Any, table: ServedTable) -> None:
    """Makes a vocabulary layer run a compressed table; its `weight` is the codes, as in transformers."""
    layer.quant_method = TableMethod(table)
    layer.table = table
    # as a plain parameter of the same memory: a dense module is refused one of codes
    layer.register_parameter("weight", nn.Parameter(plain(table.weight), requires_grad=False))
    layer.use_fused_embedding = False  # which reads dense rows


class Waiting:
    """The loader of a vocabulary layer's weight while nobody knows whether a dense or a compressed table comes.

    Args:
        load: The layer's own loader.
    """

    def __init__(self, load: Callable[[Tensor, Tensor], None]) -> None:
        self.load = load
        self.tables: TableTensors | None = None
        self.path: str | None = None
        self.filled = False

    def __call__(self, param: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        """Loads a dense table, or notes which compressed one a stand-in is of."""
        path = self.tables.path_of(loaded) if self.tables else None
        if path is not None:
            self.path = path
            return
        if self.tables and _begins_with_nan(loaded):
            raise ModelError(
                f"vLLM computes with the rows of a compressed table of {sorted(self.tables.found)} while it loads the "
                "model: expand it first with hf-dirembed expand"
            )
        if not self.filled:
            param.data = torch.empty(param.shape, dtype=param.dtype, device=param.device)
            self.filled = True
        self.load(param, loaded, *args, **kwargs)


@contextmanager
def waiting_tables(dense_method: Any) -> Iterator[None]:
    """Vocabulary layers that are made in this context hold no memory until it is known what they are to hold.

    Args:
        dense_method: The class that makes the weights of those that nothing quantises; changed while this lasts.
    """
    stock = dense_method.create_weights

    def create_weights(self: Any, layer: Any, *args: Any, params_dtype: torch.dtype, **attributes: Any) -> None:
        shape = layer.num_embeddings_per_partition, layer.embedding_dim
        weight = nn.Parameter(torch.empty(1, 1, dtype=params_dtype).expand(shape), requires_grad=False)
        loader = Waiting(attributes.pop("weight_loader"))
        for name, value in {"input_dim": 1, "output_dim": 0, "weight_loader": loader, **attributes}.items():
            setattr(weight, name, value)
        layer.register_parameter("weight", weight)

    dense_method.create_weights = create_weights
    try:
        yield
    finally:
        dense_method.create_weights = stock


def vocabulary_layers(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, Any]]]:
    """The layers of a model that share each weight which waits for its table, with their names."""
    found: dict[nn.Parameter, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            weight: Any = getattr(module, "weight", None)
            if isinstance(getattr(weight, "weight_loader", None), Waiting):
                found.setdefault(weight, []).append((name, module))
    return found


def load_tables(
    model: nn.Module,
    spec: CompressionSpec,
    load: Callable[..., Any],
    weights: Iterable[tuple[str, Tensor]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Loads one of vLLM's models with compressed tables where the checkpoint has them.

    Args:
        model: The model, with vocabulary layers that wait.
        spec: What the config says of the tables.
        load: The model's own `load_weights`, whose mapping of names says which layer each table goes to.
        weights: The tensors of the checkpoint.
        *args: What else `load` takes.
        **kwargs: Likewise.

    Returns:
        What `load` returns: the names that were loaded.

    Raises:
        CheckpointError: If a tensor of a table, or a vocabulary layer's weight, is missing or does not fit.
        ModelError: If the model has a compressed table elsewhere than in a vocabulary layer, or is loaded again.
    """
    layers = vocabulary_layers(model)
    if not layers:
        raise ModelError("compressed tables cannot be loaded again into a model that runs: start vLLM again")
    tables = TableTensors(spec, next(iter(layers)).dtype)
    for weight in layers:
        weight.weight_loader.tables = tables  # type: ignore[attr-defined]
    loaded = load(tables.pass_on(weights), *args, **kwargs)

    for weight, sharing in layers.items():
        waiting: Any = weight.weight_loader  # type: ignore[attr-defined]
        if waiting.path is not None:
            _put_shard(waiting.path, spec, tables, sharing)
        elif not waiting.filled:
            raise CheckpointError(f"the checkpoint lacks {sharing[0][0]}.weight: {AGAIN}")
        waiting.tables = None
    taken = {weight.weight_loader.path for weight in layers}  # type: ignore[attr-defined]
    _refuse_elsewhere(model, sorted(tables.found.keys() - taken))
    return loaded


def _put_shard(path: str, spec: CompressionSpec, tables: TableTensors, sharing: list[tuple[str, Any]]) -> None:
    """Puts this process's rows of a table into the layers that share it."""
    name, layer = sharing[0]
    if layer.num_added_embeddings:
        raise ModelError(f"{name} has {layer.num_added_embeddings} rows beside the compressed table: expand the model")
    indices = layer.shard_indices
    table = build_table(
        path,
        spec.tables[path],
        spec.record(path),
        tables.found[path],
        shape=(layer.org_vocab_size, layer.embedding_dim),
        rows=(indices.org_vocab_start_index, indices.org_vocab_end_index),
        dtype=layer.params_dtype,
        device=layer.weight.device,
    )
    for _, each in sharing:
        put_table(each, table)


def _refuse_elsewhere(model: nn.Module, paths: list[str]) -> None:
    """Refuses stand-ins that were loaded as tables; those that the model has no use for are left out."""
    if not paths:
        return
    for name, parameter in model.named_parameters():
        if _begins_with_nan(parameter):
            raise ModelError(
                f"{type(model).__name__} has {name} in no vocabulary layer of vLLM's, so it cannot be a compressed "
                f"table ({', '.join(paths)}): expand the model first with hf-dirembed expand"
            )


def _begins_with_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and bool(tensor[(0,) * tensor.ndim].isnan())


def serving_class(base: Any, dense_method: Any) -> Any:
    """A class of vLLM's models whose vocabulary layers wait for what the checkpoint has for them.

    Args:
        base: vLLM's own class.
        dense_method: The class that makes the weights of vocabulary layers that nothing quantises.
    """

    @functools.wraps(base.__init__)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        with waiting_tables(dense_method):
            base.__init__(self, *args, **kwargs)
        config = kwargs["vllm_config"].model_config.hf_config
        spec = CompressionSpec.from_dict(config.dirembed)
        vars(self)["load_weights"] = functools.partial(load_tables, self, spec, self.load_weights)

    return type(base.__name__, (base,), {"__init__": make, "__module__": base.__module__})
