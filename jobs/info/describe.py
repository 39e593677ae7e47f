"""Summaries of what lies on disk: the facts for programs, and lines for people."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from conditioning.card import EncoderCard
from jobs.record import SPLIT_NAMES, read_metrics, read_record, read_state
from pipeline.console import size
from pipeline.ome import OmeImage
from pipeline.packfile import INDEX_NAME, PLAN_NAME, PackSet
from pipeline.store import Store

SIGNS = {"um": "µm", "micrometer": "µm", "m": "m", "meter": "m", "px": "px", "pixel": "px"}
MOST_LISTED = 10


@dataclass(frozen=True)
class Summary:
    """What a path is.

    facts: as JSON values. lines: (label, text); a text of several lines continues below its first.
    """

    kind: str
    path: Path
    facts: dict[str, Any]
    lines: list[tuple[str, str]]


def describe_store(path: Path) -> Summary:
    """A dataset store, finished or not."""
    store = Store.open(path)
    spec, disk_bytes = store.spec, _bytes_of(path)
    states = store.image_states()
    ends = Counter(state["state"] for state in states.values())
    bad = {n: (s["state"], s["reason"]) for n, s in states.items() if s["state"] != "ok"}
    regions = store.regions() if (path / "regions.parquet").is_file() else None
    splits = Counter(region.split for region in regions or ())
    encoders = {
        key: {
            "names": store.encoder_attributes(key)["names"],
            "dim": store.encoder_attributes(key)["dim"],
            "images_by_footprint_px": {
                f: sum(store.has_embedding(key, f, i) for i in store.image_ids())
                for f in store.footprints(key)
            },
        }
        for key in store.encoders()
    }
    facts = {
        "spec": asdict(spec),
        "images": dict(ends),
        "not_ok": {name: {"state": s, "reason": why} for name, (s, why) in bad.items()},
        "regions": None if regions is None else {"side_px": spec.region, "splits": dict(splits)},
        "encoders": encoders,
        "bytes": disk_bytes,
        "fingerprint": None if regions is None else store.fingerprint(),
    }
    lines = [
        ("pixels", f"{_pixels(spec.spacing, spec.unit)}, {_bands(spec.bands, spec.dtype)}"),
        ("images", _counts(ends, ("ok", "empty", "failed")) or "none has ended yet"),
        *[(s, why) for s, why in list(bad.values())[:MOST_LISTED]],
    ]
    if len(bad) > MOST_LISTED:
        lines.append(("...", f"{len(bad) - MOST_LISTED} more; --json lists all"))
    if regions is None:
        lines.append(("regions", "not chosen yet; run python -m pipeline.ingest to its end"))
    else:
        counted = _counts(splits, ("train", "val", "test")) or "none passed"
        lines.append(("regions", f"{len(regions)} of {spec.region} px: {counted}"))
    for key, encoder in encoders.items():
        held = encoder["images_by_footprint_px"]
        footprints = ", ".join(f"{f} px ({_many(n, 'image')})" for f, n in held.items())
        known = ", ".join(encoder["names"])
        lines.append(
            ("encoder", f"{key}: {encoder['dim']} numbers at {footprints}\nalso called {known}")
        )
    if not encoders:
        lines.append(("encoder", "none yet; run python -m conditioning.embed"))
    lines.append(("disk", size(disk_bytes)))
    if regions is not None:
        lines.append(("fingerprint", store.fingerprint()))
    return Summary("a dataset store", path, facts, lines)


def describe_packs(path: Path) -> Summary:
    """Packs, finished or not."""
    finished = (path / INDEX_NAME).is_file()
    settings = json.loads((path / PLAN_NAME).read_text())
    facts: dict[str, Any] = {"finished": finished, "settings": settings, "bytes": _bytes_of(path)}
    smooth = settings.get("mollifier_sigma_px", 0.0)
    lines = [
        ("from", f"{settings['store']}, fingerprint {settings['store_fingerprint']}"),
        ("encoder", settings["encoder_key"]),
        ("tokens", _lattices(settings["lattices"])),
        (
            "draws",
            f"{settings['packs_per_region']} of each region, {settings['points']} values each, "
            f"design {settings['design']}, seed {settings['seed']}"
            + (f", of pixels smoothed by {smooth:g} px" if smooth else ""),
        ),
        (
            "pixels",
            f"{_pixels(settings['spacing'], settings['unit'])}, "
            f"{_bands(settings['bands'], settings['dtype'])}",
        ),
    ]
    if finished:
        packs = PackSet.open(path)
        splits = Counter(entry.split for entry in packs.regions)
        facts |= {"splits": dict(splits), "shards": len({e.shard for e in packs.regions})}
        counted = _counts(splits, ("train", "val", "test"))
        lines.append(("regions", f"{len(packs.regions)} of {settings['side_px']} px: {counted}"))
    else:
        written = len(list(path.glob("shard-*.json")))
        facts["shards"] = written
        lines.append(
            ("unfinished", f"{_many(written, 'shard')} so far; the same command does the rest")
        )
    lines.append(("disk", f"{size(facts['bytes'])} in {_many(facts['shards'], 'shard')}"))
    return Summary("pixel packs", path, facts, lines)


def describe_run(path: Path) -> Summary:
    """A training run, alive or not."""
    record, state, metrics = read_record(path), read_state(path), read_metrics(path)
    losses = [line for line in metrics if "loss" in line]
    config = record["config"]
    training, packs = config["training"], config["packs"]
    checkpoints = {
        p.name: _bytes_of(p) for p in sorted((path / "checkpoints").glob("step-*")) if p.is_dir()
    }
    newest = path / "checkpoints" / str(state and state.checkpoint) / "weights.safetensors"
    parameters = _num_values(newest) if newest.is_file() else None
    command = record.get("command")
    facts = {
        "preset": config["preset"],
        "parameters": parameters,
        "training": training,
        "packs": packs,
        "commit": record["commit"],
        "command": command,
        "directory": record.get("directory"),
        "state": asdict(state) if state else None,
        "alive": bool(state and state.is_alive()),
        "last_metrics": losses[-1] if losses else None,
        "last_by_part": {line.get("part", "all"): line for line in losses},
        "held_out": {line["part"]: line for line in metrics if "held_out" in line},
        "checkpoints": checkpoints,
        "bytes": _bytes_of(path),
    }
    lines = [("status", _status(facts["state"], facts["alive"]))]
    if state:
        millions = f", {parameters / 1e6:.1f} M parameters" if parameters else ""
        lines.append(("preset", f"{config['preset']}{millions}"))
        last, seconds = state.step, state.seconds
        if losses and losses[-1]["step"] > last:
            last, seconds = losses[-1]["step"], losses[-1]["seconds"]
        drawn = "windows" if packs["design"] == "cascade" else "regions"
        lines.append(
            (
                "steps",
                f"{last} of {training['steps']} steps of {training['batch']} {drawn} in "
                f"{timedelta(seconds=round(seconds))}",
            )
        )
    if losses:
        lines.append(("loss", "\n".join(_losses(losses))))
    if held_out := facts["held_out"]:
        lines.append(("held out", _held_out(held_out)))
    lines += [
        (
            "packs",
            f"{packs['design']}, regions of {packs['side_px']} px at "
            f"{_pixels(packs['spacing'], packs['unit'])}, {_bands(packs['bands'], packs['dtype'])}"
            f"\nfrom {packs['store']}, fingerprint {packs['store_fingerprint']}"
            f"\nencoder {packs['encoder_key']}",
        ),
        ("commit", record["commit"]),
        ("disk", size(facts["bytes"])),
        ("checkpoints", ", ".join(f"{n} ({size(b)})" for n, b in checkpoints.items()) or "none"),
    ]
    if command and (state is None or state.status != "done"):
        lines.append(("resume", f"{command}\nin {record['directory']}"))
    if state and state.checkpoint:
        lines.append(("sample", f"python -m jobs.sample {path} --condition STORE --out images"))
    return Summary("a training run", path, facts, lines)


def _losses(lines: list[dict[str, Any]]) -> Iterator[str]:
    """The last loss of every part of the denoiser, beside its first."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        parts.setdefault(line.get("part", "all"), []).append(line)
    for name, of_part in sorted(
        parts.items(), key=lambda item: -max(item[1][0].get("levels", [0]))
    ):
        first, last = (
            f"{line['loss']:.4g} at step {line.get('part_step', line['step'])}"
            for line in (of_part[0], of_part[-1])
        )
        yield (f"{name} " if len(parts) > 1 else "") + f"{last}; it was {first}"


def _held_out(last: dict[str, dict[str, Any]]) -> str:
    """The last held-out error of every block, over noise levels and octaves."""
    errors = []
    for name, line in sorted(last.items(), key=lambda item: -max(item[1]["levels"])):
        values = [value for row in line["held_out"] for value in row]
        errors.append(f"{name} {sum(values) / len(values):.3f}")
    splits = {line["split"] for line in last.values()}
    regions = " and ".join(sorted(SPLIT_NAMES.get(split, split) for split in splits))
    return f"{', '.join(errors)} on {regions} regions; 1 is the linear estimate, lower is better"


def describe_encoder(path: Path) -> Summary:
    """A self-trained encoder."""
    card = EncoderCard.read(path)
    facts = {**asdict(card), "bytes": _bytes_of(path)}
    training, quality = card.training, card.quality
    lines = [
        ("network", f"{card.architecture}: tiles of {card.input_px} px to {card.dim} numbers"),
        ("pixels", _bands(card.bands, card.dtype)),
        (
            "training",
            f"{training['steps']} steps of {training['batch_size']} tiles, footprints "
            f"{', '.join(map(str, training['footprints']))} px, seed {training['seed']}"
            f"\non the store of fingerprint {training['store']}",
        ),
        (
            "quality",
            f"on {quality['tiles']} tiles of the {quality['split']} split: effective rank "
            f"{quality['effective_rank']:.1f} of {card.dim}, {quality['view_retrieval']:.0%} of "
            "views find their other view",
        ),
        ("disk", size(facts["bytes"])),
        ("use", f"python -m conditioning.embed STORE --encoder {path}"),
    ]
    return Summary("a self-trained encoder", path, facts, lines)


def describe_image(path: Path) -> Summary:
    """An OME-Zarr image: painted, or one of a store."""
    image = OmeImage.open(path)
    height, width = image.shape[1:]
    made = image.attributes.get("gigabrush", {})
    identity = made if "recipe" in made else None
    georeference = {
        name: value
        for name, value in image.attributes.items()
        if name.startswith(("proj:", "spatial:"))
    }
    facts: dict[str, Any] = {
        "shape": list(image.shape),
        "dtype": image.dtype,
        "levels": image.num_levels,
        "spacing": image.spacing,
        "unit": image.unit,
        "bands": list(image.bands),
        "georeference": georeference or None,
        "identity": identity,
        "complete": image.is_complete(),
        "bytes": _bytes_of(path),
    }
    extent = " × ".join(_length(side * image.spacing, image.unit) for side in (height, width))
    lines = [
        ("size", f"{height} × {width} px, {extent}, {_many(image.num_levels, 'level')}"),
        ("pixels", f"{_pixels(image.spacing, image.unit)}, {_bands(image.bands, image.dtype)}"),
    ]
    if georeference:
        code = georeference.get("proj:code", "a coordinate system in WKT")
        _, _, x, _, _, y = georeference["spatial:transform"]
        lines.append(("place", f"{code}, upper left corner at x {x:.10g}, y {y:.10g}"))
    if identity:
        recipe, after = identity["recipe"], "without a condition"
        if region := identity.get("region"):
            after = (
                f"after region {region['index']} ({region['split']}) of the store of fingerprint "
                f"{identity['store_fingerprint']}"
            )
        if given := identity.get("given"):
            after += "\nheld to " + ", ".join(f"{name} {value}" for name, value in given.items())
        lines.append(
            (
                "painted",
                f"by {identity['run']}, {identity['checkpoint']}\n{after}\n"
                + ", ".join(f"{name} {value}" for name, value in recipe.items()),
            )
        )
    record = path.with_suffix(".json")
    if identity and record.is_file():
        cost = json.loads(record.read_text())
        facts["cost"] = {k: v for k, v in cost.items() if k not in ("image", "identity")}
        lines.append(("cost", f"{cost['seconds']} s, {cost['peak_memory_gb']} GB of memory"))
    if not facts["complete"]:
        lines.append(("unfinished", "pixels are missing; the command that makes it does the rest"))
    lines.append(("disk", size(facts["bytes"])))
    if facts["complete"]:
        lines.append(("export", f"python -m pipeline.export {path} --out {path.stem}.ome.tif"))
    return Summary("a painted image" if identity else "an image of a store", path, facts, lines)


def _status(state: dict[str, Any] | None, alive: bool) -> str:
    if state is None:
        return "no process has taken it up yet"
    host, process, _ = state["owner"].split(":")
    silent = timedelta(seconds=round(max(time.time() - state["heartbeat"], 0)))
    job = f", job {state['job_id']}" if state["job_id"] else ""
    restarts = f", restarted {_many(state['restarts'], 'time')}" if state["restarts"] else ""
    who = f"process {process} on {host}{job}{restarts}"
    if alive:
        return f"running: {who}, heartbeat {silent} ago"
    if state["status"] == "running":
        return f"died: {who}, last heartbeat {silent} ago; the same command resumes"
    return f"{state['status']} {silent} ago: {who}"


def _num_values(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


def _bytes_of(path: Path) -> int:
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file())


def _counts(counter: Counter[str], order: Iterable[str]) -> str:
    return ", ".join(f"{counter[name]} {name}" for name in order if counter[name])


def _pixels(spacing: float, unit: str) -> str:
    return f"{spacing:g} {SIGNS[unit]} a pixel"


def _bands(bands: Iterable[str], dtype: str) -> str:
    return f"{' '.join(bands)}, {dtype}"


def _length(length: float, unit: str) -> str:
    for large, small, factor in (("mm", "micrometer", 1000.0), ("km", "meter", 1000.0)):
        if unit == small and length >= factor:
            return f"{length / factor:.3g} {large}"
    return f"{length:.4g} {SIGNS[unit]}"


def _lattices(lattices: Iterable[Iterable[int]]) -> str:
    return ", ".join(f"{gy} × {gx} of {f} px" for f, gy, gx in lattices)


def _many(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")
