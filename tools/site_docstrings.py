"""Prepares this project's docstrings for mkdocstrings: examples become sections, and mentions become links."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe


_INIT = Path(__file__).parents[1] / "hf_dirembed" / "__init__.py"
_MENTION = re.compile(r"\[`([\w.]+)`\](?!\[|\()")


def public_names() -> set[str]:
    """What `hf_dirembed` exports, read without importing it."""
    (exported,) = (
        node.value
        for node in ast.parse(_INIT.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(exported))


def prepare(text: str, public: set[str]) -> str:
    """A docstring as mkdocstrings reads it: griffe knows `Examples:`, and links are [`name`][path]."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f"[`{name}`][hf_dirembed.{name}]" if name.partition(".")[0] in public else f"`{name}`"

    return _MENTION.sub(link, re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE))


class Docstrings(griffe.Extension):
    """Prepares every docstring that griffe loads."""

    def __init__(self) -> None:
        self._public = public_names()

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with each object, its members loaded."""
        if obj.docstring:
            obj.docstring.value = prepare(obj.docstring.value, self._public)
