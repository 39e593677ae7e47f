"""The outcome of a comparison as facts: an entry for each contestant, with a run for each seed.

A run joins what its training cost (its state and configuration), what its images cost (the records
that jobs.sample leaves beside them) and what they are worth (the metrics.json of jobs.evaluate).
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from jobs.compare.contest import Comparison, Contestant
from jobs.compare.paired import Difference, paired
from jobs.evaluate.kept import CropFeatures
from jobs.record import read_record
from jobs.run import Run


def hardware() -> str:
    """What the comparison ran on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def read_score(
    contestant: Contestant, folders: Sequence[Path], comparison: Comparison
) -> dict[str, Any]:
    """One contestant's entry, from its folder of every seed."""
    config = Run(folders[0] / "run").config()
    return {
        "name": contestant.name,
        "preset": contestant.preset,
        "parameters": _parameters(Run(folders[0] / "run")),
        "batch": int(config.training["batch"]),
        "design": config.packs.design,
        "options": {
            "pack": list(contestant.pack),
            "train": list(contestant.train),
            "sample": [*comparison.sample, *contestant.sample],
        },
        "runs": [_read_run(folder, comparison) for folder in folders],
    }


def _read_run(folder: Path, comparison: Comparison) -> dict[str, Any]:
    """What one seed's training and images cost and are worth."""
    run = Run(folder / "run")
    state, config = run.state(), run.config()
    assert state is not None and state.checkpoint is not None
    if state.cpu_seconds > 60 * (comparison.cpu_minutes * 1.2 + 1):
        raise ValueError(
            f"{run.path} was trained for {state.cpu_seconds / 60:.1f} CPU minutes and the "
            f"comparison asks for {comparison.cpu_minutes:g}; choose another --out"
        )
    records = [json.loads(p.read_text()) for p in sorted((folder / "images").glob("*.json"))]
    return {
        "seed": int(config.training["seed"]),
        "commit": read_record(run.path)["commit"],
        "cpu_minutes": state.cpu_seconds / 60,
        "minutes": state.seconds / 60,
        "steps": state.step,
        "images": len(records),
        "seconds_per_image": sum(float(record["seconds"]) for record in records) / len(records),
        "recipe": records[0]["identity"]["recipe"],
        "metrics": json.loads((folder / "metrics.json").read_text()),
    }


def _parameters(run: Run) -> int:
    state = run.state()
    assert state is not None and state.checkpoint is not None
    with safe_open(run.path / "checkpoints" / state.checkpoint / "ema.safetensors", "pt") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def compare_pairs(features: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """The first contestant against each other, from the features of all seeds of each."""
    kept = {name: [CropFeatures.read(file) for file in files] for name, files in features.items()}
    (ours, first), *others = kept.items()
    found = []
    for theirs, other in others:
        differences: dict[str, Difference] = paired(first, other)
        found.append(
            {
                "ours": ours,
                "theirs": theirs,
                **{
                    name: {**asdict(one), "in_words": one.in_words()}
                    for name, one in differences.items()
                },
            }
        )
    return found
