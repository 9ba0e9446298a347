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

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "use_cache": False,  # tiny hybrids may lack the kind of layer that their caches count with
}
_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "sliding_window": 16}
_GEMMA4 = {**_SMALL, **_PER_LAYER, "global_head_dim": 8}
_T5GEMMA2 = {**_SMALL, "sliding_window": 16}
_INKLING = {
    **_SMALL,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 16,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}

# Of every kind of vocabulary table that there is.
TABLE_FAMILIES = {
    family.name: family
    for family in (
        Family(
            "gemma3n_text",
            "Gemma3nTextConfig",
            {**_SMALL, **_PER_LAYER, "num_hidden_layers": 5, "num_kv_shared_layers": 0, "laurel_rank": 8},
            ("AutoModelForCausalLM",),
        ),
        Family("gemma4_text", "Gemma4TextConfig", _GEMMA4, ("AutoModelForCausalLM",)),
        Family(
            "gemma4",
            "Gemma4Config",
            {
                "text_config": {"model_type": "gemma4_text", **_GEMMA4},
                "vision_config": {
                    "model_type": "gemma4_vision",
                    "hidden_size": DIM,
                    "intermediate_size": 48,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "head_dim": 8,
                    "position_embedding_size": 64,
                },
                "image_token_id": 4,
                "video_token_id": 5,
                "audio_token_id": 6,
                "boi_token_id": 7,
                "eoi_token_id": 7,
                "boa_token_id": 7,
                "eoa_token_index": 7,
            },
            ("AutoModelForImageTextToText",),
        ),
        Family(
            "qwen4_exp_text",
            "Qwen4ExpTextConfig",
            {
                **_SMALL,
                "num_hidden_layers": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 4,
                "linear_num_value_heads": 4,
                "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 48,
                "num_experts_per_tok": 2,
                "num_experts": 4,
                "hc_lowrank": 8,
                "ple_layer_ids": [1, 3],
                "ple_embed_dim": 32,
                "ngram_size": 3,
                "heads_per_ngram": 2,
                "ngram_vocab_size_base": 101,
                "make_ngram_vocab_size_divisible_by": 8,
                "split_ngram_parts": 4,
                "eos_token_id": 2,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 16,
                "indexer_compress_ratio": 4,
            },
            ("AutoModelForCausalLM",),
        ),
        Family("llama-untied", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}, ("AutoModelForCausalLM",)),
        Family("bert-untied", "BertConfig", {**_BERT, "tie_word_embeddings": False}, ("AutoModelForMaskedLM",)),
        Family("inkling_text", "InklingTextConfig", _INKLING, ("AutoModelForCausalLM",)),
        Family(
            "t5gemma2",
            "T5Gemma2Config",
            {
                "encoder": {
                    "model_type": "t5gemma2_encoder",
                    "text_config": {"model_type": "t5gemma2_text", **_T5GEMMA2},
                    "vision_config": {"model_type": "siglip_vision_model", **_VISION},
                    "boi_token_index": 4,
                    "eoi_token_index": 9,
                    "image_token_index": 5,
                },
                "decoder": {"model_type": "t5gemma2_decoder", **_T5GEMMA2},
                "image_token_index": 5,
                "eoi_token_index": 9,
                "vocab_size": VOCAB,
            },
            ("AutoModelForSeq2SeqLM",),
            encoder_decoder=True,
        ),
        Family(
            "mobilebert",
            "MobileBertConfig",
            {
                "vocab_size": VOCAB,
                "hidden_size": 48,
                "embedding_size": DIM,
                "intermediate_size": 48,
                "intra_bottleneck_size": DIM,
                "num_hidden_layers": 2,
                "max_position_embeddings": 64,
            },
            ("AutoModelForMaskedLM",),
        ),
        Family(
            "fsmt",
            "FSMTConfig",
            {
                "langs": ["en", "de"],
                "src_vocab_size": VOCAB,
                "tgt_vocab_size": VOCAB + 16,
                "d_model": DIM,
                "encoder_ffn_dim": 48,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_ffn_dim": 48,
                "decoder_layers": 2,
                "decoder_attention_heads": 4,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
                "use_cache": False,  # or it makes no causal mask
            },
            ("AutoModelForSeq2SeqLM",),
            encoder_decoder=True,
        ),
    )
}
