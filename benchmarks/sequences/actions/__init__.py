"""Every action that sequences are drawn from; the modules register theirs when they are imported."""

from . import adapters, averages, copies, modules, moves, readings, ties, training, writes


__all__ = ["adapters", "averages", "copies", "modules", "moves", "readings", "ties", "training", "writes"]
