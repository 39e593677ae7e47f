"""All files that were made to break readers in one folder with good ones: each ends in one state
with one true sentence, the good ones as if they were alone; nobody is asked on the network,
nothing is written outside the store, no process grows.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import rasterio
from rasterio.enums import ColorInterp
from test_bad_input import ingest_measured
from test_indirect import SERVICE, server, vrt
from test_ingest import ROOT, ingest, pixels_of

from pipeline.store import Store

__all__ = ["server"]

MOST_MEMORY_BYTES = 2 << 30
# What is wrong with every file, by words that its sentence must hold.
WRONG = {
    "all_white_2048.tif": "does not say its mpp",
    "deflate_bomb_one_16384_tile_805MB.tif": "tiles of 805 MB",
    "generic_anisotropic_mpp.tif": "pixels of 1 × 0.5 µm",
    "generic_bogus_72dpi_mpp.tif": "72 dots per inch",
    "ifd_loop.tif": "claims 512 × 512 pixels and holds none",
    "mpp_garbage.svs": "aperio.MPP is 'abc'",
    "mpp_missing.svs": "does not say its mpp",
    "mpp_nan.svs": "aperio.MPP is 'nan'",
    "slides one_pixel.tif": "does not say its mpp",
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
    "antimeridian_4326.tif": "is in degrees (EPSG:4326)",
    "crs_but_no_transform.tif": "has no transform",
    "gcps_only.tif": "does not say its gsd",
    "geographic_4326.tif": "is in degrees (EPSG:4326)",
    "gray_1band.tif": "has 1 band(s) of colour",
    "int8.tif": "values of type int8",
    "multipage_subdatasets.tif": "has 1 band(s) of colour",
    "no_crs.tif": "has no coordinate system",
    "no_crs_no_transform.tif": "does not say its gsd",
    "non_square_pixels_5x2.5m.tif": "pixels of 2.5 × 5 m",
    "one_bit.tif": "has 1 band(s) of colour",
    "sheared.tif": "has sheared pixels",
    "text_named.tif": "is text",
    "truncated_99pct.tif": "tile at y=248, x=0 would end at 196185",
    "uint32.tif": "values of type uint32",
    "vrt_missing_source.vrt": "points to 'does_not_exist.tif'",
    "geotiff zero_byte.tif": "0 bytes",
}
SLIDES = {
    "mpp_decimal_comma.svs",
    "background_only_4096_real_glass.svs",
    "valid_svs_named.jpg",
    "valid_svs_no_extension",
}
THREE_BANDS = {"external_mask.tif", "jpeg_ycbcr_rgb.tif"}
MANY_BANDS = {"thirteen_band.tif"}
SIXTEEN_BITS = {
    *("big_endian.tif", "scale_offset.tif", "uint16_12bit_range.tif", "uint16_full.tif"),
    "uint16_nbits12.tif",
}
RGBN = {
    *("band_interleaved.tif", "bigtiff.tif", "compress_lerc_deflate.tif", "compress_lzma.tif"),
    *("compress_lzw.tif", "compress_packbits.tif", "compress_zstd.tif", "jpeg_4band.tif"),
    *("nir_mislabelled_alpha.tif", "nodata_unset_black_border.tif", "ok_rgbn_uint8.tif"),
    *("nrgb_by_band_description.tif", "overviews_inconsistent.tif", "pixel_is_point.tif"),
    *("rotated_30deg.tif", "smaller_than_patch_100x60.tif", "south_up.tif", "tiled_16x16.tif"),
    *("us_survey_feet_2264.tif", "geotiff one_pixel.tif"),
}
# Not looked for in a folder: GDAL reads it with the image that it is the mask of.
SIDECARS = {"external_mask.tif.msk"}
GOOD = {"0 good slide.svs": "slides/CMU-1-Small-Region.svs"} | {
    f"0 good {name}": f"naip/chips/{name}" for name in ("chico_2018_0.tif", "eureka_2020_3.tif")
}
# Loaded by every process of the run: whoever asks for another machine is written down.
WATCH = """
import os, sys

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        if not str(arguments[1][0]).startswith(("127.", "::1", "localhost")):
            log(arguments[1])
    elif event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost"):
        log(arguments[0])

def log(what):
    with open(os.environ["WATCHED"], "a") as stream:
        print(what, file=stream)

sys.addaudithook(watch)
"""


def gather(shared_data: Path, folder: Path) -> None:
    """Links to all bad and good files in one folder; of equal names, with the kind before them."""
    folder.mkdir()
    bad = [p for p in sorted((shared_data / "nasty").rglob("*")) if p.is_file()]
    names = [p.name for p in bad]
    for path in bad:
        stem = path.stem in ("one_pixel", "zero_byte") and path.suffix == ".tif"
        name = f"{path.parent.name} {path.name}" if stem else path.name
        (folder / name).symlink_to(path)
    assert len(names) == len(list(folder.iterdir()))
    for name, source in GOOD.items():
        (folder / name).symlink_to(shared_data / source)


def lay_out(tmp_path: Path) -> None:
    """What `run_watched` needs: a home, a working directory, a place for temporary files."""
    for name in ("hooks", "home", "scratch", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(WATCH)


def run_watched(tmp_path: Path, arguments: list[object]) -> tuple[int, str, dict[int, int]]:
    """An ingest with two workers: exit code, what it said, and the peak memory in bytes of each of
    its processes.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "hooks"), str(ROOT)]),
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "scratch"),
        "WATCHED": str(tmp_path / "scratch" / "watched.txt"),
    }
    command = [sys.executable, "-m", "pipeline.ingest", *map(str, arguments), "--workers", "2"]
    said = tmp_path / "scratch" / "said.txt"
    peaks: dict[int, int] = {}
    with said.open("w") as stream:
        process = psutil.Popen(
            command, cwd=tmp_path / "here", env=environment, stdout=stream, stderr=stream
        )
        deadline = time.monotonic() + 150
        while process.poll() is None:
            assert time.monotonic() < deadline, "the ingest hangs"
            try:
                for one in [process, *process.children(recursive=True)]:
                    status = Path(f"/proc/{one.pid}/status").read_text()
                    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
                    if peak:
                        peaks[one.pid] = int(peak[1]) << 10
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                pass
            time.sleep(0.05)
    assert not (tmp_path / "scratch" / "watched.txt").exists()
    return process.returncode, said.read_text(), peaks


def everything(folder: Path, *but: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder, leaving some folders out."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not any(path.is_relative_to(left_out) for left_out in but)
    }


def check_equal(mixed: Store, alone: Store) -> None:
    """The images of a store of their own are in the mixed one, array by array and byte by byte."""
    for name in alone.image_ids():
        assert mixed.image(name).is_complete()
        ours, theirs = (pixels_of(store.image_path(name)) for store in (mixed, alone))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[place], theirs[place]) for place in theirs)
        assert np.array_equal(mixed.coverage(name), alone.coverage(name))
        files = [
            {p.relative_to(store.image_path(name)): p.read_bytes() for p in chunks(store, name)}
            for store in (mixed, alone)
        ]
        assert files[0] == files[1]


def chunks(store: Store, name: str) -> list[Path]:
    return [p for p in store.image_path(name).rglob("*") if p.is_file() and p.parent.name != name]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("asked", ["--mpp", "--gsd"])
def test_every_bad_file_ends_in_one_true_sentence_and_no_good_one_is_touched(
    shared_data: Path, tmp_path: Path, server: tuple[str, list[str]], asked: str
) -> None:
    url, requests = server
    folder, out, alone = tmp_path / "all", tmp_path / "o.zarr", tmp_path / "alone.zarr"
    gather(shared_data, folder)
    (folder / "remote.vrt").write_text(vrt(f"/vsicurl/{url}/a.tif"))
    (folder / "service.vrt").write_text(vrt(SERVICE.format(url)))
    (folder / "nested.vrt").write_text(vrt("service.vrt", relative=1))
    wrong = WRONG | dict.fromkeys(("remote.vrt", "service.vrt", "nested.vrt"), "points to")
    if asked == "--mpp":
        options, usable = ["--mpp", "0.5037"], {*SLIDES, "0 good slide.svs"}
        other_kind = dict.fromkeys(THREE_BANDS | MANY_BANDS | SIXTEEN_BITS | RGBN, "is aerial")
        other_kind |= dict.fromkeys(GOOD.keys() - usable, "is aerial")
    else:
        options, usable = ["--gsd", "5"], RGBN | (GOOD.keys() - {"0 good slide.svs"})
        other_kind = dict.fromkeys((*SLIDES, "0 good slide.svs"), "is a slide")
        other_kind |= dict.fromkeys(THREE_BANDS, "is aerial, red green blue, uint8")
        other_kind |= dict.fromkeys(MANY_BANDS, "is aerial, ")
        other_kind |= dict.fromkeys(SIXTEEN_BITS, "is aerial, red green blue nir, uint16")
    good = [folder / name for name in sorted(usable) if name in GOOD or asked == "--gsd"]
    options += ["--region", "auto"]
    assert ingest(*good, "--out", alone, *options, "--cluster", "inline") == 0
    lay_out(tmp_path)
    before = everything(tmp_path, out, tmp_path / "scratch")
    code, said, peaks = run_watched(tmp_path, [folder, "--out", out, *options])
    assert everything(tmp_path, out, tmp_path / "scratch") == before
    assert code == 3 and "Traceback" not in said, said
    assert len(peaks) >= 3 and max(peaks.values()) < MOST_MEMORY_BYTES, peaks
    assert requests == []
    store = Store.open(out)
    check_equal(store, Store.open(alone))
    states = list(store.image_states().values())
    ends = {Path(s["source"]).name: s for s in states}
    assert len(ends) == len(states)
    told_twice = {name for name in {p.name for p in folder.iterdir()} - ends.keys() - SIDECARS}
    for name in told_twice:
        assert f"{folder / name} has the same content as" in said
    assert told_twice <= SLIDES | {"0 good slide.svs"} and len(told_twice) == 2
    expected = {**wrong, **other_kind}
    failed = {name for name, s in ends.items() if s["state"] == "failed"}
    assert failed == expected.keys() - told_twice
    assert ends.keys() - failed == usable - told_twice
    for name in failed:
        reason = ends[name]["reason"]
        assert expected[name] in reason and name in reason and "\n" not in reason, reason
        assert reason[-1] != "." and 5 < len(reason.split()) < 90
        assert said.count(f"failed: {reason}\n") == 1
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert len(lines) == len(states)


@pytest.mark.timeout(180)
def test_nasty_slides_whose_mpp_is_given_break_nothing(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pixel, one row, white, a pyramid upside down: each is ok or empty, and no task dies."""
    folder, out = tmp_path / "slides", tmp_path / "o.zarr"
    folder.mkdir()
    for path in (shared_data / "nasty" / "slides").iterdir():
        name = path.name if path.name in WRONG else f"slides {path.name}"
        if "mpp" in WRONG.get(name, "").lower():
            (folder / path.name).symlink_to(path)
    odd = folder / "rgb_uint16_tiled.tif"
    command = (folder, "--out", out, "--region", "auto", "--source-mpp", "0.5")
    assert ingest(*command, "--cluster", "inline") == 2
    said = capsys.readouterr().err
    assert "one store holds one kind" in said and odd.name in said
    odd.unlink()
    code, said, peak_gib = ingest_measured(*command)
    assert (code, "Traceback" in said) == (0, False) and peak_gib < 2
    ends = {Path(s["source"]).name: s["state"] for s in Store.open(out).image_states().values()}
    assert ends.pop("all_white_2048.tif") == "empty"
    assert len(ends) >= 6 and set(ends.values()) <= {"ok", "empty"}


def test_chips_whose_fourth_band_is_called_alpha_keep_their_near_infrared(
    shared_data: Path, tmp_path: Path
) -> None:
    """Also in the store: what the file holds in all four bands, whatever it calls the fourth."""
    chips = []
    for path in sorted((shared_data / "naip" / "chips").glob("*.tif")):
        with rasterio.open(path) as raw:
            if raw.colorinterp[3] == ColorInterp.alpha:
                chips.append(path)
    assert len(chips) > 15
    out, some = tmp_path / "o.zarr", chips[::5]
    assert ingest(*some, "--out", out, "--region", "128", "--cluster", "inline") == 0
    store = Store.open(out)
    assert store.spec.bands == ("red", "green", "blue", "nir") and len(store.image_ids()) >= 4
    for name, state in store.image_states().items():
        with rasterio.open(state["source"]) as raw:
            pixels = raw.read()
        assert np.array_equal(store.image(name).read(0, 0, *pixels.shape[1:]), pixels)
        valid = store.mask(name, 0, 0, *pixels.shape[1:])
        assert np.array_equal(valid, (pixels != 0).any(axis=0))
