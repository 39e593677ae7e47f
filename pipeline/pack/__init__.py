"""The random draws of training, done once, as WebDataset shards."""

from pipeline.pack.command import main

__all__ = ["main"]
