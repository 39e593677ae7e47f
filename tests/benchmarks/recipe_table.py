"""What `recipe.py` tries, a TOML file read into frozen dataclasses, and the folder of a study."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.compare.contest import read_table
from jobs.presets import read_preset
from jobs.run import Run
from jobs.stages import Progress
from model.cascade.config import BlockConfig, CascadeConfig, TopConfig
from pipeline import console


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
        """A `ValueError` for what does not fit, also for a name that does not exist."""
        content = tomllib.loads(file.read_text())
        named, listed = content.pop("stores", {}), content.pop("variants", [])
        stores = {k: read_table(Material, v, f"store {k}") for k, v in named.items()}
        variants = tuple(read_table(Variant, v, "a variant") for v in listed)
        names = [variant.name for variant in variants]
        if len({*names}) < len(names):
            raise ValueError(f"variants need different names, not {', '.join(names)}")
        table: Table = read_table(
            cls, {**content, "stores": stores, "variants": variants}, str(file)
        )
        for place, variant in enumerate(variants):
            table.variant(variant.against or variant.name)
            if variant.weights is not None and variant.weights not in names[:place]:
                raise ValueError(
                    f"variant {variant.name} has the weights of {variant.weights}, and no variant "
                    "above it is called that"
                )
            for store in {*variant.stores} - {*stores}:
                raise ValueError(f"variant {variant.name} is tried on {store}, which is no store")
        return table

    def variant(self, name: str) -> Variant:
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise ValueError(f"the table has no variant {name}")


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
        """The lines that are there, by job; a `ValueError` where one was tried otherwise than the
        table says now.
        """
        found, wanted = {}, {*self.jobs()}
        for row in self.lines():
            job = Job(row["variant"], row["store"], row["seed"])
            tried = self.tried(job) if job in wanted else row["tried"]
            if row["tried"] != tried:
                raise ValueError(
                    f"{self.results} has a line of {job} that was tried as {row['tried']}, and "
                    f"the table has {tried}; give the variant another name"
                )
            found[job] = row
        return found

    def tried(self, job: Job) -> dict[str, Any]:
        """What decides on the line of a job, as JSON has it."""
        said = {
            **asdict(self.table.variant(job.variant)),
            "train_all": self.table.train,
            "store": asdict(self.table.stores[job.store]),
            "sources": {block: str(source) for block, source in self.sources(job).items()},
        }
        for other in ("name", "stores", "seeds", "against"):
            said.pop(other)
        return dict(json.loads(json.dumps(said)))

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

    def sources(self, job: Job) -> dict[str, Job]:
        """The jobs that train what a job generates with, by block, from its first one on: itself,
        or the variant whose weights it has, or, for a block that it does not train, the first
        variant above it that trains such a block on this store. A `ValueError` where there is
        none.
        """
        variant = self.table.variant(job.variant)
        config = self.config_of(variant)[1]
        for name in (*variant.blocks, *variant.evaluations, *variant.autoguidance):
            if name not in config.names:
                names = ", ".join(config.names)
                raise ValueError(f"variant {variant.name} names a block {name}, and has {names}")
        if not variant.blocks:
            raise ValueError(f"variant {variant.name} names no block to train or generate with")
        own = job if variant.weights is None else replace(job, variant=variant.weights)
        first = min(config.names.index(name) for name in variant.blocks)
        return {
            block.name: own if block.name in variant.blocks else self._finisher(job, block)
            for block in config.sequence[first:]
        }

    def _finisher(self, job: Job, block: TopConfig | BlockConfig) -> Job:
        assert isinstance(block, BlockConfig)  # it follows another one
        for other in self.table.variants:
            if other.name == job.variant:
                break
            here = job.store in (other.stores or self.table.stores)
            if here and block.name in other.blocks and other.weights is None:
                blocks = self.config_of(other)[1].blocks
                if (block.name, block.parents, block.fine) in {
                    (b.name, b.parents, b.fine) for b in blocks
                }:
                    return Job(other.name, job.store, (other.seeds or self.table.seeds)[0])
        raise ValueError(
            f"{job}: no variant above it in the table trains a block {block.name} from level "
            f"{block.parents} to {block.fine} on this store; put one there"
        )

    def run_of(self, job: Job) -> Run:
        return Run(self.out / "runs" / job.variant / f"{job.store}-{job.seed}")

    def is_trained(self, job: Job) -> bool:
        """Whether its training has ended."""
        state = self.run_of(job).state()
        return state is not None and state.status == "done"

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

    def config_of(self, variant: Variant) -> tuple[str, CascadeConfig]:
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
