"""Kill an ingest at random moments, the coordinator or a Dask worker, and let the same command
finish: the store must equal that of an undisturbed ingest, array by array.

    python tests/kill_ingest.py [--times 20] [--seed 0] [--folder DIR]

What is killed, and when, follows from the seed; a moment is a fraction of the time that the
undisturbed ingest took from the making of its store on. Prints a line a moment and exits with 1 if
any store differs. test_ingest_run.py does a few of these.
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
OPTIONS = ("--region", "1024", "--workers", "2")


@dataclass(frozen=True)
class Moment:
    """Kill `who` once `fraction` of an undisturbed ingest's time has passed."""

    who: str
    fraction: float


def moments(times: int, seed: int) -> list[Moment]:
    """Coordinator and workers in turns, at fractions drawn in equal parts of the whole time."""
    rng = random.Random(seed)
    parts = rng.sample(range(times), times)
    return [
        Moment(("coordinator", "worker")[number % 2], (part + rng.random()) / times)
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


def undisturbed(inputs: Path, out: Path) -> float:
    """An ingest in peace; how many seconds it took from the making of the store on."""
    with start(command(inputs, out)) as process:
        wait(process, (out / "zarr.json").is_file)
        begun = time.monotonic()
        said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    return time.monotonic() - begun


def killed_at(moment: Moment, inputs: Path, out: Path, seconds: float) -> str:
    """Start an ingest, kill what is to be killed, finish by the same command; what happened."""
    with start(command(inputs, out)) as process:
        wait(process, (out / "zarr.json").is_file)
        begun = time.monotonic()
        wait(process, lambda: time.monotonic() - begun >= moment.fraction * seconds)
        if moment.who == "worker":
            wait(process, lambda: bool(workers_of(process)))
        victims = [] if process.poll() is not None else workers_of(process)
        descendants = list(victims)
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
    done = len(list(out.glob("images/*/0/c/0/*/*")))
    with start(command(inputs, out)) as again:
        more = again.communicate(timeout=300)[0]
    assert again.returncode == 0, f"{said}\n{more}"
    return f"{what} after {moment.fraction * seconds:.1f} s with {done} shards there"


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
        seconds = undisturbed(inputs, calm)
        print(f"undisturbed: {seconds:.1f} s, {len(pixels_of(calm))} arrays", flush=True)
        bad = 0
        for number, moment in enumerate(moments(options.times, options.seed)):
            out = folder / f"killed{number}.zarr"
            what = killed_at(moment, inputs, out, seconds)
            differing = differences(out, calm)
            bad += bool(differing)
            verdict = f"differs in {', '.join(differing)}" if differing else "equal"
            print(f"{number + 1:2}: {what}: {verdict}", flush=True)
    print(f"{options.times - bad} of {options.times} equal")
    return int(bool(bad))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    raise SystemExit(main())
