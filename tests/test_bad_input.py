"""What bad input gets: one state and one true sentence each; and the good slide is untouched.

These files are generated; test_nasty_folder.py does the same with real ones.
"""

import json
import re
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from damage import read_damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_ingest import pixels_of
from processes import tree
from test_ingest import ROOT, draw_slide, ingest, write_aerial, write_slide

import pipeline.coordinate
from pipeline import console
from pipeline.cluster import InlineWorkers
from pipeline.coordinate import run_jobs
from pipeline.ome import MissingShardError
from pipeline.plan import make_plan
from pipeline.readers import open_reader
from pipeline.store import Store
from pipeline.table import find_sources
from pipeline.work import Outcome

MOST_MEMORY_GIB = 2.0
# Not ru_maxrss: a process inherits that of the one that started it.
PEAK = (
    "import re, sys; from pipeline.ingest import main; code = main(sys.argv[1:]);"
    "peak = re.search('VmHWM:(.*)kB', open('/proc/self/status').read())[1];"
    "print('peak KiB', peak.strip()); sys.exit(code)"
)


def ingest_measured(*arguments: object) -> tuple[int, str, float]:
    """An ingest in a process of its own: exit code, all it said, peak memory in GiB."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments), "--cluster", "inline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    return done.returncode, said, int(said.rsplit("peak KiB", 1)[1].split()[0]) / 2**20


def check_good_is_untouched(folder: Path, alone: Path, good: str) -> None:
    """The good image of a mixed store is byte for byte that of a store of its own."""
    mixed, own = Store.open(folder), Store.open(alone)
    (name,) = own.image_ids()
    assert mixed.image(name).is_complete()
    assert tree(mixed.image_path(name)).keys() == tree(own.image_path(name)).keys()
    ours, theirs = pixels_of(mixed.image_path(name)), pixels_of(own.image_path(name))
    assert all(np.array_equal(ours[place], theirs[place]) for place in theirs)
    assert np.array_equal(mixed.coverage(name), own.coverage(name))
    assert Path(mixed.image_state(name)["source"]).name == good  # type: ignore[index]


def generated(folder: Path) -> dict[str, str]:
    """Bad files of many kinds, each with a part of the sentence that is true of it."""
    pixels = draw_slide(600, 520)
    good = write_slide(folder / "good.svs", pixels).read_bytes()
    (folder / "empty.ndpi").write_bytes(b"")
    (folder / "text.svs").write_text("slide, but only in words: µm\n")
    (folder / "random.tif").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "magic.svs").write_bytes(good[:4])
    (folder / "zip.tif").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (folder / "bomb.png").write_bytes(png_header(50_000, 50_000))
    write_slide(folder / "no mpp.tif", pixels, mpp=None)
    write_slide(folder / "dpi.tif", pixels, mpp=25400 / 96)
    write_slide(folder / "far.tif", pixels, mpp=0.01)
    bomb: dict[str, Any] = {"tile": (9600, 9600), "compression": "zlib", "photometric": "rgb"}
    with tifffile.TiffWriter(folder / "bomb.tif") as tiff:
        one = zlib.compress(bytes(9600 * 9600 * 3), 1)
        tiff.write(iter([one]), shape=(9600, 9600, 3), dtype=np.uint8, **bomb)
    stored: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "metadata": None}
    resolution = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "cut.tif", pixels, **stored, **resolution)
    whole = (folder / "cut.tif").read_bytes()
    (folder / "cut.tif").write_bytes(whole[:-1000])
    um: dict[str, Any] = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    planes = np.stack([pixels[..., 0]] * 4)
    stains = {"Channel": {"Name": ["DAPI", "FITC", "Cy3", "Cy5"]}}
    tifffile.imwrite(folder / "stains.ome.tif", planes, metadata={"axes": "CYX", **stains, **um})
    tifffile.imwrite(folder / "depth.ome.tif", planes, metadata={"axes": "ZYX", **um})
    claim = {"tile": (512, 512), "photometric": "rgb", "compression": "jpeg"}
    picture = folder / "picture.ome.tif"
    tifffile.imwrite(picture, pixels, metadata={"axes": "YXS", **um}, **claim)
    lie = bytearray(picture.read_bytes())
    size = lie.rindex(b"\xff\xc0") + 5
    lie[size : size + 4] = b"\xff\xff\xff\xff"
    picture.write_bytes(lie)
    remote = "<SourceFilename>/vsicurl/http://192.0.2.1/a.tif</SourceFilename>"
    (folder / "remote.vrt").write_text(
        f'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand band="1"><SimpleSource>'
        f"{remote}</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    (folder / "gone.tif").symlink_to(folder / "nowhere.tif")
    return {
        "stains.ome.tif": "4 channel(s) (dapi, fitc, cy3, cy5)",
        "depth.ome.tif": "4 planes in depth",
        "picture.ome.tif": "its picture claims 65535 × 65535 pixels",
        "remote.vrt": "points to '/vsicurl/http://192.0.2.1/a.tif'",
        "gone.tif": "is not a file",
        "empty.ndpi": "0 bytes",
        "text.svs": "is text",
        "random.tif": "data of no known kind",
        "magic.svs": "TIFF of 4 bytes",
        "zip.tif": "a ZIP archive",
        "damaged.png": "a damaged PNG or JPEG",
        "bomb.png": "claims 50000 × 50000 pixels",
        "no mpp.tif": "--source-mpp",
        "dpi.tif": "96 dots per inch",
        "far.tif": "not credible",
        "bomb.tif": "MB are decoded",
        "cut.tif": "tile at y=512, x=512 would end",
    }


def png_header(height: int, width: int) -> bytes:
    """A PNG of a claim and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + pixels


def test_generated_bad_files_each_end_in_one_true_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    truths = generated(folder)
    alone, mixed = tmp_path / "alone.zarr", tmp_path / "mixed.zarr"
    options = ("--region", "auto", "--cluster", "inline")
    assert ingest(folder / "good.svs", "--out", alone, *options) == 0
    code, said, peak_gib = ingest_measured(folder, "--out", mixed, "--region", "auto")
    assert code == 3 and "Traceback" not in said, said
    assert peak_gib < MOST_MEMORY_GIB
    check_good_is_untouched(mixed, alone, "good.svs")
    states = {Path(s["source"]).name: s for s in Store.open(mixed).image_states().values()}
    assert states.pop("good.svs")["state"] == "ok"
    assert states.keys() == truths.keys()
    for name, truth in truths.items():
        assert truth in states[name]["reason"] and name in states[name]["reason"]
    for name in ("good.svs", "picture.ome.tif"):  # what only fails when its pixels are read
        (folder / name).unlink()
    del truths["picture.ome.tif"], states["picture.ome.tif"]
    assert ingest(folder, "--out", tmp_path / "none.zarr", *options) == 2
    said = capsys.readouterr().err
    assert f"none of {len(truths)} inputs can be used" in said
    assert all(state["reason"] in said for state in states.values())
    assert not (tmp_path / "none.zarr").exists()


NAMES = (
    "..",
    ".. ..",
    "..%2F..%2Fescaped",
    "../" * 3,
    " spaces  and\ttabs ",
    "Prälevé № 7 – ß漢字🧬",
    "-rf *",
    "a" * 251,
    "é" * 125,
    "new\nline",
    "$(touch gone) `id` ; 'quote\"",
    "CON",
)


def test_no_name_of_a_file_leads_out_of_the_store(tmp_path: Path) -> None:
    """Dots, spaces, other alphabets, 255 bytes: each is an image of its own, of a name that is
    safe, and nothing else comes to be anywhere.
    """
    folder, out = tmp_path / "in" / "deep" / "slides", tmp_path / "out" / "o.zarr"
    folder.mkdir(parents=True)
    out.parent.mkdir()
    names = [f"{name.replace('/', '∕')}.tif" for name in NAMES]
    assert max(len(name.encode()) for name in names) >= 254
    for i, name in enumerate(names):
        write_slide(folder / name, draw_slide(270, 280 + i))
    (folder / "sub").mkdir()
    write_slide(folder / "sub" / names[-1], draw_slide(270, 279))
    hidden = [folder / name for name in names if name.startswith(".")]  # only when named
    assert len(hidden) == 4
    before = {p for p in tmp_path.rglob("*") if not p.is_relative_to(out)}
    command = (folder, *hidden, "--out", out, "--region", "auto", "--cluster", "inline")
    assert ingest(*command) == 0
    assert {p for p in tmp_path.rglob("*") if not p.is_relative_to(out)} == before
    states = Store.open(out).image_states()
    assert {s["state"] for s in states.values()} == {"ok"} and len(states) == len(names) + 1
    assert sorted(Path(s["source"]).name for s in states.values()) == sorted([*names, names[-1]])
    for image in states:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,57}", image)
    inside = {p.relative_to(out).parts for p in out.rglob("*")}
    assert {parts[1] for parts in inside if parts[0] == "images" and len(parts) > 1} == {
        *states,
        "zarr.json",
    }
    assert ingest(*command) == 0 and Store.open(out).image_states() == states


BASE = "base.tif"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small good slide, whose header comes first in the file."""
    folder = tmp_path_factory.mktemp("mutated")
    write_slide(folder / BASE, draw_slide(300, 280))
    return folder


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 449), st.sampled_from([0, 1, 127, 255])), min_size=1))
def test_no_damage_to_a_header_is_more_than_a_refusal(
    base: Path, changes: list[tuple[int, int]]
) -> None:
    read_damaged(base / BASE, changes)


def test_a_folder_is_searched_by_name_and_what_has_no_ending_by_content(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slide.jpg", draw_slide(300, 280))
    payload = slide.read_bytes()
    (tmp_path / "no_ending").write_bytes(payload)
    (tmp_path / "slide.tif.aux").write_bytes(payload)
    (tmp_path / ".hidden.tif").write_bytes(payload)
    (tmp_path / "README").write_text("not a slide")
    found = [source.path.name for source in find_sources([str(tmp_path)], None, None)]
    assert found == ["no_ending", "slide.jpg"]
    named = find_sources([str(tmp_path / "slide.tif.aux")], None, None)
    with open_reader(named[0].path) as reader:
        assert reader.spacing == 0.5


def test_a_mixture_is_refused_and_sorted_out_for_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = [write_slide(tmp_path / f"s{i}.tif", draw_slide(300, 281 + i)) for i in range(5)]
    aerial = write_aerial(tmp_path / "z.tif", np.full((4, 300, 300), 9, np.uint8), 0.6)
    out = tmp_path / "o.zarr"
    assert ingest(tmp_path, "--out", out, "--region", "auto", "--cluster", "inline") == 2
    said = capsys.readouterr().err
    assert "here are 2" in said and "and 2 more" in said
    assert f"a slide, red green blue, uint8: {slides[0]}" in said
    assert f"aerial, red green blue nir, uint8: {aerial}" in said
    assert not out.exists()
    assert ingest(slides[0], "--out", out, "--region", "auto", "--cluster", "inline") == 0
    assert ingest(aerial, "--out", out, "--region", "auto", "--cluster", "inline") == 2
    assert str(out) in capsys.readouterr().err


def test_a_task_that_dies_takes_no_other_image_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small images share a task. Here every task that holds one of them dies, as by a lack of
    memory.
    """
    paths = [write_slide(tmp_path / f"s{i}.tif", draw_slide(300, 290 + i)) for i in range(3)]
    plan = make_plan([str(p) for p in paths], None, None, None, None, 0, None)
    store = Store.create(tmp_path / "o.zarr", plan.spec)
    honest = pipeline.coordinate.ingest_images

    def ingest_images(store_path: Path, jobs: list[Any]) -> list[Outcome]:
        if any(job.source.path == paths[1] for job in jobs):
            raise MemoryError("killed")
        return honest(store_path, jobs)

    monkeypatch.setattr(pipeline.coordinate, "ingest_images", ingest_images)
    outcomes = list(run_jobs(store, plan.jobs, InlineWorkers()))
    states = {Path(s["source"]).name: s for s in store.image_states().values()}
    ends = {name: state["state"] for name, state in states.items()}
    assert ends == {"s0.tif": "ok", "s1.tif": "failed", "s2.tif": "ok"}
    assert "MemoryError: killed" in states["s1.tif"]["reason"]
    assert len(outcomes) == 3


@dataclass(frozen=True)
class NoOptions:
    """A command that takes nothing."""


def test_a_lost_shard_is_a_sentence_and_the_ingest_writes_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, out = write_slide(tmp_path / "s.tif", draw_slide(600, 600)), tmp_path / "o.zarr"
    command = (slide, "--out", out, "--region", "256", "--cluster", "inline")
    assert ingest(*command) == 0
    store = Store.open(out)
    (name,) = store.image_ids()
    before = tree(store.image_path(name))
    lost = next(p for p in store.image_path(name).glob("0/c/0/*/*") if p.is_file())
    lost.unlink()
    with pytest.raises(MissingShardError, match="run the command that makes this image again"):
        store.image(name).read(0, 0, 10, 10)

    def body(options: NoOptions) -> int:
        return int(store.image(name).read(0, 0, 10, 10).max())

    assert console.run(NoOptions, body, [], prog="look") == console.EXIT_USAGE
    assert capsys.readouterr().err.startswith("look: shard (0, 0) of level 0 of ")
    assert ingest(*command) == 0
    assert tree(store.image_path(name)) == before
    lines = (out / "images.jsonl").read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["ok"]
