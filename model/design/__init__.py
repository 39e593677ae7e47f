"""Designs: which cells of an image one training sample draws, never more than its budget of
values, and a pure function of its key.

`cascade` draws windows of each block of octaves, whose neighbours are all there; `patch` one
window of pixels; point designs (`uniform`, `mixed`, `sobol`) name cells one by one. A cell may be
invalid, and a point's cell may lie outside the image: both keep their place and say that they are
absent, so that a draw has one size. Every pixel of the image is equally likely to be drawn, or
weighs in inverse proportion.

The budget counts what a draw holds: its cells, and the coarse lattice where the design draws it
too. The lattice of a region lies in its packs once, whatever the design; a draw without it never
reads it.
"""

from model.design.cascade import CascadeDesign, WindowsBelow, rarity, window_starts
from model.design.choose import make_design
from model.design.patch import PatchDesign
from model.design.points import EVERY_PIXEL, MixedDesign, Sampling, SobolDesign, UniformDesign
from model.design.protocol import Design, Extent, PointDesign

__all__ = [
    "EVERY_PIXEL",
    "CascadeDesign",
    "Design",
    "Extent",
    "MixedDesign",
    "PatchDesign",
    "PointDesign",
    "Sampling",
    "SobolDesign",
    "UniformDesign",
    "WindowsBelow",
    "make_design",
    "rarity",
    "window_starts",
]
