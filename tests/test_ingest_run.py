"""Laws of how an ingest runs: tasks may run twice, disks fill up, locks go stale, and what it says
about all images at its end.
"""

import contextlib
import errno
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import distributed.worker
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kill_ingest import differences, killed_at, make_inputs, moments, undisturbed
from PIL import Image
from processes import tree
from test_ingest import draw_slide, ingest, write_aerial, write_slide

import pipeline.console
import pipeline.coordinate
import pipeline.lock
from pipeline.cluster import DaskWorkers, InlineWorkers, connect, lifetime_arguments
from pipeline.coordinate import run_jobs
from pipeline.lock import hold_lock
from pipeline.plan import make_plan
from pipeline.preview import draw_contact_sheet
from pipeline.store import Store, StoreSpec
from pipeline.work import finish_image, ingest_images, ingest_shard, open_template
from pipeline.worker_log import HEARTBEAT_FAILED

INLINE = ("--region", "256", "--cluster", "inline")


@pytest.mark.timeout(600)
def test_killed_at_random_moments_the_store_comes_out_equal(tmp_path: Path) -> None:
    """Two moments; `python tests/kill_ingest.py` does twenty."""
    inputs, calm = make_inputs(tmp_path / "slides"), tmp_path / "calm.zarr"
    files = undisturbed(inputs, calm)
    for number, moment in enumerate(moments(2, seed=1)):
        out = tmp_path / f"killed{number}.zarr"
        killed_at(moment, inputs, out, files)
        assert differences(out, calm) == []


@pytest.mark.parametrize("kind", ["slide", "aerial"])
def test_a_task_that_runs_twice_changes_nothing(kind: str, tmp_path: Path) -> None:
    if kind == "slide":
        path = write_slide(tmp_path / "s.tif", draw_slide(4200, 700))
    else:
        pixels = np.random.default_rng(0).integers(1, 255, (4, 4200, 700), np.uint8)
        path = write_aerial(tmp_path / "a.tif", pixels, 0.6)
    plan = make_plan([str(path)], None, None, None, None, 0, None)
    (job,) = plan.jobs
    once, twice = (Store.create(tmp_path / f"{n}.zarr", plan.spec) for n in ("once", "twice"))
    for store, times in ((once, 1), (twice, 2)):
        image = open_template(store.path, job)
        for key in image.shard_keys():
            for _ in range(times):
                assert [o.state for o in ingest_shard(store.path, job, key)] == ["working"]
        for _ in range(times):
            assert [o.state for o in finish_image(store.path, job)] == ["ok"]
    assert tree(once.path) == tree(twice.path)
    ingest_images(twice.path, [job])
    assert tree(once.path) == tree(twice.path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system needs root, to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("cluster", ["inline", "local"])
def test_a_full_disk_is_a_sentence_and_the_store_goes_on_when_there_is_room(
    cluster: str,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan's own check is taken away, as by somebody who fills the disk meanwhile."""
    rng, folder = np.random.default_rng(0), tmp_path / "slides"
    folder.mkdir()
    for number in range(4):
        noise = rng.integers(60, 200, (700, 700, 3), np.uint8)
        write_slide(
            folder / f"s{number}.tif", np.maximum(noise, 90) - np.array([0, 60, 0], np.uint8)
        )
    monkeypatch.setattr(pipeline.console, "check_free_disk", lambda *_: None)
    monkeypatch.setattr(pipeline.coordinate, "BATCH_IMAGES", 1)
    out, calm = small_disk / "o.zarr", tmp_path / "calm.zarr"
    command = (folder, "--out", out, "--region", "256", "--cluster", cluster, "--workers", "1")
    assert ingest(*command) == 2
    (mistake,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"the disk of {out} is full" in mistake and "run the same command again" in mistake
    store = Store.open(out)
    finished = store.image_ids()
    assert len(finished) < 4 and not list(out.rglob("*.partial"))
    assert {s["state"] for s in store.image_states().values()} <= {"ok"}
    before = {name: tree(store.image_path(name)) for name in finished}
    room = ["mount", "-o", "remount,size=100m", str(small_disk)]
    subprocess.run(room, check=True)
    assert ingest(*command) == 0
    assert {name: tree(store.image_path(name)) for name in finished} == before
    assert ingest(folder, "--out", calm, *INLINE) == 0
    assert differences(out, calm) == []


def test_a_disk_that_is_full_for_one_task_fails_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the task: the error comes out, and nothing is recorded."""
    path = write_slide(tmp_path / "s.tif", draw_slide(300, 300))
    plan = make_plan([str(path)], None, None, None, None, 0, None)
    store = Store.create(tmp_path / "o.zarr", plan.spec)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.ome.write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        list(run_jobs(store, plan.jobs, InlineWorkers()))
    assert not store.image_states()


def test_a_lock_of_a_process_whose_number_another_has_by_now_is_dead(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with hold_lock(lock) as check:
        check()
        holder = json.loads(lock.read_text())
    lock.write_text(json.dumps(holder))
    with pytest.raises(ValueError, match=f"process {os.getpid()}"), hold_lock(lock):
        pass
    lock.write_text(json.dumps(holder | {"began": "17 in another boot"}))
    with hold_lock(lock):
        pass
    with subprocess.Popen([sys.executable, "-c", ""]) as remains:
        time.sleep(0.5)
        while Path(f"/proc/{remains.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.05)
        lock.write_text(json.dumps({"host": holder["host"], "pid": remains.pid}))
        with hold_lock(lock):  # killed, and not yet collected by whoever started it
            pass


def test_a_holder_that_stood_still_for_too_long_finds_out(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "lock") as check:
        taken = json.loads((tmp_path / "lock").read_text()) | {"host": "elsewhere"}
        (tmp_path / "lock").write_text(json.dumps(taken))
        with pytest.raises(ValueError, match="has lost"):
            check()
    assert json.loads((tmp_path / "lock").read_text()) == taken


def test_a_second_coordinator_is_refused_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, out = write_slide(tmp_path / "s.tif", draw_slide(400, 400)), tmp_path / "o.zarr"
    with hold_lock(out / ".ingest.lock"):
        before = tree(out)
        assert ingest(slide, "--out", out, *INLINE) == 2
        assert "is being written by process" in capsys.readouterr().err
        assert tree(out) == before


@pytest.mark.parametrize(
    "left", [["images/zarr.json"], ["images/zarr.json", "embeddings/.z.1.partial"]]
)
def test_a_process_killed_at_its_very_start_leaves_a_place_to_start_again(
    left: list[str], tmp_path: Path
) -> None:
    slide, out = write_slide(tmp_path / "s.tif", draw_slide(400, 400)), tmp_path / "o.zarr"
    for name in left:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    assert ingest(slide, "--out", out, *INLINE) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert ingest(slide, "--out", tmp_path / "mine", *INLINE) == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_dashboard_answers_where_it_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = write_slide(tmp_path / "s.tif", draw_slide(400, 400))
    answers = []
    submit = DaskWorkers.submit

    def look_and_submit(self: DaskWorkers, *task: object) -> None:
        with urllib.request.urlopen(str(self.dashboard), timeout=20) as page:
            answers.append((self.dashboard, page.status))
        submit(self, *task)  # type: ignore[arg-type]

    monkeypatch.setattr(DaskWorkers, "submit", look_and_submit)
    assert ingest(slide, "--out", tmp_path / "o.zarr", "--region", "256", "--workers", "1") == 0
    (said,) = re.findall(r"^dashboard: (http://\S+/status)$", capsys.readouterr().out, re.M)
    assert answers and set(answers) == {(said, 200)}


def test_no_more_tasks_are_in_flight_than_two_a_worker() -> None:
    with connect("local", 1) as workers:
        assert workers.capacity == 2
    assert InlineWorkers().capacity == 1 and InlineWorkers().dashboard is None


def test_a_heartbeat_that_fails_says_nothing_and_other_errors_do(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert HEARTBEAT_FAILED in inspect.getsource(distributed.worker)
    with connect("local", 1) as workers:
        for words in (f"{HEARTBEAT_FAILED}.", "disk on fire"):
            workers.submit(logging.getLogger("distributed.worker").error, words)
            assert workers.next_result()[1] is None
    said = capfd.readouterr().err
    assert "disk on fire" in said and "heartbeat" not in said


@given(st.integers(60, 30 * 86400))
def test_workers_on_slurm_leave_before_their_time_is_up(limit_s: int) -> None:
    _, lifetime, _, stagger = lifetime_arguments(limit_s)
    lifetime_s, stagger_s = (int(text.removesuffix("s")) for text in (lifetime, stagger))
    assert limit_s / 2 < lifetime_s - stagger_s <= lifetime_s + stagger_s <= limit_s * 7 / 8


def test_what_a_leaving_worker_has_not_done_is_done_by_another(tmp_path: Path) -> None:
    """A scheduler at an address; a worker whose lifetime ends among the tasks, and one that
    stays.
    """
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    place = ["--scheduler-file", str(file)]
    scheduler = [*dask, "scheduler", "--port", "0", "--no-dashboard", *place]
    worker = [*dask, "worker", *place, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
    commands = (
        [*scheduler, "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"],
        [*worker, "--lifetime", "3s"],
        worker,
    )
    with contextlib.ExitStack() as stack:
        for command in commands:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = stack.enter_context(subprocess.Popen(command, **quiet))  # type: ignore[call-overload]
            stack.callback(process.kill)
            while not file.is_file():
                time.sleep(0.05)
        with connect(json.loads(file.read_text())["address"], 2) as workers:
            for number in range(20):
                workers.submit(subprocess.getoutput, f"sleep 0.3; echo {number} $PPID")
            done = [str(workers.next_result()[1]).split() for _ in range(20)]
    assert sorted(int(number) for number, _ in done) == list(range(20))
    assert len({pid for _, pid in done}) == 2, "both had work before one left"


def test_what_is_left_to_read_names_every_image(tmp_path: Path) -> None:
    folder, out = tmp_path / "a | b", tmp_path / "o.zarr"
    folder.mkdir()
    write_slide(folder / "good.tif", draw_slide(600, 700))
    write_slide(folder / "glass.tif", np.full((600, 600, 3), 243, np.uint8))
    write_slide(folder / "no mpp.tif", draw_slide(500, 500), mpp=None)
    assert ingest(folder, "--out", out, *INLINE) == 3
    store = Store.open(out)
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert len({frozenset(line) for line in lines}) == 1, "all lines have the same keys"
    by_name = {Path(line["source"]).name: line for line in lines}
    good, glass, failed = (by_name[n] for n in ("good.tif", "glass.tif", "no mpp.tif"))
    assert [s["state"] for s in (good, glass, failed)] == ["ok", "empty", "failed"]
    assert good["shape"] == [3, 600, 700] and good["native_spacing"] == 0.5
    assert good["spacing_source"] and good["seconds"] > 0 and not good["reason"]
    assert good["bytes"] == sum(
        p.stat().st_size for p in store.image_path(good["image"]).rglob("*") if p.is_file()
    )
    assert good["source_bytes"] == (folder / "good.tif").stat().st_size
    assert good["tissue"]["tissue"] == pytest.approx(
        store.mask(good["image"], 0, 0, 600, 700).mean(), abs=0.05
    )
    assert good["tissue"]["settings"]["min_saturation"] == 0.04
    assert glass["reason"] == "no tissue was found" and failed["reason"]
    assert store.preview_path(glass["image"]).is_file(), "what is empty can be looked at"
    summary = (out / "summary.md").read_text()
    assert all(f"{name}" in summary for name in by_name)
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 and len({row.count("|") for row in rows}) == 1
    with Image.open(out / "contact-sheet.jpg") as sheet:
        assert sheet.width >= 512 and sheet.height >= 256


@pytest.mark.parametrize("count", [1, 7, 150])
def test_a_contact_sheet_holds_any_number_of_images(count: int, tmp_path: Path) -> None:
    spec = StoreSpec("um", 0.5, ("red", "green", "blue"), "uint8", 256)
    store = Store.create(tmp_path / "o.zarr", spec)
    for number in range(count):
        name = f"i{number:04}"
        state = {"state": "ok", "reason": "", "source": f"/x/{'long ' * 40}{number}.svs"}
        store.write_image_state(name, state)
        store.preview_path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (300, 200), (number % 200, 0, 120)).save(store.preview_path(name))
    with Image.open(draw_contact_sheet(store)) as sheet:
        pixels = np.asarray(sheet)
    assert max(sheet.size) <= 8200
    tiles = (np.abs(pixels.astype(int) - [0, 0, 120])[..., 1:].max(axis=-1) < 30).sum()
    assert tiles > 0.8 * count * 252 * 168
