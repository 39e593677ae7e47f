"""Variants of a cascade at equal CPU seconds, from a table to JSON lines.

    python tests/benchmarks/recipe.py docs/recipe/blocks.toml --out recipe --workers 2

The table (TOML) names stores and variants. A variant trains some blocks of a cascade, on one
thread, for so many CPU seconds (of the process, so that a busy machine changes nothing), once for
every store and seed. What stays the same is taken from elsewhere: blocks that follow from the
first variant above it in the table that trained such a block on this store, parents of its first
block from the real image. Then its regions are generated, those that were held out where there are
any: under the real means of the parents of its first block, or from tokens alone where that is the
top block.

A line of OUT/results.jsonl holds the error of F by block, log-SNR and octave on held-out windows;
power per octave and seams, generated and real; Crop FID in the middle features of
EfficientNet-lite0 and KID in its last ones against the real crops of the same places
(jobs.evaluate has the protocol); steps, parameters, seconds, peak memory, hardware and commit.
Errors compare variants of the same blocks; what was generated compares all. A line that is there
is not made again, and a killed command goes on where it was. A variant that names another one as
`against` is stopped where two seeds on one store have a higher Crop FID than that: its other jobs
are not done. --show prints what is there.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from crop_fid import compare

from conditioning.tokens import fit, from_store, to_condition
from jobs.evaluate.crops import Crop, _crops_of
from jobs.evaluate.lite0 import load_lite0
from jobs.evaluate.measure import Measured, measure
from jobs.painting import Recipe, paint
from jobs.presets import read_preset
from jobs.record import commit
from jobs.run import Run, RunConfig
from jobs.stages import Progress
from model.cascade.config import BlockConfig, CascadeConfig
from model.cascade.denoiser import CascadeDenoiser
from model.family import make_passes
from model.generate import ArrayField, Pass
from pipeline import console
from pipeline.store import Region, Store

MAX_CROPS, TILE = 4096, 1024
FINISHING_PX = 2048
"""Largest side that is generated of a region: a variant is judged by textures, not by layouts."""


@dataclass(frozen=True)
class Material:
    """A store that variants learn from: what jobs.demo would make of `inputs` (none draws the
    phantom), or one that exists, `store`, with its `encoder`. regions: at most so many are
    generated.
    """

    inputs: tuple[str, ...] = ()
    ingest: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ("--steps", "80")
    embed: tuple[str, ...] = ()
    packs_per_region: int = 12
    store: str | None = None
    encoder: str | None = None
    regions: int = 8


@dataclass(frozen=True)
class Variant:
    """Blocks that are trained, and how. config: fields of a `CascadeConfig` that differ from
    `base`; set: the same as on a command line, block by block. cpu_seconds: of all its blocks,
    shared as the configuration says. weights: another variant, whose weights these blocks have
    instead. evaluations, autoguidance: of blocks when images are generated, where they are not the
    configuration's.
    """

    name: str
    blocks: tuple[str, ...]
    cpu_seconds: float
    base: str = "tiny"
    config: dict[str, Any] = field(default_factory=dict)
    set: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    weights: str | None = None
    evaluations: dict[str, int] = field(default_factory=dict)
    autoguidance: dict[str, float] = field(default_factory=dict)
    stores: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    against: str | None = None


@dataclass(frozen=True)
class Table:
    """What is tried. train: options of jobs.train that all variants share."""

    stores: dict[str, Material]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1)
    train: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path) -> "Table":
        content = tomllib.loads(file.read_text())
        stores = {k: _read(Material, v, f"store {k}") for k, v in content.pop("stores").items()}
        variants = tuple(_read(Variant, v, "a variant") for v in content.pop("variants"))
        names = [variant.name for variant in variants]
        if len({*names}) < len(names):
            raise ValueError(f"variants need different names, not {', '.join(names)}")
        return _read(cls, {**content, "stores": stores, "variants": variants}, str(file))

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)


def _read(kind: type[Any], content: Mapping[str, Any], where: str) -> Any:
    unknown = sorted({*content} - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})


@dataclass(frozen=True, order=True)
class Job:
    """One line of the results."""

    variant: str
    store: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}/{self.store}/{self.seed}"


@dataclass(frozen=True)
class Study:
    """A table and the folder of what it makes."""

    table: Table
    out: Path

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        if not self.results.is_file():
            return []
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def done(self) -> dict[Job, dict[str, Any]]:
        return {Job(row["variant"], row["store"], row["seed"]): row for row in self.lines()}

    def jobs(self) -> Iterator[Job]:
        """All of them, a variant after the other."""
        for variant in self.table.variants:
            for store in variant.stores or self.table.stores:
                for seed in variant.seeds or self.table.seeds:
                    yield Job(variant.name, store, seed)

    def is_refuted(self, variant: Variant) -> bool:
        """Whether two seeds on one store have a higher Crop FID than what it is against."""
        if variant.against is None:
            return False
        done = self.done()
        worse: dict[str, int] = {}
        for job, row in done.items():
            other = done.get(replace(job, variant=variant.against))
            if job.variant == variant.name and other is not None:
                higher = row["crop_fid"]["value"] > other["crop_fid"]["value"]
                worse[job.store] = worse.get(job.store, 0) + higher
        return any(count >= 2 for count in worse.values())

    def run_of(self, job: Job) -> Run:
        return Run(self.out / "runs" / job.variant / f"{job.store}-{job.seed}")

    def store_of(self, name: str) -> tuple[Path, str]:
        """A store, embedded, and its encoder; made where it is not there."""
        material, folder = self.table.stores[name], self.out / "stores" / name
        if material.store is not None:
            assert material.encoder is not None, "a store that exists has an encoder"
            return Path(material.store), material.encoder
        folder.mkdir(parents=True, exist_ok=True)
        progress, inputs = Progress(folder / "stages.json", "recipe"), list(material.inputs)
        if not inputs:
            inputs = [str(folder / "phantom.tif")]
            progress.run("pipeline.phantom", ["slide", "--out", inputs[0]])
        store, encoder = folder / "dataset.zarr", str(folder / "encoder")
        progress.run("pipeline.ingest", [*inputs, "--out", str(store), *material.ingest])
        arguments = [str(store), "--out", encoder, *material.pretrain]
        progress.run("conditioning.pretrain", arguments)
        arguments = [str(store), "--encoder", encoder, *material.embed]
        progress.run("conditioning.embed", arguments)
        return store, encoder

    def config_of(self, variant: Variant, job: Job) -> tuple[str, CascadeConfig]:
        """A preset of jobs.train that stands for a variant, and what it says."""
        folder = self.out / "presets"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{variant.name}.json"
        console.write_json_atomic(file, {"base": variant.base, **variant.config})
        config = read_preset(str(file), channels=3, token_dim=1)
        assert isinstance(config, CascadeConfig)
        return str(file), config

    def packs_of(self, job: Job, config: CascadeConfig) -> Path:
        """The draws of a store for the blocks of a configuration."""
        blocks = [f"{b.parents}:{b.fine}:{b.window}" for b in config.blocks]
        packs = self.out / "packs" / "-".join([job.store, *blocks]).replace(":", ".")
        store, encoder = self.store_of(job.store)
        number = str(self.table.stores[job.store].packs_per_region)
        progress = Progress(packs.with_name(f"{packs.name}.json"), "recipe")
        packs.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(store), "--encoder", encoder, "--out", str(packs)]
        arguments += ["--packs-per-region", number, "--blocks", *blocks]
        progress.run("pipeline.pack", arguments)
        return packs


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
        self.preset, self.config = study.config_of(self.variant, job)
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
                *("--steps", "1000000", "--save-every", "100000", "--seed", str(self.job.seed)),
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
        held_out = [region for region in regions if region.split != "train"] or regions[:1]
        chosen: list[Region] = []
        for region in sorted(held_out, key=lambda r: (r.split != "test", r.index)):
            apart = all(
                region.image != other.image
                or max(abs(region.y - other.y), abs(region.x - other.x)) >= region.side
                for other in chosen
            )
            if apart and len(chosen) < self.material.regions:
                chosen.append(replace(region, side=min(region.side, FINISHING_PX)))
        return chosen

    def trained(self) -> Run:
        """The run whose blocks are generated with."""
        if self.variant.weights is None:
            return self.run
        return self.study.run_of(replace(self.job, variant=self.variant.weights))

    def finisher(self, block: BlockConfig) -> Run:
        """The run of the first variant that trained such a block, on this store."""
        for other in self.study.table.variants:
            job = Job(other.name, self.job.store, (other.seeds or self.study.table.seeds)[0])
            run = self.study.run_of(job)
            if block.name in other.blocks and other.weights is None and run.state() is not None:
                config = run.config().denoiser
                assert isinstance(config, CascadeConfig)
                known = {b.name: (b.parents, b.fine) for b in config.blocks}
                if known.get(block.name) == (block.parents, block.fine):
                    return run
        raise ValueError(
            f"{self.job}: no variant above it in the table trains a block {block.name} from level "
            f"{block.parents} to {block.fine}; put one there"
        )

    def generators(self) -> list[Generator]:
        """Blocks from the first that this variant trained on, each with whose it is."""
        cpu, found = torch.device("cpu"), []
        first = [name in self.variant.blocks for name in self.config.names].index(True)
        for block in self.config.sequence[first:]:
            run = self.trained()
            if block.name not in self.variant.blocks:
                assert isinstance(block, BlockConfig)
                run = self.finisher(block)
            denoiser, early = run.load_denoiser(device=cpu), run.load_early(device=cpu)
            assert isinstance(denoiser, CascadeDenoiser)
            assert early is None or isinstance(early, CascadeDenoiser)
            found.append(Generator(block.name, denoiser, early, run.config()))
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
        """Real beside generated, 512 px of the first two regions, for the eye."""
        from PIL import Image

        rows = []
        for region in regions[:2]:
            real = self.store.image(region.image).read(region.y, region.x, 512, 512)
            generated = images[str(region.index)].read(0, 0, 512, 512)
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
        lines = (self.trained().path / "metrics.jsonl").read_text().splitlines()
        errors = {
            row["part"]: {k: row[k] for k in ("split", "log_snrs", "levels", "held_out")}
            for row in map(json.loads, lines)
            if "held_out" in row
        }
        denoiser = self.trained().load_denoiser(device=torch.device("cpu"))
        assert isinstance(denoiser, CascadeDenoiser)
        parameters = {
            name: sum(p.numel() for p in denoiser.blocks[name].parameters())
            for name in self.variant.blocks
        }
        return {
            **asdict(self.job),
            "cpu_seconds": state.cpu_seconds,
            "steps": {name: int(steps) for name, (steps, _) in state.parts.items()},
            "parameters": parameters,
            "errors": errors,
            **self.measure(),
            "commit": commit(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _moved(crop: Crop, regions: Sequence[Region], corners: Mapping[Any, str]) -> Crop:
    """The crop of a generated region that stands for a real one."""
    for r in regions:
        y, x = crop.y - r.y, crop.x - r.x
        inside = crop.image == r.image and min(y, x) >= 0 and max(y, x) + 256 <= r.side
        if inside:
            bordered = crop.bordered and max(y, x) + 256 < r.side
            return Crop(corners[r.image, r.y, r.x], y, x, bordered)
    raise AssertionError(crop)


@dataclass(frozen=True)
class RecipeOptions:
    """Try the variants of a table on one thread each, and measure them.

    python tests/benchmarks/recipe.py table.toml --out recipe --workers 2
    """

    table: Annotated[Path, tyro.conf.Positional]
    """The TOML file of stores and variants."""
    out: Path
    """Folder of everything that it makes; results.jsonl has a line for each job."""
    workers: int = 1
    """Jobs at a time, each on one thread."""
    only: tuple[str, ...] = ()
    """Names of variants; by default all of the table."""
    job: str | None = None
    """One job, VARIANT/STORE/SEED, in this process."""
    show: bool = False
    """Print the results as a table and stop."""


def recipe(options: RecipeOptions) -> int:
    """Run the command; returns its exit code."""
    study = Study(Table.read(options.table), options.out)
    if options.show:
        console.say(to_markdown(study))
        return console.EXIT_DONE
    if options.job is not None:
        variant, store, seed = options.job.split("/")
        job = Job(variant, store, int(seed))
        line = Trial(study, job).line()
        with study.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return console.EXIT_DONE
    jobs = [job for job in study.jobs() if not options.only or job.variant in options.only]
    for job in jobs:  # stores and packs are shared, so that they are made here
        _, config = study.config_of(study.table.variant(job.variant), job)
        study.packs_of(job, config)
    failed = 0
    with ThreadPoolExecutor(options.workers) as pool:
        for code in pool.map(lambda job: _work(study, job, options), jobs):
            failed += code != 0
    console.say(to_markdown(study))
    return console.EXIT_PARTIAL if failed else console.EXIT_DONE


def _work(study: Study, job: Job, options: RecipeOptions) -> int:
    if job in study.done():
        return 0
    if study.is_refuted(study.table.variant(job.variant)):
        console.say(f"recipe: {job} is not done: two seeds were worse")
        return 0
    log = study.out / "logs" / f"{str(job).replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(options.table), "--out", str(study.out)]
    with log.open("a") as file:
        code = subprocess.run(
            [*command, "--job", str(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    console.say(f"recipe: {job} {'done' if code == 0 else f'failed, see {log}'}")
    return code


def to_markdown(study: Study) -> str:
    """A row for each variant and store: the seeds' values side by side."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in study.lines():
        rows.setdefault((row["store"], row["variant"]), []).append(row)
    lines = [
        "| store | variant | steps | error of F by octave, fine to coarse | Crop FID | KID | "
        "log2 power, fine to coarse | seams at 8, 32 px (real) | CPU s a Mpx |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (store, variant), found in sorted(rows.items()):
        first = found[0]
        steps = ", ".join(f"{k} {v}" for k, v in first["steps"].items())
        errors = "; ".join(f"{part} {_mean_errors(part, found)}" for part in first["errors"])
        power = np.mean(
            [[o["log2_ratio"] or 0.0 for o in row["octaves"]] for row in found], axis=0
        )
        cells = [
            store,
            variant,
            steps,
            errors,
            " ".join(f"{row['crop_fid']['value']:.0f}" for row in found),
            " ".join(f"{row['kid']['value']:.3f}" for row in found),
            " ".join(f"{value:+.2f}" for value in power),
            " ".join(
                f"{np.mean([row['seams'][i]['generated'] for row in found]):.3f} "
                f"({first['seams'][i]['real']:.3f})"
                for i in (0, 1)
            ),
            f"{np.mean([row['seconds_per_mpx'] for row in found]):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_errors(part: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Over seeds and log-SNRs, octave by octave."""
    means = np.mean([row["errors"][part]["held_out"] for row in found], axis=(0, 1))
    return " ".join(f"{value:.3f}" for value in means)


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(RecipeOptions, recipe, argv, prog="python tests/benchmarks/recipe.py")


if __name__ == "__main__":
    raise SystemExit(main())
