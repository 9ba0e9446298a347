"""The pages of figures: which command made which table, and the same tables again.

    python tools/figures.py                             lists the pages and their commands
    python tools/figures.py benchmarks/paper.md         runs the commands of a page, and puts their tables into it
    python tools/figures.py benchmarks/paper.md --only 2 3 --keep

A command is a piece of code in a page that starts with `python` or `hf-dirembed`; it made the tables between it and
the next one. It runs in the current folder, where models and texts lie under the names that the page has. A table of
the page is replaced by the printed one with the same head. --keep leaves the page, and writes into build/figures.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path


ROOT = Path(__file__).parents[1]
RECORD = "benchmarks"  # where the pages of figures are
RESULTS = ("benchmarks/**/*.json", "model_cards/*/dirembed_results.json")  # what else holds figures
NO_FIGURES = "<!-- figures: none of its own -->"  # above a table or paragraph whose numbers are settings, or repeated
STARTS = ("python ", "hf-dirembed ", "accelerate ")
MACHINE = re.compile(r"\b(cores?|threads?|EPYC|GPU|CPUs?|machine)\b")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\w.])[-+]?(?:\d+\.\d+|\.\d+|\d+)(?!\.?\d)")
_CODE = re.compile(r"`([^`]+)`")
_HEADING = re.compile(r"^(#+) (.*)$")


@dataclass
class Figures:
    """A table of a page.

    Attributes:
        lines: Its lines, head and ruler included.
        first: The number of its first line in the page, from 0.
        measured: Whether its numbers are figures: nothing above it says otherwise.
    """

    lines: list[str]
    first: int
    measured: bool = True

    @property
    def head(self) -> list[str]:
        """The cells of its first row."""
        return cells(self.lines[0])

    @property
    def body(self) -> str:
        """All rows below the ruler, without code."""
        return _CODE.sub("", "\n".join(self.lines[2:]))


@dataclass
class Section:
    """A part of a page, from one heading to the next.

    Attributes:
        page: The page's path from the repository's root.
        headings: Its heading, behind those that it stands under.
        texts: Its text without tables, behind the texts right below those headings.
        commands: The commands in it, and the tables that each made.
        tables: All tables in it.
    """

    page: str
    headings: list[str]
    texts: list[str] = field(default_factory=list)
    commands: list[tuple[str, list[Figures]]] = field(default_factory=list)
    tables: list[Figures] = field(default_factory=list)


def cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table.

    Example:
        >>> cells("| a | b `c` |")
        ['a', 'b `c`']
    """
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def numbers(text: str) -> list[Decimal]:
    """The numbers of a text, with the digits that they show.

    Example:
        >>> [str(number) for number in numbers("-0.01 / 1.0632x of 30,522, codec2, 1.2.3 and .351")]
        ['-0.01', '1.0632', '30522', '0.351']
    """
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text.replace("−", "-"))]


def shows(shown: Decimal, recorded: Decimal) -> bool:
    """Whether a number is another one, rounded to the digits that it shows; without regard to the sign.

    Example:
        >>> shows(Decimal("0.01"), Decimal("-0.006")), shows(Decimal("1.064"), Decimal("1.0632"))
        (True, False)
    """
    half = Decimal(1).scaleb(int(shown.as_tuple().exponent)) / 2
    return abs(abs(shown) - abs(recorded)) <= half


def sections(page: str, text: str) -> list[Section]:
    """The sections of a page that have a heading."""
    found: list[Section] = []
    above: list[Section] = []
    open_table, marked, fenced = False, False, False
    for number, line in enumerate(text.splitlines()):
        fenced ^= line.startswith("```")
        heading = None if fenced else _HEADING.match(line)
        if heading:
            above = above[: len(heading[1]) - 1]
            outer = above[-1] if above else Section(page, [])
            above.append(Section(page, [*outer.headings, heading[2]], list(outer.texts)))
            found.append(above[-1])
            continue
        if not above:
            continue

        here = above[-1]
        if line.startswith("|") and not fenced:
            if not open_table:
                here.tables.append(Figures([], number, measured=not marked))
                if here.commands:
                    here.commands[-1][1].append(here.tables[-1])
            here.tables[-1].lines.append(line)
            open_table, marked = True, False
            continue
        open_table = False
        marked = line.strip() == NO_FIGURES or (marked and not line.strip())
        here.texts.append(line)
        here.commands += [(command, []) for command in _commands_ending(here.texts, fenced)]
    return found


def _commands_ending(texts: list[str], fenced: bool) -> Iterator[str]:
    """The commands that the last of some lines completes."""
    if fenced:
        return
    last = texts[-1]
    if last.startswith("```"):  # a block of code has ended
        begin = max((n for n, line in enumerate(texts[:-1]) if line.startswith("```")), default=len(texts))
        block = "\n".join(texts[begin + 1 : -1]).replace("\\\n", " ")
        yield from (" ".join(line.split()) for line in block.splitlines() if line.startswith(STARTS))
        return
    paragraph = ""
    for line in reversed(texts[:-1]):  # code may begin on a line above
        if not line.strip() or line.startswith("```"):
            break
        paragraph = f"{line}\n{paragraph}"
    before = sum(1 for _ in _CODE.finditer(paragraph))
    for found in list(_CODE.finditer(paragraph + last))[before:]:
        command = " ".join(found[1].split())
        if command.startswith(STARTS):
            yield command


def record() -> list[Section]:
    """The sections of all pages of figures."""
    pages = sorted((ROOT / RECORD).glob("*.md"))
    return [each for page in pages for each in sections(f"{RECORD}/{page.name}", page.read_text(encoding="utf-8"))]


def series(table: Figures) -> list[list[Decimal]]:
    """The figures of a table, row by row; of a row whose cells are like `1.05 / 1.07`, the firsts and the seconds.

    Figures are numbers with a decimal point; others are taken for settings, like 4 bits.

    Example:
        >>> table = Figures(["| a |", "| - |", "| 1.5 / 2.5 | 4 | 3.5 / 0.5 |"], first=0)
        >>> [[str(number) for number in each] for each in series(table)]
        [['1.5', '3.5'], ['2.5', '0.5']]
    """
    found = []
    for line in table.body.splitlines():
        split = [cell.split("/") for cell in cells(line)]
        for place in range(max(map(len, split))):
            row = numbers(" ".join(cell[place] for cell in split if place < len(cell)))
            found.append([number for number in row if number.as_tuple().exponent])
    return [each for each in found if each]


def lines_of(table: Figures) -> list[list[Decimal]]:
    """The numbers of each row and of each column of a table."""
    rows = [cells(line) for line in (table.lines[0], *table.lines[2:])]
    columns = zip(*rows, strict=False)
    return [numbers(" ".join(line)) for line in (*rows, *columns)]


def groups() -> dict[str, list[list[Decimal]]]:
    """The numbers of each part of the record, by its name, line by line.

    A part is a section below a page's title, with those below it, or a file of results. A line is a row or column of a
    table, a paragraph, or all of a file.
    """
    found, recorded = {}, record()
    for section in recorded:
        depth = len(section.headings)
        if depth > 1:
            within = [s for s in recorded if s.page == section.page and s.headings[:depth] == section.headings]
            lines = [line for each in within for table in each.tables for line in lines_of(table)]
            texts = "\n".join(section.texts).split("\n\n")
            found[f"{section.page}: {section.headings[-1]}"] = [*lines, *map(numbers, texts)]
    for pattern in RESULTS:
        for file in sorted(ROOT.glob(pattern)):
            found[file.relative_to(ROOT).as_posix()] = [numbers(file.read_text(encoding="utf-8"))]
    return found


def source_of(figures: list[list[Decimal]], parts: dict[str, list[list[Decimal]]]) -> str | None:
    """The part of the record that has all of some figures, at the digits that they show; None where none has.

    Args:
        figures: Those of each row, as [`series`] gives them; each row has to be within one line of the part.
        parts: The record.
    """

    def within(row: list[Decimal], line: list[Decimal]) -> bool:
        return all(any(shows(figure, number) for number in line) for figure in row)

    for name, lines in parts.items():
        if all(any(within(row, line) for line in lines) for row in figures):
            return name
    return None


def run(section: Section, number: int, keep: bool) -> None:
    """Runs a command of a section, and puts the tables that it prints into the page."""
    command, tables = section.commands[number]
    print(f"+ {command}", file=sys.stderr)
    words = shlex.split(command)
    words = [str(ROOT / word) if word.startswith(f"{RECORD}/") else word for word in words]
    words[0] = sys.executable if words[0] == "python" else words[0]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    printed = [each for s in sections("", f"# output\n{done.stdout}") for each in s.tables]
    if keep:
        file = ROOT / "build" / "figures" / f"{Path(section.page).stem}-{number + 1}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(done.stdout, encoding="utf-8")
        return

    path = ROOT / section.page
    for table in tables:
        new = next((each for each in printed if each.head == table.head), None)
        if new is None:
            print(f"no table with the head {table.head} was printed: that of the page stays", file=sys.stderr)
            continue
        old = "\n".join(table.lines)
        path.write_text(path.read_text(encoding="utf-8").replace(old, "\n".join(new.lines)), encoding="utf-8")


def main() -> None:
    """Lists the commands of the pages, or runs those of one."""
    parser = argparse.ArgumentParser(description="The pages of figures, and the commands that make them.")
    parser.add_argument("page", nargs="?", help="the page to make again, like benchmarks/paper.md; default: list all")
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the commands to run, as the list has them")
    parser.add_argument("--keep", action="store_true", help="write into build/figures, and leave the page as it is")
    options = parser.parse_args()

    number, page = 0, ""
    for section in record():
        if options.page and section.page != options.page:
            continue
        number = number if section.page == page else 0
        for place, (command, tables) in enumerate(section.commands):
            number += 1
            if options.page and (options.only is None or number in options.only):
                run(section, place, options.keep)
            elif not options.page:
                heading = f"\n{section.page}\n" if section.page != page else ""
                print(f"{heading}  {number:2}. {section.headings[-1]}, tables: {len(tables)}\n      {command}")
            page = section.page


if __name__ == "__main__":
    main()
