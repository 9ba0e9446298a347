"""All methods, by name."""

from __future__ import annotations

from .methods import OWN
from .packages import OTHERS


METHODS = {method.name: method for method in (*OWN, *OTHERS)}
