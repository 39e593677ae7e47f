"""What python -m pipeline.pack takes, resolved against its store."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.design import CascadeDesign, Design, Extent, make_design
from pipeline.packfile import (
    PackSettings,
    extent_of,
    window_layouts,
)
from pipeline.store import Region, Store

SHARD_BYTES = 256 * 2**20
MOST_SMOOTH_PX = 64.0


@dataclass(frozen=True)
class Pack:
    """Draw cells from every region of a store, many times, into WebDataset shards for training.

        python -m pipeline.pack dataset.zarr --encoder encoder --out packs
        python -m pipeline.pack dataset.zarr --encoder encoder --out packs --size-gb 50
        python -m pipeline.pack dataset.zarr --encoder encoder --out packs --packs-per-region 8

    The same command again finishes what is missing.
    """

    store: Annotated[Path, tyro.conf.Positional]
    """The dataset store, already embedded."""
    encoder: str
    """Which embeddings condition the regions: an encoder's key, name or folder."""
    out: Path
    """Folder of the packs."""
    points: int = 65_536
    """Values drawn from one region for one sample, however large the region."""
    packs_per_region: str = "auto"
    """Draws of each region, or auto: enough to score every pixel once, within --size-gb."""
    size_gb: float = 4.0
    """Most that auto may write, in GB."""
    design: str = "cascade"
    """Which cells are drawn. cascade: the top lattice (cells of 256 px) and windows of every block
    of octaves. uniform: random pixels, disjoint from draw to draw until a region is used up.
    mixed: half random pixels, half stacks of nested windows. sobol: pixels under a scrambled Sobol
    sequence. patch (for --preset patch of jobs.train): one embedded tile of pixels a draw."""
    window: int | None = None
    """Side of a window in cells; by default 32 for mixed and 256 for patch."""
    lattice: bool = False
    """Let uniform, mixed or sobol draws hold the coarse lattice too, within --points; cascade
    always does."""
    uniform_part: float | None = None
    """Least part of a mixed draw that is random pixels; 0.5 by default."""
    mollifier: float = 0.0
    """Smooth the pixels before the draw by a Gaussian of this many px; 0 does not, the papers'
    is 1."""
    coarse_level: int | None = None
    """Level of the coarse lattice, cells of 2^level pixels; by default 8 for cascade, 5
    otherwise."""
    blocks: tuple[str, ...] = ()
    """For a cascade of other blocks than the presets': PARENTS:FINE:WINDOW of each, coarse to
    fine, two levels and a side in parents, as 8:6:8 6:4:8 4:2:16 2:0:32."""
    seed: int = 0
    """Another seed draws other cells."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass(frozen=True)
class Plan:
    """A pack command, resolved; `labels` are the classes of images."""

    settings: PackSettings
    regions: tuple[Region, ...]
    region_bytes: int
    labels: dict[str, str]

    @property
    def shards(self) -> list[tuple[Region, ...]]:
        """The regions of every tar shard."""
        size = max(SHARD_BYTES // self.region_bytes, 1)
        return [self.regions[i : i + size] for i in range(0, len(self.regions), size)]


def make_plan(options: Pack) -> Plan:
    """Resolve the options against the store."""
    if options.coarse_level is not None and not 1 <= options.coarse_level <= 8:
        raise ValueError(
            f"--coarse-level takes a level from 1 to 8 (cells of 2 to 256 px), not "
            f"{options.coarse_level}"
        )
    if not 0.0 <= options.mollifier <= MOST_SMOOTH_PX:
        raise ValueError(
            f"--mollifier takes a width from 0 (none) to {MOST_SMOOTH_PX:g} px, not "
            f"{options.mollifier:g}"
        )
    blocks = tuple(_block(text) for text in options.blocks)
    design = make_design(
        options.design,
        points=options.points,
        coarse_level=options.coarse_level,
        window=options.window,
        lattice=options.lattice,
        uniform_part=options.uniform_part,
        blocks=blocks,
    )
    if options.mollifier and isinstance(design, CascadeDesign):
        raise ValueError(
            "the cascade learns area means of the pixels as they are; leave --mollifier out, or "
            "pack with --design uniform or sobol for the papers' presets"
        )
    store = Store.open(options.store)
    regions = store.regions()
    if not regions:
        raise ValueError(f"{options.store} has no regions; ingest it with a smaller --region")
    side = store.spec.region
    if side % (1 << design.coarse_level):
        raise ValueError(
            f"regions of {side} px do not divide into coarse cells of "
            f"{1 << design.coarse_level} px; "
            "ingest with a --region that does"
        )
    extent = Extent(side, side)
    cells = design.num_cells(extent)
    key = store.resolve_encoder(options.encoder)
    regions, lattices, token_values = _drawable(store, key, regions, design)
    if not any(region.split == "train" for region in regions):
        raise ValueError(
            f"none of the {len(regions)} regions of {options.store} that hold a draw is in the "
            "train split; ingest with a split that leaves some to learn from"
        )
    channels = len(store.spec.bands)
    pack_bytes = 2 * channels * cells
    if isinstance(design, CascadeDesign):
        last = window_layouts(design, extent, channels)[-1]
        pack_bytes = last.start + last.number * last.window_bytes
    windows = design.blocks if isinstance(design, CascadeDesign) else ()
    lattice_bytes = 2 * channels * (side >> design.coarse_level) ** 2
    fixed_bytes = 2 * token_values + lattice_bytes + 4096
    wanted = design.draws_to_cover(extent)
    packs = _packs_per_region(options, wanted, len(regions), pack_bytes, fixed_bytes)
    chosen = asdict(design)  # type: ignore[call-overload]
    labels = store.classes()
    trained = {region.image for region in regions if region.split == "train"}
    settings = PackSettings(
        store=str(options.store),
        store_fingerprint=store.fingerprint(),
        encoder_key=key,
        lattices=lattices,
        design=options.design,
        points=options.points,
        coarse_level=design.coarse_level,
        window=chosen.get("window"),
        packs_per_region=packs,
        seed=options.seed,
        side_px=side,
        unit=store.spec.unit,
        spacing=store.spec.spacing,
        bands=store.spec.bands,
        dtype=store.spec.dtype,
        lattice=chosen.get("lattice", False),
        uniform_part=chosen.get("uniform_part"),
        mollifier_sigma_px=options.mollifier,
        classes=tuple(sorted({labels[image] for image in trained & set(labels)})),
        blocks=tuple((b.parents, b.fine, b.window) for b in windows),
        windows_inside=isinstance(design, CascadeDesign),
    )
    return Plan(settings, tuple(regions), fixed_bytes + packs * pack_bytes, labels)


def _block(text: str) -> tuple[int, int, int]:
    """One of --blocks."""
    try:
        parents, fine, window = (int(part) for part in text.split(":"))
    except ValueError:
        parents, fine, window = 0, 0, 0
    if not (8 >= parents > fine >= 0 and window >= 1):
        raise ValueError(
            f"--blocks takes PARENTS:FINE:WINDOW, as 6:2:4 for windows of 4 cells of 64 px down "
            f"to cells of 4 px, not {text!r}"
        )
    return parents, fine, window


def _packs_per_region(
    options: Pack, wanted: int, regions: int, pack_bytes: int, fixed_bytes: int
) -> int:
    if options.packs_per_region != "auto":
        if not options.packs_per_region.isdecimal() or int(options.packs_per_region) < 1:
            raise ValueError(
                "--packs-per-region takes auto or a positive number, not "
                f"{options.packs_per_region!r}"
            )
        return int(options.packs_per_region)
    within = int((options.size_gb * 1e9 / regions - fixed_bytes) // pack_bytes)
    return max(min(wanted, within), 1)


def _drawable(
    store: Store, key: str, regions: Sequence[Region], design: Design
) -> tuple[list[Region], tuple[tuple[int, int, int], ...], int]:
    """The regions that hold something to draw, the token lattices that condition the design and
    that all of these have, finest first, and how many values they hold.
    """
    kept: list[Region] = []
    common: dict[int, tuple[int, int]] | None = None
    dim = 0
    for region in regions:
        found, fits = {}, True
        for lattice in store.region_tokens(key, region):
            footprint = lattice.footprint_px
            if footprint <= region.side and design.footprint_px in (None, footprint):
                found[footprint] = lattice.values.shape[:2]
                dim = lattice.values.shape[2]
                first = (lattice.y_px, lattice.x_px)
                fits &= design.fits(extent_of(region.side, footprint, first))
        if fits:
            kept.append(region)
            common = (
                found if common is None else {f: g for f, g in common.items() if found.get(f) == g}
            )
    if not common:
        wanted = design.footprint_px
        raise ValueError(
            f"no footprint of encoder {key} covers every region of {store.path} alike; "
            "embed with a --footprint that divides the regions' side and stride"
            + (f": patches of {wanted} px need --footprint {wanted}" if wanted else "")
        )
    lattices = tuple((f, int(gy), int(gx)) for f, (gy, gx) in sorted(common.items()))
    return kept, lattices, dim * sum(gy * gx for _, gy, gx in lattices)
