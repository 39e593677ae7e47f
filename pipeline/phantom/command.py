"""python -m pipeline.phantom: a slide or an aerial scene drawn by code, for the demo and for
tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.console import EXIT_DONE, run, say_plan
from pipeline.phantom.files import (
    draw_aerial,
    draw_slide,
    needed_aerial_bytes,
    needed_slide_bytes,
)


@dataclass(frozen=True)
class SlideOptions:
    """Draw a slide that looks like haematoxylin and eosin, as a TIFF that OpenSlide opens."""

    out: Path
    """The .tif to write."""
    height_px: int = 8192
    """Height in pixels."""
    width_px: int = 8192
    """Width in pixels."""
    mpp: float = 0.5
    """Side of a pixel in µm."""
    seed: int = 0
    """Another seed draws another slide."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass(frozen=True)
class AerialOptions:
    """Draw an aerial scene with red, green, blue and near-infrared, as a GeoTIFF."""

    out: Path
    """The .tif to write."""
    height_px: int = 4096
    """Height in pixels."""
    width_px: int = 4096
    """Width in pixels."""
    gsd: float = 0.6
    """Side of a pixel in m."""
    seed: int = 0
    """Another seed draws another scene."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass(frozen=True)
class PhantomOptions:
    """Draw a slide or an aerial scene by code, for trying the chain without data.

        python -m pipeline.phantom slide --out phantom.tif
        python -m pipeline.phantom slide --out small.tif --height-px 2048 --width-px 3072 --seed 7
        python -m pipeline.phantom aerial --out scene.tif --gsd 0.3

    The same seed and size always give the same pixels.
    """

    scene: tyro.conf.OmitSubcommandPrefixes[
        Annotated[SlideOptions, tyro.conf.subcommand("slide")]
        | Annotated[AerialOptions, tyro.conf.subcommand("aerial")]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(PhantomOptions, _draw, argv, prog="python -m pipeline.phantom")


def _draw(options: PhantomOptions) -> int:
    scene = options.scene
    place = (scene.out, scene.height_px, scene.width_px)
    size = f"{scene.height_px} × {scene.width_px} px"
    if isinstance(scene, SlideOptions):
        plan = f"a slide of {size} of {scene.mpp} µm, seed {scene.seed} -> {scene.out}"
        needed = needed_slide_bytes(*place, scene.mpp, scene.seed)
    else:
        plan = f"an aerial scene of {size} of {scene.gsd} m, seed {scene.seed} -> {scene.out}"
        needed = needed_aerial_bytes(*place, scene.gsd, scene.seed)
    say_plan(plan, scene.out.parent, needed)
    if scene.dry_run:
        return EXIT_DONE
    sides = {"height_px": scene.height_px, "width_px": scene.width_px}
    if isinstance(scene, SlideOptions):
        draw_slide(scene.out, **sides, mpp=scene.mpp, seed=scene.seed)
    else:
        draw_aerial(scene.out, **sides, gsd=scene.gsd, seed=scene.seed)
    return EXIT_DONE
