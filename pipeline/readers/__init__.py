"""Slides, aerial images and plain pictures behind one `Reader`, chosen by what a file holds, not
by what it is called.
"""

from pipeline.readers.choose import open_reader
from pipeline.readers.protocol import Reader, TileError, UnreadableError

__all__ = ["Reader", "TileError", "UnreadableError", "open_reader"]
