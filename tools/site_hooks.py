"""Brings pages that lie elsewhere in the repository into the site, with links that hold there.

Of the repository's Markdown and pictures, those in `PLACES` become pages under the path that they have; what is in
`docs` stands at the root. Links between them are rewritten, and those to files that are no pages, like a benchmark's
script, lead to the repository, whose address the environment names: `DOCS_REPOSITORY`. Without it they become text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks", "examples", "model_cards")
SUFFIXES = (".md", ".png", ".svg")
GUIDES = "Guides"  # the section of the navigation that pages go to which it does not name
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, Path]:
    """The files that the site takes from outside `docs`, by their path from the repository's root."""
    files = (file for place in PLACES for file in ([ROOT / place] if "." in place else (ROOT / place).rglob("*")))
    return {file.relative_to(ROOT).as_posix(): file for file in sorted(files) if file.suffix in SUFFIXES}


def site_path(path: str) -> str:
    """Where a file of the repository is on the site.

    Example:
        >>> site_path("docs/serving.md"), site_path("benchmarks/paper.md")
        ('serving.md', 'benchmarks/paper.md')
    """
    return path.removeprefix("docs/")


def rewrite_links(text: str, path: str, known: set[str], repository: str) -> str:
    """The text of a page, with its links as the site has them.

    Args:
        text: Markdown.
        path: The page's path from the repository's root.
        known: The paths of all files that are on the site.
        repository: The address of the repository; "" if it is not known.

    Example:
        >>> known = {"docs/serving.md", "benchmarks/README.md"}
        >>> rewrite_links("[a](docs/serving.md#x) [b](benchmarks) [c](LICENSE)", "README.md", known, "")
        '[a](serving.md#x) [b](benchmarks/README.md) c'
    """

    def rewritten(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        file, hash_sign, anchor = target.partition("#")
        if not file or re.match(r"\w+:", file):
            return match[0]

        goal = posixpath.normpath(posixpath.join(posixpath.dirname(path), file))
        goal = f"{goal}/README.md" if f"{goal}/README.md" in known else goal
        if goal in known:
            relative = posixpath.relpath(site_path(goal), posixpath.dirname(site_path(path)) or ".")
            return f"{mark}[{words}]({relative}{hash_sign}{anchor})"
        if not (ROOT / goal).exists():
            return match[0]  # which the strict build then refuses
        return f"[{words}]({repository}/blob/main/{goal})" if repository else words

    parts = _FENCE.split(text)  # code stays as it is
    return "".join(part if number % 2 else _LINK.sub(rewritten, part) for number, part in enumerate(parts))


def _known() -> set[str]:
    return {*pages(), *(f"docs/{file.relative_to(ROOT / 'docs').as_posix()}" for file in (ROOT / "docs").rglob("*.*"))}


def on_config(config: Any) -> Any:
    """Adds the pages of `docs` to the navigation that it does not name."""
    named = re.findall(r"[\w/.-]+\.md", repr(config.nav))
    further = sorted(file.name for file in (ROOT / "docs").glob("*.md") if file.name not in named)
    (guides,) = (section[GUIDES] for section in config.nav if GUIDES in section)
    guides += further
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the files of `PLACES`."""
    from mkdocs.structure.files import File

    for path, file in pages().items():
        files.append(File.generated(config, site_path(path), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links of a page."""
    path = page.file.src_uri if page.file.src_uri in pages() else f"docs/{page.file.src_uri}"
    return rewrite_links(markdown, path, _known(), os.environ.get("DOCS_REPOSITORY", ""))
