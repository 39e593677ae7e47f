"""What bad input gets: one state and one true sentence each; and the good slide is untouched.

The real files are those of ../shared/data/nasty; the generated ones state the same laws without.
"""

import json
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
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
from pipeline.readers import TileError, UnreadableError, open_reader
from pipeline.sources import find_sources
from pipeline.store import Store
from pipeline.work import Outcome

MOST_MEMORY_GIB = 2.0
# Not ru_maxrss: a process inherits that of the one that started it.
PEAK = (
    "import re, sys; from pipeline.ingest import main; code = main(sys.argv[1:]);"
    "peak = re.search('VmHWM:(.*)kB', open('/proc/self/status').read())[1];"
    "print('peak KiB', peak.strip()); sys.exit(code)"
)
# What is wrong with every file, by a word that its sentence must hold.
SLIDE_TRUTHS = {
    "all_white_2048.tif": "does not say its mpp",
    "deflate_bomb_one_16384_tile_805MB.tif": "tiles of 805 MB",
    "generic_anisotropic_mpp.tif": "pixels of 1 × 0.5 µm",
    "generic_bogus_72dpi_mpp.tif": "72 dots per inch",
    "ifd_loop.tif": "claims 512 × 512 pixels",
    "mpp_garbage.svs": "aperio.MPP is 'abc'",
    "mpp_missing.svs": "does not say its mpp",
    "mpp_nan.svs": "aperio.MPP is 'nan'",
    "one_pixel.tif": "does not say its mpp",
    "one_pixel_high_2048x1.tif": "does not say its mpp",
    "png_bomb_50000x50000.png": "claims 50000 × 50000 pixels",
    "png_named.svs": "does not say its mpp",
    "pyramid_level_bigger_than_base.tif": "does not say its mpp",
    "random_bytes.svs": "data of no known kind",
    "rgb_uint16_tiled.tif": "does not say its mpp",
    "text_named.svs": "is text",
    "tiff_magic_only.svs": "TIFF of 4 bytes",
    "truncated_25pct.svs": "cut off",
    "truncated_95pct.svs": "cut off",
    "zero_byte.mrxs": "0 bytes",
    "zero_byte.ndpi": "0 bytes",
}
# Read for what they are, whatever they look like: a decimal comma, another name, no name, glass.
USABLE = {
    "mpp_decimal_comma.svs",
    "valid_svs_named.jpg",
    "valid_svs_no_extension",
    "background_only_4096_real_glass.svs",
}


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


@pytest.mark.timeout(180)
def test_every_nasty_slide_ends_in_one_true_sentence(shared_data: Path, tmp_path: Path) -> None:
    folder, good = tmp_path / "slides", "0 good.svs"
    folder.mkdir()
    for path in (shared_data / "nasty" / "slides").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / good).symlink_to(shared_data / "slides" / "CMU-1-Small-Region.svs")
    alone, mixed = tmp_path / "alone.zarr", tmp_path / "mixed.zarr"
    options = ("--region", "auto", "--mpp", "0.5037")
    assert ingest(folder / good, "--out", alone, "--cluster", "inline", *options) == 0
    code, said, peak_gib = ingest_measured(folder, "--out", mixed, *options)
    assert code == 3 and "Traceback" not in said, said
    assert peak_gib < MOST_MEMORY_GIB
    check_good_is_untouched(mixed, alone, good)
    states = list(Store.open(mixed).image_states().values())
    failed = {Path(s["source"]).name: s["reason"] for s in states if s["state"] == "failed"}
    assert failed.keys() == SLIDE_TRUTHS.keys()
    for name, truth in SLIDE_TRUTHS.items():
        assert truth in failed[name] and name in failed[name]
        assert "\n" not in failed[name]
        assert said.count(f"failed: {failed[name]}\n") == 1
    same = {"valid_svs_named.jpg", "valid_svs_no_extension"}
    assert {Path(s["source"]).name for s in states} == ({good, *SLIDE_TRUTHS, *USABLE} - same)
    assert all(f"{folder / name} has the same content as" in said for name in same)
    assert {p.name for p in (shared_data / "nasty" / "slides").iterdir()} == (
        SLIDE_TRUTHS.keys() | USABLE
    )


@pytest.mark.timeout(180)
def test_nasty_slides_whose_mpp_is_given_break_nothing(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pixel, one row, white, a pyramid upside down: each is ok or empty, and no task dies."""
    folder, out = tmp_path / "slides", tmp_path / "o.zarr"
    folder.mkdir()
    for name in sorted(n for n, truth in SLIDE_TRUTHS.items() if "mpp" in truth.lower()):
        (folder / name).symlink_to(shared_data / "nasty" / "slides" / name)
    odd = folder / "rgb_uint16_tiled.tif"
    command = (folder, "--out", out, "--region", "auto", "--source-mpp", "0.5")
    assert ingest(*command, "--cluster", "inline") == 2
    said = capsys.readouterr().err
    assert "one store holds one kind" in said and odd.name in said
    odd.unlink()
    code, said, peak_gib = ingest_measured(*command)
    assert (code, "Traceback" in said) == (0, False) and peak_gib < MOST_MEMORY_GIB
    ends = {Path(s["source"]).name: s["state"] for s in Store.open(out).image_states().values()}
    assert ends.pop("all_white_2048.tif") == "empty"
    assert len(ends) >= 6 and set(ends.values()) <= {"ok", "empty"}


@pytest.mark.timeout(120)
def test_nasty_aerial_images_do_not_stop_a_good_one(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, nasty = tmp_path / "aerial", shared_data / "nasty" / "geotiff"
    folder.mkdir()
    assert ingest(nasty, "--out", tmp_path / "x.zarr", "--region", "auto") == 2
    assert "here are 3" in capsys.readouterr().err
    for path in nasty.iterdir():
        try:
            with open_reader(path) as reader:
                fits = (len(reader.bands), reader.dtype, reader.spacing) == (4, "uint8", 5.0)
        except UnreadableError:
            fits = True
        if fits:
            (folder / path.name).symlink_to(path)
    out = tmp_path / "o.zarr"
    code, said, peak_gib = ingest_measured(folder, "--out", out, "--region", "auto")
    assert code == 3 and "Traceback" not in said and peak_gib < MOST_MEMORY_GIB
    states = {Path(s["source"]).name: s for s in Store.open(out).image_states().values()}
    assert states["ok_rgbn_uint8.tif"]["state"] == "ok"
    assert "tile at y=248, x=0" in states["truncated_99pct.tif"]["reason"]
    assert {s["state"] for s in states.values()} == {"ok", "failed"}


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
    return {
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
    (folder / "good.svs").unlink()
    assert ingest(folder, "--out", tmp_path / "none.zarr", *options) == 2
    said = capsys.readouterr().err
    assert f"none of {len(truths)} inputs can be used" in said
    assert all(state["reason"] in said for state in states.values())
    assert not (tmp_path / "none.zarr").exists()


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
    payload = bytearray((base / BASE).read_bytes())
    for place, value in changes:
        payload[place % len(payload)] = value
    damaged = base / "damaged.tif"
    damaged.write_bytes(payload)
    try:
        with open_reader(damaged, source_mpp=0.5) as reader:
            height, width = (min(side, 300) for side in reader.shape[1:])
            reader.read(0, 0, height, width)
    except (UnreadableError, TileError) as error:
        assert damaged.name in str(error)


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
