"""Painted images against the real ones of a store: Crop FID and more, with floors."""

from jobs.evaluate.command import main

__all__ = ["main"]
