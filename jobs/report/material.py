"""What a report is about: painted images, the run that painted them, the store, the metrics.

A painting at a scale of 2^-level has pixels of 2^level px of the store. All that is compared with
it is taken from that level of the store's pyramid, so that one place has one pixel position in
every picture of a painting.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.record import METRICS_NAME
from jobs.report.progress import Progress
from jobs.run import Run, RunConfig, RunState
from model.lattice import coarser
from pipeline.ome import OmeImage
from pipeline.store import Region, Store


@dataclass(frozen=True)
class Painting:
    """A painted image and its record.

    region: what conditioned it. level: its pixels are 2^level px of the store; below 0 they are
    parts of one.
    """

    name: str
    record: dict[str, Any]
    image: OmeImage
    region: Region
    level: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in its own pixels."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def conditioned(self) -> tuple[int, int]:
        """Height and width, from the top left, of what its region covers."""
        side = coarser(self.region.side, self.level)
        return min(side, self.size[0]), min(side, self.size[1])


@dataclass(frozen=True)
class Material:
    """Everything that a report shows, opened.

    commit: of the training. progress: what the run's metrics.jsonl says. metrics: what
    jobs.evaluate measured, None before. stages: the commands that the demo recorded, in order.
    """

    images: Path
    paintings: tuple[Painting, ...]
    run: Run
    config: RunConfig
    state: RunState | None
    commit: str
    progress: Progress
    store: Store
    regions: tuple[Region, ...]
    metrics: dict[str, Any] | None
    metrics_file: Path
    stages: list[dict[str, Any]]


def gather(images: Path, run: Path | None, store: Path | None, metrics: Path | None) -> Material:
    """Open everything; a `ValueError` names what is missing and the option that gives it."""
    records = _records(images)
    runs = {str(record["identity"]["run"]) for record in records.values()}
    if run is None and len(runs) > 1:
        raise ValueError(
            f"{images} holds images of {len(runs)} runs ({', '.join(sorted(runs))}), a report is "
            "about one; paint each run's images into an --out of their own"
        )
    trained = Run(run or Path(runs.pop()))
    if not (trained.path / "config.json").is_file():
        raise ValueError(
            f"{trained.path}, the run that painted {images}, has no config.json; "
            "if it was moved, say where it is now with --run"
        )
    config = trained.config()
    place = store or Path(config.packs.store)
    if store is None and not (place / "zarr.json").is_file():
        raise ValueError(
            f"{place}, the store that {trained.path} was trained on, is not there; "
            "say where it is now with --store"
        )
    opened = Store.open(place)
    paintings = [_painting(images, name, record) for name, record in records.items()]
    for painting in paintings:
        if not (opened.image_path(painting.region.image) / "zarr.json").is_file():
            raise ValueError(
                f"{place} has no image {painting.region.image}, which conditioned "
                f"{painting.name}; name the store that it was painted after with --store"
            )
    file = metrics or images.parent / "metrics.json"
    if metrics is not None and not file.is_file():
        raise ValueError(f"--metrics {file} does not exist; python -m jobs.evaluate makes it")
    described = _read_json(trained.path / "config.json")
    return Material(
        images=images,
        paintings=tuple(paintings),
        run=trained,
        config=config,
        state=trained.state(),
        commit=str(described.get("commit", "unknown")),
        progress=Progress.read(trained.path / METRICS_NAME),
        store=opened,
        regions=tuple(opened.regions()),
        metrics=_read_json(file) if file.is_file() else None,
        metrics_file=file,
        stages=_stages(images.parent / "demo.json"),
    )


def _records(images: Path) -> dict[str, dict[str, Any]]:
    """The records that jobs.sample wrote, by the names of their images."""
    found = {file.stem: _read_json(file) for file in sorted(images.glob("[!.]*.json"))}
    records = {k: v for k, v in found.items() if "identity" in v and "image" in v}
    if not records:
        raise ValueError(
            f"{images} holds no painted images with their records; "
            "paint some with python -m jobs.sample"
        )
    free = sorted(name for name, record in records.items() if "region" not in record["identity"])
    if free:
        raise ValueError(
            f"{free[0]} in {images} was painted without a condition, and a report shows images "
            "beside the regions that they were painted after; paint them into an --out of their "
            "own"
        )
    return records


def _painting(images: Path, name: str, record: dict[str, Any]) -> Painting:
    identity = record["identity"]
    image = OmeImage.open(images / record["image"])
    if not image.is_complete():
        raise ValueError(
            f"{image.path} is not finished, some of its pixels are missing; run the command "
            "that makes it again"
        )
    region = Region(**identity["region"])
    return Painting(name, record, image, region, int(identity["recipe"].get("level", 0)))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as broken:
        raise ValueError(f"{file} is not JSON ({broken}); make it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; make it again")
    return content


def _stages(demo: Path) -> list[dict[str, Any]]:
    recorded = _read_json(demo).values() if demo.is_file() else []
    stages = [v for v in recorded if isinstance(v, dict) and {"command", "order"} <= v.keys()]
    return sorted(stages, key=lambda stage: stage["order"])
