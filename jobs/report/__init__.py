"""A page to look at: what was painted, after what, how the run got there, and what it measures."""

from jobs.report.command import main

__all__ = ["main"]
