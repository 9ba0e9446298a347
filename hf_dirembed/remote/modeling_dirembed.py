"""What a compressed model is: derived classes, the from_pretrained hook and what it checks, saving, and PEFT.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from .adapters_dirembed import refuse_codes, refuse_idle_optimizer, refuse_wrapper
from .checks_dirembed import (
    as_checkpoint_error,
    check_checksum,
    check_files,
    check_index,
    check_keys,
    check_table,
    checked_codes,
    decoder_checksum,
    finish_loading,
    warn_of_decoder,
)
from .codes_dirembed import (
    BlocksLayout,
    CheckpointError,
    CompressionSpec,
    Layout,
    ModelError,
    SpecError,
    TableRecord,
    checksum,
    first_line,
)
from .configuration_dirembed import derive_config_class
from .guarded_dirembed import plain
from .matrix_dirembed import CompressedMatrix, freeze, unfreeze
from .modules_dirembed import (
    CompressedBlocks,
    CompressedEmbedding,
    CompressedLinear,
    CompressedLookup,
    CompressedTable,
    compression_line,
)
from .placement_dirembed import body_parameters, keep_mapped, run_in_place
from .products_dirembed import package
from .resizing_dirembed import resize_rows
from .tables_dirembed import (
    TABLE_MODULES,
    broken_ties,
    compressed_tables,
    configured_ties,
    embedding_of,
    locate_tables,
    reading_class,
    swap_tables,
    table_at,
)


EMBEDDINGS = ("inputs_embeds", "decoder_inputs_embeds")  # arguments of models that are given in the place of ids

register_module_module_registration_hook(refuse_wrapper)
register_module_parameter_registration_hook(refuse_codes)
register_optimizer_step_pre_hook(refuse_idle_optimizer)


class DirEmbedModelMixin(PreTrainedModel):
    """Makes a base model's class one whose token embedding, and the head tied to it, are compressed."""

    base_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        vars(self)["_building"] = True
        try:
            super().__init__(config, *args, **kwargs)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if args or kwargs or not torch.empty(0).is_meta:
                raise
            # While loading: nothing is allocated and the caller passed nothing, so it is the config's fault.
            raise SpecError(
                f"the config makes no {self.base_class.__name__} ({first_line(error)}): download the model again"
            ) from error
        swap_tables(self, CompressionSpec.from_dict(config.dirembed))
        del vars(self)["_building"]
        self.tie_weights()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Like the base class's.

        Raises:
            ModelError: If embeddings are integers, as a cast to the dtype of a table's codes makes them.
        """
        for name in EMBEDDINGS:
            given = kwargs.get(name)
            if isinstance(given, Tensor) and given.dtype != self.dtype and self._has_codes_of(given.dtype):
                raise ModelError(
                    f"{name} are of {given.dtype}: cast them to the model's dtype ({self.dtype}), not to that of the "
                    "table's `weight`, which holds codes"
                )
        return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "hf_device_map":  # what accelerate does last when it dispatches a model
            self._run_tables_in_place()

    @property
    def device(self) -> torch.device:
        """The device of what is not compressed, which `generate` and pipelines bring their inputs to.

        Tables may be on another one, to which they bring ids and states themselves.
        """
        first = next(body_parameters(self), None)
        found: torch.device = super().device if first is None else first.device
        return found

    def _run_tables_in_place(self) -> None:
        """Has tables that are off the accelerator run where they are; checks those that nobody has read before."""
        unchecked = run_in_place(self)
        finish_loading(self)
        for path in unchecked:
            for _, matrix in table_at(self, path).matrices():
                check_table(matrix)
            check_checksum(table_at(self, path), path)

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
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = dict(kwargs["device_map"])  # which tables' places are changed in
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with as_checkpoint_error(name):
            if isinstance(name, (str, os.PathLike)):
                check_index(Path(name, kwargs.get("subfolder") or ""))
            loaded: Any = super().from_pretrained(*args, **kwargs)
        finish_loading(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        keep_mapped(model, load_config.device_map)
        if state_dict is None and checkpoint_files:
            check_files(CompressionSpec.from_dict(model.config.dirembed), checkpoint_files)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        check_keys(model, loading_info, load_config.ignore_mismatched_sizes)
        for module in model.modules():
            if isinstance(module, CompressedMatrix):
                check_table(module)
        for path in compressed_tables(model):
            check_checksum(table_at(model, path), path)
            warn_of_decoder(table_at(model, path), path)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def initialize_weights(self) -> None:
        """Like the base class's, which draws what no file had; codes that stay on disk are not among that."""
        for module in self.modules():
            if isinstance(module, CompressedMatrix):
                for tensor in module.code_tensors().values():
                    if tensor.is_meta:
                        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            bias = getattr(module, "bias", None) if isinstance(module, CompressedLinear) else None
            if bias is not None and not bias.is_meta and not getattr(bias, "_is_hf_initialized", False):
                nn.init.zeros_(bias)  # as that of a linear layer that no file had
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
        state = dict(self.state_dict() if state_dict is None else state_dict)
        tables = self._tables_to_save()
        if not tables:
            raise ModelError(
                "none of the tables that were compressed is part of this model: make a stock one of it with "
                "hf_dirembed.expand, and save that"
            )
        _give_own_memory(state, self.get_expanded_tied_weights_keys(all_submodels=True))
        spec = CompressionSpec(
            {path: _narrow_decoders(table_at(self, path), names, state) for path, names in tables.items()},
            {path: _current_record(table_at(self, path)) for path in tables},
        )
        self.config.dirembed = spec.to_dict()
        vars(self)["_saving"] = True  # torchao takes a state dict of its own, and knows no class of ours
        try:
            super().save_pretrained(save_directory, is_main_process, state, *args, **kwargs)
        finally:
            del vars(self)["_saving"]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like torch's; while the model is saved, codes are plain tensors in it."""
        state = super().state_dict(*args, **kwargs)
        if "_saving" in vars(self):
            for name, tensor in state.items():
                state[name] = plain(tensor) if isinstance(tensor, Tensor) else tensor
        return state

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if package.before_upload is not None:
            package.before_upload(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Like the base class's, which shares parameters one by one.

        Raises:
            ModelError: If the config ties tables that were compressed apart from one another: to share the codes of
                one without its decoder would be neither.
        """
        # While a model is built around one that is compressed, its head is dense for a moment. It is tied after that.
        if "_building" in vars(self):
            return None
        for target, source in configured_ties(self):
            one, other = (self.get_submodule(name) for name in (target, source))
            compressed = [module for module in (one, other) if isinstance(module, TABLE_MODULES)]
            apart = [module for module in compressed if not getattr(module, "tied", False)]
            if apart and one is not other:
                raise ModelError(
                    f"the config ties {target} to {source}, which were not compressed as one table: set "
                    "config.tie_word_embeddings to False, or expand the model with hf_dirembed.expand and tie that"
                )
        return super().tie_weights(*args, **kwargs)

    def _tables_to_save(self) -> dict[str, set[str]]:
        """The compressed tables, as [`compressed_tables`] gives them, if a file can say which they are.

        Raises:
            ModelError: If one was replaced by a dense one, modules share codes without being tied, or are tied without
                sharing them.
        """
        self._refuse_replaced()
        tables = compressed_tables(self)
        apart = broken_ties(self)
        for path, names in tables.items():
            weight = table_at(self, path).weight
            apart |= {name: path for name in names if not _are_one(table_at(self, name).weight, weight)}
        for name, path in sorted(apart.items()):
            if not isinstance(self.get_submodule(name), TABLE_MODULES):
                raise ModelError(
                    f"{name} is tied to the compressed {path}, but was replaced by a dense one: set "
                    "config.tie_word_embeddings to False, or expand the model with hf_dirembed.expand"
                )
            raise ModelError(
                f"{name} and {path} are tied, but have codes of their own: call tie_weights(), which gives {name} the "
                "other's, or set config.tie_word_embeddings to False"
            )
        return tables

    def _refuse_replaced(self) -> None:
        stated = CompressionSpec.from_dict(self.config.dirembed).tables
        for path in locate_tables(self, stated).values():
            if not isinstance(self.get_submodule(path), TABLE_MODULES):
                raise ModelError(
                    f"the compressed {path} was replaced by a dense one (set_input_embeddings): make a stock model "
                    "with hf_dirembed.expand, and compress that again if it should be"
                )

    def _has_codes_of(self, dtype: torch.dtype) -> bool:
        """Whether a dtype is that of codes, as which states do nothing but harm."""
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            return not dtype.is_floating_point
        return any(isinstance(each, CompressedMatrix) and each.weight.dtype == dtype for each in self.modules())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The parameters of the dense model that this one stands for; those that learn are counted as they are.

        Args:
            only_trainable: Whether to count only what learns: of a compressed table its decoder.
            exclude_embeddings: Whether to leave lookups out, with what is tied to them.
        """
        count: int = super().num_parameters(only_trainable, exclude_embeddings)
        sharing: dict[int, list[nn.Module]] = {}
        for module in self.modules():
            if isinstance(module, TABLE_MODULES):
                sharing.setdefault(id(module.weight), []).append(module)

        of_tables: dict[int, Tensor] = {}
        for modules in sharing.values():
            own = {id(each): each for module in modules for each in _table_parameters(module)}
            of_tables |= own
            if exclude_embeddings and any(isinstance(module, CompressedLookup) for module in modules):
                continue
            learning = sum(each.numel() for each in own.values() if each.requires_grad)
            count += learning if only_trainable else _num_weights(modules[0])

        counted = (each for each in self.parameters() if id(each) in of_tables)
        return count - sum(each.numel() for each in counted if each.requires_grad or not only_trainable)

    def print_compression(self) -> None:
        """Prints every vocabulary table of the model, compressed or not, and how large it is, a line each.

        Where this file is used without the package, only those that are compressed.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> import hf_dirembed
            >>> config = BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
            >>> hf_dirembed.compress(BertModel(config), method="svd", ratio=4).print_compression()
            embeddings.word_embeddings  500 x 32, 14,896 bytes, 4.3x smaller than dense, 7.45 bits per weight (svd)
        """
        compressed = compressed_tables(self)
        for path in compressed:
            print(f"{path}  {compression_line(table_at(self, path))}")
        for table in package.find_tables(self) if package.find_tables else ():
            if table.tied_to is not None:
                print(f"{table.name}  {table.rows:,} x {table.dim:,}, shares {table.tied_to}")
            elif not table.compressed:
                print(f"{table.name}  {table.rows:,} x {table.dim:,}, {table.num_bytes:,} bytes, dense")

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
        for matrices in self._sharing_codes():
            unfreeze(matrices)
        return self

    def freeze_codes(self) -> Any:
        """Undoes `unfreeze_codes`; see [`CompressedMatrix.freeze_codes`]."""
        for matrices in self._sharing_codes():
            freeze(matrices)
        return self

    def _sharing_codes(self) -> list[list[CompressedMatrix]]:
        """The compressed matrices, those together that share their codes.

        Raises:
            ModelError: If one was replaced by a dense one.
        """
        self._refuse_replaced()
        sharing: dict[int, list[CompressedMatrix]] = {}
        for module in self.modules():
            if isinstance(module, CompressedMatrix):
                sharing.setdefault(id(module.weight), []).append(module)
        return list(sharing.values())

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Like torch's, but does not unfreeze the codes; see [`unfreeze_codes`]."""
        compressed = [module for module in self.modules() if isinstance(module, CompressedMatrix)]
        frozen = {id(tensor) for module in compressed for tensor in module.frozen_tensors().values()}
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and id(parameter) not in frozen)
        return self

    def _get_resized_embeddings(
        self,
        old_embeddings: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Like the base class's; compressed tables are resized in place, each block of theirs as a matrix is."""
        if not isinstance(old_embeddings, CompressedLookup):
            return super()._get_resized_embeddings(old_embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing)
        num_tokens = old_embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            num_tokens = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        tied = self._lookups_tied_to(old_embeddings)
        for _, matrix in old_embeddings.matrices():  # type: ignore[operator]
            resize_rows(matrix, num_tokens)
        for lookup in tied:  # whichever of them is the source of the ties; heads follow when these are tied again
            assert isinstance(old_embeddings, CompressedEmbedding)
            lookup.layout = old_embeddings.layout
            for name, tensor in old_embeddings.code_tensors().items():
                setattr(lookup, name, tensor)
        return old_embeddings

    def _lookups_tied_to(self, embedding: nn.Module) -> list[CompressedEmbedding]:
        """The other modules that look up in the same table, told by their codes: the config may say otherwise."""
        lookups = (module for module in self.modules() if isinstance(module, CompressedEmbedding))
        return [module for module in lookups if module is not embedding and module.weight is embedding.weight]

    def _is_tied_head(self, head: Any, embedding: nn.Module) -> bool:
        """Whether a head shares the codes of an embedding, and is to go on doing so."""
        tables = ({self.get_submodule(name) for name in names} for names in compressed_tables(self).values())
        shares = isinstance(head, CompressedLinear) and head.weight is embedding.weight
        return shares and any({head, embedding} <= modules for modules in tables)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        embedding, head = embedding_of(self), self.get_output_embeddings()
        if not isinstance(embedding, CompressedLookup) and not isinstance(head, TABLE_MODULES):
            return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        num_tokens = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            num_tokens = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of

        tied_head = self._is_tied_head(head, embedding)
        resized = self._get_resized_embeddings(embedding, num_tokens, mean_resizing=mean_resizing)
        if resized is not embedding:
            self.set_input_embeddings(resized)
        embedding = resized

        if tied_head:
            assert isinstance(embedding, CompressedEmbedding)
            head.layout = embedding.layout
            head.out_features = num_tokens  # its codes and its bias follow when the weights are tied again
        elif isinstance(head, CompressedLinear):
            head.resize(num_tokens)
            self.set_output_embeddings(head)  # where some models make its bias their own, too
            if head.bias is not None:  # files would have one of the two
                head.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=head.bias.requires_grad)
        elif isinstance(head, CompressedLookup):
            self._get_resized_embeddings(head, num_tokens)
        elif head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, num_tokens, mean_resizing=mean_resizing))
        if getattr(self.config, "share_encoder_decoder_embeddings", False):  # Marian states the size for both sides
            self.config.decoder_vocab_size = num_tokens
        return embedding


def _table_parameters(table: Any) -> list[Tensor]:
    """The parameters of a compressed module that stand for its table."""
    shadows = (matrix.shadow for _, matrix in table.matrices())
    learning = [each for shadow in shadows if shadow is not None for each in shadow.parameters()]
    return [*table.code_tensors().values(), *learning]


def _num_weights(table: Any) -> int:
    """V x d."""
    return sum(matrix.num_rows * matrix.dim for _, matrix in table.matrices())


def _give_own_memory(state: dict[str, Tensor], ties: dict[str, str]) -> None:
    """Copies tensors of a state dict that share memory without being tied by the config: files have all of them."""
    owners: dict[int, str] = {}
    for key, tensor in state.items():
        if tensor.is_meta or hasattr(tensor, "device_mesh") or not tensor.numel():
            continue
        owner = owners.setdefault(plain(tensor).data_ptr(), key)
        if owner != key and key not in ties and owner not in ties:
            state[key] = plain(tensor).clone()


def _are_one(tensor: Tensor, other: Tensor) -> bool:
    """Whether tensors share their memory, as far as they are in memory."""
    known = not any(each.is_meta or hasattr(each, "device_mesh") for each in (tensor, other))
    return tensor is other or not known or tensor.data_ptr() == other.data_ptr()


def _narrow_decoders(table: CompressedTable, names: set[str], state: dict[str, Tensor]) -> Layout:
    """Puts a table's decoders into a state dict in the dtype that files have them in; the layout that comes of it."""
    layouts = []
    for prefix, matrix in table.matrices():
        keys = [key for name in sorted(names) if (key := f"{name}.{prefix}decoder_weight") in state]
        decoder = state[keys[0]] if keys else None
        layouts.append(matrix.current_layout(decoder))
        state |= dict.fromkeys(keys, matrix.stored_decoder(decoder))  # one tensor, which saving finds tied
    return BlocksLayout(table.layout.dims, tuple(layouts)) if isinstance(table, CompressedBlocks) else layouts[0]


def _current_record(table: CompressedTable) -> TableRecord:
    """The record of a table with the checksums of the codes and the decoder that it has now."""
    table.write_codes()
    table.verify_codes(values=True)
    codes = checked_codes(table)
    known = not any(tensor.is_meta or hasattr(tensor, "device_mesh") for tensor in codes.values())
    return replace(
        table.record,
        checksum=checksum(codes) if known else table.record.checksum,
        decoder_checksum=decoder_checksum(table),
    )


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
        derived = type(f"{prefix}{base.__name__}", (DirEmbedModelMixin, reading_class(base)), attributes)
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


def __getattr__(name: str) -> type:
    """Finds derived model classes by name, as unpickling does in a fresh process."""
    if name.startswith("DirEmbed"):
        config_name, _, base_name = name.removeprefix("DirEmbed").rpartition("Config")
        base = getattr(transformers, base_name, None)
        if isinstance(base, type) and issubclass(base, PreTrainedModel) and base.config_class is not None:
            base_config = getattr(transformers, f"{config_name}Config") if config_name else base.config_class
            return derive_model_class(base, derive_config_class(base_config.model_type))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
