"""Laws of an ingest: exact pixels, honest regions; when killed it loses and repeats nothing."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from kill_ingest import pixels_of
from ome_zarr_models.v05 import Image, Labels
from rasterio import Affine

from pipeline.cluster import connect
from pipeline.ingest import main
from pipeline.lock import hold_lock
from pipeline.readers import open_reader
from pipeline.regions import Region
from pipeline.splits import assign_splits, beside_one_another, split_groups
from pipeline.store import Store

ROOT = Path(__file__).parent.parent


def draw_slide(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A violet disk with texture on nearly white glass, (h, w, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:height, :width]
    inside = ((y / height - 0.45) ** 2 + (x / width - 0.45) ** 2 < 0.16)[..., None]
    texture = rng.integers(0, 40, (height, width, 1), np.uint8)
    return np.where(inside, np.array([150, 80, 160], np.uint8) + texture, np.uint8(240))


def write_slide(path: Path, pixels: np.ndarray, mpp: float | None = 0.5) -> Path:
    """A tiled RGB TIFF (h, w, 3), which OpenSlide opens as generic-tiff."""
    resolution: dict[str, Any] = {}
    if mpp is not None:
        resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    layout: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
    tifffile.imwrite(path, pixels, metadata=None, **layout, **resolution)
    return path


def write_aerial(path: Path, pixels: np.ndarray, gsd: float) -> Path:
    """A GeoTIFF (c, h, w) in UTM zone 11."""
    count, height, width = pixels.shape
    profile: dict[str, Any] = {"photometric": "RGB", "ALPHA": "NO", "crs": "EPSG:26911"}
    profile |= {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    transform = Affine(gsd, 0, 4e5, 0, -gsd, 4e6)
    with rasterio.open(path, "w", driver="GTiff", transform=transform, **profile) as data:
        data.write(pixels)
    return path


def ingest(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_level_0_is_what_the_reader_returns_and_regions_are_honest(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "s.tif", draw_slide(1500, 1234))
    out = tmp_path / "o.zarr"
    assert (
        ingest(slide, "--out", out, "--region", 256, "--stride", 128, "--cluster", "inline") == 0
    )
    store = Store.open(out)
    (name,) = store.image_ids()
    image = store.image(name)
    rng = np.random.default_rng(1)
    with open_reader(slide) as reader:
        assert image.shape == reader.shape
        for _ in range(20):
            y, x = int(rng.integers(0, 1400)), int(rng.integers(0, 1100))
            assert np.array_equal(image.read(y, x, 100, 134), reader.read(y, x, 100, 134))
    regions = store.regions()
    kept = {(r.y, r.x): r for r in regions}
    for y in range(0, 1500 - 256 + 1, 128):
        for x in range(0, 1234 - 256 + 1, 128):
            share = store.mask(name, y, x, 256, 256).mean()
            if (y, x) in kept:
                assert kept[y, x].tissue == pytest.approx(share) and share >= 0.25
    assert len(regions) == len(kept) > 20
    assert {r.split for r in regions} == {"train", "val", "test"}
    assert store.provenance["held_out"] == 0.2
    Image.from_zarr(zarr.open_group(str(image.path), mode="r"))
    Labels.from_zarr(zarr.open_group(str(image.path / "labels"), mode="r"))
    assert store.preview_path(name).is_file() and (out / "summary.md").is_file()


def test_target_resolution_scales_image_and_georeference(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (4, 500, 640), np.uint8)
    path = write_aerial(tmp_path / "m_4709963_se_14_1_2010.tif", pixels, 0.6)
    out = tmp_path / "o.zarr"
    assert ingest(path, "--out", out, "--gsd", 1.2, "--region", "auto", "--cluster", "inline") == 0
    store = Store.open(out)
    (name,) = store.image_ids()
    image = store.image(name)
    assert (image.shape, image.spacing, image.unit) == ((4, 250, 320), 1.2, "meter")
    means = pixels.reshape(4, 250, 2, 320, 2).mean(axis=(2, 4))
    assert np.array_equal(image.read(0, 0, 250, 320), np.floor(means + 0.5).astype(np.uint8))
    wanted = [1.2, 0, 4e5, 0, -1.2, 4e6]
    assert image.attributes["spatial:transform"] == pytest.approx(wanted)
    assert store.mask_kind(name) == "valid" and store.mask(name, 0, 0, 250, 320).all()
    assert store.spec.region == 128
    assert store.image_states()[name]["group"] == "quarter-quad 4709963_se"


def test_killed_and_run_again_equals_undisturbed_and_repeats_nothing(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "s.tif", draw_slide(4400, 8600))
    killed, calm = tmp_path / "killed.zarr", tmp_path / "calm.zarr"
    options = ["--region", "1024", "--workers", "2"]
    command = [sys.executable, "-m", "pipeline.ingest", str(slide), "--out", str(killed), *options]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        while not finished_shards(killed) and first.poll() is None:
            time.sleep(0.01)
        assert first.poll() is None, "the ingest ended before it could be killed"
        os.kill(first.pid, signal.SIGKILL)
    while _workers_of(killed):
        time.sleep(0.1)
    survivors = {p: p.stat().st_mtime_ns for p in finished_shards(killed)}
    assert 0 < len(survivors) < 6
    assert (killed / ".ingest.lock").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in survivors} == survivors
    assert not list(killed.rglob("*.partial"))
    assert ingest(slide, "--out", calm, *options, "--cluster", "inline") == 0
    ours, theirs = pixels_of(killed), pixels_of(calm)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert Store.open(killed).regions() == Store.open(calm).regions()
    shards = {p: p.stat().st_mtime_ns for p in killed.rglob("images/**/c/**/*") if p.is_file()}
    assert ingest(slide, "--out", killed, *options) == 0
    assert {p: p.stat().st_mtime_ns for p in shards} == shards


def finished_shards(store: Path) -> list[Path]:
    """Level-0 shards under their final names."""
    return [p for p in store.glob("images/*/0/c/0/*/*") if p.suffix == ""]


def _workers_of(store: Path) -> list[str]:
    """Processes whose command line names `store`."""
    lines = []
    for item in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = item.read_text()
        except OSError:
            continue
        if str(store) in line:
            lines.append(line)
    return lines


def test_a_bad_slide_does_not_stop_a_good_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    good = write_slide(folder / "good.tif", draw_slide(600, 600))
    write_slide(folder / "no_mpp.tif", draw_slide(600, 601), mpp=None)
    bad_tile = bytearray(write_slide(folder / "bad_tile.tif", draw_slide(600, 602)).read_bytes())
    middle = len(bad_tile) // 2
    bad_tile[middle : middle + 2000] = bytes(2000)
    (folder / "bad_tile.tif").write_bytes(bad_tile)
    (folder / "cut.svs").write_bytes(good.read_bytes()[:20000])
    (folder / "copy of good.tif").write_bytes(good.read_bytes())
    write_slide(folder / "glass.tif", np.full((600, 600, 3), 243, np.uint8))
    out = tmp_path / "o.zarr"
    assert ingest(folder, "--out", out, "--region", "auto", "--cluster", "inline") == 3
    said = capsys.readouterr().out
    assert "has the same content as" in said
    store = Store.open(out)
    assert len(store.image_ids()) == 1 and store.image(store.image_ids()[0]).is_complete()
    states = {Path(s["source"]).name: s for s in store.image_states().values()}
    ends = {name: s["state"] for name, s in states.items()}
    assert ends.pop("copy of good.tif", "ok") == "ok"
    assert ends.pop("good.tif", "ok") == "ok"
    assert ends == {
        "no_mpp.tif": "failed",
        "bad_tile.tif": "failed",
        "cut.svs": "failed",
        "glass.tif": "empty",
    }
    assert "the tile at y=" in states["bad_tile.tif"]["reason"]
    assert states["no_mpp.tif"]["reason"] in said
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mpp", "0.25"], "finest that works is --mpp 0.5"),
        (["--gsd", "1"], "give --mpp"),
        (["--region", "100"], "multiple of 16"),
        (["--region", "1024"], "no image is as large"),
        (["--cluster", "moon"], "must be inline, local, slurm"),
        (["--source-mpp", "90"], "not credible"),
        (["--held-out", "1"], "must lie between 0 and 1"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    slide = write_slide(tmp_path / "s.tif", draw_slide(500, 500))
    defaults = ["--region", "256"] if "--region" not in arguments else []
    assert ingest(slide, "--out", tmp_path / "o.zarr", *defaults, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "s.tif", draw_slide(500, 500))
    assert ingest(slide, "--out", tmp_path / "o.zarr", "--region", "auto", "--dry-run") == 0
    assert not (tmp_path / "o.zarr").exists()


def test_one_coordinator_at_a_time_and_a_dead_one_is_recognised(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        hold_lock(lock),
        pytest.raises(ValueError, match=f"process {os.getpid()} on"),
        hold_lock(lock),
    ):
        pass
    assert not lock.exists()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    holder = {"host": os.uname().nodename, "pid": dead.pid, "since": "yesterday"}
    lock.write_text(json.dumps(holder))
    with hold_lock(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    lock.write_text(json.dumps(holder | {"host": "elsewhere"}))
    with pytest.raises(ValueError, match="elsewhere"), hold_lock(lock):
        pass
    os.utime(lock, (0, 0))
    with hold_lock(lock):
        pass


def test_a_csv_gives_mpp_patient_and_split(tmp_path: Path) -> None:
    for i in range(4):
        write_slide(tmp_path / f"s{i}.tif", draw_slide(400, 400, seed=i), mpp=None)
    rows = ["s0.tif,0.5,p1,val", "s1.tif,0.5,p1,", "s2.tif,0.5,p2,", "s3.tif,0.5,p3,train"]
    (tmp_path / "table.csv").write_text("\n".join(["path,mpp,patient,split", *rows]))
    out = tmp_path / "o.zarr"
    assert (
        ingest(tmp_path / "table.csv", "--out", out, "--region", 128, "--cluster", "inline") == 0
    )
    splits: dict[str, set[str]] = {}
    for region in Store.open(out).regions():
        splits.setdefault(region.image[:2], set()).add(region.split)
    assert splits["s0"] == splits["s1"] == {"val"} and splits["s3"] == {"train"}
    (tmp_path / "table.csv").write_text("path,colour\ns0.tif,red")
    assert ingest(tmp_path / "table.csv", "--out", tmp_path / "p.zarr") == 2


def test_no_group_is_in_two_splits_and_many_groups_stay_where_they_are() -> None:
    regions = [Region(i, f"i{i % 60}", i // 60 * 64, 0, 64, 1.0, "") for i in range(240)]
    groups = {f"i{i}": f"g{i // 2}" for i in range(60)}
    by_group: dict[str, set[str]] = {}
    for region in assign_splits(regions, groups, {})[0]:
        by_group.setdefault(groups[region.image], set()).add(region.split)
    assert all(len(splits) == 1 for splits in by_group.values())
    assert set.union(*by_group.values()) == {"train", "val", "test"}
    names = [f"g{i}" for i in range(200)]
    few, many = split_groups(names[:50]), split_groups(names)
    assert all(many[name] == split for name, split in few.items())
    more = split_groups(names, held_out=0.5)
    assert all(more[name] != "train" for name, split in many.items() if split != "train")
    counts = Counter(more.values())
    assert counts["train"] < 130 and min(counts["val"], counts["test"]) > 30
    assert Counter(split_groups(names[:10], 0.4).values()) == {"train": 6, "val": 2, "test": 2}
    assert set(split_groups(names[:10], 0.0).values()) == {"train"}


def test_one_image_is_split_by_area_with_a_gap() -> None:
    side = 64
    regions = [
        Region(0, "a", y * side, x * 32, side, 1.0, "") for y in range(3) for x in range(20)
    ]
    kept, how = assign_splits(regions, {"a": "a"}, {})
    assert "split by area along x" in how
    spans = {s: [r.x for r in kept if r.split == s] for s in ("train", "val", "test")}
    assert all(spans.values())
    assert max(spans["train"]) + 2 * side <= min(spans["val"])
    assert max(spans["val"]) + 2 * side <= min(spans["test"])


@given(st.data())
def test_a_lone_slide_holds_out_what_was_asked_for_and_leaks_nothing(data: st.DataObject) -> None:
    """Whatever is tissue: no two splits are nearer than a region's side, val and test hold the
    part of what fits, test half of it; and where there is no room for that, all are train.
    """
    side, stride, rows, columns = 64, 32, *(data.draw(st.integers(3, 20)) for _ in range(2))
    tissue = data.draw(
        st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns).filter(any)
    )
    regions = [
        Region(i, "a", i // columns * stride, i % columns * stride, side, 1.0, "")
        for i, passes in enumerate(tissue)
        if passes
    ]
    held_out = data.draw(st.sampled_from([0.1, 0.2, 0.34, 0.5]))
    kept, how = assign_splits(regions, {"a": "a"}, {}, held_out)
    parts = {s: [r for r in kept if r.split == s] for s in ("train", "val", "test")}
    if "all are train" in how:
        assert parts["train"] == kept and len(kept) == len(regions)
        return
    for one, other in itertools.combinations(parts, 2):
        for a, b in itertools.product(parts[one], parts[other]):
            assert max(abs(a.y - b.y), abs(a.x - b.x)) >= 2 * side
    fits = {s: len(beside_one_another(members)) for s, members in parts.items()}
    wanted = held_out * len(beside_one_another(regions))
    assert fits["train"] and fits["val"] and fits["val"] + fits["test"] >= wanted
    assert not parts["test"] or fits["test"] >= wanted / 2
    for members in parts.values():
        for a, b in itertools.combinations(beside_one_another(members), 2):
            assert max(abs(a.y - b.y), abs(a.x - b.x)) >= side


def test_importing_the_ingest_needs_no_torch() -> None:
    code = "import sys, pipeline.ingest, pipeline.work; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_dask_cluster_leaves_no_trace_in_the_environment() -> None:
    """Else torch, imported later in the same process, would be held to one core."""
    before = dict(os.environ)
    with connect("local", 1) as workers:
        workers.submit(os.getpid)
        assert workers.next_result()[1] != os.getpid()
    assert dict(os.environ) == before
