"""What leaving each table of a model uncoded costs the loss: as calibration saw it, and by rule where it did not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ..compression.table import Table
from ..remote.tables_dirembed import tied_modules
from .calibrated import Calibration


# What a relative error of a head costs, times what it costs of a table of that size that token ids look up. White
# errors of a language model's tables gave 4 to 6, those of a small masked one 1 to 2: see "One budget over all tables"
# in benchmarks/README.md for why it is the lower.
HEAD_COST = 2.0


def cost_by_rule(model: PreTrainedModel, path: str) -> float:
    """What a weight of a table costs that is left uncoded, relative to one of a table that is only looked up.

    Args:
        model: The dense model.
        path: Of the table's module. Where it is tied, all its uses count.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=False))
        >>> cost_by_rule(model, "lm_head") / cost_by_rule(model, "model.embed_tokens") == HEAD_COST
        True
    """
    shared = [model.get_submodule(name) for name in tied_modules(model, path)]
    looked_up = any(isinstance(module, nn.Embedding) for module in shared)
    return float(looked_up) + HEAD_COST * any(isinstance(module, nn.Linear) for module in shared)


def table_costs(
    model: PreTrainedModel, matrices: Sequence[tuple[str, int, Table]], calibration: Calibration | None
) -> list[float]:
    """What leaving each of several matrices uncoded costs, all in one unit.

    Args:
        model: The dense model.
        matrices: Of each the path of the table that it is, or is a block of columns of, which block, and its rows.
        calibration: What was seen of the model. In its unit, nats, are the costs of the tables that it saw, and of the
            others what the rule says of them relative to these. Without it all costs are by rule, in no unit.

    Returns:
        A cost for each matrix. By rule, as many weights of two tables of one kind cost as much.
    """
    by_rule = [cost_by_rule(model, path) * rows.num_rows * rows.dim for path, _, rows in matrices]
    seen = [None if calibration is None else calibration.cost(model, *matrix) for matrix in matrices]
    pairs = [(cost, rule) for cost, rule in zip(seen, by_rule, strict=True) if cost is not None]
    unit = sum(cost for cost, _ in pairs) / sum(rule for _, rule in pairs) if pairs else 1.0
    return [unit * rule if cost is None else cost for cost, rule in zip(seen, by_rule, strict=True)]
