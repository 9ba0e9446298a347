"""The methods of others, each through its own package: torchao, bitsandbytes, scikit-learn, tltorch.

None of them knows token weights or calibration text. Their packages are imported where they are used: the extra
`benchmarks` brings them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_dirembed.compression import CodedTable
from hf_dirembed.compression.budget import Budget, LatentStorage, TableSize
from hf_dirembed.errors import BudgetError
from hf_dirembed.remote.codes_dirembed import TableLayout

from .methods import Method, Runnable, Stored, Table, coded_modules, coded_table, half


GROUP = 32  # weights that share a scale and a zero point
BLOCK = 64  # of bitsandbytes, its default


def _embedding(rows: Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(rows)


class TorchaoIntx(Method):
    """`IntxWeightOnlyConfig`: integers with a scale and a zero point, for each row or each group of a row.

    torchao keeps every integer in a byte of its own, whatever its width, for export to engines that pack them. The
    bits per weight are those of the packed form, in its favour; file and memory are as they are.
    """

    package = "torchao"
    has_budget = False

    def __init__(self, width: int, group: int | None) -> None:
        self.width, self.group = width, group
        self.name = f"torchao-int{width}"
        self.about = f"IntxWeightOnlyConfig, int{width}, " + (f"groups of {group}" if group else "one scale a row")

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Quantises, with scales of two bytes."""
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.quant_primitives import MappingType

        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{self.width}"),
            granularity=PerGroup(self.group) if self.group else PerAxis(0),
            mapping_type=MappingType.ASYMMETRIC,
            scale_dtype=half(table.rows.dtype),
        )
        module = nn.Sequential(_embedding(table.rows))
        quantize_(module, config, lambda found, name: isinstance(found, nn.Embedding))
        weight: Any = module[0].weight
        tensors = {name: getattr(weight, name) for name in ("qdata", "scale", "zero_point")}
        beside = tensors["scale"].nbytes + tensors["zero_point"].nbytes
        return Stored.of(table.rows, tensors, self.width + 8 * beside / table.rows.numel())

    def load(self, stored: Stored) -> Runnable:
        """An `nn.Embedding` and an `nn.Linear` over torchao's tensor."""
        from torchao.quantization import IntxUnpackedToInt8Tensor

        num_rows, dim = stored.shape
        weight = IntxUnpackedToInt8Tensor(
            **stored.tensors,
            target_dtype=getattr(torch, f"int{self.width}"),
            block_size=(1, self.group or dim),
            dtype=stored.torch_dtype,
            activation_quantization=None,
        )
        parameter = nn.Parameter(weight, requires_grad=False)
        embedding = nn.Embedding(num_rows, dim, device="meta")
        head = nn.Linear(dim, num_rows, bias=False, device="meta")
        embedding.weight = head.weight = parameter
        return Runnable(embedding, head)


class TorchaoPacked(Method):
    """`EmbeddingQuantizer` with packed integers, which needs torchao's library of kernels for ARM and ExecuTorch."""

    name = "torchao-int4-packed"
    width = 4
    package = "torchao"
    has_budget = False
    about = f"EmbeddingQuantizer, int4, groups of {GROUP}, packed"

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Quantises and packs."""
        from torchao.prototype.quantization.embedding.api import EmbeddingQuantizer
        from torchao.quantization.granularity import PerGroup

        module = nn.Sequential(_embedding(table.rows.float()))
        EmbeddingQuantizer(weight_dtype=getattr(torch, f"int{self.width}"), granularity=PerGroup(GROUP)).quantize(
            module
        )
        return Stored.of(table.rows, dict(module[0].named_buffers()))

    def load(self, stored: Stored) -> Runnable:
        """Its embedding; its tied head quantises the states too, and is another module."""
        from torchao.prototype.quantization.embedding.api import QuantizedEmbedding

        module = QuantizedEmbedding(self.width)
        module.num_embeddings, module.embedding_dim = stored.shape
        for name, tensor in stored.tensors.items():
            module.register_buffer(name, tensor)
        return Runnable(lambda ids: module(ids).to(stored.torch_dtype))


class Bitsandbytes4bit(Method):
    """`Embedding4bit` with NF4 values, and `Linear4bit` over the same.

    Neither embedding of bitsandbytes can be saved by itself: the file holds their tensors.
    """

    name = "bitsandbytes-nf4"
    package = "bitsandbytes"
    has_budget = False
    about = f"Embedding4bit, NF4, blocks of {BLOCK}"

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Quantises, as its modules do when they are moved to a device."""
        from bitsandbytes.nn import Embedding4bit

        num_rows, dim = table.rows.shape
        module = Embedding4bit(num_rows, dim, dtype=table.rows.dtype, quant_type="nf4")
        module.load_state_dict({"weight": table.rows})
        weight: Any = module.to(table.rows.device).weight
        state = weight.quant_state
        return Stored.of(table.rows, {"weight": weight.data, "absmax": state.absmax, "code": state.code})

    def load(self, stored: Stored) -> Runnable:
        """Both modules; each has a parameter of its own over the same bytes."""
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Embedding4bit, Linear4bit, Params4bit

        num_rows, dim = stored.shape
        dtype = stored.torch_dtype

        def parameter() -> Params4bit:
            state = QuantState(
                stored.tensors["absmax"],
                shape=torch.Size(stored.shape),
                code=stored.tensors["code"],
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=dtype,
            )
            return Params4bit(stored.tensors["weight"], quant_state=state, quant_type="nf4", bnb_quantized=True)

        embedding = Embedding4bit(num_rows, dim, dtype=dtype, quant_type="nf4", device="meta")
        head = Linear4bit(dim, num_rows, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        embedding.weight, head.weight = parameter(), parameter()
        return Runnable(embedding, head.eval())


class Bitsandbytes8bit(Method):
    """`Embedding8bit`, and `Linear8bitLt` over the same."""

    name = "bitsandbytes-int8"
    package = "bitsandbytes"
    has_budget = False
    about = "Embedding8bit, one scale a row"

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Quantises, as its modules do when they are moved to a device."""
        from bitsandbytes.nn import Embedding8bit

        num_rows, dim = table.rows.shape
        module = Embedding8bit(num_rows, dim, dtype=table.rows.dtype)
        module.load_state_dict({"weight": table.rows})
        weight: Any = module.to(table.rows.device).weight
        return Stored.of(table.rows, {"CB": weight.CB, "SCB": weight.SCB})

    def load(self, stored: Stored) -> Runnable:
        """Both modules; each has a parameter of its own over the same bytes."""
        from bitsandbytes.nn import Embedding8bit, Int8Params, Linear8bitLt

        num_rows, dim = stored.shape

        def parameter() -> Int8Params:
            codes = stored.tensors["CB"]
            return Int8Params(codes, requires_grad=False, CB=codes, SCB=stored.tensors["SCB"])

        embedding = Embedding8bit(num_rows, dim, dtype=stored.torch_dtype, device="meta")
        head = Linear8bitLt(dim, num_rows, bias=False, has_fp16_weights=False, device="meta")
        embedding.weight, head.weight = parameter(), parameter()
        return Runnable(embedding, head.eval())


class TruncatedSVD(Method):
    """scikit-learn's; its two factors run in hf_dirembed's modules, for it has none."""

    name = "sklearn-svd"
    package = "sklearn"
    about = "TruncatedSVD, randomised; float latents"

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Latents of two bytes, and a decoder of the table's dtype."""
        from sklearn.decomposition import TruncatedSVD as Decomposition

        dtype = table.rows.dtype
        size = TableSize(len(table.rows), table.rows.shape[1], dtype.itemsize)
        rank = Budget(bits=bits).float_rank(size, LatentStorage(2, dtype.itemsize, bias=False))
        found = Decomposition(rank, random_state=0)
        latents = torch.from_numpy(found.fit_transform(table.rows.float().numpy()))
        tensors = {"decoder_weight": torch.from_numpy(found.components_), "weight": latents}
        dtypes = {"decoder_weight": dtype, "weight": half(dtype)}
        codes, decoder = (str(each).removeprefix("torch.") for each in (half(dtype), dtype))
        layout = TableLayout(method="svd", rank=rank, codes=codes, decoder=decoder)
        return coded_table(
            table.rows, CodedTable(layout, {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()})
        )

    def load(self, stored: Stored) -> Runnable:
        """The modules that a model compressed by `svd` has."""
        return coded_modules(stored)


class TensorTrain(Method):
    """tltorch's `FactorizedEmbedding`: a block tensor train of two cores over a reshaped table.

    Its cores are kept in two bytes a number and used in the table's dtype. It has no tied head.
    """

    name = "tltorch-tt"
    package = "tltorch"
    about = "FactorizedEmbedding, block tensor train of two cores"

    def fit(self, table: Table, bits: float | None) -> Stored:
        """Decomposes at the largest rank within the budget."""
        from tltorch import FactorizedEmbedding

        num_rows, dim = table.rows.shape
        single = self._module(num_rows, dim, 1)
        per_rank = 2 * sum(core.numel() for core in single.parameters())
        limit = min(rows * columns for rows, columns in zip(*single.tensor_shape, strict=True))
        max_bytes = Budget(bits=bits).max_bytes(TableSize(num_rows, dim, table.rows.dtype.itemsize))
        assert max_bytes is not None
        rank = min(max_bytes // per_rank, limit)
        if rank < 1:
            raise BudgetError(f"rank 1 takes {8 * per_rank / (num_rows * dim):.3g} bits per weight: ask for more")
        module = FactorizedEmbedding.from_embedding(
            _embedding(table.rows.float()), rank=rank, factorization="blocktt", n_tensorized_modes=2
        )
        cores = {name: core.to(half(table.rows.dtype)) for name, core in module.state_dict().items()}
        return Stored.of(table.rows, cores, rank=rank)

    def load(self, stored: Stored) -> Runnable:
        """Its module."""
        module = self._module(*stored.shape, stored.settings["rank"]).to(stored.torch_dtype)
        module.load_state_dict(stored.tensors)
        return Runnable(module)

    @staticmethod
    def _module(num_rows: int, dim: int, rank: int) -> Any:
        from tltorch import FactorizedEmbedding

        return FactorizedEmbedding(num_rows, dim, n_tensorized_modes=2, factorization="blocktt", rank=rank)


OTHERS: tuple[Method, ...] = (
    TruncatedSVD(),
    TensorTrain(),
    TorchaoIntx(8, None),
    TorchaoIntx(4, GROUP),
    TorchaoIntx(3, GROUP),
    TorchaoIntx(2, GROUP),
    TorchaoPacked(),
    Bitsandbytes8bit(),
    Bitsandbytes4bit(),
)
