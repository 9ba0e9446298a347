"""What `from_pretrained(quantization_config=...)` is asked for: the options of a compression while loading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.quantizers import auto, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..calibration.statistics import Statistics
from ..compression.compress import METHODS, SETTINGS, Effort, Settings
from ..errors import OptionError
from ..remote.codes_dirembed import with_known_options
from ..remote.configuration_dirembed import MODEL_TYPE
from ..request import CompressionRequest


OWN_TOKENIZER = "auto"


@register_quantization_config(MODEL_TYPE)
@dataclass(kw_only=True)
class DirEmbedQuantizationConfig(QuantizationConfigMixin):
    """How `from_pretrained(base, quantization_config=...)` compresses the vocabulary tables of a dense model.

    The model is the one that [`hf_dirembed.compress`] makes with the same options of the model that was loaded: no
    quantisation config stays on it. Options are checked when they are given, except for statistics that a dictionary
    names, which are read when a model is loaded: it may be somebody else's.

    What a compressed checkpoint states of itself reads as one of these with its `quant_method` alone.

    Attributes:
        quant_method: `dirembed`.
        bits: Bits per weight over all tables together, or of each table by its name. Exactly one of `bits`, `ratio`
            and `rank` is given.
        ratio: The bytes of the tables over the bytes that replace them.
        rank: The number of latents, for the methods with float latents.
        tables: Paths of the tables to compress, or their last parts; by default all.
        method: `transform`, `direction`, `autoencoder` or `svd`.
        languages: Tags of the text that the model is for, like `("en", "de")`.
        latent_dtype: Of float latents: `float32`, `float16` or `bfloat16`.
        settings: `TransformSettings` or `AutoencoderSettings`, or their values by name; kept as the latter.
        device: Where to fit; by default a GPU where there is one.
        effort: How long `transform` may fit: `fast`, `balanced` or `thorough`.
        statistics: What calibration saw of the dense model: [`Statistics`], or the path of a file that
            `calibrate(resume=...)` or `Statistics.save` wrote. Without it the model is not calibrated.
        tokenizer: Tells which tokens are frequent: `auto` for the one that lies beside the model's weights, the name
            or the folder of another, a tokenizer, or None for none: then all rows count alike.

    Raises:
        BudgetError: If there is not exactly one budget, or it is no positive number.
        CalibrationError: If the statistics cannot be read.
        OptionError: If an option is not of its kind, or does not go with another.

    Example:
        >>> config = DirEmbedQuantizationConfig(bits=2, languages=("en", "de"))
        >>> DirEmbedQuantizationConfig.from_dict(config.to_dict()) == config
        True
        >>> DirEmbedQuantizationConfig(rank=8)
        Traceback (most recent call last):
        ...
        hf_dirembed...BudgetError: rank=8 goes with methods of float latents: give transform bits or a ratio
    """

    quant_method: str = field(default=MODEL_TYPE, init=False)  # type: ignore[assignment]
    bits: float | Mapping[str, float] | None = None
    ratio: float | None = None
    rank: int | None = None
    tables: Sequence[str] | None = None
    method: str = "transform"
    languages: str | Sequence[str] | None = None
    latent_dtype: str | None = None
    settings: Settings | Mapping[str, Any] | None = None
    device: torch.device | str | None = None
    statistics: Statistics | str | Path | None = None
    tokenizer: PreTrainedTokenizerBase | str | Path | None = OWN_TOKENIZER
    effort: Effort | None = None

    def __post_init__(self) -> None:
        self.quant_method = MODEL_TYPE
        self._check_sources()
        self.request()
        self.bits = dict(self.bits) if isinstance(self.bits, Mapping) else self.bits
        self.tables = None if self.tables is None else list(self.tables)
        if self.languages is not None and not isinstance(self.languages, str):
            self.languages = list(self.languages)
        self.settings = asdict(self.settings) if isinstance(self.settings, Settings) else self.settings
        self.device = None if self.device is None else str(self.device)
        self.statistics = str(self.statistics) if isinstance(self.statistics, Path) else self.statistics
        self.tokenizer = str(self.tokenizer) if isinstance(self.tokenizer, Path) else self.tokenizer

    def _check_sources(self) -> None:
        statistics, tokenizer = self.statistics, self.tokenizer
        if not isinstance(statistics, Statistics | str | Path | None):
            raise OptionError(f"statistics={statistics!r} are none: give Statistics, or the path of a file with some")
        if not isinstance(tokenizer, PreTrainedTokenizerBase | str | Path | None) or tokenizer == "":
            raise OptionError(
                f"tokenizer={tokenizer!r} is none: give a tokenizer, its name or folder, {OWN_TOKENIZER!r} or None"
            )
        if statistics is not None and tokenizer is None:
            raise OptionError("statistics go with a tokenizer: leave tokenizer=None out, or the statistics")

    def request(self) -> CompressionRequest:
        """What is asked for, checked; statistics are read from their file.

        Raises:
            BudgetError: As above.
            CalibrationError: As above.
            OptionError: As above.
        """
        statistics = self.statistics
        return CompressionRequest(
            bits=self.bits,
            ratio=self.ratio,
            rank=self.rank,
            tables=self.tables,
            method=self.method,
            languages=self.languages,
            calibration=Statistics.load(statistics) if isinstance(statistics, str | Path) else statistics,
            latent_dtype=self.latent_dtype,
            settings=self._settings(),
            device=self.device,
            effort=self.effort,
        )

    def _settings(self) -> Settings | None:
        if not isinstance(self.settings, Mapping):
            return self.settings
        if self.method not in METHODS:
            return None  # which the request refuses
        kind = SETTINGS.get(self.method)
        if kind is None:
            raise OptionError(f"method {self.method!r} takes no settings: leave them out")
        known = [each.name for each in fields(kind)]
        if unknown := [name for name in self.settings if name not in known]:
            raise OptionError(f"method {self.method!r} has no setting {unknown[0]!r}: it has {', '.join(known)}")
        return kind(**self.settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes one of what `to_dict` gave.

        Args:
            config_dict: The options by name; `quant_method` alone is what a compressed checkpoint states of itself.
            return_unused_kwargs: Whether to return what of `kwargs` is no option, too.
            **kwargs: Options that go before those of `config_dict`.

        Raises:
            BudgetError: As the class does.
            OptionError: As the class does, and if there is an option that it does not have.
        """
        known = [each.name for each in fields(cls) if each.init]
        options = {name: value for name, value in config_dict.items() if name != "quant_method"}
        if unknown := [name for name in options if name not in known]:
            raise OptionError(f"{cls.__name__} has no option {unknown[0]!r}: it has {', '.join(known)}")
        options |= {name: kwargs.pop(name) for name in known if name in kwargs}

        if options:
            # A config that came with a model does not get to say which file is read before a model is loaded.
            config = cls(**{**options, "statistics": None})
            config.statistics = options.get("statistics")
            config._check_sources()
        else:
            config = object.__new__(cls)
            config.quant_method = MODEL_TYPE
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def asks(self) -> bool:
        """Whether it asks for a compression, and not only says that there was one."""
        return len(vars(self)) > 1

    # What transformers asks before it takes this config off a compressed model that is loaded; no option.
    dequantize = True

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers puts on the config of a checkpoint that is compressed already: the options given."""
        return {name: value for name, value in vars(self).items() if name != "quant_method" and value is not None}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The options as JSON.

        Raises:
            OptionError: If the statistics or the tokenizer are given themselves, and not where they lie.
        """
        for name in ("statistics", "tokenizer"):
            if not isinstance(getattr(self, name), str | None):
                raise OptionError(f"JSON does not hold the {name}: save them, and give {name}= the path")
        return super().to_json_string(use_diff)

    def to_json_file(self, json_file_path: Any) -> None:
        """Writes the options to a file.

        Raises:
            OptionError: As `to_json_string` does.
        """
        Path(json_file_path).write_text(json.dumps(json.loads(self.to_json_string()), indent=2) + "\n", "utf-8")


# Of these alone transformers passes options on to the config of a checkpoint that is quantised already, which is where
# the quantiser finds them to refuse them; of others it drops them with a warning.
_PASSED_ON = "LOADING_ATTRIBUTES_CONFIG_TYPES"
setattr(auto, _PASSED_ON, (*getattr(auto, _PASSED_ON, ()), DirEmbedQuantizationConfig))


DirEmbedQuantizationConfig.__init__ = with_known_options(DirEmbedQuantizationConfig.__init__)  # type: ignore[method-assign]
