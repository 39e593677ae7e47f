"""python -m jobs.demo: the whole chain on one small input, within minutes on two CPU cores.

Every stage is the command a user would type, run in this process one after the other and printed
first, so that this module is also the manual of the chain. What a stage finished is recorded in
OUT/demo.json; the same command after a kill goes on in the middle of the stage it was in, and one
that is done repeats nothing. Without slides it draws its own phantom.

Inputs of every size end in a picture. The grid of regions is made finer where there are few, and
coarser where there are more than can be packed in minutes. Regions below 1024 px get tokens of a
quarter of their side, since one token is no layout. An image of more than twice the side of its
region is conditioned by many regions side by side (`conditioning.layout`).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.doctor.machine import DEMO_BYTES
from jobs.record import generated_by_others
from jobs.stages import Progress
from pipeline import console
from pipeline.coordinate import Coverages
from pipeline.regions import Region, find_regions
from pipeline.sources import find_files
from pipeline.store import Store

FEW_REGIONS = 16
MANY_PIXELS = 64 * 4096**2
MANY_TILES = 1 << 14
# What differs from the preset where regions are large, and where they are all trained on as well
# (see `_train_arguments`).
LARGE_REGIONS = ("B.turned=false", "C.turned=false")
TRAINED_ON = (
    *("A.widths=96,128", "A.autoguidance=1.5"),
    *("B.autoguidance=2", "D.autoguidance=1.6"),
)
SMALL_REGION_PX, LEAST_REGION_PX, LEAST_TOKEN_PX = 1024, 256, 64


@dataclass(frozen=True)
class Demo:
    """Paint a 4096 x 4096 image from slides, aerial images, or a phantom drawn by code.

        python -m jobs.demo --out demo
        python -m jobs.demo --slides slide.svs --out out --train-minutes 30

    The same command goes on where a killed one was.
    """

    slides: tuple[str, ...] = ()
    """Slides, GeoTIFFs or folders; by default a phantom slide."""
    out: Path = Path("demo")
    """Folder of everything that the demo makes."""
    size: int = 4096
    """Side of the painted image in pixels."""
    train_minutes: float = 6.0
    """Time for training the denoiser."""
    pretrain_steps: int = 80
    """Steps of training the encoder."""
    draws: int = 1200
    """Draws of all regions together."""
    steps: int | None = None
    """Evaluations of each block of the denoiser; by default each block's own number."""
    region: int | None = None
    """Row of the region table that conditions the image; by default one held out, if any is."""
    mpp: float | None = None
    """Resolution to work at in µm per pixel (slides); without it, the coarsest native one."""
    gsd: float | None = None
    """Resolution to work at in m per pixel (aerial); without it, the coarsest native one."""
    source_mpp: float | None = None
    """What a slide's pixels measure in µm, where its file does not say."""
    source_gsd: float | None = None
    """What an aerial image's pixels measure in m, where its file does not say."""
    min_tissue: float | None = None
    """Least tissue or valid fraction of a region; by default 0.25 of tissue, 0.9 of valid data."""
    cluster: str = "local"
    """Where ingest runs; see pipeline.ingest."""
    dry_run: bool = False
    """Print the plan and stop."""


def demo(options: Demo) -> int:
    """Run the command; returns its exit code."""
    out = options.out
    for item in options.slides:
        find_files(item)
    for name in ("size", "train_minutes", "pretrain_steps", "draws", "steps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(
                f"--{name.replace('_', '-')} takes a positive number, not {getattr(options, name)}"
            )
    progress = Progress(out / "demo.json", "demo")
    progress.check_claim("slides", sorted(options.slides))
    console.say_plan(
        f"demo: {', '.join(options.slides) or 'a phantom slide'} -> {out}: ingest, "
        f"pretrain, embed, pack, train for {options.train_minutes:g} minutes, paint "
        f"{options.size}x{options.size} px, evaluate, report; about "
        f"{options.train_minutes + 4:.0f} minutes on two cores, more for large slides",
        out,
        0 if "jobs.sample" in progress.done else DEMO_BYTES,
    )
    if options.dry_run:
        return console.EXIT_DONE
    progress.claim("slides", sorted(options.slides))
    slides = list(options.slides)
    if not slides:
        slides = [str(out / "phantom.tif")]
        arguments = ["slide", "--out", slides[0]]
        progress.run("pipeline.phantom", arguments)
    store_path = str(out / "dataset.zarr")
    _ingest(options, progress, slides, store_path)
    encoder, packs, run = str(out / "encoder"), str(out / "packs"), str(out / "run")
    store = Store.open(Path(store_path))
    regions = store.regions()
    if options.region is not None and all(options.region != r.index for r in regions):
        raise ValueError(
            f"--region {options.region} is not in the region table of {store_path}, which has "
            f"rows 0 to {len(regions) - 1}"
        )
    footprints = _footprints(store)
    arguments = [store_path, "--out", encoder, "--steps", str(options.pretrain_steps)]
    if footprints:
        arguments += ["--footprints", footprints[0], str(store.spec.region)]
    progress.run("conditioning.pretrain", arguments)
    arguments = [store_path, "--encoder", encoder]
    arguments += ["--footprint", *footprints] if footprints else []
    progress.run("conditioning.embed", arguments)
    draws = str(max(options.draws // len(regions), 1))
    progress.run(
        "pipeline.pack",
        [store_path, "--encoder", encoder, "--out", packs, "--packs-per-region", draws],
    )
    images, training = out / "images", _train_arguments(options, packs, run, regions)
    progress.run("jobs.train", training)
    arguments = [run, "--condition", store_path, "--out", str(images), "--size", str(options.size)]
    arguments += [] if options.steps is None else ["--steps", str(options.steps)]
    arguments += ["--format", *_formats(store)]
    if options.size > 2 * store.spec.region:
        arguments += ["--fill", "regions"]
    if options.region is not None:
        arguments += ["--region", str(options.region)]
    progress.check("jobs.sample", arguments)
    if progress.has_changed("jobs.sample", arguments) or generated_by_others(images, Path(run)):
        shutil.rmtree(images, ignore_errors=True)
        progress.forget_after("jobs.sample")
    progress.run("jobs.sample", arguments)
    metrics, report = out / "metrics.json", out / "report"
    arguments = ["--real", store_path, "--generated", str(images), "--out", str(metrics)]
    progress.run("jobs.evaluate", arguments)
    progress.run("jobs.report", [str(images), "--out", str(report), "--metrics", str(metrics)])
    _conclude(metrics, report)
    return progress.code


def _ingest(options: Demo, progress: Progress, slides: list[str], store_path: str) -> None:
    """Ingest; where that finds few regions or too many, again on another grid: a new table."""
    more = ["--cluster", options.cluster]
    for option, value in (
        ("--mpp", options.mpp),
        ("--gsd", options.gsd),
        ("--source-mpp", options.source_mpp),
        ("--source-gsd", options.source_gsd),
        ("--min-tissue", options.min_tissue),
    ):
        more += [] if value is None else [option, str(value)]
    arguments = [*slides, "--out", store_path, "--region", "auto", *more]
    progress.run("pipeline.ingest", arguments)
    store = Store.open(Path(store_path))
    side, stride = store.spec.region, _stride(store)
    if side < LEAST_REGION_PX or not store.regions():
        raise ValueError(
            f"the largest square of {store.path} that is tissue or valid data has {side} px, and "
            f"the demo learns from {LEAST_REGION_PX} px and more; give it larger images, or a "
            "smaller --min-tissue"
        )
    if stride != side:
        arguments = [*slides, "--out", store_path, "--region", str(side)]
        arguments += ["--stride", str(stride), *more]
        progress.run("pipeline.ingest", arguments, "another grid")


def _stride(store: Store) -> int:
    """Step of the grid of regions: their side, or less where they are few, or more where their
    pixels are too many to be packed in minutes.
    """
    side, coverages = store.spec.region, Coverages(store)

    def count(stride: int) -> int:
        return len(find_regions(coverages, side, stride, store.provenance["min_tissue"]))

    stride = side
    while count(stride) < FEW_REGIONS and stride > max(side // 4, 256):
        stride //= 2
    # Images without a second region on the coarser grid cannot be thinned this way.
    while count(stride) * side**2 > MANY_PIXELS and count(2 * stride) < count(stride):
        stride *= 2
    return stride


def _footprints(store: Store) -> list[str]:
    """Of the tokens of small regions; none stands for the usual ones."""
    side = store.spec.region
    if side >= SMALL_REGION_PX:
        return []
    shapes = [store.image(name).shape for name in store.image_ids()]
    finest = max(side // 4, LEAST_TOKEN_PX)
    while finest < side and sum(h // finest * (w // finest) for _, h, w in shapes) > MANY_TILES:
        finest *= 2
    return [str(f) for f in sorted({finest, side})]


def _formats(store: Store) -> list[str]:
    """What the image is written as beside OME-TIFF: for maps, for OpenSlide, or neither."""
    known = [store.image(name).attributes for name in store.image_ids()]
    if all("spatial:transform" in a and {"proj:code", "proj:wkt2"} & a.keys() for a in known):
        return ["ome-tiff", "cog"]
    rgb = (store.spec.dtype, len(store.spec.bands)) == ("uint8", 3)
    return ["ome-tiff", "tiff"] if rgb else ["ome-tiff"]


def _train_arguments(options: Demo, packs: str, run: str, regions: Sequence[Region]) -> list[str]:
    """Tissue of large regions keeps its directions in blocks B and C; small ones, of which there
    is little, would be learned by heart unless they are turned. Where no region is held out, the
    one that is painted was trained on: A is wide enough to know it, and A, B and D are led further
    from their early weights.
    """
    large: list[str] = []
    if regions[0].side >= SMALL_REGION_PX:
        known = all(region.split == "train" for region in regions)
        large = ["--set", *LARGE_REGIONS, *(TRAINED_ON if known else ())]
    return [
        *(packs, "--run", run, "--preset", "tiny", "--max-minutes", str(options.train_minutes)),
        *("--steps", "1000000", "--batch", "8", "--warmup", "30", "--ema", "0.99"),
        *("--save-every", "2000", *large),
    ]


def _conclude(metrics: Path, report: Path) -> None:
    """Say whether every image is nearest to the region that conditioned it, and where to look."""
    found = json.loads(metrics.read_text())
    for name, layout in found.get("layout", {}).items():
        if layout["nearest_other"] is None:
            console.say(f"demo: {name}: there is no other region to compare it with")
            continue
        nearest = layout["own"] < layout["nearest_other"]
        console.say(
            f"demo: {name}: at 64x64 px it is {layout['own']:.1f} grey levels from its own region "
            f"and {layout['nearest_other']:.1f} from the nearest other "
            f"({layout['nearest_other_region']}): it "
            + ("follows" if nearest else "DOES NOT follow")
            + (" its condition" if nearest else " its condition yet; more --train-minutes help")
        )
    console.say(f"demo: done, open {report / 'index.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Demo, demo, argv, prog="python -m jobs.demo")


if __name__ == "__main__":
    raise SystemExit(main())
