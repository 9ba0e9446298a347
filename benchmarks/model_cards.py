"""Model cards of a model at several budgets: compress, evaluate against the dense model, draw, write the card.

    python benchmarks/model_cards.py sentence-transformers/all-MiniLM-L6-v2 --bits 2 1 \
        --evaluate "--task sts --data sentence-transformers/stsb"

    python benchmarks/model_cards.py SmolLM2-135M-Instruct --base-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --metadata license=apache-2.0 language=en --calibrate mixed.txt --languages en --bits 4 3 \
        --evaluate "--task perplexity --data held-out.txt"

MODEL is a Hub id or a folder; a folder's Hub id, and what its card would say where it has none, is told by
--base-model and --metadata. Each --evaluate holds arguments of `hf-dirembed evaluate`. Of every budget, the card, its
picture, the results and the config are kept in OUT/NAME-BITSbit (by default in model_cards); the weights only with
--keep, in that folder.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import metadata_load, metadata_save

from hf_dirembed.checkpoints.convert import compress_checkpoint, resolve_checkpoint
from hf_dirembed.cli.commands import main as run_cli
from hf_dirembed.cli.picture import TableProfile, save_picture
from hf_dirembed.hub.publishing import write_checkpoint_card


KEPT = ("README.md", "dirembed.png", "dirembed_results.json", "config.json", ".eval_results")


def make_card(arguments: argparse.Namespace, bits: float, work: Path) -> Path:
    """Makes the card of one budget.

    Args:
        arguments: Of the command line.
        bits: Per weight.
        work: Where the compressed model is put.

    Returns:
        The folder that the card is kept in.
    """
    name = f"{arguments.name or Path(arguments.model).name}-{bits:g}bit"
    folder = work / name
    compress_checkpoint(
        arguments.model,
        folder,
        base_model=arguments.base_model,
        method=arguments.method,
        bits=bits,
        languages=arguments.languages,
        calibration=arguments.calibrate,
    )
    if arguments.metadata:
        stated = dict(each.split("=", 1) for each in arguments.metadata)
        card = folder / "README.md"
        metadata_save(card, {**(metadata_load(card) or {}), **stated})
    for evaluation in arguments.evaluate:
        told = ["evaluate", str(folder), "--reference", arguments.model, *shlex.split(evaluation)]
        run_cli(told, standalone_mode=False)
    reference = resolve_checkpoint(arguments.model)
    save_picture(TableProfile.of_checkpoint(folder, reference), folder / "dirembed.png")
    write_checkpoint_card(folder, model_id=f"{arguments.user}/{name}" if arguments.user else None)
    return keep(folder, arguments.out / name)


def keep(folder: Path, target: Path) -> Path:
    """Copies the card and what belongs to it, in place of an earlier one."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in KEPT:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)
        elif (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    return target


def main(told: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 1.0])
    parser.add_argument("--method", default="transform")
    parser.add_argument("--calibrate", help="text file, or self")
    parser.add_argument("--languages", nargs="+")
    parser.add_argument("--evaluate", nargs="+", default=[], metavar="ARGUMENTS", help="of hf-dirembed evaluate")
    parser.add_argument("--base-model", help="Hub id of MODEL")
    parser.add_argument("--metadata", nargs="+", metavar="KEY=VALUE", help="what the card of MODEL would say")
    parser.add_argument("--name", help="of the compressed models  [default: MODEL's]")
    parser.add_argument("--user", help="whose Hub account the cards name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "model_cards")
    parser.add_argument("--keep", type=Path, help="keep the compressed models in this folder")
    arguments = parser.parse_args(told)
    with tempfile.TemporaryDirectory() as temporary:
        for bits in arguments.bits:
            print(make_card(arguments, bits, arguments.keep or Path(temporary)), flush=True)


if __name__ == "__main__":
    main()
