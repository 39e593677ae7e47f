"""The outcome of a comparison: one entry a contestant, a table and a picture.

An entry joins what a run cost (its state and configuration), what its images cost (the records
that jobs.sample leaves beside them) and what they are worth (the metrics.json of jobs.evaluate).
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from jobs.compare.contest import Comparison, Contestant
from jobs.pictures import liveliest, reduced
from jobs.record import read_record
from jobs.run import Run
from pipeline.ome import OmeImage
from pipeline.store import Region, Store

PICTURE_PX = 512
CROP_PX = 512
GAP_PX = 8


def hardware() -> str:
    """What the comparison ran on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def read_score(contestant: Contestant, folder: Path, comparison: Comparison) -> dict[str, Any]:
    """One contestant's entry, from its run, its images and its metrics."""
    run = Run(folder / "run")
    state, config = run.state(), run.config()
    assert state is not None and state.checkpoint is not None
    if state.seconds > 60 * (comparison.minutes * 1.2 + 1):
        raise ValueError(
            f"{run.path} was trained for {state.seconds / 60:.1f} minutes and the comparison asks "
            f"for {comparison.minutes:g}; choose another --out"
        )
    weights = folder / "run" / "checkpoints" / state.checkpoint / "ema.safetensors"
    with safe_open(weights, "pt") as file:
        sizes = [int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118
    records = [json.loads(p.read_text()) for p in sorted((folder / "images").glob("*.json"))]
    seconds = [float(record["seconds"]) for record in records]
    return {
        "name": contestant.name,
        "commit": read_record(run.path)["commit"],
        "preset": contestant.preset,
        "parameters": sum(sizes),
        "minutes": state.seconds / 60,
        "cpu_minutes": state.cpu_seconds / 60,
        "steps": state.step,
        "batch": int(config.training["batch"]),
        "design": config.packs.design,
        "images": len(records),
        "seconds_per_image": sum(seconds) / len(seconds),
        "recipe": records[0]["identity"]["recipe"],
        "options": {
            "pack": list(contestant.pack),
            "train": list(contestant.train),
            "sample": [*comparison.sample, *contestant.sample],
        },
        "metrics": json.loads((folder / "metrics.json").read_text()),
    }


def to_markdown(facts: Mapping[str, Any]) -> str:
    """The tables of a comparison: scores and costs, then the spectra."""
    scores = facts["contestants"]
    space = scores[0]["metrics"]["features"]
    size = facts["size_px"]
    commits = sorted({score["commit"][:12] for score in scores})
    lines = [
        f"Each trained for {facts['minutes']:g} minutes on {facts['hardware']}, one after the "
        f"other, on the same store; {scores[0]['images']} regions that were held out, painted at "
        f"{size} x {size} px. Commit {', '.join(commits)}.",
        "",
        f"Features: {space['name']}, {space['dim']} dimensions: {space['label']}.",
    ]
    if space["conditions_images"]:
        lines += ["These features condition the images: no headline number."]
    lines += [
        "",
        "| contestant | parameters | training | seconds an image | Crop FID | floor | KID | floor "
        "| n painted, real |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(score) for score in scores]
    lines += ["", *(_recipe(score) for score in scores)]
    lines += ["", *_spectra(scores)]
    return "\n".join(lines) + "\n"


def _row(score: Mapping[str, Any]) -> str:
    metrics = score["metrics"]
    n = metrics["n"]
    cells = [
        f"{score['name']} (`{score['preset']}`)",
        f"{score['parameters'] / 1e6:.1f}M",
        f"{score['minutes']:.1f} min, {score['cpu_minutes']:.1f} CPU min, {score['steps']} steps, "
        f"batch {score['batch']}",
        f"{score['seconds_per_image']:.0f}",
    ]
    for name in ("crop_fid", "kid"):
        distance = metrics[name]
        reach = distance["interval"]
        shown = f"[{reach[0]:.4g}, {reach[1]:.4g}]" if reach else "(interval not known)"
        cells += [f"{distance['value']:.4g} {shown}"]
        floor_n = f" (n = {distance['floor_n']})" if "floor_n" in distance else ""
        cells += [f"{distance['floor']:.4g}{floor_n}"]
    cells += [f"{n['generated']}, {n['real']}"]
    return f"| {' | '.join(cells)} |"


def _recipe(score: Mapping[str, Any]) -> str:
    """How a contestant painted, in one line."""
    recipe = score["recipe"]
    overlap = recipe.get("overlap")
    windows = "" if overlap is None else f", windows overlapping by {overlap:g} (published: 0.75)"
    eta = f" with eta {recipe['eta']:g}" if "eta" in recipe else ""
    steps = f"{recipe['steps']} steps" if "steps" in recipe else "the preset's own steps"
    return (
        f"- {score['name']}: draws `{score['design']}`; {steps} of "
        f"{recipe['solver']}{eta}, guidance {recipe['guidance']:g}{windows}; train "
        f"`{' '.join(score['options']['train'])}`"
    )


def _spectra(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """log2 of power painted over real, octave by octave from the finest."""
    octaves = scores[0]["metrics"]["spectrum"]["octaves"]
    heads = [_cells(row["cells_px"]) for row in octaves]
    lines = [
        "log2 of power painted / real, by octave:",
        "",
        f"| contestant | {' | '.join(f'{head} px' for head in heads)} |",
        f"| --- |{' --- |' * len(heads)}",
    ]
    for score in scores:
        ratios = [row["log2_ratio"] for row in score["metrics"]["spectrum"]["octaves"]]
        shown = ["–" if ratio is None else f"{ratio:+.2f}" for ratio in ratios]
        lines.append(f"| {score['name']} | {' | '.join(shown)} |")
    return lines


def _cells(cells_px: Any) -> str:
    """The sides of the cells between which an octave lies."""
    return (
        "–".join(str(side) for side in cells_px) if isinstance(cells_px, list) else f"{cells_px}"
    )


def draw_picture(
    file: Path, store: Store, region: Region, contestants: Sequence[Path], size: int
) -> None:
    """The real region and what each contestant painted after it: whole, and a piece at full
    resolution below.
    """
    config = Run(contestants[0] / "run").config()
    side = min(region.side, size)
    crop = min(side, CROP_PX)
    real = store.image(region.image)
    dy, dx = liveliest(real, region.y, region.x, side, crop)
    columns = [(real, region.y, region.x)]
    for folder in contestants:
        records = (json.loads(path.read_text()) for path in (folder / "images").glob("*.json"))
        (own,) = (r for r in records if r["identity"]["region"]["index"] == region.index)
        columns.append((OmeImage.open(folder / "images" / own["image"]), 0, 0))
    rows = []
    for y, x, extent in ((0, 0, side), (dy, dx, crop)):
        shown = [
            reduced(image, y0 + y, x0 + x, extent, extent, config, PICTURE_PX)
            for image, y0, x0 in columns
        ]
        gap = np.full((shown[0].shape[0], GAP_PX, 3), 255, np.uint8)
        rows.append(np.concatenate([part for one in shown for part in (one, gap)][:-1], axis=1))
    between = np.full((GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    temporary = file.with_name(f".{file.name}.partial")
    Image.fromarray(np.concatenate([rows[0], between, rows[1]])).save(temporary, "png")
    temporary.replace(file)
