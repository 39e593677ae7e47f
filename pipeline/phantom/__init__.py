"""A slide and an aerial scene drawn by code: the demo's input, and pixels whose truth the tests
know.
"""

from pipeline.phantom.command import main
from pipeline.phantom.files import draw_aerial, draw_slide

__all__ = ["draw_aerial", "draw_slide", "main"]
