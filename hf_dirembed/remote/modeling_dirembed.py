"""How compressed tables get into a model: derived classes, ties, the from_pretrained hook, and the way in and back.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .codes_dirembed import (
    CODE_TENSORS,
    CheckpointError,
    CompressionSpec,
    DirEmbedError,
    ModelError,
    SpecError,
    UnreadableCheckpointError,
    first_line,
)
from .configuration_dirembed import DirEmbedConfigMixin, derive_config_class
from .modules_dirembed import (
    CompressedEmbedding,
    CompressedLMHead,
    CompressedMatrix,
    compression_line,
    freeze,
    package,
    resize_rows,
    unfreeze,
)


# Of the entries of a tie map, those that `_tie_decoders` adds.
DECODER_TIE = re.compile(rf"\b({'|'.join(name for name in CODE_TENSORS if name != 'weight')})$")


def embedding_of(model: nn.Module) -> nn.Embedding | CompressedEmbedding:
    """The module that looks token embeddings up.

    Raises:
        ModelError: If the model has none.
    """
    embedding = None
    if isinstance(model, PreTrainedModel):
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError:
            embedding = None
    if not isinstance(embedding, (nn.Embedding, CompressedEmbedding)):
        found = "none" if embedding is None else f"a {type(embedding).__name__}"
        raise ModelError(
            f"{type(model).__name__} has no token embedding to compress (get_input_embeddings gives {found}): "
            "choose a transformers model that reads token ids"
        )
    return embedding


def tied_modules(model: PreTrainedModel) -> set[str]:
    """Names of the input embedding and of every module whose `weight` is tied to it."""
    ties = [
        {target.removesuffix(".weight"), source.removesuffix(".weight")}
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if target.endswith(".weight") and source.endswith(".weight")
    ]
    embedding = embedding_of(model)
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module is embedding}
    while grown := {name for tie in ties if tie & names for name in tie} - names:
        names |= grown
    return names


def compressed_modules(model: nn.Module) -> set[str]:
    """Names of the modules that stand for the table, or for what was tied to it."""
    modules = model.named_modules(remove_duplicate=False)
    return {name for name, module in modules if isinstance(module, CompressedMatrix)}


def swap_modules(model: PreTrainedModel, spec: CompressionSpec, device: str | None = None) -> set[str]:
    """Puts compressed modules, their codes still to be set, where the table and what is tied to it were.

    Args:
        model: Changed in place.
        spec: The layout of the codes.
        device: Where the codes are made; by default where the table is.

    Returns:
        The names of the compressed modules.
    """
    names = tied_modules(model)
    swapped: dict[nn.Module, CompressedMatrix] = {}
    for name in sorted(names):
        dense = model.get_submodule(name)
        if dense in swapped or isinstance(dense, CompressedMatrix):
            continue  # a model that is built around an inner AutoModel gets it with its embedding swapped
        if isinstance(dense, nn.Embedding):
            swapped[dense] = CompressedEmbedding.like(dense, spec, device=device)
        elif isinstance(dense, nn.Linear):
            swapped[dense] = CompressedLMHead.like(dense, spec, device=device)
        else:
            raise ModelError(f"the table is tied to a {type(dense).__name__}: only linear heads are supported")
    for name in names:  # only now that all of them can be
        dense = model.get_submodule(name)
        model.set_submodule(name, swapped.get(dense, dense))
    _tie_decoders(model, names)
    return names


def _tie_decoders(model: PreTrainedModel, names: set[str]) -> None:
    """Extends the tie maps, so that whatever shares a code matrix shares its decoder."""
    modules = {module for name in sorted(names) if isinstance(module := model.get_submodule(name), CompressedMatrix)}
    for module in modules:
        module.tied = len(modules) > 1
    source = next(iter(modules))
    shared = [name for name in source.code_tensors() if name != "weight"]
    submodels = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    for prefix, submodel in submodels:
        ties = submodel.get_expanded_tied_weights_keys()
        decoder_ties = {
            target.removesuffix("weight") + tensor: source.removesuffix("weight") + tensor
            for target, source in ties.items()
            if target.endswith(".weight") and f"{prefix}.{target}".removeprefix(".").removesuffix(".weight") in names
            for tensor in shared
        }
        if decoder_ties:
            submodel._tied_weights_keys = {**ties, **decoder_ties}
    for _, submodel in submodels:
        submodel.all_tied_weights_keys = submodel.get_expanded_tied_weights_keys(all_submodels=True)


AGAIN = "save or download the compressed model again"


@contextmanager
def as_checkpoint_error(name: Any) -> Iterator[None]:
    """Turns what reading a missing or damaged file raises into this package's errors."""
    try:
        yield
    except DirEmbedError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{name} holds no intact safetensors ({first_line(error)}): {AGAIN}") from error
    except OSError as error:
        raise UnreadableCheckpointError(
            f"{name} does not load from safetensors ({first_line(error)}): {AGAIN}"
        ) from error


def check_index(folder: Path) -> None:
    """Refuses a malformed index of shards in a local folder, if there is one.

    Raises:
        CheckpointError: If it is no JSON, lacks its map, or points outside of the folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        shards_of(index)


def shards_of(index: Path) -> set[str]:
    """The names of the shards that an index file lists.

    Raises:
        CheckpointError: If it is no JSON, lacks its map, or points outside of its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
        outside = sorted(shard for shard in shards if Path(shard).name != shard)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards ({first_line(error)}): {AGAIN}") from error
    if outside:
        raise CheckpointError(f"{index} points outside of its folder, to {outside[0]!r}: {AGAIN}")
    return shards


def check_stored_dtypes(spec: CompressionSpec, dtypes: Mapping[str, str]) -> None:
    """Refuses integers for floats and floats for integers, which transformers would cast, and what it would leave out.

    Args:
        spec: The layout that the config states.
        dtypes: Of every tensor of the checkpoint, by its name, as safetensors calls them.

    Raises:
        CheckpointError: If a tensor of a compressed table is of another kind than the layout says, or not part of it.
    """
    parts = spec.stored_shapes(1, 1)
    for name in dtypes:
        prefix = name.removesuffix("decoder_weight")
        if not name.endswith(".decoder_weight") or f"{prefix}weight" not in dtypes:
            continue
        for tensor in CODE_TENSORS:
            found, expected = dtypes.get(prefix + tensor), spec.stored_dtypes(tensor)
            if found is not None and tensor not in parts:
                raise CheckpointError(f"{prefix}{tensor} is not part of the layout that the config states: {AGAIN}")
            if found is not None and found not in expected:
                raise CheckpointError(f"{prefix}{tensor} is of dtype {found}, not {' or '.join(expected)}: {AGAIN}")


def check_files(spec: CompressionSpec, files: Iterable[str]) -> None:
    """Checks the headers of the files that are about to be loaded.

    Raises:
        CheckpointError: If a tensor of a compressed table is of another kind than the layout says.
    """
    dtypes: dict[str, str] = {}
    for path in files:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
    check_stored_dtypes(spec, dtypes)


def check_keys(model: PreTrainedModel, info: Any, ignore_mismatched: bool) -> None:
    """Refuses a checkpoint that lacks tensors, before room is made for them.

    Args:
        model: What the tensors were loaded into; the missing ones are still on the meta device.
        info: What transformers found, with `missing_keys`, `mismatched_keys` and `conversion_errors`.
        ignore_mismatched: Whether tensors of the wrong shape may stay random, as long as they are not the table's.

    Raises:
        CheckpointError: If a tensor of the compressed table is missing, any has the wrong shape or could not be
            quantised or converted otherwise, or most of the model is missing.
    """
    for key, report in info.conversion_errors.items():  # a traceback, what it ends with, what was converted
        reason = report.strip().splitlines()[-2:][0]
        raise CheckpointError(f"{key} could not be converted: {reason}: change the quantization_config, or {AGAIN}")
    modules = model.named_modules(remove_duplicate=False)
    compressed = {name for name, module in modules if isinstance(module, CompressedMatrix)}

    def of_table(key: str) -> bool:
        module, _, tensor = key.rpartition(".")
        return module in compressed and tensor != "bias"

    tied = set(model.all_tied_weights_keys)  # they come with what they are tied to
    missing = set(info.missing_keys) - tied
    lacking = sorted(filter(of_table, missing))
    if lacking:
        raise CheckpointError(f"the checkpoint lacks {lacking}: {AGAIN}")
    mismatched = sorted(
        f"{key} is {list(found)}, not {list(expected)}"
        for key, found, expected in info.mismatched_keys
        if of_table(key) or not ignore_mismatched
    )
    if mismatched:
        raise CheckpointError(f"the checkpoint does not fit its config: {'; '.join(mismatched)}: {AGAIN}")
    held = {name: tensor.nbytes for name, tensor in model.state_dict().items() if name not in tied}
    if 2 * sum(held[name] for name in missing & held.keys()) > sum(held.values()):
        raise CheckpointError(f"the checkpoint lacks most of the model that its config describes: {AGAIN}")


def check_table(matrix: CompressedMatrix) -> None:
    """Refuses values that no compressed table has.

    Raises:
        CheckpointError: If a float is not finite, if the refined rows or outliers are not distinct rows in ascending
            order, or the refined latents not distinct latents.
    """
    for name, tensor in matrix.code_tensors().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointError(f"{name} of the compressed table holds a NaN or an infinity: {AGAIN}")
    for name in ("refined_rows_weight", "outlier_rows_weight"):
        rows = getattr(matrix, name)
        if rows is None or rows.is_meta:
            continue
        if int(rows[0]) < 0 or int(rows[-1]) >= len(matrix.weight) or not (rows[1:] > rows[:-1]).all():
            raise CheckpointError(f"{name} does not name rows of {len(matrix.weight)} in ascending order: {AGAIN}")
    latents = matrix.refined_latents_weight
    if latents is not None and not latents.is_meta:
        named = latents.sort().values
        if int(named[0]) < 0 or int(named[-1]) >= matrix.spec.rank or not (named[1:] > named[:-1]).all():
            raise CheckpointError(
                f"refined_latents_weight does not name each of {matrix.spec.rank} latents at most once: {AGAIN}"
            )


def settle(model: PreTrainedModel) -> None:
    """Brings the compressed modules of a model that was just loaded into the state that they are in when made."""
    for module in model.modules():
        if isinstance(module, CompressedMatrix):
            module.align()
            for tensor in module.codes().values():  # transformers makes a parameter that learns of every float tensor
                tensor.requires_grad_(False)


WRAPPED = ("base_layer", "original_module")  # what PEFT's wrappers call the module that they wrap


def refuse_wrapper(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuses wrappers of PEFT that cannot work around a compressed matrix; called for every module that gets a part.

    Args:
        parent: What the module becomes a part of.
        name: What it is called there.
        child: The module.

    Raises:
        ModelError: If the wrapper changes rows of a dense table, trains packed codes, or adapts one of several modules
            that share a decoder.
    """
    if name not in WRAPPED or not isinstance(child, CompressedMatrix):
        return
    wrapper = type(parent)
    if wrapper.__module__.partition(".")[0] != "peft":
        return
    parameter = vars(parent).get("parameter_name")  # of LoRA's `target_parameters`
    if parameter is not None:
        if child.tied:
            raise ModelError(
                f"{parameter} of this {type(child).__name__} is shared with a tied module, which an adapter of one of "
                "them would leave behind: train the decoder itself, or expand the model with hf_dirembed.expand"
            )
        if not child.get_parameter(parameter).is_floating_point():
            raise ModelError(f"{parameter} holds packed integers, which no adapter adds to: choose decoder_weight")
    elif wrapper.__name__ != "ModulesToSaveWrapper":
        raise ModelError(
            f"PEFT's {wrapper.__name__} changes rows of a dense table, and a {type(child).__name__} has none: expand "
            "the model first with hf_dirembed.expand, or adapt its decoder with LoraConfig(target_parameters=...)"
        )
    elif child.spec.bit_allocation is not None:
        raise ModelError(
            "modules_to_save trains all of a module, and packed codes learn only without PEFT (unfreeze_codes): leave "
            f"the {type(child).__name__} out of it, or compress with method='direction' and call unfreeze_codes(), or "
            "expand the model first with hf_dirembed.expand"
        )


register_module_module_registration_hook(refuse_wrapper)


# Architectures whose forward passes index the table itself, or multiply with it.
TABLE_READERS = ("gemma4", "mobilebert")


class DirEmbedModelMixin(PreTrainedModel):
    """Makes a base model's class one whose token embedding, and the head tied to it, are compressed."""

    base_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(config, *args, **kwargs)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if args or kwargs or not torch.empty(0).is_meta:
                raise
            # While loading: nothing is allocated and the caller passed nothing, so it is the config's fault.
            raise SpecError(
                f"the config makes no {self.base_class.__name__} ({first_line(error)}): download the model again"
            ) from error
        swap_modules(self, CompressionSpec.from_dict(config.dirembed))
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Like the base class's, from safetensors only; refuses a checkpoint whose codes or decoder do not fit.

        Raises:
            CheckpointError: If a file is missing or damaged, a tensor of the compressed table is missing or holds what
                no table does, or any tensor has the wrong shape.
            SpecError: If the config makes no model.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise CheckpointError("compressed models load from safetensors only: drop use_safetensors=False")
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with as_checkpoint_error(name):
            if isinstance(name, (str, os.PathLike)):
                check_index(Path(name, kwargs.get("subfolder") or ""))
            loaded: Any = super().from_pretrained(*args, **kwargs)
        settle(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        if state_dict is None and checkpoint_files:
            check_files(CompressionSpec.from_dict(model.config.dirembed), checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        check_keys(model, loading_info, load_config.ignore_mismatched_sizes)
        for module in model.modules():
            if isinstance(module, CompressedMatrix):
                check_table(module)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def initialize_weights(self) -> None:
        """Like the base class's, which draws what no file had; codes that stay on disk are not among that."""
        for module in self.modules():
            if isinstance(module, CompressedMatrix):
                for tensor in module.code_tensors().values():
                    if tensor.is_meta:
                        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        super().initialize_weights()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the modeling is the base's own, and so are its checkpoint conversions (MoE and others)."""
        return False

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Like the base class's; the decoder goes into the file in its narrow dtype, where that loses nothing.

        Raises:
            ModelError: If the embedding was replaced by a dense one, or a compressed head is no longer tied to it,
                which a file cannot say.
        """
        embedding = embedding_of(self)
        if not isinstance(embedding, CompressedEmbedding):
            raise ModelError(
                "the compressed embedding was replaced by a dense one (set_input_embeddings): make a stock model "
                "with hf_dirembed.expand, and compress that again if it should be"
            )
        if untied := sorted(compressed_modules(self) - tied_modules(self)):
            raise ModelError(
                f"{untied} are compressed, but no longer tied to the input embedding: set "
                "config.tie_word_embeddings and call tie_weights(), or expand the model with hf_dirembed.expand"
            )
        state = dict(self.state_dict() if state_dict is None else state_dict)
        names = [name for module in tied_modules(self) if (name := f"{module}.decoder_weight") in state]
        decoder = state[names[0]] if names else None
        self.config.dirembed = embedding.current_spec(decoder).to_dict()
        # One tensor for all names, which saving finds tied.
        state |= dict.fromkeys(names, embedding.stored_decoder(decoder))
        super().save_pretrained(save_directory, is_main_process, state, *args, **kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if package.before_upload is not None:
            package.before_upload(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def print_compression(self) -> None:
        """Prints how large the token embeddings are, and were, in a line.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> import hf_dirembed
            >>> config = BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
            >>> hf_dirembed.compress(BertModel(config), method="svd", ratio=4).print_compression()
            token embeddings 500 x 32: 14,896 bytes, 4.3x smaller than dense, 7.45 bits per weight (svd)
        """
        print(compression_line(embedding_of(self)))

    def unfreeze_codes(self) -> Any:
        """Makes the codes of the embedding and of every tied head learn; see [`CompressedMatrix.unfreeze_codes`].

        Raises:
            ModelError: If the embedding is no longer compressed; and as there.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> import hf_dirembed
            >>> sizes = dict(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
            >>> model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=True))
            >>> hf_dirembed.compress(model, bits=4).unfreeze_codes().get_output_embeddings().shadow
            LatentShadow(weight=(500, 32))
        """
        unfreeze(self._sharing_codes())
        return self

    def freeze_codes(self) -> Any:
        """Undoes `unfreeze_codes`; see [`CompressedMatrix.freeze_codes`]."""
        freeze(self._sharing_codes())
        return self

    def _sharing_codes(self) -> list[CompressedMatrix]:
        embedding = embedding_of(self)
        if not isinstance(embedding, CompressedEmbedding):
            raise ModelError("the compressed embedding was replaced by a dense one, which has no codes")
        sharing = [module for module in self.modules() if isinstance(module, CompressedMatrix)]
        return [module for module in sharing if module.weight is embedding.weight]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Like torch's, but does not unfreeze the codes; see [`unfreeze_codes`]."""
        compressed = [module for module in self.modules() if isinstance(module, CompressedMatrix)]
        frozen = {id(tensor) for module in compressed for tensor in module.frozen_tensors().values()}
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and id(parameter) not in frozen)
        return self

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        embedding = embedding_of(self)
        if not isinstance(embedding, CompressedEmbedding):  # replaced by hand, with set_input_embeddings
            return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        num_tokens = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            num_tokens = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        resize_rows(embedding, num_tokens)
        head = self.get_output_embeddings()
        if isinstance(head, CompressedLMHead):
            head.spec = embedding.spec
            head.out_features = num_tokens  # its codes and its bias follow when the weights are tied again
        elif head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, num_tokens, mean_resizing=mean_resizing))
        return embedding


_model_classes: dict[tuple[type, type], type] = {}


def derive_model_class(base: type[PreTrainedModel], config_class: Any) -> type[PreTrainedModel]:
    """The class of compressed models over a base class, made once.

    Args:
        base: A class of transformers.
        config_class: The derived config; where it is not over the base's own (several architectures may use one
            class), its name becomes part of the class's.
    """
    if (base, config_class) not in _model_classes:
        attributes = {"__module__": __name__, "config_class": config_class, "base_class": base}
        own = base.config_class is config_class.base_class
        prefix = "DirEmbed" if own else config_class.__name__
        derived = type(f"{prefix}{base.__name__}", (DirEmbedModelMixin, base), attributes)
        conversions = get_checkpoint_conversion_mapping(base.__name__)
        if conversions is not None:  # renamings of checkpoint keys that go by the name of the class
            register_checkpoint_conversion_mapping(derived.__name__, conversions, overwrite=True)
        _model_classes[base, config_class] = derived
    return _model_classes[base, config_class]


def register_model_classes(base_config: type, config_class: type) -> None:
    """Registers a derived model class with every AutoModel class that knows the base config."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or base_config not in mapping:
            continue
        bases = mapping[base_config]
        if isinstance(bases, (tuple, list)):
            derived = tuple(derive_model_class(base, config_class) for base in bases)
            mapping.register(config_class, derived, exist_ok=True)
        else:
            auto.register(config_class, derive_model_class(bases, config_class), exist_ok=True)


def convert(model: PreTrainedModel, spec: CompressionSpec, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Turns a dense model, in place, into the compressed one that `spec` and `tensors` describe.

    Args:
        model: Its class, its config and its embedding change; everything else stays the object it was.
        spec: The layout of the codes.
        tensors: Those of `CompressedMatrix.code_tensors`, by name.

    Raises:
        ModelError: If the model has its own code, or its embedding or head is of a kind that cannot be compressed.
    """
    base_config = type(model.config)
    config_class = derive_config_class(base_config.model_type)
    if config_class.base_class is not base_config:  # type: ignore[attr-defined]
        raise ModelError(
            f"{base_config.__name__} is not the config that transformers has for {base_config.model_type!r}: "
            "models that bring their own code are not supported"
        )
    if base_config.model_type in TABLE_READERS:
        raise ModelError(f"{type(model).__name__} reads its table's rows past the embedding: it is not supported")
    device = embedding_of(model).weight.device
    device = tensors["weight"].device if device.type == "meta" else device
    for name in swap_modules(model, spec, device="meta"):
        module = model.get_submodule(name)
        assert isinstance(module, CompressedMatrix)
        # The same storage for all: tying then makes them the same parameter, whichever of them is its source.
        kept = {key: tensors[key].to(device, parameter.dtype) for key, parameter in module.code_tensors().items()}
        module.load_state_dict(kept, strict=False, assign=True)
    _give_own_config(model).__class__ = config_class
    model.config.dirembed = spec.to_dict()
    model.__class__ = derive_model_class(type(model), config_class)
    _forget_quantizer(model)
    model.tie_weights()
    return model


def _give_own_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Replaces a config, which other models may be made with, by a copy; its parts stay the objects that they are.

    Returns:
        The copy.
    """
    shared, own = model.config, copy.copy(model.config)
    for attributes in (vars(module) for module in model.modules()):
        if attributes.get("config") is shared:
            attributes["config"] = own
    return own


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a compressed model, in place, back into a stock dense one; the inverse of [`convert`]."""
    dense: dict[nn.Module, nn.Module] = {}
    for name in sorted(compressed_modules(model)):
        compressed = model.get_submodule(name)
        assert isinstance(compressed, (CompressedEmbedding, CompressedLMHead))
        if compressed not in dense:
            dense[compressed] = compressed.to_dense()
        model.set_submodule(name, dense[compressed])
    for submodel in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        if ties := vars(submodel).get("_tied_weights_keys"):
            kept = {target: source for target, source in ties.items() if not DECODER_TIE.search(target)}
            submodel._tied_weights_keys = kept
        if isinstance(submodel, DirEmbedModelMixin):
            submodel.__class__ = submodel.base_class  # type: ignore[assignment]
        if isinstance(submodel.config, DirEmbedConfigMixin):
            del submodel.config.dirembed
            vars(submodel.config).pop("auto_map", None)  # left there by a save of the compressed model
            submodel.config.__class__ = submodel.config.base_class
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    return model


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Drops what a GGUF file leaves on a model whose weights are dense by now; it would refuse to be saved."""
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if getattr(method, "value", method) == "gguf":
        del model.config.quantization_config
        del model.hf_quantizer


def __getattr__(name: str) -> type:
    """Finds derived model classes by name, as unpickling does in a fresh process."""
    if name.startswith("DirEmbed"):
        config_name, _, base_name = name.removeprefix("DirEmbed").rpartition("Config")
        base = getattr(transformers, base_name, None)
        if isinstance(base, type) and issubclass(base, PreTrainedModel) and base.config_class is not None:
            base_config = getattr(transformers, f"{config_name}Config") if config_name else base.config_class
            return derive_model_class(base, derive_config_class(base_config.model_type))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
