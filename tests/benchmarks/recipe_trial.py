"""One job of `recipe.py`: blocks are trained, regions generated with them, and both measured."""

import os
import platform
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from crop_fid import compare
from PIL import Image
from recipe_table import Job, Study

from conditioning.tokens import fit, from_store, to_condition
from jobs.compare.command import held_out_apart
from jobs.evaluate.crops import Crop, _crops_of
from jobs.evaluate.lite0 import load_lite0
from jobs.evaluate.measure import Measured, measure
from jobs.painting import Recipe, paint
from jobs.record import commit, read_metrics
from jobs.run import Run, RunConfig
from model.cascade.denoiser import CascadeDenoiser
from model.family import make_passes
from model.generate import ArrayField, Pass
from pipeline import console
from pipeline.store import Region, Store

MAX_CROPS, TILE, SHOWN_PX = 4096, 1024, 512
FINISHING_PX = 2048
"""Largest side that is generated of a region: a variant is judged by textures, not by layouts."""


@dataclass(frozen=True)
class InMemory:
    """Generated pixels, read as an image is."""

    pixels: np.ndarray

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        return self.pixels[:, y : y + height, x : x + width]


@dataclass(frozen=True)
class Generator:
    """A block of a run, at the end of its training and early in it."""

    block: str
    denoiser: CascadeDenoiser
    early: CascadeDenoiser | None
    config: RunConfig


class Trial:
    """A job at work."""

    def __init__(self, study: Study, job: Job) -> None:
        self.study, self.job = study, job
        self.variant = study.table.variant(job.variant)
        self.material = study.table.stores[job.store]
        self.preset, self.config = study.config_of(self.variant)
        self.run = study.run_of(job)

    @cached_property
    def store(self) -> Store:
        return Store.open(self.study.store_of(self.job.store)[0])

    def train(self) -> None:
        """jobs.train, in this process; it resumes."""
        import jobs.train

        if self.variant.weights is not None:
            return
        packs = self.study.packs_of(self.job, self.config)
        changes = ["--set", *self.variant.set] if self.variant.set else []
        code = jobs.train.main(
            [
                *(str(packs), "--run", str(self.run.path), "--preset", self.preset),
                *("--steps", "1000000", "--save-every", "2000", "--seed", str(self.job.seed)),
                *("--max-cpu-minutes", str(self.variant.cpu_seconds / 60)),
                *("--blocks", *self.variant.blocks, *changes),
                *self.study.table.train,
                *self.variant.train,
            ]
        )
        assert code == console.EXIT_DONE, code

    def regions(self) -> list[Region]:
        """Those that are generated: held out and apart, where there are any, or the first."""
        regions = self.store.regions()
        chosen = held_out_apart(regions)[: self.material.regions] or regions[:1]
        return [replace(region, side=min(region.side, FINISHING_PX)) for region in chosen]

    def trained(self) -> Run:
        """The run whose blocks are generated with."""
        if self.variant.weights is None:
            return self.run
        return self.study.run_of(replace(self.job, variant=self.variant.weights))

    def generators(self) -> list[Generator]:
        """Blocks from the first that this variant trained on, each with whose it is."""
        cpu, found = torch.device("cpu"), []
        for block, source in self.study.sources(self.job).items():
            if not self.study.is_trained(source):
                raise ValueError(f"{self.job} needs the run of {source}, which was not trained")
            run = self.study.run_of(source)
            denoiser, early = run.load_denoiser(device=cpu), run.load_early(device=cpu)
            assert isinstance(denoiser, CascadeDenoiser)
            assert early is None or isinstance(early, CascadeDenoiser)
            found.append(Generator(block, denoiser, early, run.config()))
        return found

    def generate(self, region: Region, generators: Sequence[Generator]) -> np.ndarray:
        """Pixels (c, side, side) of a region, by all generators one after the other."""
        side, passes = region.side, list[Pass]()
        for one in generators:
            name, config = one.block, one.config
            lattices = fit(from_store(self.store, config.packs, region), side, side)
            found = make_passes(
                one.denoiser,
                to_condition([lattices], config.token_scale(), [True]),
                guidance=1.0,
                tile=TILE,
                level=0,
                steps=None,
                sampling=config.packs.sampling(),
                values=config.value_range(),
                early=one.early,
                autoguidance=self.variant.autoguidance.get(name),
            )
            found_pass = next(each for each in found if each.name == name)
            steps = self.variant.evaluations.get(name, found_pass.evaluations)
            passes.append(replace(found_pass, evaluations=steps))
        name, config = generators[0].block, generators[0].config
        cascade = generators[0].denoiser.config
        pixels = self.store.image(region.image).read(region.y, region.x, side, side)
        if name != cascade.top.name:
            level = next(block.parents for block in cascade.blocks if block.name == name)
            values = config.statistics.standardise(pixels.transpose(1, 2, 0).astype(np.float32))
            cells = side >> level
            means = values.reshape(cells, 1 << level, cells, 1 << level, -1).mean(axis=(1, 3))
            above = ArrayField(np.ascontiguousarray(means.transpose(2, 0, 1)))
            prepare = passes[0].prepare
            passes[0] = replace(passes[0], prepare=lambda _: prepare(above))
        recipe = Recipe(side, side, None, self.job.seed, 1.0, "dpm++2m", bf16=True)
        painted = paint(passes, recipe, channels=len(pixels))
        back = config.statistics.to_pixels(painted.array.transpose(1, 2, 0))
        top = np.iinfo(pixels.dtype).max
        return np.clip(np.rint(back), 0, top).astype(pixels.dtype).transpose(2, 0, 1)

    def measure(self) -> dict[str, Any]:
        """Everything that is said of what was generated."""
        regions, generators = self.regions(), self.generators()
        started = time.process_time()
        images = {str(r.index): InMemory(self.generate(r, generators)) for r in regions}
        seconds = time.process_time() - started
        pixels = sum(region.side**2 for region in regions)
        space = load_lite0(self.store, None, torch.device("cpu"))
        real = _crops_of(self.store, regions, MAX_CROPS, 0)
        corners = {(r.image, r.y, r.x): str(r.index) for r in regions}
        crops = [_moved(crop, regions, corners) for crop in real]
        a: Measured = measure(crops, images, space, "generated")  # type: ignore[arg-type]
        b = measure(real, {r.image: self.store.image(r.image) for r in regions}, space, "real")
        self._picture(images, regions)
        return {
            "seconds_per_mpx": round(1e6 * seconds / pixels, 2),
            "regions": [region.index for region in regions],
            "split": regions[0].split,
            **compare((crops, a), (real, b), space, 0),
        }

    def _picture(self, images: Mapping[str, InMemory], regions: Sequence[Region]) -> None:
        """Real beside generated, the first two regions or a corner of them, for the eye."""
        rows, side = [], min(SHOWN_PX, regions[0].side)
        for region in regions[:2]:
            real = self.store.image(region.image).read(region.y, region.x, side, side)
            generated = images[str(region.index)].read(0, 0, side, side)
            rows.append(np.concatenate([real, generated], axis=2)[:3])
        picture = np.concatenate(rows, axis=1).transpose(1, 2, 0)
        if picture.dtype != np.uint8:
            picture = (picture >> 8).astype(np.uint8)
        file = self.study.out / "pictures" / f"{str(self.job).replace('/', '-')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)

    def line(self) -> dict[str, Any]:
        """Train, generate and measure: a line of the results."""
        self.train()
        state = self.trained().state()
        assert state is not None
        errors = errors_of(read_metrics(self.trained().path))
        denoiser = self.trained().load_denoiser(device=torch.device("cpu"))
        assert isinstance(denoiser, CascadeDenoiser)
        parameters = {
            name: sum(p.numel() for p in denoiser.blocks[name].parameters())
            for name in self.variant.blocks
        }
        return {
            **asdict(self.job),
            "tried": self.study.tried(self.job),
            "cpu_seconds": state.cpu_seconds,
            "steps": {name: int(steps) for name, (steps, _) in state.parts.items()},
            "parameters": parameters,
            "errors": errors,
            **self.measure(),
            "commit": commit(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def errors_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By block, the held-out error of the weights that images are generated with: the least one on
    validation regions, the last one where there are none.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in lines:
        if "held_out" in row:
            before = found.get(row["part"])
            least = before is None or np.mean(row["held_out"]) < np.mean(before["held_out"])
            if least or row["split"] != "val":
                keys = ("split", "log_snrs", "levels", "held_out")
                found[row["part"]] = {key: row[key] for key in keys}
    return found


def _moved(crop: Crop, regions: Sequence[Region], corners: Mapping[Any, str]) -> Crop:
    """The crop of a generated region that stands for a real one."""
    for r in regions:
        y, x = crop.y - r.y, crop.x - r.x
        inside = crop.image == r.image and min(y, x) >= 0 and max(y, x) + 256 <= r.side
        if inside:
            bordered = crop.bordered and max(y, x) + 256 < r.side
            return Crop(corners[r.image, r.y, r.x], y, x, bordered)
    raise AssertionError(crop)
