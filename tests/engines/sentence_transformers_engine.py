"""Encodes texts with sentence-transformers on onnxruntime; usage: FOLDER FILE TEXTS.json; prints JSON."""

import json
import sys
from pathlib import Path


def main(folder: str, file: str, texts: str) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs={"file_name": file})
    print(json.dumps(model.encode(json.loads(Path(texts).read_text()), normalize_embeddings=True).tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
