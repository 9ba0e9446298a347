"""model2vec on an encoder: a static model in place of the whole of it, so another kind of thing than the rest.

It is distilled in a process of its own, as `measure` measures.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hf_dirembed.checkpoints.convert import load_model, load_tokenizer
from hf_dirembed.evaluation import load_pairs, sts

from .measure import PeakMemory, compare


NEEDS = ("model2vec", "skeletoken")
SENTENCES = 32  # encoded at once


@dataclass(frozen=True)
class StaticJob:
    """What is to be distilled and where; as `Job` for a table."""

    model: str
    out: str
    pairs: tuple[str, ...]
    prefix: str = ""
    limit: int | None = None
    repeats: int = 20

    def to_json(self) -> str:
        """For the process."""
        return json.dumps(asdict(self))


def missing_packages() -> str | None:
    """What to install, if something is missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    return f"needs {' and '.join(missing)}: pip install 'hf_dirembed[benchmarks]'" if missing else None


def distill(job: StaticJob) -> dict[str, Any]:
    """Distils with model2vec's own settings; quality, bytes, seconds and memory of the static model."""
    from model2vec.distill import distill_from_model

    folder = Path(job.model)
    encoder, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    assert tokenizer is not None  # `load_subject` asked for one
    memory = PeakMemory()
    start = time.perf_counter()
    model = distill_from_model(encoder, tokenizer, device="cpu")
    seconds, peak = time.perf_counter() - start, memory.bytes()
    model.save_pretrained(job.out)
    encoder, quality, sentences = load_model(folder).eval(), {}, []
    for source in job.pairs:
        pairs = load_pairs(source)
        sentences = [job.prefix + sentence for sentence in pairs.first[:SENTENCES]]
        quality[Path(source).name] = 100 * sts(model, pairs, prefix=job.prefix, limit=job.limit).spearman

    def encode() -> None:
        encoder(**tokenizer(sentences, padding=True, truncation=True, return_tensors="pt"))

    return {
        "quality": quality,
        "model_bytes": sum(file.stat().st_size for file in Path(job.out).glob("*.safetensors")),
        "dense_model_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "fit_s": seconds,
        "fit_peak_bytes": peak,
        "encode": compare(lambda: model.encode(sentences), encode, job.repeats),
    }


def measure_static(argument: str) -> dict[str, Any]:
    """What a job, given as JSON, finds."""
    told = json.loads(argument)
    with torch.no_grad():
        return distill(StaticJob(**{**told, "pairs": tuple(told["pairs"])}))
