"""Codes that learn."""
