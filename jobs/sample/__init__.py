"""Painting large images with a trained run."""

from jobs.sample.command import main

__all__ = ["main"]
