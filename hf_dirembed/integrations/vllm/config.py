"""How vLLM reads the config of a compressed model: as that of its base, with the `dirembed` object beside."""

from __future__ import annotations

from typing import Any

from ...remote.configuration_dirembed import MODEL_TYPE, DirEmbedConfigMixin


def served_config(config_dict: dict[str, Any], config: Any) -> tuple[dict[str, Any], Any]:
    """What vLLM goes on with after it has read a config.

    Args:
        config_dict: What the file says.
        config: The config that transformers made of it.

    Returns:
        Both, those of a compressed model as its base's: vLLM's own classes and the quantiser of the body see what they
        know. `config.dirembed` says what is compressed. Those of any other model as they are.

    Example:
        >>> from hf_dirembed import DirEmbedConfig
        >>> layout = {"method": "svd", "rank": 8, "codes": "float16", "decoder": "float32"}
        >>> stated = {
        ...     "model_type": "dirembed", "architectures": ["DirEmbedBertModel"], "quantization_config": {
        ...     "quant_method": "dirembed"}, "dirembed": {
        ...     "format": 2, "base_model_type": "bert", "tables": {"embeddings.word_embeddings": layout}},
        ... }  # fmt: skip
        >>> values, config = served_config(stated, DirEmbedConfig.from_dict(stated))
        >>> type(config).__name__, config.architectures, "quantization_config" in values
        ('BertConfig', ['BertModel'], False)
    """
    if not isinstance(config, DirEmbedConfigMixin):
        return config_dict, config

    base: Any = type(config)
    config.__class__ = base.base_class
    served: Any = config
    served.architectures = [name.removeprefix("DirEmbed") for name in served.architectures or []]
    quantization = config_dict.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == MODEL_TYPE:  # for stock classes only
        config_dict = {name: value for name, value in config_dict.items() if name != "quantization_config"}
    return {**config_dict, "model_type": served.model_type}, served
