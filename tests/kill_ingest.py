"""Kill an ingest at random moments, the coordinator or a Dask worker, and let the same command
finish: the store must equal that of an undisturbed ingest, array by array.

    python tests/kill_ingest.py [--times 20] [--seed 0] [--folder DIR]

What is killed, and when, follows from the seed. A moment is a fraction of the files that the
undisturbed store has, and some tenths of a second after as many are there: moments lie in every
phase, however busy the machine is. Prints a line a moment and exits with 1 if any store differs.
test_ingest_run.py does a few of these.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import zarr

ROOT = Path(__file__).parent.parent
MAX_DELAY_S = 0.4
OPTIONS = ("--region", "1024", "--workers", "2")


@dataclass(frozen=True)
class Moment:
    """Kill `who` a little after `fraction` of an undisturbed store's files are there."""

    who: str
    fraction: float
    delay_s: float


def moments(times: int, seed: int) -> list[Moment]:
    """Coordinator and workers in turns, at fractions drawn in equal parts of the whole."""
    rng = random.Random(seed)
    parts = rng.sample(range(times), times)
    return [
        Moment(
            ("coordinator", "worker")[number % 2],
            (part + rng.random()) / times,
            rng.random() * MAX_DELAY_S,
        )
        for number, part in enumerate(parts)
    ]


def command(inputs: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.ingest", str(inputs), "--out", str(out), *OPTIONS]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, **pipes)  # type: ignore[call-overload]


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes in which tasks run, oldest first: those that Dask spawned."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [c for c in children if "spawn_main" in " ".join(c.cmdline())]
    except psutil.Error:
        return []


def pixels_of(path: Path) -> dict[str, np.ndarray]:
    """Every array in a store, by its place."""
    return {
        str(item.parent.relative_to(path)): np.asarray(
            zarr.open_array(str(item.parent), mode="r")[...]
        )
        for item in sorted(path.rglob("zarr.json"))
        if json.loads(item.read_text())["node_type"] == "array"
    }


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two stores: arrays, region tables, outlines, coverages; what a killed
    process left behind counts as well.
    """
    mine, other = pixels_of(ours), pixels_of(theirs)
    found = sorted(mine.keys() ^ other.keys())
    found += [name for name in mine.keys() & other.keys() if not equal(mine[name], other[name])]
    for name in ("regions.parquet", "coverage/*", "outlines/*"):
        files = {p.relative_to(theirs) for p in theirs.glob(name)}
        files |= {p.relative_to(ours) for p in ours.glob(name)}
        found += [str(f) for f in sorted(files) if not _same_file(ours / f, theirs / f)]
    found += [str(p.relative_to(ours)) for p in ours.rglob("*.partial")]
    return found + [p.name for p in ours.glob(".ingest.lock*")]


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


def _same_file(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    while not until() and process.poll() is None:
        time.sleep(0.01)


def undisturbed(inputs: Path, out: Path) -> int:
    """An ingest in peace; how many files there are."""
    with start(command(inputs, out)) as process:
        said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    return count_files(out)


def count_files(out: Path) -> int:
    """Files in a store, whole ones."""
    return sum(p.suffix != ".partial" for p in out.rglob("*") if p.is_file())


def killed_at(moment: Moment, inputs: Path, out: Path, files: int) -> str:
    """Start an ingest, kill what is to be killed, finish by the same command; what happened.

    `files` is how many an undisturbed store has.
    """
    with start(command(inputs, out)) as process:
        wait(process, lambda: count_files(out) >= moment.fraction * files)
        time.sleep(moment.delay_s)
        if moment.who == "worker":
            wait(process, lambda: bool(workers_of(process)))
        victims = [] if process.poll() is not None else workers_of(process)
        descendants, there = list(victims), count_files(out)
        if process.poll() is not None:
            what = "had ended before"
        elif moment.who == "coordinator":
            process.kill()
            what = "coordinator killed"
        elif victims:
            victims[0].send_signal(signal.SIGKILL)
            what = "worker killed"
        else:
            what = "had no worker any more"
        said = process.communicate(timeout=300)[0]
    psutil.wait_procs(descendants, timeout=60)
    with start(command(inputs, out)) as again:
        more = again.communicate(timeout=300)[0]
    assert again.returncode == 0, f"{said}\n{more}"
    return f"{what} when {there} of {files} files were there"


def make_inputs(folder: Path) -> Path:
    """A slide of six shards and two of one, which share a task; one with a georeference would need
    a store of its own.
    """
    from test_ingest import draw_slide, write_slide

    folder.mkdir()
    write_slide(folder / "large.tif", draw_slide(4400, 8600))
    for number in range(2):
        write_slide(folder / f"small{number}.tif", draw_slide(1500, 1400 + number, seed=number))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        inputs, calm = make_inputs(folder / "slides"), folder / "calm.zarr"
        files = undisturbed(inputs, calm)
        print(f"undisturbed: {files} files, {len(pixels_of(calm))} arrays", flush=True)
        bad = 0
        for number, moment in enumerate(moments(options.times, options.seed)):
            out = folder / f"killed{number}.zarr"
            what = killed_at(moment, inputs, out, files)
            differing = differences(out, calm)
            bad += bool(differing)
            verdict = f"differs in {', '.join(differing)}" if differing else "equal"
            print(f"{number + 1:2}: {what}: {verdict}", flush=True)
    print(f"{options.times - bad} of {options.times} equal")
    return int(bool(bad))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    raise SystemExit(main())
