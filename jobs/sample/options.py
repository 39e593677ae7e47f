"""What python -m jobs.sample takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from conditioning.layout import Fill


@dataclass(frozen=True)
class Sample:
    """Paint images after the conditions of regions, or after none; the same command resumes.

        python -m jobs.sample run --condition dataset.zarr --out images
        python -m jobs.sample run --condition dataset.zarr --out images --region 5 --size 2048x4096
        python -m jobs.sample run --unconditional 4 --out images

    Each becomes an OME-Zarr image, and the files that --format names.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path
    """Folder of the images."""
    condition: Path | None = None
    """The dataset store whose regions condition the images; embedded by the run's encoder."""
    unconditional: int | None = None
    """Instead: so many images after no condition, of the seeds --seed and following; the run needs
    python -m jobs.latents first."""
    region: tuple[int, ...] = ()
    """Rows K of the store's region table; by default the first region that was not trained on."""
    size: str = "region"
    """Side in pixels, or HxW; by default the region's, or what --low or --known cover. A larger
    image continues its condition."""
    low: Path | None = None
    """Super-resolution: an OME-Zarr image 2, 4, 8, ... times as coarse as what is painted, whose
    pixels the area means of the painting are to be."""
    known: Path | None = None
    """Inpainting: an OME-Zarr image of the painting's resolution, kept where --mask is white."""
    mask: Path | None = None
    """With --known: a picture (PNG), white where the image is kept, black where it is painted
    anew; as large as the image, or 2, 4, 8, ... times as coarse."""
    fill: Fill = "reflect"
    """What conditions the part of an image beyond its region: reflect mirrors the region's tokens,
    regions lays those of other regions beside it."""
    label: str | None = None
    """Class that the images are to be of, by its name; by default that of their region, if it has
    one."""
    scale: float = 1.0
    """Resolution of the image over the training's: 1, 0.5, 0.25 or 0.125, exact area means of the
    whole image; of runs whose noise is mollified (presets paper, infinity-diff) 1, 2 or 4."""
    steps: int | None = None
    """Evaluations of the denoiser; guidance of either kind evaluates twice in each. By default
    each block of a cascade has its own number, and other denoisers take 20; both papers took
    50."""
    seed: int = 0
    """Another seed paints another image after the same condition."""
    guidance: float = 1.0
    """Classifier-free guidance, in blocks that read the condition; 1 is the condition alone, and
    twice as fast. Patch diffusion was published with 3."""
    autoguidance: float | None = None
    """How far a cascade's estimates are taken from those of its own weights early in training,
    which are worse in the same places; by default each block's own number, 1 for not at all."""
    solver: Literal["dpm++2m", "ddim", "ancestral"] = "dpm++2m"
    """How a step is taken: of second order, of first, or with fresh noise (which wants 100
    steps)."""
    eta: float | None = None
    """With --solver ddim: how much fresh noise a step adds, from 0 (none, the default) to 1
    (ancestral)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of layers; auto is bf16 where the device multiplies in it, but for sparse
    operators."""
    tile: str = "auto"
    """Side of a tile in pixels (of a cascade in cells of each block), a multiple of the coarse
    cell; auto suits the device."""
    overlap: float | None = None
    """Patch diffusion only: how much of a window its neighbours overlap; by default 0.75, as
    published."""
    format: tuple[Literal["ome-tiff", "tiff", "cog", "zarr"], ...] = ("ome-tiff",)
    """What to write beside the OME-Zarr image."""
    share: str = "1/1"
    """K/N paints the K-th of N shares of the regions: several jobs paint side by side."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the plan and stop."""
