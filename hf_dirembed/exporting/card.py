"""An exported folder -> its model card."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..hub.card import CARD_NAME, MARK, TAG, size
from ..hub.source import Source
from .body import lookups_of
from .folder import MODULES_FILE
from .quantise import BODIES
from .summary import ExportSummary


_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def write_export_card(
    folder: Path, summary: ExportSummary, model: PreTrainedModel, source: Source, model_id: str
) -> None:
    """Writes README.md of an exported folder.

    Args:
        folder: It.
        summary: What it holds.
        model: What was exported.
        source: What that was made from.
        model_id: The name that the card tells people to load.
    """
    sentences = (folder / MODULES_FILE).is_file()
    found = (task for kind, task in _TASKS.items() if kind in summary.model_class)
    task = next(found, "feature-extraction")
    inherited = {key: value for key, value in source.metadata.items() if key != "library_name"}
    inherited.setdefault("pipeline_tag", "sentence-similarity" if sentences else task)

    data = ModelCardData(
        library_name="sentence-transformers" if sentences else "transformers.js",
        base_model=source.base_model,
        base_model_relation="quantized" if source.base_model else None,
        tags=[TAG, "onnx", "transformers.js"],
        **inherited,
    )
    tables = lookups_of(model)
    card = ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"),
        mark=MARK,
        model_id=model_id,
        source=source,
        summary=summary,
        bodies=BODIES,
        tables=tables,
        sentences=sentences,
        encodes=summary.outputs == ("last_hidden_state",),
        task=task,
        size=size,
    )
    (folder / CARD_NAME).write_text(f"{card}\n", encoding="utf-8", newline="\n")
