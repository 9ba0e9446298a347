"""Checkpoints on disk or on the Hub → their models, their tables, and back."""
