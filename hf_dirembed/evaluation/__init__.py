"""Model -> figures: each evaluation takes a dense or a compressed model, and says how its figures were taken."""

from ..errors import EvaluationError
from .causal import PerplexityFigures, perplexity
from .data import DatasetSource, SentencePairs, Text, load_pairs, load_text
from .finetuning import FineTunedFigures, FineTuningSettings, freeze_codes
from .glue import glue
from .glue_tasks import GLUE
from .masked import MaskedPerplexityFigures, dense_head, masked_perplexity
from .results import ReferenceResult, Result, load_results, save_result
from .running import Comparison, compare
from .similarity import (
    STSFigures,
    STSOptions,
    compare_sts,
    embed_sentences,
    movement,
    similarity_error,
    sts,
)
from .squad import SquadSettings, squad
from .tasks import TASKS, Task, evaluate


__all__ = [
    "GLUE",
    "TASKS",
    "Comparison",
    "DatasetSource",
    "EvaluationError",
    "FineTunedFigures",
    "FineTuningSettings",
    "MaskedPerplexityFigures",
    "PerplexityFigures",
    "ReferenceResult",
    "Result",
    "STSFigures",
    "STSOptions",
    "SentencePairs",
    "SquadSettings",
    "Task",
    "Text",
    "compare",
    "compare_sts",
    "dense_head",
    "embed_sentences",
    "evaluate",
    "freeze_codes",
    "glue",
    "load_pairs",
    "load_results",
    "load_text",
    "masked_perplexity",
    "movement",
    "perplexity",
    "save_result",
    "similarity_error",
    "squad",
    "sts",
]
