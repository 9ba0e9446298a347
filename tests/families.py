"""Tiny random models of many architectures, with the input and the AutoClasses each is tried with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel


VOCAB, DIM = 160, 32
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """An architecture: its config, and the AutoClasses that a compressed model of it must load with."""

    name: str
    config: str
    arguments: dict[str, Any]
    autos: tuple[str, ...]
    encoder_decoder: bool = False
    tensors: dict[str, Any] = field(default_factory=dict)

    def make_config(self) -> PreTrainedConfig:
        return getattr(transformers, self.config)(**self.arguments)

    def make(self, auto: str, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return getattr(transformers, auto).from_config(self.make_config()).eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        ids = torch.randint(8, VOCAB, (2, 9))  # none of the special tokens
        ids[:, -1] = 2  # BART classifies at the end-of-sentence token
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if self.encoder_decoder else {"input_ids": ids}


_VISION = {
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

_MASKED = (
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
_CAUSAL = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
_SEQ2SEQ = ("AutoModel", "AutoModelForSeq2SeqLM")

FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "BertConfig", _BERT, (*_MASKED, "AutoModelForQuestionAnswering", "AutoModelForPreTraining")),
        Family("roberta", "RobertaConfig", {**_BERT, "pad_token_id": 1, "max_position_embeddings": 42}, _MASKED),
        Family(
            "distilbert",
            "DistilBertConfig",
            {"vocab_size": VOCAB, "dim": DIM, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
            _MASKED,
        ),
        Family("albert", "AlbertConfig", {**_BERT, "embedding_size": 16}, _MASKED),
        Family("electra", "ElectraConfig", {**_BERT, "embedding_size": 16}, _MASKED),
        Family("modernbert", "ModernBertConfig", {**_BERT, "pad_token_id": 0}, _MASKED),
        Family(
            "gpt2",
            "GPT2Config",
            {"vocab_size": VOCAB, "n_embd": DIM, "n_layer": 2, "n_head": 4, "n_positions": 40, "pad_token_id": 0},
            _CAUSAL,
        ),
        Family("llama-tied", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}, _CAUSAL),
        Family("llama-untied", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}, _CAUSAL),
        Family("gemma3", "Gemma3TextConfig", {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True}, _CAUSAL),
        Family(
            "mixtral",
            "MixtralConfig",
            {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": False},
            _CAUSAL,
        ),
        Family(
            "opt",
            "OPTConfig",
            {
                "vocab_size": VOCAB,
                "hidden_size": DIM,
                "ffn_dim": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 40,
                "word_embed_proj_dim": 16,
            },
            _CAUSAL,
        ),
        Family(
            "t5",
            "T5Config",
            {
                "vocab_size": VOCAB,
                "d_model": DIM,
                "d_kv": 8,
                "d_ff": 48,
                "num_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
            _SEQ2SEQ,
            encoder_decoder=True,
        ),
        Family(
            "bart",
            "BartConfig",
            {
                "vocab_size": VOCAB,
                "d_model": DIM,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "max_position_embeddings": 40,
                "scale_embedding": True,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
                "forced_eos_token_id": None,
            },
            (*_SEQ2SEQ, "AutoModelForSequenceClassification"),
            encoder_decoder=True,
        ),
        Family(
            "marian",
            "MarianConfig",
            {
                "vocab_size": VOCAB,
                "d_model": DIM,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "max_position_embeddings": 40,
                "scale_embedding": True,
                "pad_token_id": 0,
                "eos_token_id": 2,
                "decoder_start_token_id": 0,
                "forced_eos_token_id": None,
            },
            _SEQ2SEQ,
            encoder_decoder=True,
        ),
        Family(
            "llava",
            "LlavaConfig",
            {
                "text_config": {"model_type": "llama", **_LLAMA},
                "vision_config": {"model_type": "clip_vision_model", **_VISION},
                "image_token_id": 5,
            },
            ("AutoModel", "AutoModelForImageTextToText"),
        ),
        Family(
            "gemma3-vision",
            "Gemma3Config",
            {
                "text_config": {"model_type": "gemma3_text", "head_dim": 8, **_LLAMA},
                "vision_config": {"model_type": "siglip_vision_model", **_VISION},
                "mm_tokens_per_image": 4,
                "image_token_id": 5,
                "boi_token_id": 6,
                "eoi_token_id": 7,
            },
            ("AutoModel", "AutoModelForImageTextToText"),
        ),
    )
}
