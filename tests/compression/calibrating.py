"""What the tests of calibration share: five texts, a tokenizer of as many words, tiny models of every kind."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)


ROWS, DIM, LENGTH = 40, 16, 12
WORDS = [f"word{number}" for number in range(20)]
DRAWS = torch.Generator().manual_seed(3)
TEXTS = [
    " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=DRAWS)) for length in (7, 30, 3, 18, 25)
]
SIZES = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def make_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {token: index for index, token in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", **dict(zip(names, special, strict=True))
    )


def bert(kind=BertForMaskedLM):
    return kind(BertConfig(vocab_size=ROWS, max_position_embeddings=64, **SIZES))


def llama(tied=True):
    return LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, tie_word_embeddings=tied, **SIZES))


def t5():
    sizes = {"d_model": DIM, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=ROWS, decoder_start_token_id=0, **sizes))


MODELS = {
    "causal": llama,
    "untied": lambda: llama(tied=False),
    "masked": bert,
    "seq2seq": t5,
    "encoder": lambda: bert(BertModel),
    "classifier": lambda: bert(BertForSequenceClassification),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():  # predictions that are far from uniform
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def assert_same(ours, others):
    torch.testing.assert_close(ours.counts, others.counts)
    for name in ("head_moment", "gradient_moment", "probabilities", "uncertainty"):
        mine, other = getattr(ours, name), getattr(others, name)
        if mine is not None or other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert (ours.num_tokens, ours.num_predictions, ours.num_windows) == (
        others.num_tokens,
        others.num_predictions,
        others.num_windows,
    )
    assert ours.further.keys() == others.further.keys()
    for name, mine in ours.further.items():
        other = others.further[name]
        assert mine.num_reads == other.num_reads
        torch.testing.assert_close(mine.gradient_moment, other.gradient_moment, rtol=1e-4, atol=1e-6)
        if mine.counts is not None or other.counts is not None:
            assert torch.equal(mine.counts, other.counts)
