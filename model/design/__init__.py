"""Designs: which cells of an image one training sample draws, never more than its budget of
values; a pure function of the image's extent and a key.
"""

from typing import Any

from model.design.points import MixedDesign, SobolDesign, UniformDesign
from model.design.protocol import Design, Extent, PointDesign, WindowDesign
from model.design.windows import PatchDesign, ZoomDesign

__all__ = [
    "Design",
    "Extent",
    "MixedDesign",
    "PatchDesign",
    "PointDesign",
    "SobolDesign",
    "UniformDesign",
    "WindowDesign",
    "ZoomDesign",
    "make_design",
]

DESIGNS: dict[str, type[Design]] = {
    "zoom": ZoomDesign,
    "uniform": UniformDesign,
    "mixed": MixedDesign,
    "sobol": SobolDesign,
    "patch": PatchDesign,
}


def make_design(
    name: str, *, points: int, coarse_level: int, window: int | None, halo: int | None
) -> Design:
    """The design of a name; None stands for its own default. Only windows have a side and a halo
    to choose.
    """
    if name not in DESIGNS:
        raise ValueError(f"design {name!r} does not exist; choose one of {', '.join(DESIGNS)}")
    if name in ("uniform", "sobol"):
        window = halo = None
    if name in ("mixed", "patch"):
        halo = None
    asked = {"window": window, "halo": halo}
    given = {key: value for key, value in asked.items() if value is not None}
    kind: Any = DESIGNS[name]
    return kind(points=points, coarse_level=coarse_level, **given)
