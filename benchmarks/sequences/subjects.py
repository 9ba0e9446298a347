"""What sequences start from: tiny random models of several architectures, compressed, and what they are asked."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import hf_dirembed


VOCAB = 96
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "sliding_window": 16}
_METHODS: dict[str, dict[str, Any]] = {
    "transform": {"method": "transform", "bits": 5},
    "direction": {"method": "direction", "rank": 6, "latent_dtype": "float16"},
    "svd": {"method": "svd", "rank": 7},
}


@dataclass(frozen=True)
class Subject:
    """An architecture.

    Attributes:
        auto: The AutoModel class that loads it.
        config: Its config class.
        values: What the config says.
        adapted: The layers that adapters go on.
        encoder_decoder: Whether it takes ids for a decoder as well.
        per_layer: Whether tokens are looked up for each layer, too.
    """

    auto: str
    config: str
    values: dict[str, Any]
    adapted: tuple[str, ...]
    encoder_decoder: bool = False
    per_layer: bool = False

    def inputs(self) -> dict[str, Tensor]:
        """Ids that are none of special tokens."""
        ids = torch.randint(8, VOCAB // 2, (2, 7), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if self.encoder_decoder else {"input_ids": ids}


_CAUSAL, _ATTENTION = "AutoModelForCausalLM", ("q_proj", "v_proj")
SUBJECTS = {
    "llama": Subject(_CAUSAL, "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}, _ATTENTION),
    "llama-tied": Subject(_CAUSAL, "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}, _ATTENTION),
    "gemma3": Subject(_CAUSAL, "Gemma3TextConfig", {**_LLAMA, "tie_word_embeddings": True}, _ATTENTION),
    "gemma3n": Subject(
        _CAUSAL,
        "Gemma3nTextConfig",
        {**_LLAMA, **_PER_LAYER, "num_hidden_layers": 5, "num_kv_shared_layers": 0, "laurel_rank": 8},
        _ATTENTION,
        per_layer=True,
    ),
    "gpt2": Subject(
        _CAUSAL,
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40},
        ("c_attn",),
    ),
    "bert": Subject(
        "AutoModelForMaskedLM",
        "BertConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
        },
        ("query", "value"),
    ),
    "t5": Subject(
        "AutoModelForSeq2SeqLM",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
        },
        ("q", "v"),
        encoder_decoder=True,
    ),
}


@functools.cache
def compressed(name: str, method: str, seed: int = 0) -> PreTrainedModel:
    """The compressed model of a subject; it is shared, so copy it."""
    subject = SUBJECTS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, subject.config)(**subject.values)
    model = getattr(transformers, subject.auto).from_config(config).eval()
    return hf_dirembed.compress(model, **_METHODS[method])


def pair(name: str, method: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A compressed model, and the stock one that it expands to."""
    ours = copy.deepcopy(compressed(name, method))
    return ours, hf_dirembed.expand(copy.deepcopy(ours))


def another(name: str, is_compressed: bool) -> PreTrainedModel:
    """A model of the same shapes and other weights; or the stock one that it expands to."""
    ours = copy.deepcopy(compressed(name, "transform", seed=1))
    return ours if is_compressed else hf_dirembed.expand(ours)
