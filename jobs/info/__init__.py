"""What a store, a run, packs, an encoder or a painted image holds."""

from jobs.info.command import main

__all__ = ["main"]
