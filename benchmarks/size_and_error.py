"""The picture of the README: how small a table is, and how far that moves what the model says of sentences.

    python benchmarks/size_and_error.py benchmarks/README.md benchmarks/figures/size-and-error.svg

Draws the first three kinds of rows that the page has of all-MiniLM-L6-v2: integers in groups, `transform`, and
`transform` that was calibrated. The figures are those of the page, which `quality.py` made.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


HEADING = "### all-MiniLM-L6-v2"
DENSE_BITS = 32
ROW = re.compile(r"^\| (int|transform)[^|]*\| ([\d.]+) \|[^|]*\|[^|]*\| ([\d.]+) \|$", re.M)
LINES = {
    "integers": ("integers in groups of 32", "#c8453c", "P"),
    "plain": ("hf_dirembed", "#6aa5dc", "o"),
    "calibrated": ('hf_dirembed, calibration="self"', "#1f6fb4", "o"),
}


def points(page: str) -> dict[str, list[tuple[float, float]]]:
    r"""Bits per weight and error of similarities, by line, from the section of the page.

    Example:
        >>> points("### all-MiniLM-L6-v2\n| transform | 2 | 7 | 0 | 1 |\nCalibrated\n| transform | 2 | 7 | 0 | 0.9 |")
        {'integers': [], 'plain': [(2.0, 1.0)], 'calibrated': [(2.0, 0.9)]}
    """
    section = page.partition(HEADING)[2].partition("\n### ")[0]
    plain, _, calibrated = section.partition("\nCalibrated")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    for kind, bits, error in ROW.findall(plain):
        found["integers" if kind == "int" else "plain"].append((float(bits), float(error)))
    found["calibrated"] = [(float(bits), float(error)) for _, bits, error in ROW.findall(calibrated)]
    return found


def draw(found: dict[str, list[tuple[float, float]]]) -> Figure:
    """A line for each kind, sizes to the left of quality."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (label, colour, marker) in LINES.items():
        sizes, errors = zip(*sorted(found[name]), strict=True)
        axes.plot(sizes, errors, color=colour, marker=marker, lw=2, ms=6, label=label)

    # both axes in octaves: halving the size is a step to the left
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = [0.5, 1, 2, 4]
    axes.set_xticks(ticks, [f"{bits:g}\n{DENSE_BITS / bits:.0f}x smaller" for bits in ticks])
    axes.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axes.minorticks_off()

    axes.set_xlabel("bits per weight of the table of token embeddings (dense: 32)")
    axes.set_ylabel("how far similarities move\n(root mean square x 100)")
    axes.set_title("all-MiniLM-L6-v2, 1,500 English sentence pairs: lower and further left is better", fontsize=10)
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with matplotlib.rc_context(
        {"svg.hashsalt": "size-and-error", "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        draw(points(arguments.page.read_text(encoding="utf-8"))).savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
