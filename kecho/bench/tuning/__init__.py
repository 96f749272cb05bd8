"""Kernel limits of a run: what it needs, raising them, restoring them."""
