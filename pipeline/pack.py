"""python -m pipeline.pack: the random draws of training, done once.

65,536 random pixels touch every chunk of a 4096^2 region in a tiled store, nested windows most, so
drawing them at training time would read 48 MiB to use a fraction of one. Packing reads every
region once, in order, smooths it where that is asked for (smoothing needs neighbours, which a draw
has not), and writes many draws of it side by side (`pipeline.packfile`). A tar shard
and its side file are written under temporary names and renamed, shard by shard: the same command
after a kill writes only what is missing.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
import webdataset

from model.design import Design, Extent, make_design
from pipeline import console
from pipeline.draws import Energy, Moments, RegionLevels, mollified
from pipeline.packfile import (
    INDEX_NAME,
    PLAN_NAME,
    PackSettings,
    PackStatistics,
    RegionEntry,
    extent_of,
    index_content,
    tuples_from_json,
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
    design: str = "zoom"
    """Which cells are drawn. zoom: the coarse lattice and chains of nested windows. uniform:
    random pixels, disjoint from draw to draw until a region is used up. mixed: half random pixels,
    half stacks of nested windows. sobol: pixels under a scrambled Sobol sequence. patch (for
    --preset patch of jobs.train): one embedded tile of pixels a draw."""
    window: int | None = None
    """Side of a window in cells; by default 48 for zoom, 32 for mixed and 256 for patch."""
    halo: int | None = None
    """Cells at a window's rim that are not scored; for zoom at least the denoiser's halo, 6."""
    lattice: bool = False
    """Let uniform, mixed or sobol draws hold the coarse lattice too, within --points; zoom always
    does."""
    uniform_part: float | None = None
    """Least part of a mixed draw that is random pixels; 0.5 by default."""
    mollifier: float = 0.0
    """Smooth the pixels before the draw by a Gaussian of this many px; 0 does not, the papers'
    is 1."""
    coarse_level: int = 5
    """Level of the coarse lattice: cells of 2^level pixels."""
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
    if not 1 <= options.coarse_level <= 8:
        raise ValueError(
            f"--coarse-level takes a level from 1 to 8 (cells of 2 to 256 px), not "
            f"{options.coarse_level}"
        )
    if not 0.0 <= options.mollifier <= MOST_SMOOTH_PX:
        raise ValueError(
            f"--mollifier takes a width from 0 (none) to {MOST_SMOOTH_PX:g} px, not "
            f"{options.mollifier:g}"
        )
    design = make_design(
        options.design,
        points=options.points,
        coarse_level=options.coarse_level,
        window=options.window,
        halo=options.halo,
        lattice=options.lattice,
        uniform_part=options.uniform_part,
    )
    store = Store.open(options.store)
    regions = store.regions()
    if not regions:
        raise ValueError(f"{options.store} has no regions; ingest it with a smaller --region")
    side = store.spec.region
    if side % (1 << options.coarse_level):
        raise ValueError(
            f"regions of {side} px do not divide into coarse cells of "
            f"{1 << options.coarse_level} px; "
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
        coarse_level=options.coarse_level,
        window=chosen.get("window"),
        halo=chosen.get("halo"),
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
    )
    return Plan(settings, tuple(regions), fixed_bytes + packs * pack_bytes, labels)


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


def pack(options: Pack) -> int:
    """Run the command; returns its exit code."""
    plan = make_plan(options)
    settings = plan.settings
    total = plan.region_bytes * len(plan.regions)
    design, extent = settings.make_design(), Extent(settings.side_px, settings.side_px)
    smooth = settings.mollifier_sigma_px
    missing = [i for i in range(len(plan.shards)) if not _side_file(options.out, i).is_file()]
    console.say_plan(
        f"pack: {len(plan.regions)} regions of {settings.side_px} px, "
        f"{settings.packs_per_region} draws each, {design.num_values(extent)} values a draw "
        f"({design.describe(extent)}{f', smoothed by {smooth:g} px' if smooth else ''}), "
        f"tokens of {settings.encoder_key} at "
        f"{', '.join(str(f) for f, _, _ in settings.lattices)} px; {console.size(total)} "
        f"in {len(plan.shards)} shards",
        options.out,
        total * len(missing) // len(plan.shards),
    )
    if options.dry_run:
        return console.EXIT_DONE
    _claim(options.out, settings)
    if (options.out / INDEX_NAME).is_file():
        console.say(f"pack: {options.out} is already done")
        return console.EXIT_DONE
    for leftover in options.out.glob(".*.partial"):
        leftover.unlink()
    store = Store.open(options.store)
    for number in console.progress(missing, total=len(missing), desc="pack"):
        _write_shard(store, plan, options.out, number)
    _write_index(options.out, plan)
    console.say(f"pack: done, {options.out / INDEX_NAME}")
    return console.EXIT_DONE


def _claim(out: Path, settings: PackSettings) -> None:
    """Record the settings in an empty folder; refuse a folder with others."""
    recorded = out / PLAN_NAME
    wanted = json.loads(json.dumps(asdict(settings)))
    if recorded.is_file():
        there = asdict(PackSettings(**tuples_from_json(json.loads(recorded.read_text()))))
        there = json.loads(json.dumps(there))
        for name, value in wanted.items():
            if there.get(name) != value and name != "store":
                raise ValueError(
                    f"{out} was packed with {name} = {there.get(name)!r}, this command asks for "
                    f"{value!r}; "
                    "choose another --out or delete the folder"
                )
    else:
        console.write_json_atomic(recorded, wanted)


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _side_file(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.json"


def _write_shard(store: Store, plan: Plan, out: Path, number: int) -> None:
    settings = plan.settings
    temporary = out / f".{_shard_name(number)}.partial"
    entries: list[dict[str, Any]] = []
    moments: dict[str, Any] = {}
    with webdataset.TarWriter(str(temporary), mtime=0, user="", group="") as shard:
        for region in plan.shards[number]:
            label = plan.labels.get(region.image)
            sample, first_px, measured = _sample(store, settings, region, label)
            shard.write(sample)
            entries.append({**asdict(region), "label": label, "first_px": first_px})
            moments[str(region.index)] = measured
    offsets = _member_offsets(temporary)
    for entry in entries:
        key = f"{entry['index']:09d}"
        members = [f"{key}.tokens.npy", f"{key}.coarse.npy"]
        members += [f"{key}.{_pack_name(p)}" for p in range(settings.packs_per_region)]
        entry["offsets"] = [offsets[name] for name in members]
    temporary.replace(out / _shard_name(number))
    console.write_json_atomic(_side_file(out, number), {"entries": entries, "moments": moments})


def _pack_name(pack: int) -> str:
    return f"p{pack:02d}.bin"


def _sample(
    store: Store, settings: PackSettings, region: Region, label: str | None
) -> tuple[dict[str, Any], list[tuple[float, float]], dict[str, Any]]:
    """One region as a WebDataset sample, the places of its tokens, and its moments."""
    side = region.side
    image = store.image(region.image)
    pixels = image.read(region.y, region.x, side, side)
    valid = np.ones((side, side), bool)
    if store.mask_kind(region.image) == "valid":
        valid = store.mask(region.image, region.y, region.x, side, side)
    scale, unit = settings.value_scale, 1
    if settings.mollifier_sigma_px:
        pixels = mollified(pixels, valid, settings.mollifier_sigma_px, scale)
        unit = scale
    levels = RegionLevels.of(pixels, valid, settings.coarse_level, unit)
    wanted = {footprint for footprint, _, _ in settings.lattices}
    lattices = sorted(
        (t for t in store.region_tokens(settings.encoder_key, region) if t.footprint_px in wanted),
        key=lambda lattice: lattice.footprint_px,
    )
    tokens = np.concatenate([t.values.reshape(-1, t.values.shape[2]) for t in lattices])
    coarse = levels.lattice(scale)
    first_px = [(t.y_px, t.x_px) for t in lattices]
    sample: dict[str, Any] = {
        "__key__": f"{region.index:09d}",
        "json": json.dumps({**asdict(region), "label": label}).encode(),
        "tokens.npy": _npy(tokens),
        "coarse.npy": _npy(coarse),
    }
    design = settings.make_design()
    extent = extent_of(side, lattices[0].footprint_px, first_px[0], coarse)
    for number in range(settings.packs_per_region):
        key = (settings.seed, region.index, number)
        sample[_pack_name(number)] = levels.values(design, extent, key, scale).tobytes()
    return sample, first_px, _measure(levels, tokens)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _measure(levels: RegionLevels, tokens: np.ndarray) -> dict[str, Any]:
    """A region's moments, and its tokens' (count, sum, sum of squares), as JSON."""
    moments = Moments.of(levels)
    values = tokens.astype(np.float64)
    return {
        "pixels": _to_json(moments.pixels),
        "total": moments.total.tolist(),
        "details": [_to_json(energy) for energy in moments.details],
        "residuals": [_to_json(energy) for energy in moments.residuals],
        "region_means": [mean.tolist() for mean in moments.region_means],
        "tokens": (len(values), values.sum(0).tolist(), np.square(values).sum(0).tolist()),
    }


def _to_json(energy: Energy) -> tuple[float, list[list[float]]]:
    return energy[0], energy[1].tolist()


def _from_json(pair: Sequence[Any]) -> Energy:
    return pair[0], np.array(pair[1])


def _member_offsets(tar: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(tar) as members:
        return {member.name: (member.offset_data, member.size) for member in members}


def _moments(measured: dict[str, Any]) -> Moments:
    return Moments(
        _from_json(measured["pixels"]),
        np.array(measured["total"]),
        [_from_json(pair) for pair in measured["details"]],
        [_from_json(pair) for pair in measured["residuals"]],
        [np.array(mean) for mean in measured["region_means"]],
    )


def _write_index(out: Path, plan: Plan) -> None:
    entries, train = [], []
    for number, content in enumerate(_side_contents(out, len(plan.shards))):
        for item in content["entries"]:
            entries.append(
                RegionEntry(
                    key=item["index"],
                    image=item["image"],
                    y=item["y"],
                    x=item["x"],
                    split=item["split"],
                    shard=_shard_name(number),
                    first_px=tuple(tuple(place) for place in item["first_px"]),
                    offsets=tuple(tuple(place) for place in item["offsets"]),
                    label=item.get("label"),
                )
            )
            if item["split"] == "train":
                train.append(content["moments"][str(item["index"])])
    moments = _moments(train[0])
    for measured in train[1:]:
        moments = moments + _moments(measured)
    count = sum(measured["tokens"][0] for measured in train)
    total = sum(np.array(measured["tokens"][1]) for measured in train)
    squares = sum(np.array(measured["tokens"][2]) for measured in train)
    token_mean = total / count
    token_std = np.sqrt(np.maximum(squares / count - token_mean**2, 1e-8))
    statistics = PackStatistics(
        mean=tuple(moments.mean().tolist()),
        colour=tuple(tuple(row) for row in moments.colour().tolist()),
        signal=moments.signal(),
        residual=moments.residual(),
        token_mean=tuple(token_mean.tolist()),
        token_std=tuple(token_std.tolist()),
    )
    console.write_json_atomic(out / INDEX_NAME, index_content(plan.settings, statistics, entries))


def _side_contents(out: Path, shards: int) -> Iterator[dict[str, Any]]:
    for number in range(shards):
        yield json.loads(_side_file(out, number).read_text())


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Pack, pack, argv, prog="python -m pipeline.pack")


if __name__ == "__main__":
    raise SystemExit(main())
