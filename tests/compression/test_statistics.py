"""What calibration found -> hessian and weights; and its file."""

from dataclasses import replace

import pytest
import torch
from calibrating import DIM, LENGTH, TEXTS, assert_same, build, make_tokenizer
from families import TABLE_FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_dirembed
from hf_dirembed.calibration.calibrate import calibrate
from hf_dirembed.calibration.calibrated import Calibration
from hf_dirembed.calibration.statistics import Statistics, hessian, usage
from hf_dirembed.compression.table import Table
from hf_dirembed.errors import CalibrationError
from hf_dirembed.tables import find_tables, num_blocks


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_metric_is_normalised_and_positive_definite(tokenizer):
    statistics = calibrate(build("causal"), tokenizer, TEXTS, sequence_length=LENGTH)
    c = hessian(statistics)
    assert torch.equal(c, c.T)
    assert c.diagonal().mean() == pytest.approx(1.1)
    assert torch.linalg.eigvalsh(c).min() >= 0.1 - 1e-9
    head, gradient = statistics.head_moment, statistics.gradient_moment
    assert head.trace() > 2 * gradient.trace()  # so different that scaling each side would show
    natural = (head + gradient) * DIM / (head.trace() + gradient.trace())
    torch.testing.assert_close(hessian(statistics, damping=0), natural)
    torch.testing.assert_close(c, natural + 0.1 * torch.eye(DIM).double())
    torch.testing.assert_close(hessian(statistics, damping=0, use_head=False), gradient * DIM / gradient.trace())
    torch.testing.assert_close(hessian(statistics, damping=0, use_gradient=False), head * DIM / head.trace())


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
        hessian(unseen)
    with pytest.raises(CalibrationError, match="give tied=False"):
        usage(Statistics(torch.ones(3), None, None, 3, 3, probabilities=torch.ones(2) / 2), tied=True)


def test_statistics_are_saved_whole_and_merged(tokenizer, tmp_path):
    model = build("causal")
    halves = [calibrate(model, tokenizer, texts, sequence_length=LENGTH) for texts in (TEXTS[:2], TEXTS[2:])]
    merged = sum(halves[1:], halves[0])
    expected = sum(s.head_moment * s.num_predictions for s in halves) / merged.num_predictions
    torch.testing.assert_close(merged.head_moment, expected)
    expected = sum(s.probabilities * s.num_predictions for s in halves) / merged.num_predictions
    torch.testing.assert_close(merged.probabilities, expected)
    assert merged.probabilities.sum() == pytest.approx(1)
    expected = sum(s.uncertainty * s.num_predictions for s in halves) / merged.num_predictions
    torch.testing.assert_close(merged.uncertainty, expected)
    assert (replace(halves[0], uncertainty=None) + halves[1]).uncertainty is None  # of a file without it
    torch.testing.assert_close(merged.counts, halves[0].counts + halves[1].counts)
    merged.save(tmp_path / "s.safetensors")
    assert_same(Statistics.load(tmp_path / "s.safetensors"), merged)
    with pytest.raises(CalibrationError, match="one model only"):
        merged + calibrate(build("encoder"), tokenizer, TEXTS, sequence_length=LENGTH)


def test_what_was_seen_of_further_tables_is_saved_and_merged(tokenizer, tmp_path):
    model = TABLE_FAMILIES["gemma4_text"].make("AutoModelForCausalLM")
    halves = [calibrate(model, tokenizer, texts, sequence_length=LENGTH) for texts in (TEXTS[:2], TEXTS[2:])]
    merged = halves[0] + halves[1]
    ((name, seen),) = merged.further.items()
    first, second = (half.further[name] for half in halves)
    assert torch.equal(seen.counts, first.counts + second.counts)
    expected = (first.gradient_moment * first.num_reads + second.gradient_moment * second.num_reads) / seen.num_reads
    torch.testing.assert_close(seen.gradient_moment, expected)

    file = tmp_path / "s.safetensors"
    merged.save(file)
    assert_same(Statistics.load(file), merged)
    with pytest.raises(CalibrationError, match="different tables"):
        merged + replace(halves[0], further={})

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    del header[f"further.{name}.num_reads"]
    save_file(load_file(file), tmp_path / "malformed.safetensors", header)
    with pytest.raises(CalibrationError, match=f"{name} is malformed"):
        Statistics.load(tmp_path / "malformed.safetensors")


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "qwen4_exp_text"])
def test_every_table_is_compressed_by_what_was_seen_of_it(name, tokenizer):
    """Its rows by how often they were read, its errors along the gradients at them, its bytes by what these cost."""
    model = TABLE_FAMILIES[name].make("AutoModelForCausalLM")
    calibration = Calibration.of(model, tokenizer, TEXTS, "en")
    tables = [table for table in find_tables(model) if table.tied_to is None]
    for table in tables:
        rows = model.get_parameter(f"{table.name}.weight").data
        weights = calibration.weights(model, tokenizer, table.name, "en")
        assert weights is None if table.kind == "n-gram" else len(weights) == len(rows)
        for block, part in enumerate(rows.chunk(num_blocks(model, table), dim=1)):
            moment = calibration.hessian(model, table.name, block)
            cost = calibration.cost(model, table.name, block, Table(part))
            if (name, table.kind) == ("gemma3n_text", "per-layer"):  # when they are new, its layers take nothing of it
                assert (moment, cost) == (None, None)
            else:
                assert moment.shape == (part.shape[1],) * 2
                assert cost > 0

    hf_dirembed.compress(model, tokenizer, bits=6, calibration=calibration)
    records = model.config.dirembed["record"]["tables"]
    measured = {path for path, record in records.items() if record["settings"]["hessian"]}
    assert measured == {table.name for table in tables if (name, table.kind) != ("gemma3n_text", "per-layer")}


def test_mistakes_are_named(tmp_path):
    with pytest.raises(CalibrationError, match="damping"):
        hessian(Statistics(torch.ones(2), None, torch.eye(2), 2), damping=-1)
    with pytest.raises(CalibrationError, match="no moment"):
        hessian(Statistics(torch.ones(2), None, None, 2))
    for name, tensors in (("other", {"x": torch.ones(2)}), ("none", {})):
        save_file(tensors, tmp_path / name)
        with pytest.raises(CalibrationError, match="holds no"):
            Statistics.load(tmp_path / name)
    (tmp_path / "torn").write_bytes(b"\0" * 9)
    with pytest.raises(CalibrationError, match="no readable"):
        Statistics.load(tmp_path / "torn")
