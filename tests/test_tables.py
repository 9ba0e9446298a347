"""Which tables a model has: over many architectures, on the meta device, against what their code says."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_dirembed import find_tables


# Of models of the default config: path and kind. Left out are codes of audio and images, and other ids than tokens'.
EXPECTED: dict[str, dict[str, str]] = {
    "BertForMaskedLM": {"bert.embeddings.word_embeddings": "input", "cls.predictions.decoder": "tied head"},
    "LlamaForCausalLM": {"model.embed_tokens": "input", "lm_head": "head"},
    "T5ForConditionalGeneration": {
        "shared": "input",
        "encoder.embed_tokens": "lookup",
        "decoder.embed_tokens": "lookup",
        "lm_head": "tied head",
    },
    "FSMTForConditionalGeneration": {
        "model.encoder.embed_tokens": "input",
        "model.decoder.embed_tokens": "lookup",
        "model.decoder.output_projection": "head",
    },
    "OpenAIGPTDoubleHeadsModel": {"transformer.tokens_embed": "input", "lm_head": "tied head"},
    "LxmertForPreTraining": {"lxmert.embeddings.word_embeddings": "input", "cls.predictions.decoder": "tied head"},
    "LukeForMaskedLM": {"luke.embeddings.word_embeddings": "input", "lm_head.decoder": "head"},
    "RoCBertForMaskedLM": {"roc_bert.embeddings.word_embeddings": "input", "cls.predictions.decoder": "tied head"},
    "CLIPModel": {"text_model.embeddings.token_embedding": "lookup"},
    "FlavaForPreTraining": {
        "flava.text_model.embeddings.word_embeddings": "lookup",
        "mlm_head.decoder": "head",
        "mmm_text_head.decoder": "head",
    },
    "WhisperForConditionalGeneration": {"model.decoder.embed_tokens": "input", "proj_out": "tied head"},
    "BarkModel": {"semantic.input_embeds_layer": "lookup"},
    "MusicgenForConditionalGeneration": {
        "text_encoder.shared": "input",
        "text_encoder.encoder.embed_tokens": "lookup",
    },
    "BltForCausalLM": {
        "model.local_encoder.embed_tokens": "input",
        "model.encoder_hash_tok_embedding": "n-gram",
        "model.patcher.embed_tokens": "lookup",
        "model.patcher.lm_head": "head",
        "lm_head": "head",
    },
    "NeoMMEForMaskedLM": {
        "model.embed_tokens.word_embeddings": "input",
        "model.value_embeddings": "per-layer",
        "lm_head": "tied head",
    },
    "Gemma4ForCausalLM": {
        "model.embed_tokens": "input",
        "model.embed_tokens_per_layer": "per-layer",
        "lm_head": "tied head",
    },
    "CanineModel": {f"char_embeddings.HashBucketCodepointEmbedder_{n}": "n-gram" for n in range(8)},
    "PerceiverForMaskedLM": {"perceiver.input_preprocessor.embeddings": "lookup"},
    "VitsModel": {"text_encoder.embed_tokens": "lookup"},
    "FastSpeech2ConformerModel": {"encoder.embed": "lookup"},
    "SpeechT5ForTextToSpeech": {"speecht5.encoder.prenet.embed_tokens": "input"},
    "BridgeTowerForMaskedLM": {
        "bridgetower.text_model.embeddings.word_embeddings": "input",
        "mlm_score.decoder": "head",
    },
    "IdeficsForVisionText2Text": {"model.embed_tokens": "input", "lm_head": "head"},
    "JanusForConditionalGeneration": {"model.language_model.embed_tokens": "input", "lm_head": "tied head"},
    "XLNetLMHeadModel": {"transformer.word_embedding": "input", "lm_loss": "tied head"},
    "ImageGPTModel": {},
    "Wav2Vec2ForCTC": {},
    "ViTModel": {},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_tables_of_architectures(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip("this transformers does not have it")
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    assert {table.name: table.kind for table in find_tables(model)} == EXPECTED[name]


def test_a_tied_table_takes_no_bytes_of_its_own() -> None:
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config())
    tables = find_tables(model)
    assert [table.tied_to for table in tables] == [None, "shared", "shared", "shared"]
    assert [table.num_bytes for table in tables] == [4 * 32128 * 512, 0, 0, 0]
    assert all(table.refusal is None for table in tables)
