"""Compares the methods with float latents on one model's input embeddings; prints a Markdown table.

python benchmarks/direction_vs_autoencoder.py MODEL_FOLDER [--ranks 153 76 38] [--paper-batches]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

from transformers import AutoModel

from hf_dirembed.compression.autoencoder import AutoencoderSettings, train_autoencoder
from hf_dirembed.compression.factorization import Factorization
from hf_dirembed.compression.subspace import direction, mean_cosine, svd
from hf_dirembed.compression.table import Table


def root_mean_square_error(table: Table, factorization: Factorization) -> float:
    """√ mean (x - x̂)² over all elements of the table."""
    total = sum(float((chunk - factorization.reconstruct(rows)).square().sum()) for rows, chunk in table.chunks())
    return (total / (table.num_rows * table.dim)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a local model folder")
    parser.add_argument("--ranks", type=int, nargs="+", help="by default dim / 2.5, dim / 5 and dim / 10")
    parser.add_argument("--paper-batches", action="store_true", help="also train with batches of 32, as the paper did")
    arguments = parser.parse_args()
    table = Table(AutoModel.from_pretrained(arguments.model).get_input_embeddings().weight.detach())
    methods: dict[str, Callable[[Table, int], Factorization]] = {
        "svd": svd,
        "autoencoder": train_autoencoder,
        "direction, linear": partial(direction, affine=False),
        "direction, affine": direction,
    }
    if arguments.paper_batches:
        methods["autoencoder, batch 32"] = partial(train_autoencoder, settings=AutoencoderSettings.paper())
    print(f"{arguments.model}: {table.num_rows} x {table.dim}\n")
    print("| rank | method | mean cosine | RMSE | seconds |\n| --- | --- | --- | --- | --- |")
    for rank in arguments.ranks or [int(table.dim / share) for share in (2.5, 5, 10)]:
        for name, method in methods.items():
            start = time.perf_counter()
            found = method(table, rank)
            seconds = time.perf_counter() - start
            figures = f"{mean_cosine(table, found):.4f} | {root_mean_square_error(table, found):.5f} | {seconds:.1f}"
            print(f"| {rank} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
