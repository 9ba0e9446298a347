"""Encodes texts with fastembed; usage: FOLDER FILE TEXTS.json; prints JSON."""

import json
import sys
from pathlib import Path


def main(folder: str, file: str, texts: str) -> None:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="me/exported",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="me/exported"),
        dim=json.loads(Path(folder, "config.json").read_text())["hidden_size"],
        model_file=file,
    )
    model = TextEmbedding("me/exported", specific_model_path=folder)
    print(json.dumps([vector.tolist() for vector in model.embed(json.loads(Path(texts).read_text()))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
