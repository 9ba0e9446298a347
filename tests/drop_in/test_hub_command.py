"""`hf dirembed ...`: the command is what `hf extensions install OWNER/hf-dirembed` looks for, and runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("huggingface_hub.cli.extensions", reason="this huggingface_hub has no extensions")


def test_the_command_is_an_extension_of_hf(tmp_path: Path) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    hub, ours = (shutil.which(name, path=places) for name in ("hf", "hf-dirembed"))
    if hub is None or ours is None:
        pytest.skip("the commands are not installed")
    # What an installation leaves: it makes an environment, and takes the console script of the extension's name there.
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-dirembed"
    folder.mkdir(parents=True)
    manifest = {"owner": "me", "repo": "hf-dirembed", "repo_id": "me/hf-dirembed", "short_name": "dirembed"}
    manifest |= {"executable_path": ours, "type": "python", "installed_at": "2026-01-01T00:00:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [hub, "dirembed", "inspect", "nothing"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("hf-dirembed: nothing is neither a folder here nor a model")
