"""The packages that exporting needs, which are an extra of this one."""

from __future__ import annotations

import importlib.util

from ..errors import ExportError


NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Checks that what makes and runs ONNX files is installed.

    Raises:
        ExportError: If one of `NEEDED` is not.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ExportError(f"exporting needs {', '.join(missing)}: pip install 'hf_dirembed[onnx]'")
