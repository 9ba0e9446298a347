"""Figures -> model card."""

from .card import CARD_NAME, is_generated, write_card
from .source import Source, find_source


__all__ = ["CARD_NAME", "Source", "find_source", "is_generated", "write_card"]
