"""Token weights on tokenizers that are trained here, one of each family."""

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_dirembed.calibration import languages as languages_module
from hf_dirembed.calibration import token_weights as weights_module
from hf_dirembed.calibration.languages import word_list
from hf_dirembed.calibration.statistics import Statistics, usage
from hf_dirembed.calibration.token_weights import (
    WeightsError,
    card_languages,
    count_tokens,
    expected_frequencies,
    mix_counts,
    token_weights,
    tokenizer_languages,
    tokenizer_prior,
)


WORDS = word_list("en", 400)[0]
CORPUS = [f"{w.capitalize()} {w}, {w.capitalize()} {w}." for i, w in enumerate(WORDS) for _ in range(400 // (i + 1))]
SENTENCES = ["The people said that this was it.", "and then? The end, of the thing"]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special))
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    # tokenizer.json of real models brings truncation and padding, which must not cut or fill the word lists
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=800, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=list("的是我，。")
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


FAMILIES = {"wordpiece": wordpiece, "bpe": byte_level_bpe, "unigram": unigram}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return FAMILIES[request.param]()


@pytest.fixture(autouse=True)
def _short_word_lists(monkeypatch):
    monkeypatch.setattr(weights_module, "LANGUAGE_WORDS", 3_000)
    monkeypatch.setattr(weights_module, "MAX_WORDS", 4_000)


def weight_of(weights, tokenizer, text):
    return float(weights[tokenizer(text, add_special_tokens=False)["input_ids"]].min())


def assert_distribution(weights, num_rows):
    assert weights.shape == (num_rows,)
    assert weights.dtype == torch.float64
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()


def test_weights_cover_every_row_and_order_words_by_use(tokenizer):
    num_rows = len(tokenizer) + 7  # padding rows
    weights = token_weights(tokenizer, num_rows, languages="en")
    assert_distribution(weights, num_rows)
    assert weights.min() > 0
    the, people, comma = (weight_of(weights, tokenizer, text) for text in (" the", " people", ","))
    assert the > 20 * people > 20 * weights[len(tokenizer) :].max()
    assert 0.01 < comma < 0.1


def test_expected_frequencies_follow_the_word_list(tokenizer):
    frequencies = expected_frequencies(tokenizer, len(tokenizer), ["en"])
    assert_distribution(frequencies, len(tokenizer))
    words, listed = word_list("en", 5)
    # " the" against " to": capitalised and line-initial forms are other tokens, in the same proportion
    ratio = weight_of(frequencies, tokenizer, f" {words[0]}") / weight_of(frequencies, tokenizer, f" {words[1]}")
    assert ratio == pytest.approx(listed[0] / listed[1], rel=0.15)


def test_forms_of_a_word_are_told_apart():
    tokenizer = byte_level_bpe()
    frequencies = expected_frequencies(tokenizer, len(tokenizer), ["en"])
    spaced, capitalised, start = (weight_of(frequencies, tokenizer, text) for text in (" the", " The", "The"))
    assert spaced > 4 * capitalised > 4 * start > 0


def test_special_tokens_of_every_text_have_a_share():
    tokenizer = wordpiece()
    frequencies = expected_frequencies(tokenizer, len(tokenizer), ["en"])
    cls, pad = tokenizer.convert_tokens_to_ids(["[CLS]", "[PAD]"])
    assert 0.005 < frequencies[cls] < 0.05
    assert frequencies[pad] == 0


@pytest.mark.parametrize("language", ["zh", "ja", "ko", "de"])
def test_languages_need_no_segmenter(tokenizer, language):
    assert_distribution(token_weights(tokenizer, len(tokenizer), languages=[language, "en"]), len(tokenizer))


def test_words_of_a_spaceless_language_bring_no_spaces():
    tokenizer = unigram()
    frequencies = expected_frequencies(tokenizer, len(tokenizer), ["zh"])
    word, space = tokenizer.convert_tokens_to_ids(["的", "▁"])
    assert frequencies[word] > 0.01 > frequencies[space]


def test_several_languages_are_averaged(monkeypatch):
    monkeypatch.setattr(weights_module, "MAX_WORDS", 6_000)  # lists of the same length
    tokenizer = unigram()
    both = expected_frequencies(tokenizer, len(tokenizer), ["en", "de"])
    each = [expected_frequencies(tokenizer, len(tokenizer), [language]) for language in ("en", "de")]
    torch.testing.assert_close(both, sum(each) / 2)


def test_language_of_the_vocabulary_is_found(tokenizer):
    assert tokenizer_languages(tokenizer) == ("en",)
    by_default = token_weights(tokenizer, len(tokenizer))
    torch.testing.assert_close(by_default, token_weights(tokenizer, len(tokenizer), languages=["en-GB"]))


def test_prior_of_ranks_gives_placeholders_no_rank():
    tokenizer = wordpiece()
    prior = tokenizer_prior(tokenizer, len(tokenizer) + 3)
    assert_distribution(prior, len(tokenizer) + 3)
    ranked = prior[6 : len(tokenizer)]
    assert (ranked[1:] < ranked[:-1]).all()
    torch.testing.assert_close(ranked[0] / ranked[50], torch.tensor(2.0).double(), atol=0.1, rtol=0)
    torch.testing.assert_close(prior[:6], prior[1].expand(6))  # [unused0] like [MASK]
    torch.testing.assert_close(prior[len(tokenizer) :], prior[1].expand(3))
    assert ranked[-1] < prior[1] < ranked[0]


def test_prior_of_unigram_is_its_probabilities():
    model = models.Unigram([("<s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁b", -2.0), ("c", -4.0)], unk_id=1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>", bos_token="<s>")
    prior = tokenizer_prior(tokenizer, 5)
    uniform = 0.05 / 5
    expected = torch.tensor([-1.0, -2.0, -4.0]).double().exp()
    torch.testing.assert_close((prior[2:] - uniform) / (prior[2] - uniform), expected / expected[0])
    assert prior[0] == prior[1] < prior[2]  # score 0 is no probability of 1


def test_counts_are_exact(tokenizer):
    counts = count_tokens(tokenizer, iter(SENTENCES), len(tokenizer))
    expected = Counter(index for text in SENTENCES for index in tokenizer(text)["input_ids"])
    assert {i: int(n) for i, n in enumerate(counts) if n} == expected


def test_counts_take_over_as_the_text_grows(tokenizer):
    num_rows = len(tokenizer)
    floor = token_weights(tokenizer, num_rows, languages="en")
    counts = torch.zeros(num_rows)
    counts[num_rows - 1] = 1
    few, many = (token_weights(tokenizer, num_rows, languages="en", counts=counts * n) for n in (100, 1_000_000))
    assert few[num_rows - 1] < 0.02
    assert 0.8 < many[num_rows - 1] < 0.9
    assert (many > 0).all()
    torch.testing.assert_close(mix_counts(torch.zeros(num_rows), floor), floor)


def test_predictions_weigh_as_much_as_counts():
    counts, expected = torch.tensor([90_000.0, 0, 0]).double(), torch.tensor([0.0, 1, 0]).double()
    seen = Statistics(counts, None, None, 90_000, num_predictions=100, probabilities=expected)
    floor = torch.full((3,), 1 / 3).double()
    mixed = mix_counts(usage(seen, tied=True), floor)
    torch.testing.assert_close(mixed, 0.85 * torch.tensor([0.5, 0.5, 0]).double() + 0.15 * floor)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("language: en", ("en",)),
        ("language: [de, zh-Hant, code, gsw-x-y, no, de]", ("de", "zh", "nb")),
        ("language:\n- multilingual\n- en", ()),
        ("license: mit", ()),
        ("language: 7", ()),
        ("language: [broken", ()),
    ],
)
def test_card_languages(tmp_path, head, expected):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Model\n")
    assert card_languages(tmp_path) == expected


def test_no_card_states_no_language(tmp_path):
    assert card_languages(tmp_path) == ()


def test_mistakes_are_named():
    tokenizer = wordpiece()
    num_rows = len(tokenizer)
    with pytest.raises(WeightsError, match="no word list for language 'xx'"):
        token_weights(tokenizer, num_rows, languages="xx")
    with pytest.raises(WeightsError, match="token id"):
        token_weights(tokenizer, num_rows - 1)
    with pytest.raises(WeightsError, match="one count for each"):
        token_weights(tokenizer, num_rows, languages="en", counts=torch.ones(3))
    for bad in (-1.0, float("nan")):
        with pytest.raises(WeightsError, match="negative, infinite or NaN"):
            token_weights(tokenizer, num_rows, languages="en", counts=torch.full((num_rows,), bad))
    with pytest.raises(WeightsError, match="letter by letter"):
        count_tokens(tokenizer, "text", num_rows)
    with pytest.raises(WeightsError, match="give strings"):
        count_tokens(tokenizer, [b"text"], num_rows)


def test_word_lists_hold_no_numbers():
    words, frequencies = word_list("zh", 1000)
    assert len(words) == len(frequencies) == 1000
    assert not any(character.isdigit() for word in words for character in word)
    assert languages_module.is_unspaced("zh")
