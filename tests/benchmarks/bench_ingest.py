"""What an ingest costs beside what it cannot do without, and beside two other writers.

Bare processes read and decode the same pixels, each a shard's box at a time, and compress them by
zstd-1 in chunks of 512²; they keep nothing and write nothing. Sides take turns and the least of
each counts, in seconds of CPU (of all processes together) and of the clock, as the machine may be
shared. Every command runs in a process of its own. The slides are those of ../shared/data.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import openslide
import psutil
import pytest
import rasterio
from benchmarks import bare_ingest
from benchmarks.bench_costs import interleaved, report

from pipeline.ome import SHARD_PX
from pipeline.plan import make_plan
from pipeline.shard import CHUNK_PX
from pipeline.store import Store
from pipeline.work import finish_image, ingest_shard, open_template

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SLIDE = DATA / "slides" / "pa_helicobacter_HE_full.tif"
MOSAIC = DATA / "naip" / "mosaic_claremont_2018_sparse.tif"
PROCESSES = 2
STRIPS = {"a shard at once": SHARD_PX, "strips of 512 rows": CHUNK_PX}
ROUNDS, TASK_ROUNDS, SHARDS = 2, 3, 8

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not DATA.is_dir(), reason="real data is not here (../shared/data)"),
]


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of CPU; the most that one process and all of them held, in GB."""

    wall_s: float
    cpu_s: float
    worst_gb: float = 0.0
    all_gb: float = 0.0

    def least(self, other: "Cost | None") -> "Cost":
        return (
            Cost(*(min(*pair) for pair in zip(self, other, strict=True))) if other else self  # type: ignore[call-overload]
        )

    def __iter__(self) -> Iterator[float]:
        return iter((self.wall_s, self.cpu_s, self.worst_gb, self.all_gb))


def measured(command: list[str]) -> Cost:
    """Run a command; what it and the processes that it starts cost."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        peaks: list[float] = [0.0, 0.0]
        watcher = threading.Thread(target=_watch, args=(process, peaks), daemon=True)
        watcher.start()
        said = process.communicate()[0]
        wall_s = time.perf_counter() - started
        watcher.join()
    assert process.returncode == 0, said.decode()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall_s, cpu_s, *peaks)


def _watch(process: "subprocess.Popen[bytes]", peaks: list[float]) -> None:
    """Memory that only the process itself holds, so that shared libraries count once at most."""
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        held = []
        try:
            for one in (parent, *parent.children(recursive=True)):
                held.append(one.memory_info().rss / 1e9)
        except psutil.Error:
            continue
        peaks[0], peaks[1] = max(peaks[0], *held), max(peaks[1], sum(held))
        time.sleep(0.05)


def in_turns(sides: Mapping[str, Callable[[], Cost]], rounds: int = ROUNDS) -> dict[str, Cost]:
    """The least of `rounds` for each side."""
    least: dict[str, Cost] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            least[name] = side().least(least.get(name))
    return least


def bare(kind: str, paths: list[Path]) -> Cost:
    script = str(Path(__file__).with_name("bare_ingest.py"))
    return measured([sys.executable, script, kind, str(PROCESSES), *map(str, paths)])


def ingested(out: Path, paths: list[Path], *options: str) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline.ingest", *map(str, paths), "--out", str(out)]
    return measured([*command, "--region", "auto", "--workers", str(PROCESSES), *options])


def copies_of(path: Path, count: int, folder: Path) -> list[Path]:
    """Copies that differ in a few bytes behind the end of the TIFF."""
    made = []
    for number in range(count):
        made.append(folder / f"copy{number}{path.suffix}")
        shutil.copyfile(path, made[-1])
        with made[-1].open("ab") as stream:
            stream.write(number.to_bytes(16, "big"))
    return made


def versus(pixels: int, ours: Cost, bare: Cost) -> str:
    return (
        f"{ours.wall_s:.1f} s, {ours.cpu_s:.1f} s of CPU; bare {bare.wall_s:.1f} s, "
        f"{bare.cpu_s:.1f} s; throughput {bare.wall_s / ours.wall_s:.2f} × bare by the clock, "
        f"{bare.cpu_s / ours.cpu_s:.2f} × by CPU; {pixels / ours.wall_s / 1e6:.0f} megapixels a "
        f"second; largest process {ours.worst_gb:.2f} GB, all {ours.all_gb:.2f} GB"
    )


def seconds_in_tasks(out: Path) -> float:
    return sum(s["seconds"] or 0.0 for s in Store.open(out).image_states().values())


@pytest.mark.parametrize(("path", "kind"), [(SLIDE, "slide"), (MOSAIC, "raster")])
def test_a_task_against_its_bare_part(path: Path, kind: str) -> None:
    """Tasks as workers run them, against the same boxes bare, in turns in one process; then what
    ends the image. CPU of this process, so that a busy machine decides nothing.
    """
    plan = make_plan([str(path)], None, None, 0.25 if kind == "slide" else None, None, 0, None)
    (job,) = plan.jobs
    with tempfile.TemporaryDirectory() as name:
        store = Store.create(Path(name) / "o.zarr", plan.spec)
        image = open_template(store.path, job)
        keys = image.shard_keys()
        chosen = keys[:: max(1, len(keys) // SHARDS)]
        bare = getattr(bare_ingest, kind)

        def side(name: str, key: tuple[int, int]) -> Callable[[], object]:
            if name == "ours":
                return lambda: ingest_shard(store.path, job, key)
            return lambda: bare(path, image.shard_box(key), STRIPS[name])

        names = ("ours", *STRIPS)
        works = {(name, key): side(name, key) for key in chosen for name in names}
        least = interleaved(works, TASK_ROUNDS)
        for key in keys:
            if not image.has_shard(key):
                ingest_shard(store.path, job, key)
        started = time.process_time()
        finish_image(store.path, job)
        end_s = time.process_time() - started
    costs = {name: sum(least[name, key] for key in chosen) for name in names}
    ours, times = costs.pop("ours"), len(keys) / len(chosen)
    rows = [("a task", f"{ours / len(chosen):.3f} s of CPU")]
    rows += [
        (
            f"bare, {name}",
            f"{cost / len(chosen):.3f} s; {cost / ours:.2f} × its throughput, "
            f"with the image's end {cost * times / (ours * times + end_s):.2f} ×",
        )
        for name, cost in costs.items()
    ]
    rows.append(("the image's end", f"{end_s:.2f} s, {end_s / ours / times:.1%} of its tasks"))
    report(f"{path.name}: {len(chosen)} of {len(keys)} shards, least of {TASK_ROUNDS}", rows)


def test_a_slide_and_its_copies() -> None:
    """Whole commands with 1, 2 and 4 copies; what a copy adds is free of what starting costs."""
    width, height = openslide.OpenSlide(SLIDE).dimensions
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copies = copies_of(SLIDE, 4, folder)
        sides: dict[str, Callable[[], Cost]] = {}
        for count in (1, 2, 4):
            paths = copies[:count]
            sides[f"ours {count}"] = lambda paths=paths: ingested(  # type: ignore[misc]
                folder / "o.zarr", paths, "--source-mpp", "0.25"
            )
            sides[f"bare {count}"] = lambda paths=paths: bare("slide", paths)  # type: ignore[misc]
        least = in_turns(sides)
        seconds = seconds_in_tasks(folder / "o.zarr")
        stored = json.loads((folder / "o.zarr" / "images.jsonl").read_text().splitlines()[0])
    rows = []
    for count in (1, 2, 4):
        ours, theirs = least[f"ours {count}"], least[f"bare {count}"]
        rows.append(
            (f"{count} × {height} × {width} px", versus(count * height * width, ours, theirs))
        )
    added = [
        Cost(*((b - a) / 3 for a, b in zip(least[f"{k} 1"], least[f"{k} 4"], strict=True)))
        for k in ("ours", "bare")
    ]
    rows.append(("each further copy", versus(height * width, *added)))
    one, two, four = (least[f"ours {n}"].cpu_s for n in (1, 2, 4))
    rows.append(
        (
            "growth of CPU from 1 to 2 and from 2 to 4, each copy",
            f"{two - one:.1f} s, {(four - two) / 2:.1f} s",
        )
    )
    rows.append(("seconds in tasks, of four copies", f"{seconds:.1f}"))
    rows.append(
        ("on disk, each", f"{stored['bytes'] / 1e6:.0f} MB of {stored['source_bytes'] / 1e6:.0f}")
    )
    report(f"ingest of {SLIDE.name}, {PROCESSES} processes", rows)


def test_an_aerial_mosaic() -> None:
    with rasterio.open(MOSAIC) as data:
        height, width = data.shape
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "o.zarr"
        least = in_turns(
            {
                "ours": lambda: ingested(out, [MOSAIC]),
                "bare": lambda: bare("raster", [MOSAIC]),
            }
        )
    row = (f"{height} × {width} px, 4 bands", versus(height * width, *least.values()))
    report(f"ingest of {MOSAIC.name}, {PROCESSES} processes", [row])


def test_two_other_writers() -> None:
    """One slide by `ingest`, by libvips' dzsave (JPEG) and by ome_zarr's writer (OME-Zarr)."""
    script = str(Path(__file__).with_name("other_writers.py"))
    width, height = openslide.OpenSlide(SLIDE).dimensions
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def other(kind: str) -> Cost:
            out = folder / kind
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return measured([sys.executable, script, kind, str(SLIDE), str(out), str(PROCESSES)])

        least = in_turns(
            {
                "ours": lambda: ingested(folder / "o.zarr", [SLIDE], "--source-mpp", "0.25"),
                "dzsave": lambda: other("dzsave"),
                "ome_zarr": lambda: other("ome_zarr"),
            },
            rounds=1,
        )
    rows = [
        (
            kind,
            f"{cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of CPU, ours / it by CPU "
            f"{least['ours'].cpu_s / cost.cpu_s:.2f}; processes at most {cost.all_gb:.2f} GB",
        )
        for kind, cost in least.items()
    ]
    report(f"{SLIDE.name}, {height} × {width} px, {PROCESSES} threads or processes", rows)
