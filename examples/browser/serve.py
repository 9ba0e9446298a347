"""Serves the search page, an exported model and transformers.js, on this machine only.

    npm install --prefix examples/browser
    hf-dirembed export sentence-transformers/all-MiniLM-L6-v2 exported --bits 2 --body int8-weights
    python examples/browser/serve.py exported

The page then finds everything at 127.0.0.1, and asks nothing of any other machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


HERE = Path(__file__).parent
MODEL = "exported"  # what the page calls the model
DTYPES = {"model.onnx": "fp32", "model_quantized.onnx": "q8", "model_int8.onnx": "int8"}  # as transformers.js does


class Handler(SimpleHTTPRequestHandler):
    """Answers with files of three folders, and with what there is to know of the model."""

    extensions_map = {  # noqa: RUF012 (the base class has it so)
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def __init__(self, *args: Any, roots: dict[str, Path], about: dict[str, Any], **kwargs: Any) -> None:
        self.roots, self.about = roots, about
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        """The file of a path, which is below one of the folders."""
        path = unquote(urlsplit(path).path)
        for prefix, root in self.roots.items():
            if path.startswith(prefix):
                file = (root / path.removeprefix(prefix)).resolve()
                inside = file.is_relative_to(root.resolve())
                return str(file if inside else root / "no such file")
        return str(HERE / "no such file")

    def do_GET(self) -> None:
        """Answers."""
        if urlsplit(self.path).path != "/about.json":
            super().do_GET()
            return
        content = json.dumps(self.about).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        """Isolates the page: it may then use several threads, and measure its memory."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing of each request."""


def make_server(folder: Path, modules: Path, port: int) -> ThreadingHTTPServer:
    """Makes the server of an exported folder.

    Args:
        folder: What `hf-dirembed export` wrote.
        modules: The `node_modules` with transformers.js.
        port: Where to listen, at 127.0.0.1; 0 for any that is free.
    """
    files = [
        {"dtype": dtype, "bytes": (folder / "onnx" / name).stat().st_size}
        for name, dtype in DTYPES.items()
        if (folder / "onnx" / name).is_file()
    ]
    about = {"model": MODEL, "name": folder.resolve().name, "files": files}
    roots = {f"/models/{MODEL}/": folder, "/modules/": modules, "/": HERE}
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, roots=roots, about=about))


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hf-dirembed export wrote")
    parser.add_argument("--modules", type=Path, default=HERE / "node_modules", help="where npm put transformers.js")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    if not (arguments.folder / "onnx" / "model.onnx").is_file():
        sys.exit(f"{arguments.folder} holds no onnx/model.onnx: name a folder that hf-dirembed export wrote")
    if not (arguments.modules / "@huggingface" / "transformers").is_dir():
        sys.exit(f"{arguments.modules} holds no transformers.js: npm install --prefix {HERE}")
    server = make_server(arguments.folder, arguments.modules, arguments.port)
    print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
