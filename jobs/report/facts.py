"""The words and numbers of a report: what was measured and how to read it, where all came from."""

import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.record import SPLIT_NAMES
from jobs.report.material import Material, Painting
from jobs.report.progress import Progress
from jobs.run import commit
from pipeline.store import StoreSpec

LENGTHS = {"um": ((1e3, "mm"), (1.0, "µm")), "m": ((1e3, "km"), (1.0, "m"))}
Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Measure:
    """One row of the table of metrics; absent values are empty."""

    name: str
    generated: str
    interval: str
    real: str
    reading: str


def number(value: Any) -> str:
    """Three significant digits, or what it is if it is no number; nothing for None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def length(pixels: int | float, spacing: float, unit: str) -> str:
    """A length in the unit that suits it."""
    value = pixels * spacing
    for scale, name in LENGTHS.get(unit, ()):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:.3g} {unit_name(unit)}"


def unit_name(unit: str) -> str:
    return "µm" if unit == "um" else unit


def scale_bar(pixels: int, spacing: float, unit: str) -> tuple[float, str]:
    """A round length of about a quarter of `pixels`: in pixels, and in words."""
    most = pixels * spacing / 3
    power = 10.0 ** math.floor(math.log10(most))
    round_length = max(k * power for k in (1, 2, 5) if k * power <= most)
    return round_length / spacing, length(round_length / spacing, spacing, unit)


def seconds(value: float) -> str:
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} minutes" if value < 5400 else f"{value / 3600:.1f} hours"


def measures(metrics: dict[str, Any]) -> list[Measure]:
    """The table of metrics, of those that are there."""
    n = metrics.get("n") or {}
    crops = f"{number(n.get('generated'))} generated and {number(n.get('real'))} real crops"
    rows = []
    if fid := metrics.get("crop_fid"):
        floor = number(fid.get("floor"))
        floor += f" (n = {number(fid['floor_n'])})" if floor and "floor_n" in fid else ""
        reading = "Fréchet distance between crops; 0 is equal. Its floor is what two samples of"
        reading += " real crops score against each other, and all that can be hoped for."
        rows.append(_measure(f"Crop FID, {crops}" if n else "Crop FID", fid, floor, reading))
    if kid := metrics.get("kid"):
        reading = "Kernel distance between the same crops, unbiased at small n; 0 is equal."
        rows.append(_measure("KID", kid, number(kid.get("floor")), reading))
    if seams := metrics.get("seams"):
        period = f", every {number(seams['period_px'])} px" if "period_px" in seams else ""
        reading = "Mean step between neighbouring pixels there over that elsewhere; "
        reading += "without seams it is what real images show."
        values = (number(seams.get(name)) for name in ("generated", "real"))
        rows.append(Measure(f"Seams{period}", next(values), "", next(values), reading))
    if cosine := metrics.get("condition_cosine"):
        own, other = (number(cosine.get(name)) for name in ("own", "other"))
        reading = "Cosine between the embedding of an image and its condition; "
        reading += f"against the conditions of others it is {other}." if other else "1 is equal."
        rows.append(Measure("Condition cosine", own, "", "", reading))
    return rows


def _measure(name: str, found: dict[str, Any], real: str, reading: str) -> Measure:
    bounds = found.get("interval") or ()
    interval = " to ".join(number(bound) for bound in bounds)
    return Measure(name, number(found.get("value")), interval, real, reading)


def measuring_notes(metrics: dict[str, Any]) -> list[str]:
    """In what space the metrics were measured, and what a reader of them should know."""
    features = metrics.get("features") or {}
    notes = []
    if space := features.get("label") or features.get("name"):
        size = f", {number(features['dim'])} dimensions" if "dim" in features else ""
        notes.append(f"Feature space: {space}{size}.")
    notes += [str(note) for note in metrics.get("notes") or ()]
    failed = metrics.get("failed") or {}
    return notes + [f"{name} could not be measured: {why}" for name, why in failed.items()]


def protocol(metrics: dict[str, Any]) -> list[str]:
    """By what rules the metrics were measured."""
    rules = metrics.get("protocol") or {}
    real = f"Real images: {rules['real_split']}." if rules.get("real_split") else ""
    return [str(text) for text in (rules.get("description"), real) if text]


def painting_facts(painting: Painting, spec: StoreSpec) -> Facts:
    """What one image is and what it cost."""
    height, width = painting.size
    spacing = spec.spacing * 2**painting.level
    identity, recipe = painting.record["identity"], painting.record["identity"]["recipe"]
    facts = [("size", f"{width} × {height} px")]
    if spec.unit in LENGTHS:
        across = " × ".join(length(n, spacing, spec.unit) for n in (width, height))
        facts.append(("on the ground" if spec.unit == "m" else "in tissue", across))
    facts.append(("bands", ", ".join(spec.bands)))
    names = ("solver", "eta", "steps", "guidance", "seed")
    facts += [(name, number(recipe[name])) for name in names if name in recipe]
    facts.append(("weights", str(identity.get("checkpoint"))))
    if "seconds" in painting.record:
        facts.append(("painted in", seconds(float(painting.record["seconds"]))))
    if "peak_memory_gb" in painting.record:
        facts.append(("peak memory", f"{number(painting.record['peak_memory_gb'])} GB"))
    return facts


def training_facts(material: Material) -> Facts:
    """What was trained, on what, for how long."""
    config, state, training = material.config, material.state, material.config.training
    splits = [region.split for region in material.regions]
    counts = {split: splits.count(split) for split in ("train", "val", "test")}
    facts = [("preset", config.preset)]
    if state is not None:
        facts += [
            ("status", f"{state.status} at step {number(state.step)}"),
            ("training time", seconds(state.seconds)),
            *([("CPU time of it", seconds(state.cpu_seconds))] if state.cpu_seconds else []),
            ("restarts", number(state.restarts)),
        ]
    if len(parts := material.progress.parts) > 1:
        facts.append(("blocks", ", ".join(parts)))
    names = ("batch", "optimizer", "learning_rate", "precision", "zero", "seed")
    facts += [(n.replace("_", " "), number(training[n])) for n in names if n in training]
    return [
        *facts,
        ("commit of the training", material.commit),
        ("encoder", config.packs.encoder_key),
        ("design of the draws", config.packs.design),
        ("regions", ", ".join(f"{n} {split}" for split, n in counts.items() if n)),
        ("side of a region", f"{material.store.spec.region} px"),
        ("store", str(material.store.path)),
        ("fingerprint of the store", material.store.fingerprint()),
    ]


@dataclass(frozen=True)
class HeldOutRow:
    """One octave of a block in the table of held-out errors: by log-SNR, and their mean."""

    block: str
    octave: str
    errors: tuple[str, ...]
    mean: str


def held_out_rows(progress: Progress) -> list[HeldOutRow]:
    """The last measurement of every block, coarse to fine; the top block has no octave above."""
    rows = []
    for number, line in enumerate(progress.last_held_out()):
        for place in reversed(range(len(line.levels))):
            level, errors = line.levels[place], [row[place] for row in line.errors]
            octave = f"{1 << level} to {2 << level}"
            if number == 0 and len(line.levels) == 1:
                octave = f"{1 << level} and more"
            mean = sum(errors) / len(errors)
            told = tuple(f"{error:.3f}" for error in errors)
            rows.append(HeldOutRow(line.part, octave, told, f"{mean:.3f}"))
    return rows


def held_out_split(progress: Progress) -> str:
    """Of what regions the held-out errors are."""
    splits = {line.split for line in progress.last_held_out()}
    return " and ".join(sorted(SPLIT_NAMES.get(split, split) for split in splits))


def flat(content: Mapping[str, Any], before: str = "") -> Facts:
    """What a JSON object holds, inner objects' names after those of the outer."""
    facts: Facts = []
    for key, value in content.items():
        name = f"{before} {key.replace('_', ' ')}".strip()
        if isinstance(value, Mapping):
            facts += flat(value, name)
        elif isinstance(value, list):
            facts.append((name, " ".join(str(item) for item in value)))
        else:
            facts.append((name, number(value)))
    return facts


def report_facts() -> Facts:
    """The program and the machine that wrote the report."""
    return [
        ("commit of the report", commit()),
        ("processor", f"{_processor()}, {os.cpu_count()} cores"),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        (
            "system",
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        ),
        ("torch", torch.__version__),
    ]


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commands(material: Material, arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The commands that led here, each with what it took, as far as it is recorded."""
    recorded = [
        (_command(stage["command"]), seconds(float(stage.get("seconds", 0))))
        for stage in material.stages
    ]
    known = any(stage["command"][0] == "jobs.sample" for stage in material.stages)
    painted = [] if known else [(sample_command(material, p), "") for p in material.paintings]
    return [*recorded, *painted, (_command(["jobs.report", *arguments]), "")]


def sample_command(material: Material, painting: Painting) -> str:
    """The command that paints an image again, from its record."""
    identity, recipe = painting.record["identity"], painting.record["identity"]["recipe"]
    height, width = identity.get("size_px", painting.size)
    arguments = [str(material.run.path), "--condition", str(material.store.path)]
    arguments += ["--out", str(material.images), "--region", str(painting.region.index)]
    arguments += ["--size", f"{height}x{width}"]
    arguments += ["--scale", f"{2.0**-painting.level:g}"] if painting.level else []
    if len({number for row in identity.get("layout", []) for number in row}) > 1:
        arguments += ["--fill", "regions"]
    for name in ("steps", "seed", "guidance", "solver", "eta", "overlap"):
        if name in recipe:
            arguments += [f"--{name}", str(recipe[name])]
    arguments += ["--precision", "bf16" if recipe.get("bf16") else "fp32"]
    given = identity.get("given") or {}
    for name in ("low", "known", "mask"):
        if name in given:
            arguments += [f"--{name}", given[name]]
    return _command(["jobs.sample", *arguments])


def evaluate_command(material: Material) -> str:
    """The command that makes the metrics."""
    real, generated = ["--real", str(material.store.path)], ["--generated", str(material.images)]
    return _command(["jobs.evaluate", *real, *generated, "--out", str(material.metrics_file)])


def _command(words: Sequence[str]) -> str:
    return f"python -m {shlex.join(words)}"
