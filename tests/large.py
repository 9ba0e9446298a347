"""Tiny models with tables that count as large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, PreTrainedModel, Qwen4ExpTextConfig


N_GRAM = "model.layers.0.ple.ple_embedding.ngram_embedding"
PER_LAYER = "model.embed_tokens_per_layer"
_SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def n_gram_model() -> PreTrainedModel:
    """A Qwen4Exp with an n-gram table of about 3,000 rows of 32 columns, which files have in four pieces."""
    config = Qwen4ExpTextConfig(
        **_SIZES, num_hidden_layers=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=4,
        linear_num_value_heads=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts_per_tok=2,
        num_experts=4, hc_lowrank=16, ple_layer_ids=[1], ple_embed_dim=64, ngram_size=3, heads_per_ngram=1,
        ngram_vocab_size_base=1_500, make_ngram_vocab_size_divisible_by=4, split_ngram_parts=4, eos_token_id=2,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4,
    )  # fmt: skip
    return _with_table(config, N_GRAM)


def per_layer_model() -> PreTrainedModel:
    """A Gemma 3n with a per-layer table of 3,000 rows of five blocks of 16 columns."""
    config = Gemma3nTextConfig(
        **_SIZES, hidden_size_per_layer_input=16, vocab_size_per_layer_input=3_000, intermediate_size=64,
        num_hidden_layers=5, num_kv_shared_layers=0, laurel_rank=16, max_position_embeddings=64, sliding_window=16,
    )  # fmt: skip
    return _with_table(config, PER_LAYER)


def _with_table(config: Any, path: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    weight = model.get_parameter(f"{path}.weight")
    weight.data.copy_(torch.randn(weight.shape) * torch.arange(1, weight.shape[1] + 1).pow(-0.5))
    weight.data[7] *= 40
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Saves a model; its folder."""
    model.save_pretrained(folder, **options)
    return folder
