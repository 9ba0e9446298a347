"""How a compressed model is used: with which class, and in which pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.models.auto import modeling_auto


# Of each head: the table of transformers that knows it, its AutoModel class, the pipeline it runs in. The first that
# fits is taken.
_HEADS = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText", "image-text-to-text"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM", None),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", "text-generation"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM", "fill-mask"),
    (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForSequenceClassification",
        "text-classification",
    ),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification", "token-classification"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering", "question-answering"),
)
_LM_HEADS = (
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
)
# What `hf-dirembed evaluate` can measure of models with a head of that kind.
_TASKS = {
    "AutoModelForCausalLM": ("perplexity",),
    "AutoModelForMaskedLM": ("mlm-perplexity", "sts", "glue", "squad"),
    "AutoModel": ("sts", "glue", "squad"),
}
# What a pipeline is shown with on the card.
_INPUTS = {
    "fill-mask": 'f"Paris is the {pipe.tokenizer.mask_token} of France."',
    "text-generation": '"The capital of France is", max_new_tokens=20',
    "text-classification": '"What a lovely day."',
    "token-classification": '"Marie lives in Paris."',
    "question-answering": 'question="Where does Marie live?", context="Marie lives in Paris."',
    "feature-extraction": '"What a lovely day."',
}
_CHAT = '[{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=40'


@dataclass(frozen=True)
class Usage:
    """How a checkpoint is loaded.

    Attributes:
        auto_class: The AutoModel class of its head.
        pipeline_tag: The Hub's task for it; None where the architecture alone does not say.
        pipeline_input: Python arguments to show that pipeline with; None where a line of text is no input for it.
    """

    auto_class: str
    pipeline_tag: str | None
    pipeline_input: str | None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What `hf-dirembed evaluate` can measure of it."""
        return _TASKS.get(self.auto_class, ())

    @property
    def has_lm_head(self) -> bool:
        """Whether it predicts tokens."""
        return self.auto_class in _LM_HEADS

    @classmethod
    def of_config(cls, config: dict[str, Any], *, has_chat_template: bool = False) -> Usage:
        """Reads the class out of a `config.json`.

        Example:
            >>> Usage.of_config({"architectures": ["DirEmbedGPT2LMHeadModel"]}).auto_class
            'AutoModelForCausalLM'
            >>> Usage.of_config({"architectures": ["DirEmbedBertModel"]}).pipeline_tag
            'feature-extraction'
        """
        stated = config.get("architectures")
        architecture = stated[0].removeprefix("DirEmbed") if isinstance(stated, list) and stated else ""
        auto_class, tag = "AutoModel", "feature-extraction"
        for table, head_class, head_tag in _HEADS:
            if any(architecture in _names(entry) for entry in getattr(modeling_auto, table, {}).values()):
                auto_class, tag = head_class, head_tag  # type: ignore[assignment]
                break
        chat = tag == "text-generation" and has_chat_template
        return cls(auto_class, tag, _CHAT if chat else _INPUTS.get(tag or ""))


def _names(entry: Any) -> tuple[str, ...]:
    """The classes that an entry of a table names, one or several."""
    return (entry,) if isinstance(entry, str) else tuple(entry)
