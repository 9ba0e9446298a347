"""Figures of README and docs are those of the pages of benchmarks/, where each has its command and its machine."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]

# Quantities in running text that a measurement gives; bits and bytes of a budget are settings.
QUANTITY = re.compile(
    r"(?<![\w.,])((?:\d[\d,]*)?\.?\d+)(?: (?:and|or|to) (\d[\d.,]*\d|\d))? ?(%|MB|MiB|GB|GiB|ms\b|µs|s\b)"
)

# What needs no measurement: the share of a model's parameters that its table has, by its shapes; a rule of the coder.
SHARES = {82: "multilingual-e5-small", 69: "xlm-roberta-base", 52: "all-MiniLM-L6-v2", 21: "bert-base"}
RULES = {95: "rows up to three times as long as 95 % of the others are no outliers"}


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "tools" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module
    spec.loader.exec_module(module)
    return module


def test_examples(figures) -> None:
    assert doctest.testmod(figures).failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_tables_repeat_the_record(page: str, figures) -> None:
    """The figures of a table are in one part of the record, those of a row in one row or column there."""
    parts = figures.groups()
    for section in figures.sections(page, (ROOT / page).read_text(encoding="utf-8")):
        for table in section.tables:
            found = figures.series(table)
            if table.measured and found:
                assert figures.source_of(found, parts), (
                    f"the table {table.head} under {section.headings[-1]!r} has figures that no part of the record "
                    f"has: put what a command printed into benchmarks/, or write {figures.NO_FIGURES} above it"
                )


@pytest.mark.parametrize("page", PAGES)
def test_text_repeats_the_record(page: str, figures) -> None:
    known = [number for lines in figures.groups().values() for line in lines for number in line]
    text = re.sub(r"^```.*?^```|^\|.*?$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for paragraph in text.split("\n\n"):
        if figures.NO_FIGURES in paragraph:
            continue
        plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", " ".join(paragraph.split()))
        for match in QUANTITY.finditer(plain):
            for number in figures.numbers(f"{match[1]} {match[2] or ''}"):
                stated = number in SHARES or number in RULES
                assert stated or any(figures.shows(number, each) for each in known), (
                    f"{match[0]!r} in {plain[:90]!r} is not in the record: measure it, or put {figures.NO_FIGURES} "
                    "above the paragraph if nobody has to"
                )


def test_the_record_has_commands_and_machines(figures) -> None:
    for section in figures.record():
        for table in section.tables:
            if table.measured and figures.series(table):
                text = " ".join(section.texts)
                assert any(f"`{start}" in text or f"\n{start}" in text for start in figures.STARTS), (
                    f"{section.page}, {section.headings[-1]!r}: no command says what made {table.head}"
                )
                assert figures.MACHINE.search(text), f"{section.page}, {section.headings[-1]!r} names no machine"


@pytest.mark.parametrize("page", sorted((ROOT / "benchmarks").glob("*.md")), ids=lambda page: page.name)
def test_codecs_have_numbers(page: Path) -> None:
    """A page that calls a codec the present one is wrong as soon as there is another."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert not re.search(r"codec as it is|of the present codec|codec before the present one|with the codec now", text)
    assert "codec 1" in text or "codec 2" in text


def test_commands_name_scripts_that_there_are(figures) -> None:
    for section in figures.record():
        for command, _ in section.commands:
            _, *words = command.split()
            if words[0] == "-m":
                file = ROOT / words[1].replace(".", "/")
                assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), command
            elif command.startswith("python "):
                assert (ROOT / words[0]).is_file(), command


PAGE = """# Page

On one core.

`python script.py
--option 1`

| what | figure |
| --- | --- |
| a | 1.25 |

Other text, and `not a command`.

| other | figure |
| --- | --- |
| b | 2.5 |

## Code

```bash
python script.py \\
    --option 2
```

<!-- figures: none of its own -->

| setting |
| --- |
| 0.5 |
"""


def test_a_page_is_made_again(figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "benchmarks").mkdir()
    page = tmp_path / "benchmarks" / "page.md"
    page.write_text(PAGE)
    (tmp_path / "script.py").write_text(
        "print('so\\n\\n| what | figure |\\n| --- | --- |\\n| a | 1.5 |\\n| c | 3.0 |')"
    )
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    first, code = figures.record()
    assert [command for command, _ in first.commands + code.commands] == [
        "python script.py --option 1",
        "python script.py --option 2",
    ]
    assert [table.measured for table in first.tables + code.tables] == [True, True, False]

    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    assert "python script.py --option 2" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["figures.py", "benchmarks/page.md", "--only", "1"])
    figures.main()
    assert page.read_text() == PAGE.replace("| a | 1.25 |", "| a | 1.5 |\n| c | 3.0 |")
    assert "['other', 'figure'] was printed" in capsys.readouterr().err


def test_what_is_not_in_the_record_is_found(figures) -> None:
    """Of the numbers that README and docs repeat, each a little off."""
    parts, tried, found = figures.groups(), 0, 0
    for page in PAGES:
        for section in figures.sections(page, (ROOT / page).read_text(encoding="utf-8")):
            for rows in (figures.series(table) for table in section.tables if table.measured):
                for row, place in [(row, place) for row, each in enumerate(rows) for place in range(len(each))]:
                    off = [list(each) for each in rows]
                    off[row][place] += Decimal(17).scaleb(off[row][place].as_tuple().exponent)
                    tried, found = tried + 1, found + (figures.source_of(off, parts) is None)
    assert found >= 0.75 * tried
