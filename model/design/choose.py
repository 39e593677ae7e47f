"""The design of a name."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from model.design.cascade import CascadeDesign, WindowsBelow
from model.design.patch import PatchDesign
from model.design.points import MixedDesign, SobolDesign, UniformDesign
from model.design.protocol import Design

DESIGNS: dict[str, Callable[..., Design]] = {
    "cascade": CascadeDesign,
    "uniform": UniformDesign,
    "mixed": MixedDesign,
    "sobol": SobolDesign,
    "patch": PatchDesign,
}


def make_design(
    name: str,
    *,
    points: int,
    coarse_level: int | None = None,
    window: int | None = None,
    lattice: bool = False,
    uniform_part: float | None = None,
    blocks: Sequence[tuple[int, int, int]] = (),
) -> Design:
    """The design of a name; None stands for its own default.

    blocks: (level of parents, fine level, window in parents) of each block of a cascade, coarse to
    fine, which share the budget; none for its own.
    """
    if name not in DESIGNS:
        raise ValueError(f"design {name!r} does not exist; choose one of {', '.join(DESIGNS)}")
    if points < 1:
        raise ValueError(f"--points takes a positive number, not {points}")
    options: dict[str, Any] = {
        "coarse_level": coarse_level,
        "window": window,
        "lattice": lattice or None,
        "uniform_part": uniform_part,
        "blocks": tuple(WindowsBelow(fine, up, side) for up, fine, side in blocks) or None,
    }
    given = {option: value for option, value in options.items() if value is not None}
    if blocks and coarse_level is None:
        given["coarse_level"] = blocks[0][0]
    kind = DESIGNS[name]
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for option in given:
        if option not in known:
            raise ValueError(
                f"the cells of --design {name} do not depend on --{option.replace('_', '-')}; "
                "leave it out"
            )
    return kind(points=points, **given)
