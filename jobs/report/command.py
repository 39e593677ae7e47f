"""python -m jobs.report: painted images, their run and their metrics as a page that opens from
disk.

    report/index.html        the page; everything it needs lies beside it, nothing is fetched
    report/files-HASH/       its pictures and curves, named by a hash of what they hold

Files are written under another name and renamed, and index.html is replaced last, so that it only
ever names files that are all there. Equal inputs give equal bytes.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.report.material import Material, gather
from jobs.report.neighbours import find_neighbours
from jobs.report.page import GENERATOR, Drawn, render
from jobs.report.pictures import draw_panels, draw_steps, picture_bytes
from jobs.report.plots import plot_held_out, plot_losses, plot_spectrum
from pipeline import console

INDEX = "index.html"
FILES = "files-"
STEPS_SHOWN = 12
GENERATOR_WITHIN = 2000


@dataclass(frozen=True)
class Report:
    """Write a page about painted images: each beside its condition and the nearest training
    region, the training, the metrics, and where all came from.

        python -m jobs.report images --out report
        python -m jobs.report images --out report --metrics metrics.json --store dataset.zarr

    The folder opens in any browser, from disk; copy or zip it as a whole.
    """

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of the images that jobs.sample painted."""
    out: Path = Path("report")
    """Folder of the page."""
    metrics: Path | None = None
    """What jobs.evaluate measured; by default metrics.json beside the folder of the images."""
    run: Path | None = None
    """The run that painted the images, if it was moved since."""
    store: Path | None = None
    """The dataset store of their conditions, if it was moved since."""
    dry_run: bool = False
    """Print the plan and stop."""


def report(options: Report) -> int:
    """Run the command; returns its exit code."""
    index = options.out / INDEX
    if index.is_file() and GENERATOR not in index.read_text(errors="replace")[:GENERATOR_WITHIN]:
        raise ValueError(f"{index} is a page of something else; choose another --out")
    material = gather(options.images, options.run, options.store, options.metrics)
    measured = "without metrics" if material.metrics is None else f"{material.metrics_file}"
    needed_bytes = picture_bytes(material)
    console.say_plan(
        f"report: {len(material.paintings)} images of {options.images}, run {material.run.path}, "
        f"store {material.store.path}, {measured} -> {index}",
        options.out,
        needed_bytes,
    )
    if options.dry_run:
        return console.EXIT_DONE
    neighbours = find_neighbours(material)
    partial = options.out / f".{os.getpid()}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    try:
        panels = {}
        paintings = console.progress(
            enumerate(material.paintings, 1), total=len(material.paintings), desc="report"
        )
        for count, painting in paintings:
            nearest = neighbours[painting.name].nearest
            slug = f"image{count}"
            panels[painting.name] = draw_panels(material, painting, nearest, partial, slug)
        steps = draw_steps(material.run.path / "samples", partial, STEPS_SHOWN)
        drawn = Drawn(panels, _draw_plots(material, partial), steps)
        folder = f"{FILES}{_fingerprint(partial)}"
        if (options.out / folder).is_dir():
            shutil.rmtree(partial)
        else:
            partial.replace(options.out / folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    page = render(material, neighbours, drawn, folder, _arguments(options))
    console.write_bytes_atomic(index, page.encode())
    _sweep(options.out, folder)
    console.say(f"report: done, open {index}")
    return console.EXIT_DONE


def _draw_plots(material: Material, folder: Path) -> dict[str, str]:
    """Write every curve there is material for; their files by name."""
    octaves = ((material.metrics or {}).get("spectrum") or {}).get("octaves") or []
    curves = {
        "loss": plot_losses(material.progress, by_level=False),
        "level_losses": plot_losses(material.progress, by_level=True),
        "held_out": plot_held_out(material.progress),
        "spectrum": plot_spectrum(octaves, ratio=False),
        "spectrum_ratio": plot_spectrum(octaves, ratio=True),
    }
    files = {}
    for name, content in curves.items():
        if content is not None:
            files[name] = f"{name.replace('_', '-')}.svg"
            (folder / files[name]).write_bytes(content)
    return files


def _fingerprint(folder: Path) -> str:
    """A hash of the files in a folder and their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _sweep(out: Path, kept: str) -> None:
    """Remove the files of earlier pages, and what killed commands left."""
    for folder in out.iterdir():
        own = re.fullmatch(rf"{FILES}[0-9a-f]{{12}}|\.(\d+)\.partial", folder.name)
        if own is None or not folder.is_dir() or folder.name == kept:
            continue
        if own[1] is None or not Path(f"/proc/{own[1]}").exists():
            shutil.rmtree(folder)


def _arguments(options: Report) -> list[str]:
    """The command line, as far as it is not by default."""
    named = {"metrics": options.metrics, "run": options.run, "store": options.store}
    more = [word for name, value in named.items() if value for word in (f"--{name}", str(value))]
    return [str(options.images), "--out", str(options.out), *more]


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Report, report, argv, prog="python -m jobs.report")
