"""The trained autoencoder: its loss by hand, its determinism, and what it gains over SVD."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_dirembed.compression.baselines.autoencoder import (
    AutoencoderSettings,
    autoencoder_epochs,
    autoencoder_loss,
    train_autoencoder,
)
from hf_dirembed.compression.baselines.training_state import TrainingState
from hf_dirembed.compression.subspace import mean_cosine, svd
from hf_dirembed.compression.table import Table
from hf_dirembed.errors import BudgetError, CheckpointError, OptionError


QUICK = AutoencoderSettings(epochs=3, alpha_epochs=2, batch_size=64, initialisation="random", seed=5)


def random_rows(num_rows: int, dim: int, mean: float = 0.0) -> torch.Tensor:
    """Rows with a decaying spectrum and norms spread over two decades."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, dim, generator=generator) * torch.exp(-0.3 * torch.arange(dim)) + mean
    return rows * torch.logspace(-1, 1, num_rows)[torch.randperm(num_rows, generator=generator), None]


def bits(found):
    return [tensor.view(torch.int32) for tensor in (found.latents, found.decoder, found.bias)]


def test_loss_is_the_papers_formula():
    rows = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    approximation = torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    cosine_term = 0.9975 / 5 * ((1 - 24 / 25) + (1 - 0.0)) / 2
    errors = [1.0, 1.0, 1.0, 2.0]
    for epoch, alpha in ((0, 1.0), (10, 0.55), (20, 0.1), (29, 0.1)):
        expected = cosine_term + 0.0025 * sum((error + 1e-10) ** alpha for error in errors) / 4
        assert float(autoencoder_loss(rows, approximation, AutoencoderSettings(), epoch)) == pytest.approx(expected)
    rmse = autoencoder_loss(rows, approximation, AutoencoderSettings(norm_loss="rmse"), 0)
    assert float(rmse) == pytest.approx(cosine_term + 0.0025 * math.sqrt(7 / 4))


def test_paper_settings():
    paper = AutoencoderSettings.paper(seed=3)
    assert (paper.batch_size, paper.learning_rate, paper.decay_epochs, paper.decay) == (32, 1e-3, 4, 0.5)
    assert (paper.epochs, paper.alpha_epochs, paper.initialisation, paper.seed) == (30, 20, "random", 3)
    assert not paper.nonlinear_encoder


def test_same_seed_same_bits_and_global_random_state_untouched():
    table = Table(random_rows(200, 12))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = train_autoencoder(table, 3, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    with torch.no_grad():  # as a caller's inference code may have it
        second = train_autoencoder(Table(table.rows, chunk_rows=200), 3, QUICK)
    assert all(torch.equal(a, b) for a, b in zip(bits(first), bits(second), strict=True))
    other = train_autoencoder(table, 3, replace(QUICK, seed=6))
    assert not torch.equal(first.decoder, other.decoder)
    assert not any(tensor.requires_grad for tensor in (first.latents, first.decoder, first.bias))


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_loss": "rmse"}, {"initialisation": "random", "learning_rate": 4e-3}, {"nonlinear_encoder": True}],
    ids=["default", "rmse", "random", "elu"],
)
def test_loss_falls(changes):
    rows = torch.nn.functional.normalize(random_rows(400, 12, mean=0.5), dim=1)

    def loss_after(epochs: int) -> float:
        settings = AutoencoderSettings(epochs=epochs, batch_size=32, **changes)
        return float(autoencoder_loss(rows, train_autoencoder(Table(rows), 3, settings).reconstruct(), settings, 30))

    assert loss_after(20) < loss_after(1)


@pytest.mark.parametrize("settings", [AutoencoderSettings(epochs=3), QUICK], ids=["svd", "random"])
@pytest.mark.parametrize("power", [-90, -20, -1, 0, 1, 20, 60])
def test_a_table_times_a_power_of_two_gives_the_same_latents(power: int, settings: AutoencoderSettings):
    rows = random_rows(200, 12)
    found = train_autoencoder(Table(rows), 3, settings)
    scaled = train_autoencoder(Table(rows * 2.0**power), 3, settings)
    assert torch.equal(scaled.latents, found.latents)
    assert torch.equal(scaled.decoder, found.decoder * 2.0**power)
    assert torch.equal(scaled.bias, found.bias * 2.0**power)


def test_rows_of_one_to_two_are_trained_on_as_they_are():
    """As those of BERT's table, which the published settings are for; zeros and a few long rows change nothing."""
    rows = torch.nn.functional.normalize(random_rows(200, 12), dim=1) * torch.linspace(1, 1.99, 200)[:, None]
    rows[:9], rows[9:20] = 0, 1e6 * rows[9:20]
    (*_, model) = autoencoder_epochs(Table(rows), 3, QUICK)
    assert model.scale == 1
    (*_, model) = autoencoder_epochs(Table(rows / 2), 3, QUICK)
    assert model.scale == 0.5


def test_elu_encoder_gives_codes_above_minus_one_and_an_affine_decoder():
    found = train_autoencoder(Table(random_rows(300, 12)), 4, AutoencoderSettings(nonlinear_encoder=True, epochs=5))
    assert float(found.latents.min()) > -1
    torch.testing.assert_close(found.reconstruct(), found.latents @ found.decoder + found.bias)


def test_cosine_beats_svd_where_norms_vary():
    """SVD spends its rank on the long rows, the cosine counts all alike."""
    generator = torch.Generator().manual_seed(0)
    long, short = torch.zeros(300, 16), torch.zeros(900, 16)
    long[:, :8] = 10 * torch.randn(300, 8, generator=generator)
    short[:, 8:] = torch.randn(900, 8, generator=generator)
    rows = torch.cat([long, short]) / 4
    table = Table(rows)
    found = train_autoencoder(table, 8, AutoencoderSettings.paper())
    assert mean_cosine(table, found) > mean_cosine(table, svd(table, 8)) + 0.2


def test_svd_initialisation_starts_at_the_svd():
    table = Table(random_rows(100, 8))
    settings = AutoencoderSettings(initialisation="svd", epochs=1, learning_rate=1e-12)
    expected = svd(table, 3).reconstruct()
    torch.testing.assert_close(train_autoencoder(table, 3, settings).reconstruct(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.ones(1, 4)], ids=["all zero", "one row"])
def test_degenerate_tables_stay_finite(rows):
    found = train_autoencoder(Table(rows), 4, QUICK)
    assert found.reconstruct().isfinite().all()


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 2.5},
        {"alpha_epochs": True},
        {"decay_epochs": -1},
        {"learning_rate": 0.0},
        {"alpha_end": math.nan},
        {"cosine_weight": -1.0},
        {"cosine_weight": 0.0, "norm_weight": 0.0},
        {"decay": 1.5},
        {"norm_loss": "l2"},
        {"initialisation": "pca"},
        {"nonlinear_encoder": "yes"},
        {"seed": -1},
    ],
    ids=lambda bad: "-".join(bad),
)
def test_bad_settings_name_the_value_and_the_mend(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(OptionError, match=f"{name}={value!r}: give "):
        AutoencoderSettings(**bad)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """The table of a training that was interrupted after two of its three epochs, and its file."""
    table, file = Table(random_rows(200, 12)), tmp_path / "training.safetensors"
    save = TrainingState.save

    def save_and_stop(self, epochs):
        save(self, epochs)
        if epochs == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(table, 3, QUICK, resume=file)
    return table, file


def test_an_interrupted_training_goes_on_to_the_same_bits(interrupted, monkeypatch):
    table, file = interrupted
    whole = train_autoencoder(table, 3, QUICK)
    epochs = []
    save = TrainingState.save
    monkeypatch.setattr(TrainingState, "save", lambda self, done: (epochs.append(done), save(self, done)))
    resumed = train_autoencoder(table, 3, QUICK, resume=file)
    assert epochs == [3]
    finished = train_autoencoder(table, 3, QUICK, resume=file)  # nothing is left to do
    assert epochs == [3]
    for found in (resumed, finished):
        assert all(torch.equal(a, b) for a, b in zip(bits(found), bits(whole), strict=True))
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary file


def test_a_training_of_something_else_is_not_gone_on_with(interrupted):
    table, file = interrupted
    cases = [
        (Table(table.rows * 2), 3, QUICK, "another table"),
        (table, 4, QUICK, "rank=3: go on with that"),
        (table, 3, replace(QUICK, seed=6, decay=0.25), "decay=0.5, seed=5: go on with that"),
    ]
    for rows, rank, settings, message in cases:
        with pytest.raises(CheckpointError, match=message):
            train_autoencoder(rows, rank, settings, resume=file)


def test_a_damaged_training_is_refused(interrupted, tmp_path):
    table, file = interrupted
    with safe_open(file, "pt") as held:
        header = held.metadata()
    tensors = load_file(file)

    def changed(**changes):
        return {**tensors, **changes}

    cases = [
        ({"encoder": tensors["encoder"]}, header, "other tensors"),
        (changed(encoder=tensors["encoder"].T.contiguous()), header, "other tensors"),
        (changed(decoder=tensors["decoder"].double()), header, "other tensors"),
        (changed(more=torch.ones(1)), header, "other tensors"),
        (changed(generator=torch.full_like(tensors["generator"], 255)), header, "random numbers"),
        (tensors, {**header, "epochs": "4"}, "epochs='4'"),
        (tensors, {**header, "epochs": "-1"}, "epochs='-1'"),
        (tensors, {**header, "run": "[]"}, "holds no dirembed-autoencoder-2"),
        (tensors, {**header, "format": "dirembed-statistics-3"}, "holds no dirembed-autoencoder-2"),
        (tensors, {}, "holds no dirembed-autoencoder-2"),
    ]
    for number, (held, metadata, message) in enumerate(cases):
        bad = tmp_path / f"{number}.safetensors"
        save_file(held, bad, metadata)
        with pytest.raises(CheckpointError, match=message):
            train_autoencoder(table, 3, QUICK, resume=bad)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:-1])
    for bad in (torn, tmp_path):
        with pytest.raises(CheckpointError, match="no readable state"):
            train_autoencoder(table, 3, QUICK, resume=bad)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No such file or directory\)"):
        train_autoencoder(table, 3, QUICK, resume=tmp_path / "missing" / "file")


def test_bad_rank():
    with pytest.raises(BudgetError, match="rank=5"):
        train_autoencoder(Table(torch.ones(3, 4)), 5)


def test_the_epochs_are_those_of_one_training() -> None:
    table = Table(random_rows(200, 8))
    epochs = [each.factorize(table).reconstruct() for each in autoencoder_epochs(table, 3, QUICK)]
    assert len(epochs) == QUICK.epochs
    assert torch.equal(epochs[-1], train_autoencoder(table, 3, QUICK).reconstruct())
    assert torch.equal(epochs[0], train_autoencoder(table, 3, replace(QUICK, epochs=1)).reconstruct())
    assert not torch.equal(epochs[0], epochs[1])
