"""What is on disk: the config that dispatches to the base model's, and what of it is not obeyed.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .codes_dirembed import CompressionSpec, SpecError


MODEL_TYPE = "dirembed"
MAX_LAYERS = 1_024

# Of a config, what would have transformers fetch or run code that the caller did not ask for. What the caller passes
# to `from_pretrained` comes by another way; `auto_map` is rewritten on every save.
CODE_KEYS = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)


def read_spec(config_dict: dict[str, Any]) -> tuple[str, CompressionSpec]:
    """The base model's type and the spec out of the contents of a `config.json`.

    Raises:
        SpecError: If the `dirembed` object is missing or malformed, or names a base that transformers lacks.
    """
    values = config_dict.get(MODEL_TYPE)
    values = dict(values) if isinstance(values, dict) else values
    base_model_type = values.pop("base_model_type", None) if isinstance(values, dict) else None
    spec = CompressionSpec.from_dict(values)
    return _checked_base(base_model_type), spec


def _checked_base(base_model_type: Any) -> str:
    if not isinstance(base_model_type, str) or base_model_type == MODEL_TYPE or base_model_type not in CONFIG_MAPPING:
        raise SpecError(
            f"base_model_type {base_model_type!r} is not an architecture that this transformers has: "
            "update transformers, or compress the model again"
        )
    return base_model_type


def _harmless(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values without those that would have transformers fetch or run code, in nested configs too.

    Raises:
        SpecError: If it claims more layers than any model has: building it would take forever.
    """
    kept = {}
    for name, value in values.items():
        if name.endswith(("layer", "layers")) and type(value) is int and value > MAX_LAYERS:
            raise SpecError(f"the config's {name} {value} is above {MAX_LAYERS}: download the model again")
        if name not in CODE_KEYS:
            kept[name] = _harmless(value) if name.endswith("_config") and isinstance(value, dict) else value
    return kept


class DirEmbedConfigMixin:
    """Makes a base model's config one of a compressed model.

    `model_type` stays the base's at run time, so that pipelines, PEFT and exporters know the model; only
    `config.json` says `dirembed` and points to the dispatcher.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the run-time form or, for those who load with a derived class by name, the one on disk."""
        if config_dict.get("model_type") == MODEL_TYPE:
            return DirEmbedConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Writes `config.json` in its on-disk form."""
        values = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        values["model_type"] = MODEL_TYPE
        values["auto_map"] = {"AutoConfig": f"{__name__.rpartition('.')[2]}.{DirEmbedConfig.__name__}"}
        values[MODEL_TYPE]["base_model_type"] = type(self).model_type  # type: ignore[attr-defined]
        # Asked by stock classes, which then load this too where the package is imported.
        values.setdefault("quantization_config", {"quant_method": MODEL_TYPE})
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")


class DirEmbedConfig(PreTrainedConfig):
    """What `model_type: dirembed` in a `config.json` stands for; reading one gives the derived config of its base.

    Example:
        >>> config = DirEmbedConfig.from_dict({
        ...     "model_type": "dirembed",
        ...     "dirembed": {"format": 2, "base_model_type": "bert", "tables": {"embeddings.word_embeddings": {
        ...         "method": "svd", "rank": 8, "codes": "float16", "decoder": "float32"}}},
        ... })
        >>> type(config).__name__, config.model_type
        ('DirEmbedBertConfig', 'bert')
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the config of a compressed model.

        Raises:
            SpecError: If the `dirembed` object is missing or malformed, names a base that transformers lacks, or
                stands beside values that the base's config refuses.
        """
        base_model_type, spec = read_spec(config_dict)
        derived = derive_config_class(base_model_type)
        values = {**_harmless(config_dict), "model_type": base_model_type, MODEL_TYPE: spec.to_dict()}
        quantization = values.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == MODEL_TYPE:
            del values["quantization_config"]  # for stock classes only
        try:
            return derived.from_dict(values, **kwargs)
        except Exception as error:  # hundreds of config classes, each with its own way to fail on a bad value
            reason = " ".join(str(error).split())
            raise SpecError(
                f"the config does not make one of {base_model_type} ({reason}): download or compress the model again"
            ) from error


_config_classes: dict[type, type[PreTrainedConfig]] = {}


def derive_config_class(base_model_type: Any) -> type[PreTrainedConfig]:
    """The config class of compressed models over a base, made and registered with every AutoModel class once.

    Args:
        base_model_type: A `model_type` that transformers knows, like `bert`.

    Raises:
        SpecError: If transformers does not know it.
    """
    base = CONFIG_MAPPING[_checked_base(base_model_type)]
    if base not in _config_classes:
        from .modeling_dirembed import register_model_classes

        attributes = {"__module__": __name__, "base_class": base, "_auto_class": "AutoConfig"}
        # _auto_class makes save_pretrained copy this file, and those that it imports, beside config.json.
        derived = type(f"DirEmbed{base.__name__}", (DirEmbedConfigMixin, base), attributes)
        _config_classes[base] = derived
        register_model_classes(base, derived)
    return _config_classes[base]


def __getattr__(name: str) -> type:
    """Finds derived config classes by name, as unpickling does in a fresh process."""
    import transformers

    base = getattr(transformers, name.removeprefix("DirEmbed"), None) if name.startswith("DirEmbed") else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig) and base.model_type in CONFIG_MAPPING:
        derived = derive_config_class(base.model_type)
        if derived.__name__ == name:
            return derived
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
