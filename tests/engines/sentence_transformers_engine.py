"""Encodes texts with sentence-transformers on onnxruntime; usage: FOLDER FILE TEXTS.json; prints JSON."""

import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer


folder, file, texts = sys.argv[1:]
model = SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs={"file_name": file})
print(json.dumps(model.encode(json.loads(Path(texts).read_text()), normalize_embeddings=True).tolist()))
