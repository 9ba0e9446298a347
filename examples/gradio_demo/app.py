"""A demo in the browser: compress an encoder, look at its table, and compare what it makes of sentences and words.

    pip install -r examples/gradio_demo/requirements.txt
    python examples/gradio_demo/app.py --model sentence-transformers/all-MiniLM-L6-v2

Compressed models are kept in a temporary folder, which goes when the demo ends. A model is taken from a folder or from
the Hub, by transformers and without trust: nothing of its repository is run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import gradio as gr
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import hf_dirembed
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.checkpoints.loading import resolve_checkpoint
from hf_dirembed.cli.picture import TableProfile, save_picture


MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES = """How do I reset my password?
I can't log in, I forgot my credentials.
The cat sleeps on the warm windowsill.
A kitten is napping by the window.
Quarterly revenue grew by eight percent."""
WORDS = "paris, green, dog, seven"
MOST_SENTENCES = 8  # of which every pair is shown


@lru_cache(maxsize=4)
def load(folder: str) -> tuple[PreTrainedModel, AutoTokenizer]:
    """The model and tokenizer of a folder."""
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def compress(name: str, bits: float, calibrated: bool) -> tuple[str, str, dict[str, str]]:
    """Compresses a model into a folder of its own.

    Args:
        name: A folder, or a name on the Hub.
        bits: Bits per weight.
        calibrated: Whether the model is run on words first, to see in which directions errors cost.

    Returns:
        What came of it, in Markdown; the file of a picture; the folders of the dense and the compressed model.

    Raises:
        gr.Error: If the model cannot be compressed, with the package's message.
    """
    started = time.perf_counter()
    out = Path(tempfile.mkdtemp(dir=WORK.name)) / "compressed"
    try:
        dense = resolve_checkpoint(name.strip())
        summary = compress_checkpoint(dense, out, bits=bits, calibration="self" if calibrated else None)
        picture = out / "picture.png"
        save_picture(TableProfile.of_checkpoint(out, dense), picture)
    except hf_dirembed.DirEmbedError as error:
        raise gr.Error(str(error), duration=None) from error

    rows = [
        f"| `{table.name}` | {table.num_embeddings:,} x {table.embedding_dim:,} | {table.dense_bytes / 1e6:.2f} MB | "
        f"{table.bytes / 1e6:.2f} MB | {table.bits_per_weight:.2f} | {table.mean_cosine or float('nan'):.4f} |"
        for table in summary.tables
    ]
    sizes = [sum(file.stat().st_size for file in folder.glob("model*.safetensors")) / 1e6 for folder in (dense, out)]
    seconds = time.perf_counter() - started
    report = "\n".join(
        [
            f"The file went from **{sizes[0]:.1f} MB to {sizes[1]:.1f} MB** in {seconds:.0f} s.\n",
            "| table | rows x columns | before | after | bits per weight | mean cosine of a row before and after |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )
    return report, str(picture), {"dense": str(dense), "compressed": str(out)}


@torch.no_grad()
def embed(folder: str, sentences: list[str]) -> Tensor:
    """The mean of each sentence's token vectors, of length 1: (sentences, dim)."""
    model, tokenizer = load(folder)
    inputs = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    hidden = model(**inputs).last_hidden_state
    return normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def compare_sentences(text: str, folders: dict[str, str] | None) -> list[list[str]]:
    """The cosine of each pair of sentences, dense and compressed, most similar first.

    Raises:
        gr.Error: If nothing is compressed yet, or there are not two to eight sentences.
    """
    folders = require(folders)
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not 2 <= len(sentences) <= MOST_SENTENCES:
        raise gr.Error(f"{len(sentences)} sentences: write 2 to {MOST_SENTENCES}, one a line")
    before, after = (embed(folders[kind], sentences) for kind in ("dense", "compressed"))
    pairs = sorted(combinations(range(len(sentences)), 2), key=lambda pair: -float(before[pair[0]] @ before[pair[1]]))
    found = [(i, j, float(before[i] @ before[j]), float(after[i] @ after[j])) for i, j in pairs]
    return [[sentences[i], sentences[j], f"{b:.3f}", f"{a:.3f}", f"{a - b:+.3f}"] for i, j, b, a in found]


@torch.no_grad()
def compare_words(text: str, folders: dict[str, str] | None) -> list[list[str]]:
    """The tokens whose rows point most nearly in the direction of a word's row, before and after.

    Raises:
        gr.Error: If nothing is compressed yet, or a word is no token of the model.
    """
    folders = require(folders)
    _, tokenizer = load(folders["dense"])
    words = [word.strip() for word in text.split(",") if word.strip()]
    known = {word: ids[0] for word in words if len(ids := tokenizer.encode(word, add_special_tokens=False)) == 1}
    known = {word: token for word, token in known.items() if token != tokenizer.unk_token_id}
    if unknown := [word for word in words if word not in known]:
        raise gr.Error(f"{', '.join(unknown)}: not one token of this model each; write other words")

    found = [[word] for word in known]
    for kind in ("dense", "compressed"):
        embedding = load(folders[kind])[0].get_input_embeddings()
        rows = embedding.weight if kind == "dense" else embedding.dense_weight()
        rows = normalize(rows[: len(tokenizer)], dim=1)  # some tables have rows to spare
        for line, token in zip(found, known.values(), strict=True):
            nearest = (rows @ rows[token]).topk(6).indices.tolist()
            line.append(", ".join(tokenizer.convert_ids_to_tokens([each for each in nearest if each != token][:5])))
    return found


def require(folders: dict[str, str] | None) -> dict[str, str]:
    """The folders of the models that are compared.

    Raises:
        gr.Error: If nothing is compressed yet.
    """
    if not folders:
        raise gr.Error("there is no compressed model yet: press Compress first")
    return folders


def build(name: str) -> gr.Blocks:
    """The page.

    Args:
        name: The model that stands in its field at first.
    """
    with gr.Blocks(title="hf_dirembed") as page:
        folders = gr.State(None)
        gr.Markdown(
            "# Smaller vocabulary tables\n"
            "A vocabulary table has a row for each token, and in small encoders it is most of the model. Compress "
            "one, and see what it still makes of sentences and words."
        )
        with gr.Row():
            model = gr.Textbox(name, label="Model: a name on the Hub, or a folder", scale=3)
            bits = gr.Slider(0.5, 8, 2, step=0.5, label="Bits per weight", scale=2)
            calibrated = gr.Checkbox(True, label="Calibrate", info="without data; takes longer", scale=1)
        button = gr.Button("Compress", variant="primary")
        report = gr.Markdown(elem_id="report")
        picture = gr.Image(label="The table", interactive=False, elem_id="picture", buttons=["download"])
        button.click(compress, [model, bits, calibrated], [report, picture, folders], api_name="compress")

        gr.Markdown("## Sentences")
        sentences = gr.Textbox(SENTENCES, label="One sentence a line", lines=5)
        ask = gr.Button("Compare sentences")
        similar = gr.Dataframe(
            headers=["sentence", "with", "dense", "compressed", "change"],
            label="Cosines of the sentences' embeddings",
            elem_id="sentences",
            max_height=900,
            column_widths=["33%", "33%", "10%", "14%", "10%"],
            wrap=True,
            interactive=False,
        )
        ask.click(compare_sentences, [sentences, folders], similar, api_name="sentences")

        gr.Markdown("## Words")
        words = gr.Textbox(WORDS, label="Words that are one token each, with commas between them")
        look = gr.Button("Compare words")
        near = gr.Dataframe(
            headers=["word", "nearest rows, dense", "nearest rows, compressed"],
            label="Neighbours in the table",
            elem_id="words",
            column_widths=["14%", "43%", "43%"],
            wrap=True,
            interactive=False,
        )
        look.click(compare_words, [words, folders], near, api_name="words")
    return page


WORK = tempfile.TemporaryDirectory(prefix="hf_dirembed-demo-")


def main() -> None:
    """Serves the page."""
    parser = argparse.ArgumentParser(description="Compress an encoder in the browser, and compare.")
    parser.add_argument("--model", default=MODEL, help="what stands in the field at first (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    options = parser.parse_args()
    page = build(options.model)
    page.launch(server_name="127.0.0.1", server_port=options.port, allowed_paths=[WORK.name], footer_links=[])


if __name__ == "__main__":
    main()
