"""Designs: which cells of an image one training sample draws, never more than its budget of
values, and a pure function of its key.

A design draws in one of two ways. Window designs (`zoom`, `patch`) name squares of cells, whose
neighbours are all there; point designs (`uniform`, `mixed`, `sobol`) name cells one by one.
Windows may stick out of the image and cells may be invalid: both keep their place and say that
they are absent, so that a draw has one size and every pixel of the image is equally likely to be
drawn.

The budget counts what a draw holds: its cells, and the coarse lattice where the design draws it
too. The lattice of a region lies in its packs once, whatever the design; a draw without it never
reads it.
"""

from model.design.choose import make_design
from model.design.points import EVERY_PIXEL, MixedDesign, Sampling, SobolDesign, UniformDesign
from model.design.protocol import Design, Extent, PointDesign, WindowDesign
from model.design.windows import PatchDesign, ZoomDesign

__all__ = [
    "EVERY_PIXEL",
    "Design",
    "Extent",
    "MixedDesign",
    "PatchDesign",
    "PointDesign",
    "Sampling",
    "SobolDesign",
    "UniformDesign",
    "WindowDesign",
    "ZoomDesign",
    "make_design",
]
