"""The version of the package, which setup.cfg states and every other place repeats.

    python tools/version.py                 prints it
    python tools/version.py --check v0.1.0  fails unless a release of that tag can be made

CITATION.cff has to repeat the version; CHANGELOG.md has to have a section of it, with its date, by the time of the
release.
"""

from __future__ import annotations

import argparse
import re
import sys
from configparser import ConfigParser
from pathlib import Path


ROOT = Path(__file__).parents[1]
RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", re.MULTILINE)


def version() -> str:
    """The version that setup.cfg states."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return settings["metadata"]["version"]


def problems(tag: str | None = None) -> list[str]:
    """What does not agree with the version, in words.

    Args:
        tag: The tag of a release that is about to be made; None between releases.
    """
    stated, found = version(), []
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1] != stated:
        found.append(f"CITATION.cff says version {cited and cited[1]}, setup.cfg {stated}")

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = dict(RELEASE.findall(changelog))
    if tag is None and "## [Unreleased]" not in changelog:
        found.append("CHANGELOG.md has no section [Unreleased] for the next changes")
    if tag is not None and tag != f"v{stated}":
        found.append(f"the tag {tag} is not v{stated}, the version of setup.cfg")
    if tag is not None and stated not in releases:
        found.append(f"CHANGELOG.md has no section '## [{stated}] - YEAR-MONTH-DAY'")
    return found


def main() -> None:
    """Prints the version, or what is wrong with it."""
    parser = argparse.ArgumentParser(description="The version of the package.")
    parser.add_argument("--check", metavar="TAG", help="the tag of the release that is about to be made")
    tag = parser.parse_args().check
    if found := problems(tag):
        sys.exit("\n".join(found))
    print(version())


if __name__ == "__main__":
    main()
