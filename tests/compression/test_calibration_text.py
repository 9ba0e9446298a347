"""Text for calibration, from the user in any form and from the model itself."""

from itertools import islice

import datasets
import pytest
import torch
from calibrating import LENGTH, TEXTS, build, llama, make_tokenizer
from wordfreq import word_frequency

from hf_dirembed.calibration.calibrate import calibrate
from hf_dirembed.calibration.self_text import self_generated_texts, word_texts
from hf_dirembed.calibration.text import windows
from hf_dirembed.errors import CalibrationError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_texts_in_any_form(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    table = datasets.Dataset.from_dict({"n": range(5), "text": TEXTS, "title": ["t"] * 5})
    stream = table.remove_columns("title").rename_column("text", "sentence").to_iterable_dataset()
    forms = {"file": file, "name": str(file), "table": table, "stream": stream, "tuple": tuple(TEXTS)}
    for packed in (True, False):
        expected = list(windows(TEXTS, tokenizer, length=LENGTH, packed=packed))
        for name, form in forms.items():
            assert list(windows(form, tokenizer, length=LENGTH, packed=packed)) == expected, name
    body = [index for window in windows(TEXTS, tokenizer, length=LENGTH) for index in window[1:-1]]
    assert body == tokenizer(" ".join(TEXTS), add_special_tokens=False)["input_ids"]
    assert list(windows([[5] * 20], tokenizer, length=LENGTH)) == [[5] * 12, [5] * 8]


def test_a_model_writes_its_own_text(tokenizer):
    torch.manual_seed(0)
    model = llama()  # as initialised: every token about as likely
    model.train()
    options = {"num_tokens": 200, "sequence_length": LENGTH, "batch_size": 4, "languages": ["en"]}
    state = torch.get_rng_state()
    texts, again, other = (list(self_generated_texts(model, tokenizer, seed=s, **options)) for s in (0, 0, 1))
    assert texts == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert 200 <= sum(map(len, texts)) < 200 + 4 * LENGTH
    assert all(2 <= len(text) <= LENGTH and tokenizer.eos_token_id not in text[1:-1] for text in texts)
    statistics = calibrate(model, tokenizer, texts, sequence_length=LENGTH)
    assert statistics.num_windows == len(texts)


def test_a_model_that_predicts_no_next_token_writes_none(tokenizer):
    with pytest.raises(CalibrationError, match="writes no text"):
        next(self_generated_texts(build("masked"), tokenizer))


def test_words_are_as_frequent_as_in_running_text():
    texts = list(islice(word_texts(["en", "zh"]), 4000))
    assert (
        texts == list(islice(word_texts(["en", "zh"]), 4000)) != list(islice(word_texts(["en", "zh"], seed=1), 4000))
    )
    english, chinese = texts[::2], texts[1::2]
    words = [word.strip(".").lower() for text in english for word in text.split()]
    assert all(4 <= len(text.split()) <= 24 for text in english)
    assert words.count("the") / len(words) == pytest.approx(word_frequency("the", "en"), rel=0.1)
    assert words.count("i") / len(words) == pytest.approx(word_frequency("i", "en"), rel=0.3)
    assert not any(" " in text or "、" in text for text in chinese)
    assert "的" in "".join(chinese)
