"""Calibration in parts: interrupted and gone on with, and by two processes, to the figures of one go."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from calibrating import LENGTH, TEXTS, assert_same, build, make_tokenizer

from hf_dirembed.calibration import calibrate as calibration
from hf_dirembed.calibration.calibrate import calibrate
from hf_dirembed.calibration.statistics import Statistics
from hf_dirembed.errors import CalibrationError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


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
        from hf_dirembed.calibration.calibrate import calibrate
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
    for name in ("counts", "head_moment", "gradient_moment", "probabilities", "uncertainty"):  # to the bit
        assert torch.equal(getattr(one, name), getattr(two, name))
