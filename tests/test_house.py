"""How the package's files depend on one another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_dirembed


PACKAGE = Path(hf_dirembed.__file__).parent
REMOTE = PACKAGE / "remote"


def imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The absolute names of what a file imports, and the names that it takes of each; wherever it does."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield module, tuple(alias.name for alias in node.names)


def modules_of(file: Path) -> set[Path]:
    """The package's files that a file imports."""
    found = set()
    for module, names in imports(file):
        for name in (module, *(f"{module}.{name}" for name in names)):
            path = PACKAGE.parent / Path(*name.split("."))
            found |= {each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()}
    return found - {file, PACKAGE / "__init__.py"}


def test_what_travels_imports_its_siblings_alone() -> None:
    files = set(REMOTE.glob("*_dirembed.py"))
    assert len(files) == 16
    for file in files:
        assert modules_of(file) <= files
        assert not [
            name for name, _ in imports(file) if name.partition(".")[0] == "hf_dirembed" and "remote" not in name
        ]


def test_no_circles() -> None:
    """But for one within what travels: reading a config makes the classes of its models."""
    allowed = {REMOTE / "configuration_dirembed.py": REMOTE / "modeling_dirembed.py"}
    graph = {file: modules_of(file) - {allowed.get(file)} for file in PACKAGE.rglob("*.py")}
    while leaves := {file for file, needs in graph.items() if not needs & graph.keys()}:
        for file in leaves:
            del graph[file]
    assert not graph, sorted(str(file.relative_to(PACKAGE)) for file in graph)


def test_every_error_is_public() -> None:
    errors = hf_dirembed.errors
    for name in errors.__all__:
        if name != "first_line":
            assert issubclass(getattr(hf_dirembed, name), hf_dirembed.DirEmbedError)
    defined = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert defined <= set(hf_dirembed.__all__)
