"""Reads what commands print."""

from __future__ import annotations


def read_table(text: str) -> list[list[str]]:
    """The cells of the Markdown table in a text, its ruler left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]
