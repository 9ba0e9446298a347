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
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote


TOKEN = "hf_made_up"
REPO = r"([^/]+/[^/]+)"


@dataclass
class Repo:
    """Files by commit, commits by branch.

    Attributes:
        private: Whether only who has the token sees it.
        branches: The last commit of each.
        commits: The files of each, by path.
    """

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        """Adds files to a branch, or to a new one that starts at main; the commit's name."""
        before = self.commits.get(self.branches.get(branch, self.branches.get("main", "")), {})
        name = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(changes)}".encode()).hexdigest()
        self.commits[name] = {**before, **changes}
        self.branches[branch] = name
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or a commit."""
        return self.commits[self.branches.get(revision, revision)]


class StandInHub:
    """Repos in memory behind the routes that huggingface_hub asks; small files come in the commit, others by LFS.

    Attributes:
        repos: By id.
        downloads: How many bytes of which file were sent, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.downloads: list[tuple[str, int]] = []
        self._objects: dict[str, bytes] = {}  # of LFS
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_POST(self) -> None:
                self._route(hub._post, self._body())

            def do_PUT(self) -> None:  # to an address that was given out, so without the token
                self._route(hub._put, self._body())

            def do_GET(self) -> None:
                self._route(hub._get)

            do_HEAD = do_GET  # noqa: N815 (the base class's name)

            def _route(self, handle: Any, *body: bytes) -> None:
                path = unquote(self.path.partition("?")[0])
                match = re.match(rf"/(?:api/models/)?{REPO}?(?:\.git)?(/|$)", path)
                repo = hub.repos.get(match[1] or "") if match else None
                trusted = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if not trusted and (self.command == "POST" or (repo and repo.private)):
                    self.answer(b"", 401, X_Error_Code="RepoNotFound")  # as the Hub says it to who may not know
                else:
                    handle(self, path, *body)

            def _body(self) -> bytes:
                if length := int(self.headers.get("Content-Length") or 0):
                    return self.rfile.read(length)
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

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repo that is there already."""
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", files)

    def environment(self, cache: Path, token: str = TOKEN) -> dict[str, str]:
        """Of a process whose Hub this is; without a token if that is empty."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, code: str, *arguments: object, cache: Path, token: str = TOKEN) -> str:
        """Runs code in a fresh interpreter whose Hub this is."""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = self.environment(cache, token)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _post(self, handler: Any, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            return handler.answer_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.repos.setdefault(name, Repo(private))
            return handler.answer_json({"url": f"{self.endpoint}/{name}", "name": name})
        if match := re.fullmatch(rf"/{REPO}\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            return handler.answer_json({"transfer": "basic", "objects": objects})
        match = re.fullmatch(rf"/api/models/{REPO}/(branch|preupload|commit)/(.+)", path)
        if match is None or match[1] not in self.repos:
            return handler.answer(b"", 404)
        repo, (_, what, revision) = self.repos[match[1]], match.groups()
        if what == "branch":
            repo.commit(revision, {})
            return handler.answer_json({})
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": upload_mode(file), "shouldIgnore": False} for file in files]
            return handler.answer_json({"files": modes})
        commit = repo.commit(revision, self._changes(body))
        url = f"{self.endpoint}/{match[1]}/commit/{commit}"
        return handler.answer_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _changes(self, body: bytes) -> dict[str, bytes]:
        changes = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self._objects[value["oid"]]
        return changes

    def _put(self, handler: Any, path: str, body: bytes) -> None:
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return handler.answer(b"", 400)
        self._objects[oid] = body
        return handler.answer(b"")

    def _get(self, handler: Any, path: str) -> None:
        match = re.fullmatch(rf"/(?:api/models/)?{REPO}(?:/(resolve|revision|tree)/([^/]+)/?(.*))?", path)
        if match is None or match[1] not in self.repos:
            return handler.answer(b"", 404, X_Error_Code="RepoNotFound")
        name, what, revision, file = match.groups()
        repo = self.repos[name]
        commit = repo.branches.get(revision or "main", revision or "main")
        if commit not in repo.commits:
            return handler.answer(b"", 404, X_Error_Code="RevisionNotFound")
        files = repo.commits[commit]
        if what == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
                if path.startswith(file)
            ]
            return handler.answer_json(tree)
        if what != "resolve":
            siblings = [{"rfilename": path} for path in files]
            return handler.answer_json({"id": name, "sha": commit, "private": repo.private, "siblings": siblings})
        if file not in files:
            return handler.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if handler.command == "GET":
            self.downloads.append((file, len(files[file])))
        etag = hashlib.sha256(files[file]).hexdigest()
        return handler.answer(files[file], ETag=f'"{etag}"', X_Repo_Commit=commit)


def upload_mode(file: dict[str, Any]) -> str:
    """By size, and by name for weights, as a new repo's `.gitattributes` have it."""
    return "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10_000_000 else "regular"
