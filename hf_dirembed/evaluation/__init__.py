"""Model -> figures: each evaluation takes a dense or a compressed model, and says how its figures were taken."""

from .causal import PerplexityFigures, perplexity
from .data import DatasetSource, EvaluationError, SentencePairs, Text, load_pairs, load_text
from .masked import MaskedPerplexityFigures, dense_head, masked_perplexity
from .results import ReferenceResult, Result, load_results, save_result
from .running import Comparison, compare
from .similarity import STSFigures, compare_sts, sts


__all__ = [
    "Comparison",
    "DatasetSource",
    "EvaluationError",
    "MaskedPerplexityFigures",
    "PerplexityFigures",
    "ReferenceResult",
    "Result",
    "STSFigures",
    "SentencePairs",
    "Text",
    "compare",
    "compare_sts",
    "dense_head",
    "load_pairs",
    "load_results",
    "load_text",
    "masked_perplexity",
    "perplexity",
    "save_result",
    "sts",
]
