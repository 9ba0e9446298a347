"""A dense checkpoint that is being loaded → the compressed model of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.accelerate import get_device
from transformers.utils import logging
from transformers.utils.hub import extract_commit_hash

from ..checkpoints.loading import load_tokenizer_of
from ..compression.compress import WEIGHING
from ..errors import CalibrationError, ModelError
from ..pipeline import compress_model
from ..remote.configuration_dirembed import MODEL_TYPE
from ..remote.tables_dirembed import tied_modules
from ..tables import choose_tables
from .quantization_config import OWN_TOKENIZER, DirEmbedQuantizationConfig


logger = logging.get_logger(__name__)

WITHOUT_A_MAP = "load it without device_map, save the compressed model, and load that with the map"


class CompressionOnLoad:
    """Compresses a model once its weights are there, and refuses before that what can be told to fail.

    Args:
        config: What is asked for.

    Raises:
        CalibrationError: If the statistics cannot be read.
        OptionError: If the options do not go together, or the device to fit on cannot be used.
    """

    def __init__(self, config: DirEmbedQuantizationConfig) -> None:
        self.request = config.request()
        self.request.options.fitting_device()
        self.named_tokenizer = config.tokenizer
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.device_map: Any = None
        self.tables: list[str] = []  # known once there is a model

    def check_devices(self, device_map: Any) -> None:
        """Refuses a map of devices that leaves a table on disk; before there is a model it only keeps the map.

        Args:
            device_map: By its name, or as a dictionary, which transformers makes of the former once there is a model.

        Raises:
            ModelError: If it does.
        """
        self.device_map = device_map
        for name in self.tables:
            if isinstance(device_map, Mapping) and get_device(dict(device_map), f"{name}.weight") == "disk":
                raise ModelError(f"device_map leaves the table {name} on disk: {WITHOUT_A_MAP}")

    def before_weights(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        """Looks at a model that holds no weights yet, and loads its tokenizer.

        Args:
            model: On the meta device.
            files: Those that its weights will come from.

        Raises:
            CalibrationError: If statistics were given, and there is no tokenizer.
            CheckpointError: If the tokenizer does not load.
            ModelError: If the model is compressed already, or has no table that can be compressed, or the map leaves
                one on disk.
            OptionError: If a name is that of no table.
        """
        refuse_compressed(model)
        self.tables = [table.name for table in choose_tables(model, self.request.names)]
        self.check_devices(self.device_map)
        if self.request.method in WEIGHING:
            self.tokenizer = self._load_tokenizer(model.name_or_path if files else None, next(iter(files), None))

    def after_weights(self, model: PreTrainedModel) -> None:
        """Compresses a model, in place.

        Raises:
            DirEmbedError: As [`hf_dirembed.compress`] does.
            ModelError: If a table is not in memory as a whole.
        """
        hooks: dict[str, ModelHook] = {}
        for name in self.tables:
            weight = model.get_parameter(f"{name}.weight")
            if weight.is_meta or hasattr(weight, "device_mesh"):
                where = "offloaded" if weight.is_meta else "spread over several processes"
                raise ModelError(f"the table {name} is {where}, and is not here to be compressed: {WITHOUT_A_MAP}")
            for tied in tied_modules(model, name):
                if hook := getattr(model.get_submodule(tied), "_hf_hook", None):
                    hooks[tied] = hook

        compress_model(model, self.tokenizer, self.request)
        for name, hook in hooks.items():  # accelerate's, of a model on several devices, for which it moves inputs
            add_hook_to_module(model.get_submodule(name), hook)

    def _load_tokenizer(self, base: str | None, file: str | None) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was asked for.

        Args:
            base: The name or folder of the model; None where its weights come from neither.
            file: One of its files.
        """
        named = self.named_tokenizer
        if named is None or isinstance(named, PreTrainedTokenizerBase):
            return named
        if named != OWN_TOKENIZER:
            tokenizer = load_tokenizer_of(named)
        elif base is not None:  # of the same revision: files in the Hub's cache have it in their path
            tokenizer = load_tokenizer_of(base, extract_commit_hash(file, None))
        else:
            tokenizer = None

        where = base if named == OWN_TOKENIZER else named
        if tokenizer is None and self.request.calibration is not None:
            raise CalibrationError(f"{where} has no tokenizer, which statistics go with: name one with tokenizer=")
        if tokenizer is None:
            logger.warning(
                f"{where} has no tokenizer, so all rows of the tables count alike: name one with tokenizer=, or say "
                "tokenizer=None"
            )
        return tokenizer


def refuse_compressed(model: PreTrainedModel) -> None:
    """Refuses to compress a checkpoint again.

    Raises:
        ModelError: If it is compressed.
    """
    if hasattr(model.config, MODEL_TYPE):
        raise ModelError(
            f"{model.name_or_path} is compressed already: leave quantization_config out, or load the dense model that "
            "it was made from"
        )


def forget_quantisation(model: PreTrainedModel) -> None:
    """Takes off a model and its parts what transformers leaves there on the way: none of it is quantised."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
    vars(model).pop("is_quantized", None)
