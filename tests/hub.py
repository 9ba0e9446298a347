"""A stand-in of the Hub's HTTP API, for uploads and downloads without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandInHub:
    """Repos in memory behind the routes that huggingface_hub asks.

    Attributes:
        repos: The files of every repo, by id and path.
        created: What `create_repo` was asked for, in order.
        commits: The revisions that commits went to, in order.
        downloads: How many bytes of which file were sent, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[str] = []
        self.downloads: list[tuple[str, int]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self._chunks()
                hub._post(self, self.path.partition("?")[0], body)

            def do_GET(self) -> None:
                hub._get(self, self.path.partition("?")[0])

            do_HEAD = do_GET  # noqa: N815 (the base class's name)

            def _chunks(self) -> bytes:
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                return b"".join(parts)

            def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def answer_json(self, content: Any) -> None:
                self.answer(json.dumps(content).encode(), Content_Type="application/json")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def run(self, code: str, *arguments: object, cache: Path) -> str:
        """Runs code in a fresh interpreter whose Hub this is."""
        environment = {
            **os.environ,
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache),
            "HF_TOKEN": "hf_made_up",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def asked_for_private(self) -> bool:
        """Whether the repo that was made last is private, in the words of any version of huggingface_hub."""
        return self.created[-1].get("private") is True or self.created[-1].get("visibility") == "private"

    def _post(self, handler: Any, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            asked = self.created[-1]
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(name, {})
            handler.answer_json({"url": f"{self.endpoint}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            handler.answer_json({"errors": [], "warnings": []})
        elif path.startswith("/api/models/") and "/branch/" in path:
            handler.answer_json({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            handler.answer_json({"files": modes})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.commits.append(match[2])
            url = f"{self.endpoint}/{match[1]}/commit/{COMMIT}"
            handler.answer_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            handler.answer(b"", 404)

    def _get(self, handler: Any, path: str) -> None:
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.repos.get(match[1], {}).get(match[2])
            if content is None:
                code = "EntryNotFound" if match[1] in self.repos else "RepoNotFound"
                handler.answer(b"", 404, X_Error_Code=code, X_Repo_Commit=COMMIT)
            else:
                if handler.command == "GET":
                    self.downloads.append((match[2], len(content)))
                etag = hashlib.sha256(content).hexdigest()
                handler.answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            files = self.repos.get(match[1])
            if files is None:
                handler.answer(b"", 404, X_Error_Code="RepoNotFound")
            else:
                siblings = [{"rfilename": name} for name in files]
                handler.answer_json({"id": match[1], "sha": COMMIT, "private": False, "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            files = self.repos.get(match[1], {})
            handler.answer_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                    if name.startswith(match[2])
                ]
            )
        else:
            handler.answer(b"", 404, X_Error_Code="EntryNotFound")
