"""What a project that is published needs: one version, a changelog, workflows, forms, and a site of all its pages."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import hf_dirembed


ROOT = Path(__file__).parent.parent


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_one_version() -> None:
    version = tool("version")
    assert version.problems() == []
    assert version.problems("v9.9.9") == [
        f"the tag v9.9.9 is not v{version.version()}, the version of setup.cfg",
        *(problem for problem in version.problems(f"v{version.version()}")),
    ]


def test_the_changelog_is_kept() -> None:
    headings = re.findall(r"^#+ .*$", read("CHANGELOG.md"), re.MULTILINE)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert headings[:2] == ["# Changelog", "## [Unreleased]"]
    for heading in headings[2:]:
        assert heading.removeprefix("### ") in kinds or re.fullmatch(
            r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading
        )


@pytest.mark.parametrize("workflow", sorted(file.name for file in (ROOT / ".github" / "workflows").glob("*.yml")))
def test_workflows_are_pinned_and_have_few_rights(workflow: str) -> None:
    text = read(f".github/workflows/{workflow}")
    jobs = yaml.safe_load(text)["jobs"]
    used = re.findall(r"uses: (.*)", text)
    assert len(used) == sum("uses" in step for job in jobs.values() for step in job["steps"])
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used)
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    for job in jobs.values():
        assert job["timeout-minutes"] <= 60
        assert set(job.get("permissions", {})) <= {"id-token", "pages"}
        # who may publish does nothing but that: it checks nothing out, and installs nothing
        if "permissions" in job:
            assert not any("run" in step or "checkout" in step["uses"] for step in job["steps"])


def test_every_python_is_tried() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    stated = re.findall(r"Python :: (3\.\d+)", settings["metadata"]["classifiers"])
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == stated
    oldest = settings["options"]["python_requires"].removeprefix(">=")
    assert oldest == stated[0] == jobs["lowest"]["steps"][1]["with"]["python-version"]
    wheels = tomllib.loads(read("pyproject.toml"))["tool"]["cibuildwheel"]["build"]
    assert wheels == f"cp{oldest.replace('.', '')}-*"  # made with the oldest, and of no version: see setup.py


def test_issue_forms() -> None:
    for form in ("bug", "model"):
        values: dict[str, Any] = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{form}.yml"))
        assert values["name"]
        assert values["description"]
        ids = [part["id"] for part in values["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids))


def test_the_api_page_has_every_public_name() -> None:
    named = re.findall(r"^::: hf_dirembed\.(\w+)$", read("docs/api.md"), re.MULTILINE)
    assert sorted(named) == sorted(hf_dirembed.__all__)


def test_the_site_has_every_page_and_its_links_hold() -> None:
    """As far as that can be seen without mkdocs, which `make docs` runs."""
    hooks = tool("site_hooks")
    assert doctest.testmod(hooks).failed == 0
    known = hooks._known()
    named = set(re.findall(r": ([\w/.-]+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    assert named <= {hooks.site_path(path) for path in known}
    for page in (path for path in known if path.endswith(".md")):
        text = re.sub(r"^```.*?^```", "", hooks.rewrite_links(read(page), page, known, ""), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^()\s:#]+)(?:#[^()\s]*)?\)", text):
            goal = (ROOT / "docs" / hooks.site_path(page)).parent / target
            at = goal.resolve().relative_to(ROOT / "docs").as_posix()
            assert at in {hooks.site_path(path) for path in known}, (page, target)


def test_docstrings_for_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    docstrings = tool("site_docstrings")
    assert docstrings.public_names() == set(hf_dirembed.__all__)
    prepared = docstrings.prepare("See [`compress`] and [`_x`].\n\nExample:\n    >>> 1\n    1\n", {"compress"})
    assert prepared == "See [`compress`][hf_dirembed.compress] and `_x`.\n\nExamples:\n    >>> 1\n    1\n"
