"""Random sequences of what people do, on a compressed model and on the dense one that it stands for."""

from __future__ import annotations

import pytest

from benchmarks.sequences.machine import run


LENGTH = 3


@pytest.mark.parametrize("part", range(10))
def test_sequences(part: int, record_property: pytest.RecordProperty) -> None:
    """No difference is neither rounding nor a clear error; a failure says how to see it again."""
    sequences = [run(seed, length=LENGTH) for seed in range(part * 32, (part + 1) * 32)]
    findings = [
        f"{each}\n(python -m benchmarks.sequences --seed {each.seed} --length {LENGTH})"
        for each in sequences
        if each.finding
    ]
    assert not findings, "\n".join(findings)
    record_property("sequences beside the dense model", len(sequences))
