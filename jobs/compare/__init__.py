"""Contestants on equal terms, from one store to their Crop FIDs."""

from jobs.compare.command import main

__all__ = ["main"]
