"""A model → its vocabulary tables: what token ids look up, and what hidden states are multiplied with for logits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import ModelError, OptionError
from .remote.modules_dirembed import CompressedLinear, CompressedLookup
from .remote.stock_dirembed import StockEmbedding
from .remote.tables_dirembed import TABLE_MODULES, declared_ties, input_table, source_of, tied_modules


# Lookups that no accessor of a model gives, by the end of their name.
_LOOKUPS = re.compile(
    r"(^|\.)(embed_tokens|shared|word_embeddings?|token_embedding|text_token_embedding|text_embed_tokens"
    r"|embed_text_tokens)$"
)
_PER_LAYER = re.compile(r"(^|\.)(embed_tokens_per_layer|value_embeddings)$")
_N_GRAM = re.compile(r"(^|\.)(ngram_embedding|encoder_hash_tok_embedding|HashBucketCodepointEmbedder_\d+)$")

# The same by names that say little: they count where a config has a vocabulary of as many rows.
_GENERIC = re.compile(r"(^|\.)(embeddings?|embed)$")
_VOCABULARIES = ("vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "text_vocab_size")

# Text heads that neither an accessor nor a tie map gives.
_HEADS = re.compile(r"(^|\.)(mlm_head|mmm_text_head)\.decoder$")

# Tables of other ids than tokens': of entities, pronunciations, shapes, added tokens, slots of other modalities.
_AUXILIARY = re.compile(
    r"(^|\.)(entity_embeddings\.entity_embeddings|embed_tokens\.additional_embedding|pronunciation_embed|shape_embed"
    r"|lm_head\.additional_fc|embed_(vision|audio)\.embedding)$"
)

# Tables of codes of audio, speech units or images: by the module's name, or by the class of a model that holds it.
_CODES = re.compile(
    r"(^|\.)(codec_\w+|code_embedding|embed_audio_tokens|unit_embedding|generation_embeddings|vqmodel|quantize\w*"
    r"|visual_embeddings_table|code_predictor|coarse_acoustics|fine_acoustics|speech_decoder_model|t2u_model)(\.|$)"
)
_CODE_MODELS = re.compile(
    r"^(DirEmbed)?(Bark(Coarse|Fine)|CsmDepth|ClvpDecoder|ClvpForCausalLM|SeamlessM4T(v2)?TextToUnit|MoshiDepth"
    r"|Musicgen\w*(Decoder|ForCausalLM)|Qwen\w*Omni\w*Talker|ImageGPT"
    r"|\w*(VQVAE|VQModel|CodeHifiGan|Code2Wav|Token2Wav))"
)

# Models that read text and write codes.
_CODE_WRITERS = re.compile(
    r"^(DirEmbed)?(BarkSemanticModel|CsmForConditionalGeneration|GlmImageForConditionalGeneration)$"
)


@dataclass(frozen=True)
class VocabularyTable:
    """One vocabulary table of a model.

    Attributes:
        name: The path of its module.
        kind: `input`, `tied head`, `head`, `per-layer`, `n-gram`, or `lookup`: one more table that token ids look up,
            as a decoder's or a text tower's.
        rows: V.
        dim: d.
        num_bytes: The bytes that it takes; a table that is tied to another takes none of its own.
        share: Its share of the model's bytes.
        tied_to: The path of the table that it shares its weights with, if it does.
        compressed: Whether it is compressed.
        refusal: Why it cannot be compressed; None if it can, or is.
    """

    name: str
    kind: str
    rows: int
    dim: int
    num_bytes: int
    share: float
    tied_to: str | None = None
    compressed: bool = False
    refusal: str | None = None


def find_tables(model: PreTrainedModel) -> list[VocabularyTable]:
    """Finds every vocabulary table of a model, compressed or not.

    Args:
        model: Loaded, or on the meta device.

    Returns:
        The tables, in the order of the model's modules.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=False))
        >>> [(table.name, table.kind, table.rows, table.num_bytes) for table in find_tables(model)]
        [('model.embed_tokens', 'input', 500, 64000), ('lm_head', 'head', 500, 64000)]
    """
    kinds = _kinds(model)
    if all(kind == "head" for kind in kinds.values()):
        return []  # it reads no token ids

    total = sum(tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()) - _tied_bytes(model)
    lookups, tables = {name for name, kind in kinds.items() if kind != "head"}, []

    for name, kind in kinds.items():
        names = tied_modules(model, name)
        source = source_of(model, names)
        own = name == source or source not in kinds
        rows, dim, num_bytes = _size(model.get_submodule(name))
        num_bytes = num_bytes if own else 0

        tables.append(
            VocabularyTable(
                name,
                "tied head" if kind == "head" and lookups & names else kind,
                rows,
                dim,
                num_bytes,
                num_bytes / max(total, 1),
                tied_to=None if own else source,
                compressed=isinstance(model.get_submodule(name), TABLE_MODULES),
                refusal=_refusal_of(model, names),
            )
        )

    return tables


def num_blocks(model: PreTrainedModel, table: VocabularyTable) -> int:
    """How many blocks of columns of a table are coded by themselves: one a layer of a per-layer table, else 1."""
    width = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None)
    if table.kind != "per-layer" or not width or table.dim % width:
        return 1
    return table.dim // width


def choose_tables(model: PreTrainedModel, names: tuple[str, ...] | None) -> list[VocabularyTable]:
    """The tables to compress: those with weights of their own, each once.

    Args:
        model: A dense one.
        names: Paths of tables, or their last parts; by default every table that can be compressed.

    Raises:
        ModelError: If the model has none, one of those that are named cannot be compressed, or tables share weights
            that the config does not tie.
        OptionError: If a name is that of no table, or of several.
    """
    _check_ties(model)
    tables = find_tables(model)
    if compressed := [table.name for table in tables if table.compressed]:
        raise ModelError(f"{', '.join(compressed)} of the model are compressed already: expand it first")

    if names is None:
        chosen = [table for table in tables if table.tied_to is None]
        if able := [table for table in chosen if table.refusal is None]:
            return able
        embedding = _accessed(model, "get_input_embeddings")
        given = "none" if embedding is None else f"a {type(embedding).__name__}"
        refusals = "; ".join(f"{table.name}: {table.refusal}" for table in chosen)
        reasons = refusals or f"get_input_embeddings gives {given}"
        raise ModelError(
            f"{type(model).__name__} has no token embedding that can be compressed ({reasons}): choose a "
            "transformers model that reads token ids"
        )

    by_name = {table.name: table for table in tables}
    found = [by_name[match_name(name, by_name)] for name in names]
    for table in found:
        if table.refusal is not None:
            raise ModelError(f"{table.name} cannot be compressed: {table.refusal}")

    sources = dict.fromkeys(table.tied_to or table.name for table in found)
    return [by_name[name] for name in sources]


def _check_ties(model: PreTrainedModel) -> None:
    """Refuses a model whose tables share weights that its config does not tie, which no file could say.

    A table that the config ties, but that has values of its own, is a table of its own.

    Raises:
        ModelError: If there are such tables.
    """
    seen: dict[int, str] = {}
    for name in _kinds(model):
        weight = model.get_submodule(name)._parameters.get("weight")
        other = seen.setdefault(id(weight), name)
        if other != name and other not in tied_modules(model, name):
            raise ModelError(
                f"{name} shares the weights of {other}, but the config does not tie them: set "
                "config.tie_word_embeddings = True, or give it a copy of its own"
            )


def is_head(model: PreTrainedModel, path: str) -> bool:
    """Whether a model's head multiplies the table at a path."""
    head = model.get_output_embeddings()
    return any(model.get_submodule(name) is head for name in tied_modules(model, path))


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether a model's head multiplies the table that its token ids look up."""
    return is_head(model, input_table(model))


def match_name(name: str, names: dict[str, VocabularyTable]) -> str:
    """The table that a path, or the last parts of one, stands for.

    Raises:
        OptionError: If it stands for none, or for several.

    Example:
        >>> match_name("embed_tokens", {"model.embed_tokens": ..., "lm_head": ...})
        'model.embed_tokens'
    """
    matches = [each for each in names if each == name] or [each for each in names if each.endswith(f".{name}")]
    if len(matches) != 1:
        if matches:
            raise OptionError(f"{name!r} names each of {', '.join(matches)}: give more of the path of one")
        raise OptionError(f"{name!r} names no table: the model has {', '.join(names) or 'none'}")
    return matches[0]


@dataclass(frozen=True)
class _Parts:
    """The modules of a model, by their first names.

    Attributes:
        names: The first name of each module.
        modules: Modules, by every name.
        models: The models among them, by name, the model itself under the empty one.
    """

    names: dict[nn.Module, str]
    modules: dict[str, nn.Module]
    models: dict[str, PreTrainedModel]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Parts:
        """The modules of a model, by their names."""
        modules = dict(model.named_modules(remove_duplicate=False))
        names: dict[nn.Module, str] = {}
        for name, module in modules.items():
            names.setdefault(module, name)
        models = {name: module for name, module in modules.items() if isinstance(module, PreTrainedModel)}
        return cls(names, modules, models)

    def holders(self, name: str) -> list[PreTrainedModel]:
        """The models that hold a module, the innermost one last."""
        held = [prefix for prefix in self.models if not prefix or name.startswith(f"{prefix}.")]
        return [self.models[prefix] for prefix in sorted(held, key=len)]


def _kinds(model: PreTrainedModel) -> dict[str, str]:
    """The kind of each module that is a vocabulary table, by its first name."""
    parts = _Parts.of(model)
    kinds = _accessed_kinds(model, parts)

    for module, name in parts.names.items():
        if _is_lookup(module):
            if _PER_LAYER.search(name):
                kinds[module] = "per-layer"
            elif _N_GRAM.search(name):
                kinds[module] = "n-gram"
            elif _LOOKUPS.search(name) or _is_of_a_vocabulary(parts, module):
                kinds.setdefault(module, "lookup")
        elif _is_linear(module) and _HEADS.search(name):
            kinds.setdefault(module, "head")

    _add_tied(parts, kinds)
    return {
        name: kinds[module]
        for module, name in parts.names.items()
        if module in kinds and not _AUXILIARY.search(name) and not _holds_codes(parts, name, kinds[module])
    }


def _accessed_kinds(model: PreTrainedModel, parts: _Parts) -> dict[nn.Module, str]:
    """What the accessors of a model, and of every model in it, give."""
    kinds: dict[nn.Module, str] = {}
    for inner in dict.fromkeys(parts.models.values()):
        lookup, head = _accessed(inner, "get_input_embeddings"), _accessed(inner, "get_output_embeddings")
        if _is_lookup(lookup) and lookup in parts.names:
            kinds.setdefault(lookup, "input" if inner is model else "lookup")
        if head in parts.names and (_is_lookup(head) or _is_linear(head)):
            kinds.setdefault(head, "lookup" if _is_lookup(head) else "head")
    return kinds


def _add_tied(parts: _Parts, kinds: dict[nn.Module, str]) -> None:
    """Adds whatever shares its weights with a lookup, or would if the config said so."""
    pairs: list[tuple[nn.Module | None, nn.Module | None]] = []
    for prefix, inner in parts.models.items():
        for ends in declared_ties(inner).items():
            target, source = (parts.modules.get(f"{prefix}.{end}".removeprefix(".")) for end in ends)
            pairs.append((target, source))
    owners: dict[int, nn.Module] = {}
    for module in parts.names:
        if _is_lookup(module) or _is_linear(module):
            pairs.append((module, owners.setdefault(id(module._parameters.get("weight")), module)))

    groups: dict[nn.Module, set[nn.Module]] = {}
    for one, other in pairs:
        if one is not None and other is not None and all(_is_lookup(m) or _is_linear(m) for m in (one, other)):
            joined = groups.get(one, {one}) | groups.get(other, {other})
            groups.update(dict.fromkeys(joined, joined))
    for module, group in groups.items():
        if any(_is_lookup(each) and each in kinds for each in group):
            kinds.setdefault(module, "lookup" if _is_lookup(module) else "head")


def _is_of_a_vocabulary(parts: _Parts, module: nn.Module) -> bool:
    """Whether a lookup of a name that says little has as many rows as a vocabulary of the model that it is in."""
    name = parts.names[module]
    if not _GENERIC.search(name):
        return False
    config = parts.holders(name)[-1].config
    configs = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    return _size(module)[0] in {getattr(each, field, None) for each in configs for field in _VOCABULARIES}


def _holds_codes(parts: _Parts, name: str, kind: str) -> bool:
    """Whether a table is one of codes, not of tokens."""
    if name.endswith("text_embed_tokens"):  # moshi's depth decoder reads a token of text first
        return False
    writers = [prefix for prefix, inner in parts.models.items() if _CODE_WRITERS.match(type(inner).__name__)]
    if kind == "head" and any(name == f"{prefix}.lm_head".removeprefix(".") for prefix in writers):
        return True
    inner = any(_CODE_MODELS.search(type(holder).__name__) for holder in parts.holders(name))
    return inner or _CODES.search(name) is not None


def _accessed(model: PreTrainedModel, accessor: str) -> nn.Module | None:
    try:
        return getattr(model, accessor)()
    except (NotImplementedError, AttributeError, TypeError):  # as of speech models
        return None


def _is_lookup(module: object) -> bool:
    return isinstance(module, (nn.Embedding, CompressedLookup))


def _is_linear(module: object) -> bool:
    return isinstance(module, (nn.Linear, CompressedLinear))


def _size(module: nn.Module) -> tuple[int, int, int]:
    """Rows, columns and bytes."""
    if isinstance(module, TABLE_MODULES):
        matrices = [matrix for _, matrix in module.matrices()]
        dim = sum(matrix.decoder_weight.shape[1] for matrix in matrices)
        return len(matrices[0].weight), dim, module.num_bytes
    weight = module.get_parameter("weight")
    return weight.shape[0], weight.shape[1], weight.nbytes


def _tied_bytes(model: PreTrainedModel) -> int:
    """The bytes that a state dict counts more than once."""
    seen: set[int] = set()
    again = 0
    for tensor in model.state_dict(keep_vars=True).values():
        again += tensor.nbytes if id(tensor) in seen else 0
        seen.add(id(tensor))
    return again


def _refusal_of(model: PreTrainedModel, names: set[str]) -> str | None:
    """Why a table cannot be compressed, if it or a module that is tied to it cannot be."""
    refusals = (_refusal(model.get_submodule(name)) for name in sorted(names))
    return next((refusal for refusal in refusals if refusal is not None), None)


def _refusal(module: nn.Module) -> str | None:
    """Why a module cannot be compressed, if so."""
    if isinstance(module, TABLE_MODULES):
        return None

    weight = module.get_parameter("weight")
    if not weight.dtype.is_floating_point:
        return f"it is of dtype {weight.dtype}: load the model unquantised"
    if is_traceable_wrapper_subclass(weight) and not hasattr(weight, "device_mesh"):  # torchao's, of a float's dtype
        return f"it is quantised, a {type(weight).__name__}: load the model unquantised"

    if isinstance(module, nn.Embedding):
        try:
            StockEmbedding.of(module)
        except ModelError as error:
            return str(error)
    elif type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} is more than a linear layer: it is not supported as a head"

    return None
