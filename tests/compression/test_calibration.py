"""Calibration against brute force: one window at a time, the loss written out, no shared code."""

import os
import socket
import subprocess
import sys
import textwrap
from collections import Counter

import datasets
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_dirembed.compression import calibration
from hf_dirembed.compression.calibration import calibrate
from hf_dirembed.compression.calibration_text import self_generated_texts, windows
from hf_dirembed.compression.statistics import CalibrationError, Statistics, metric, usage


ROWS, DIM, LENGTH = 40, 16, 12
WORDS = [f"word{number}" for number in range(20)]
DRAWS = torch.Generator().manual_seed(3)
TEXTS = [
    " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=DRAWS)) for length in (7, 30, 3, 18, 25)
]
SIZES = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def tokenizer():
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


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def brute_force(model, tokenizer, seed=0):
    """Counts, Σ h hᵀ and Σ p / predictions, Σ g gᵀ / tokens: each window alone, through the parameters' graph."""
    model.eval()
    encoder, seq2seq = model.get_output_embeddings() is None, isinstance(model, T5ForConditionalGeneration)
    masked = isinstance(model, BertForMaskedLM)
    counts, hidden, gradients, probabilities = Counter(), [], [], []
    for number, window in enumerate(windows(TEXTS, tokenizer, length=LENGTH, packed=not encoder)):
        counts.update(window)
        random = torch.Generator().manual_seed(seed * 1_000_003 + number)
        ids = torch.tensor([window])
        where = torch.ones_like(ids, dtype=torch.bool)
        where[:, -1] = seq2seq
        if masked:
            collator = DataCollatorForLanguageModeling(tokenizer)
            collator.generator = random
            special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
            ids, labels = collator.torch_mask_tokens(ids, special)
            where = labels != -100
        embed = model.get_input_embeddings()
        embedded = embed(ids).detach().requires_grad_()
        if encoder:
            last = model.base_model(inputs_embeds=embedded).last_hidden_state[0]
            loss = last.mean(0) @ (torch.randint(2, (DIM,), generator=random) * 2.0 - 1)
            gradients.append(torch.autograd.grad(loss, embedded)[0][0])
            continue
        leaves, inputs = [embedded], {"inputs_embeds": embedded}
        if seq2seq:
            leaves.append(embed(torch.cat([torch.zeros(1, 1).long(), ids[:, :-1]], 1)).detach().requires_grad_())
            inputs["decoder_inputs_embeds"] = leaves[1]
        seen = []
        hook = model.get_output_embeddings().register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[0])
        )
        logits = model(**inputs).logits
        hook.remove()
        draws = torch.rand(ids.shape[1], generator=random)
        cdf = logits.softmax(-1).cumsum(-1)
        labels = (cdf <= draws[None, :, None] * cdf[..., -1:]).sum(-1)
        loss = F.cross_entropy(logits[where], labels[where], reduction="sum")
        hidden.append(seen[0][where].detach())
        probabilities.append(logits[where].detach().double().softmax(-1))
        gradients += [gradient[0] for gradient in torch.autograd.grad(loss, leaves)]
    moment = lambda parts: torch.cat(parts).double().T @ torch.cat(parts).double()  # noqa: E731
    head = moment(hidden) / len(torch.cat(hidden)) if hidden else None
    mean = torch.cat(probabilities).mean(0) if probabilities else None
    return counts, head, moment(gradients) / counts.total(), mean


def assert_same(ours, others):
    torch.testing.assert_close(ours.counts, others.counts)
    for name in ("head_moment", "gradient_moment", "probabilities"):
        mine, other = getattr(ours, name), getattr(others, name)
        if mine is not None or other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert (ours.num_tokens, ours.num_predictions, ours.num_windows) == (
        others.num_tokens,
        others.num_predictions,
        others.num_windows,
    )


def test_moments_are_those_of_brute_force(model, tokenizer):
    statistics = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, batch_size=3)
    counts, head, gradient, probabilities = brute_force(model, tokenizer)
    assert {index: int(n) for index, n in enumerate(statistics.counts) if n} == counts
    assert statistics.num_tokens == counts.total()
    torch.testing.assert_close(statistics.gradient_moment, gradient, rtol=1e-4, atol=1e-7)
    assert (statistics.head_moment is None) == (head is None)
    if head is not None:
        torch.testing.assert_close(statistics.head_moment, head, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.probabilities, probabilities, rtol=1e-4, atol=1e-7)
    else:
        assert statistics.probabilities is None


def test_batch_size_and_repetition_change_nothing(model, tokenizer):
    first, again, other = (
        calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, batch_size=size) for size in (1, 1, 5)
    )
    assert torch.equal(first.gradient_moment, again.gradient_moment)
    assert_same(first, other)
    reseeded = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, seed=1)
    assert not torch.allclose(first.gradient_moment, reseeded.gradient_moment, rtol=1e-3)


def test_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.base_model.get_input_embeddings().eval()  # a mixed state
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_runs_in_float32_on_a_cpu(tokenizer):
    model = build("causal").bfloat16()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    found = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
    exact = calibrate(model.float(), tokenizer, TEXTS, sequence_length=LENGTH)
    assert torch.equal(found.head_moment, exact.head_moment)
    assert torch.equal(found.gradient_moment, exact.gradient_moment)


@pytest.mark.parametrize("name", ["causal", "masked", "encoder"])
def test_interrupted_calibration_goes_on(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "ROUND_WINDOWS", 2)
    model, file = build(name), tmp_path / "statistics.safetensors"
    whole = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)
    part = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, max_tokens=LENGTH * 3, resume=file)
    assert part.num_tokens < whole.num_tokens
    save = Statistics.save

    def interrupted(self, path, **kwargs):
        save(self, path, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Statistics, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, resume=file)
    assert part.num_windows < Statistics.load(file).num_windows < whole.num_windows
    assert_same(calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH, resume=file), whole)
    assert_same(Statistics.load(file), whole)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # no temporary file
    other = build(name)
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 3] += 1
    for change in ({"seed": 1}, {"texts": TEXTS[::-1]}, {"model": other}):
        with pytest.raises(CalibrationError, match="was calibrated"):
            calibrate(**{"model": model, "tokenizer": tokenizer, "texts": TEXTS, "sequence_length": LENGTH,
                         "resume": file, **change})  # fmt: skip


def test_two_processes_equal_one(tokenizer, tmp_path):
    model, file = build("masked"), tmp_path / "statistics.safetensors"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import os
        from accelerate import Accelerator
        from transformers import AutoModelForMaskedLM, AutoTokenizer
        from hf_dirembed.compression.calibration import calibrate
        # as torchrun does, but the imports, which take longer than all the rest, are made once
        other = os.fork()
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if other else "0"
        folder = {str(tmp_path / "model")!r}
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        calibrate(AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), {TEXTS!r},
                  sequence_length={LENGTH}, accelerator=accelerator, resume={str(file)!r})
        accelerator.end_training()
        assert not other or os.waitpid(other, 0)[1] == 0
        """)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ran = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **world, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    one, two = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH), Statistics.load(file)
    assert_same(one, two)
    for name in ("counts", "head_moment", "gradient_moment", "probabilities"):  # to the bit
        assert torch.equal(getattr(one, name), getattr(two, name))


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


def test_metric_is_normalised_and_positive_definite(tokenizer):
    statistics = calibrate(build("causal"), tokenizer, TEXTS, sequence_length=LENGTH)
    c = metric(statistics)
    assert torch.equal(c, c.T)
    assert c.diagonal().mean() == pytest.approx(1.1)
    assert torch.linalg.eigvalsh(c).min() >= 0.1 - 1e-9
    head, gradient = statistics.head_moment, statistics.gradient_moment
    assert head.trace() > 2 * gradient.trace()  # so different that scaling each side would show
    natural = (head + gradient) * DIM / (head.trace() + gradient.trace())
    torch.testing.assert_close(metric(statistics, damping=0), natural)
    torch.testing.assert_close(c, natural + 0.1 * torch.eye(DIM).double())
    torch.testing.assert_close(metric(statistics, damping=0, use_head=False), gradient * DIM / gradient.trace())
    torch.testing.assert_close(metric(statistics, damping=0, use_gradient=False), head * DIM / head.trace())


def test_usage_is_half_read_and_half_predicted(tokenizer):
    tied, encoder = (calibrate(build(n), tokenizer, TEXTS, sequence_length=LENGTH) for n in ("causal", "encoder"))
    used = usage(tied, tied=True)
    torch.testing.assert_close(used / used.sum(), tied.counts / tied.num_tokens / 2 + tied.probabilities / 2)
    assert used.sum() == pytest.approx(tied.num_tokens)
    assert torch.equal(usage(tied, tied=False), tied.counts)
    assert torch.equal(usage(encoder, tied=True), encoder.counts)
    unseen = calibrate(build("masked"), tokenizer, ["word1"], sequence_length=LENGTH, seed=1)
    assert unseen.num_predictions == 0  # its one word was not masked
    assert torch.equal(usage(unseen, tied=True), unseen.counts)
    with pytest.raises(CalibrationError, match="zero or not finite"):
        metric(unseen)
    with pytest.raises(CalibrationError, match="give tied=False"):
        usage(Statistics(torch.ones(3), None, None, 3, 3, probabilities=torch.ones(2) / 2), tied=True)


def test_only_predicting_positions_go_through_the_head(tokenizer):
    model, seen = build("masked"), []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    statistics = calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)
    assert sum(seen) == statistics.num_predictions < statistics.num_tokens / 3


def test_a_head_that_is_bypassed_is_named(tokenizer):
    model = build("masked")
    model.cls.predictions.forward = lambda h: h @ model.get_output_embeddings().weight.T
    with pytest.raises(CalibrationError, match="beside its head"):
        calibrate(model, tokenizer, TEXTS, sequence_length=LENGTH)


def test_statistics_are_saved_whole_and_merged(tokenizer, tmp_path):
    model = build("causal")
    halves = [calibrate(model, tokenizer, texts, sequence_length=LENGTH) for texts in (TEXTS[:2], TEXTS[2:])]
    merged = sum(halves[1:], halves[0])
    expected = sum(s.head_moment * s.num_predictions for s in halves) / merged.num_predictions
    torch.testing.assert_close(merged.head_moment, expected)
    expected = sum(s.probabilities * s.num_predictions for s in halves) / merged.num_predictions
    torch.testing.assert_close(merged.probabilities, expected)
    assert merged.probabilities.sum() == pytest.approx(1)
    torch.testing.assert_close(merged.counts, halves[0].counts + halves[1].counts)
    merged.save(tmp_path / "s.safetensors")
    assert_same(Statistics.load(tmp_path / "s.safetensors"), merged)
    with pytest.raises(CalibrationError, match="one model only"):
        merged + calibrate(build("encoder"), tokenizer, TEXTS, sequence_length=LENGTH)


def test_mistakes_are_named(tokenizer, tmp_path):
    model = build("causal")
    cases = [
        ({"texts": str(tmp_path / "missing.txt")}, "cannot read"),
        ({"texts": []}, "no text"),
        ({"texts": [b"text"]}, "give strings"),
        ({"texts": [[1.5]]}, "token ids"),
        ({"texts": 3}, "texts is a int"),
        ({"texts": [[ROWS]]}, "beyond the table"),
        ({"texts": datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS}))}, "give one of them"),
        ({"texts": datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS})}, "one string column"),
        ({"sequence_length": 2}, "leaves no room"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ]
    for change, message in cases:
        with pytest.raises(CalibrationError, match=message):
            calibrate(**{"model": model, "tokenizer": tokenizer, "texts": TEXTS, **change})
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(model, tokenizer, TEXTS)
    model.set_input_embeddings(nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match="dense model"):
        calibrate(model, tokenizer, TEXTS)
    with pytest.raises(CalibrationError, match="writes no text"):
        next(self_generated_texts(build("masked"), tokenizer))
    with pytest.raises(CalibrationError, match="damping"):
        metric(Statistics(torch.ones(2), None, torch.eye(2), 2), damping=-1)
    with pytest.raises(CalibrationError, match="no moment"):
        metric(Statistics(torch.ones(2), None, None, 2))
    for name, tensors in (("other", {"x": torch.ones(2)}), ("none", {})):
        save_file(tensors, tmp_path / name)
        with pytest.raises(CalibrationError, match="holds no"):
            Statistics.load(tmp_path / name)
    (tmp_path / "torn").write_bytes(b"\0" * 9)
    with pytest.raises(CalibrationError, match="no readable"):
        Statistics.load(tmp_path / "torn")
