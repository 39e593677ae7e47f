"""What this machine has of what the project can use, what is missing and how to get it."""

from jobs.doctor.command import main

__all__ = ["main"]
