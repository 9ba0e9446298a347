"""Figures → model card → Hub."""
