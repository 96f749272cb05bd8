"""Kernel limits of a run: what they have to be, setting them, putting them back."""
