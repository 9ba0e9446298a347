"""Kernels for CPUs, in C: they read rows of packed codes, multiply states with all of them, and search the trellis.

They are built when the package is installed; [`in_use`] says what runs. Where they could not be built or do not load,
[`compiled`] is false, and plain operations of torch run in their place.
"""

from .library import compiled, in_use
from .products import rows_product
from .reading import patch_rows, read_rows


__all__ = ["compiled", "in_use", "patch_rows", "read_rows", "rows_product"]
