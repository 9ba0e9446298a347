"""Encodes texts with fastembed; usage: FOLDER FILE TEXTS.json; prints JSON."""

import json
import sys
from pathlib import Path

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType


folder, file, texts = sys.argv[1:]
config = json.loads(Path(folder, "config.json").read_text())
TextEmbedding.add_custom_model(
    model="me/exported",
    pooling=PoolingType.MEAN,
    normalization=True,
    sources=ModelSource(hf="me/exported"),
    dim=config["hidden_size"],
    model_file=file,
)
model = TextEmbedding("me/exported", specific_model_path=folder)
print(json.dumps([vector.tolist() for vector in model.embed(json.loads(Path(texts).read_text()))]))
