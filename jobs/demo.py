"""python -m jobs.demo: the whole chain on one small input, within minutes on two CPU cores.

Every stage is the command a user would type, run in this process one after the other and printed
first, so that this module is also the manual of the chain. What a stage finished is recorded in
OUT/demo.json; the same command after a kill goes on in the middle of the stage it was in, and one
that is done repeats nothing. Without slides it draws its own phantom.
"""

import importlib
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import console
from pipeline.ome import OmeImage
from pipeline.store import Region, Store

FEW_REGIONS = 16
FREE_BYTES = 6_000_000_000
PICTURE_PX = 640
CROP_PX = 512


@dataclass(frozen=True)
class Demo:
    """Paint a 4096 x 4096 image from slides, aerial images, or a phantom drawn by code."""

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
    steps: int = 16
    """Evaluations of the denoiser when painting."""
    region: int | None = None
    """Row of the region table that conditions the image; by default one held out, if any is."""
    source_mpp: float | None = None
    """What a slide's pixels measure in µm, where its file does not say."""
    source_gsd: float | None = None
    """What an aerial image's pixels measure in m, where its file does not say."""
    min_tissue: float = 0.25
    """Least tissue or valid fraction of a region."""
    cluster: str = "local"
    """Where ingest runs; see pipeline.ingest."""
    dry_run: bool = False
    """Print the plan and stop."""


class Progress:
    """Which stages are done, with the commands that did them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def run(self, module: str, arguments: Sequence[str], name: str | None = None) -> int:
        """Run a command unless it is done; returns its exit code, 0 or 3.

        `name` tells two runs of one module apart. Stages are imported one by one: Dask's workers
        import this module again, without torch.
        """
        name = name or module
        command = [module, *arguments]
        if self.is_done(name, arguments, module):
            recorded = self.done[name]
            console.say(f"demo: {name} is already done ({recorded['seconds']:.0f} s)")
            return int(recorded["code"])
        console.say(f"\n$ python -m {shlex.join(command)}")
        self.forget_after(name)
        started = time.monotonic()
        code = int(importlib.import_module(module).main(arguments))
        if code not in (console.EXIT_DONE, console.EXIT_PARTIAL):
            raise ValueError(f"{name} ended with exit code {code}; its message stands above")
        seconds = round(time.monotonic() - started, 1)
        order = sum(isinstance(record, dict) for record in self.done.values())
        self.done[name] = {"command": command, "code": code, "seconds": seconds, "order": order}
        console.write_json_atomic(self.file, self.done)
        return code

    def is_done(self, name: str, arguments: Sequence[str], module: str | None = None) -> bool:
        """Whether this very command has ended."""
        recorded = self.done.get(name)
        return recorded is not None and recorded["command"] == [module or name, *arguments]

    def claim(self, name: str, value: Any) -> None:
        """Record what the demo is made from; refuse a folder made from something else."""
        if self.done.setdefault(name, value) != value:
            raise ValueError(
                f"{self.file.parent} holds a demo of {name} {self.done[name] or 'of its own'}, "
                f"this command asks for {value or 'its own'}; choose another --out (make: OUT=...)"
            )

    def forget_after(self, name: str) -> None:
        """A stage that is run again is followed by all later ones."""
        recorded = self.done.pop(name, None)
        if recorded is not None:
            stages = {k: v for k, v in self.done.items() if isinstance(v, dict)}
            for stage in stages:
                if stages[stage]["order"] > recorded["order"]:
                    del self.done[stage]


def demo(options: Demo) -> int:
    """Run the command; returns its exit code."""
    console.say(
        f"demo: {', '.join(options.slides) or 'a phantom slide'} -> {options.out}: ingest, "
        f"pretrain, embed, pack, train for {options.train_minutes:g} minutes, paint "
        f"{options.size}x{options.size} px; about 11 minutes on two cores, 6 GB of disk"
    )
    if options.dry_run:
        return console.EXIT_DONE
    out = options.out
    progress = Progress(out / "demo.json")
    progress.claim("slides", sorted(options.slides))
    if "jobs.sample" not in progress.done:
        console.check_free_disk(out, FREE_BYTES)
    slides = list(options.slides)
    if not slides:
        slides = [str(out / "phantom.tif")]
        arguments = ["slide", "--out", slides[0]]
        progress.run("pipeline.phantom", arguments)
    store_path = str(out / "dataset.zarr")
    code = _ingest(options, progress, slides, store_path)
    encoder, packs, run = str(out / "encoder"), str(out / "packs"), str(out / "run")
    arguments = [store_path, "--out", encoder, "--steps", str(options.pretrain_steps)]
    progress.run("conditioning.pretrain", arguments)
    progress.run("conditioning.embed", [store_path, "--encoder", encoder])
    store = Store.open(Path(store_path))
    regions = store.regions()
    draws = str(max(options.draws // len(regions), 1))
    progress.run(
        "pipeline.pack",
        [store_path, "--encoder", encoder, "--out", packs, "--packs-per-region", draws],
    )
    images, training = out / "images", _train_arguments(options, packs, run)
    trained = progress.is_done("jobs.train", training)
    progress.run("jobs.train", training)
    if not trained:
        shutil.rmtree(images, ignore_errors=True)  # painted by other weights
    arguments = [run, "--condition", store_path, "--out", str(images), "--size", str(options.size)]
    arguments += ["--steps", str(options.steps), "--guidance", "1"]
    arguments += ["--format", "ome-tiff", *(["tiff"] if store.spec.unit == "um" else ["cog"])]
    if options.region is not None:
        arguments += ["--region", str(options.region)]
    progress.run("jobs.sample", arguments)
    follows = _conclude(store, regions, Path(run), images, out)
    return code if follows else console.EXIT_PARTIAL


def _ingest(options: Demo, progress: Progress, slides: list[str], store_path: str) -> int:
    """Ingest; where that finds few regions, again with overlapping ones: only a new table."""
    more = ["--min-tissue", str(options.min_tissue), "--cluster", options.cluster]
    for option, value in (
        ("--source-mpp", options.source_mpp),
        ("--source-gsd", options.source_gsd),
    ):
        more += [] if value is None else [option, str(value)]
    arguments = [*slides, "--out", store_path, "--region", "auto", *more]
    code = progress.run("pipeline.ingest", arguments)
    store, again = Store.open(Path(store_path)), "overlapping regions"
    if again in progress.done or len(store.regions()) < FEW_REGIONS:
        side = store.spec.region
        arguments = [*slides, "--out", store_path, "--region", str(side)]
        arguments += ["--stride", str(max(side // 4, 256)), *more]
        progress.run("pipeline.ingest", arguments, again)
    return code


def _train_arguments(options: Demo, packs: str, run: str) -> list[str]:
    return [
        *(packs, "--run", run, "--preset", "tiny", "--max-minutes", str(options.train_minutes)),
        *("--steps", "4000", "--batch", "4", "--learning-rate", "0.001", "--warmup", "20"),
        *("--save-every", "100", "--ema", "0.98"),
    ]


def _conclude(store: Store, regions: Sequence[Region], run: Path, images: Path, out: Path) -> bool:
    """Draw every image beside its region; whether all are nearest to their own."""
    from jobs.metrics import layout_match
    from jobs.pictures import liveliest, reduced
    from jobs.run import Run

    config, follow = Run(run).config(), True
    for file in sorted(images.glob("*.json")):
        record = json.loads(file.read_text())
        own = Region(**record["identity"]["region"])
        painted = OmeImage.open(images / record["image"])
        match = layout_match(painted, store, own, regions)
        follow &= match.follows
        side = min(own.side, *painted.shape[1:])
        crop = min(side, CROP_PX)
        dy, dx = liveliest(store.image(own.image), own.y, own.x, side, crop)
        places = ((0, 0, side), (dy, dx, crop))
        corners = ((store.image(own.image), own.y, own.x), (painted, 0, 0))
        rows = [
            reduced(image, y + dy, x + dx, extent, extent, config, PICTURE_PX)
            for image, y, x in corners
            for dy, dx, extent in places
        ]
        sheet = np.concatenate([np.concatenate(rows[:2], 0), np.concatenate(rows[2:], 0)], 1)
        Image.fromarray(sheet).save(out / f"{file.stem}.png")
        console.write_json_atomic(out / f"{file.stem}-layout.json", asdict(match))
        console.say(
            f"demo: {file.stem}: at 64x64 px the image is {match.own:.1f} grey levels from its "
            f"own region and {match.nearest_other:.1f} from the nearest other "
            f"({match.nearest_other_region}): it "
            f"{'follows' if match.follows else 'DOES NOT follow'}"
            f" its condition; picture (left real, right painted; below at full resolution): "
            f"{out / file.stem}.png"
        )
    console.say(f"demo: done, {images}")
    return follow


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Demo, demo, argv, prog="jobs.demo")


if __name__ == "__main__":
    raise SystemExit(main())
