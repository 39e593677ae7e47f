"""Painting: kills, tiles and exports change nothing in the image."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile
from chain import EVEN_SHARES, Chain, succeed, train_arguments
from openslide import OpenSlide
from PIL import Image
from processes import run, start, stop_when

import jobs.sample
import jobs.train
from jobs.evaluate.metrics import (
    LayoutMatch,
    layout_distances,
    region_thumbnails,
    thumbnail,
)
from jobs.info.describe import describe_image
from jobs.run import Run
from model.cascade.config import CascadeConfig
from pipeline.ome import OmeImage
from pipeline.store import Store

STEPS = 4


@pytest.fixture(scope="module")
def trained(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    succeed(jobs.train.main(train_arguments(chain, folder, 8, *EVEN_SHARES)))
    return folder


def arguments(chain: Chain, trained: Path, out: Path, *more: str) -> list[str]:
    condition = ["--condition", str(chain.store), "--out", str(out), "--steps", str(STEPS)]
    return [str(trained), *condition, "--region", "3", "--precision", "fp32", *more]


def painted(out: Path) -> OmeImage:
    (folder,) = out.glob("*.zarr")
    return OmeImage.open(folder)


def pixels(out: Path) -> np.ndarray:
    image = painted(out)
    return image.read(0, 0, *image.shape[1:])


@pytest.fixture(scope="module")
def undisturbed(chain: Chain, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("painted")
    formats = ["--format", "ome-tiff", "tiff"]
    assert jobs.sample.main(arguments(chain, trained, out, "--size", "512", *formats)) == 0
    return out


def test_the_image_opens_everywhere_with_its_pixel_size(undisturbed: Path) -> None:
    image = painted(undisturbed)
    assert image.shape == (3, 512, 512)
    (ome,) = undisturbed.glob("*.ome.tif")
    with tifffile.TiffFile(ome) as file:
        assert file.is_ome
        assert file.ome_metadata is not None
        assert 'PhysicalSizeX="0.5"' in file.ome_metadata
        for level, series in enumerate(file.series[0].levels):
            _, h, w = image.level_shape(level)
            expected = image.read(0, 0, h, w, level).transpose(1, 2, 0)
            np.testing.assert_array_equal(series.asarray(), expected)
    (plain,) = [p for p in undisturbed.glob("*.tif") if not p.name.endswith(".ome.tif")]
    with OpenSlide(plain) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert slide.level_count == image.num_levels
        shown = np.asarray(slide.read_region((0, 0), 0, (512, 512)).convert("RGB"))
    np.testing.assert_array_equal(shown, pixels(undisturbed).transpose(1, 2, 0))
    assert not list(undisturbed.glob(".work-*"))


@pytest.mark.parametrize("tile", ["64", "208"])
def test_tiles_change_nothing(
    chain: Chain, trained: Path, undisturbed: Path, tmp_path: Path, tile: str
) -> None:
    command = arguments(chain, trained, tmp_path, "--size", "512", "--format", "zarr")
    assert jobs.sample.main([*command, "--tile", tile]) == 0
    difference = pixels(tmp_path).astype(int) - pixels(undisturbed)
    assert abs(difference).max() <= 1  # float32 sums in another order, then rounded


def test_a_killed_painting_ends_like_an_undisturbed_one(
    chain: Chain, trained: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = arguments(chain, trained, tmp_path, "--size", "512", "--format", "zarr")

    def steps_done() -> int:
        states = list(tmp_path.glob(".work-*/state.json"))
        return sum(json.loads(states[0].read_text())["passes"].values()) if states else 0

    stop_when(start("jobs.sample", command), lambda: steps_done() >= 1, signal.SIGKILL)
    assert 1 <= steps_done() <= 5 * STEPS
    run("jobs.sample", command)
    difference = pixels(tmp_path).astype(int) - pixels(undisturbed)
    assert abs(difference).max() <= 1
    assert "already done" in run("jobs.sample", command)


def test_sizes_that_are_no_multiple_of_the_coarse_cell_are_cut(
    chain: Chain, trained: Path, tmp_path: Path
) -> None:
    """A smaller image is a crop only of its field; it has exactly the pixels asked for."""
    command = arguments(chain, trained, tmp_path, "--size", "300x170", "--format", "ome-tiff")
    assert jobs.sample.main(command) == 0
    assert painted(tmp_path).shape == (3, 300, 170)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_preview_is_the_area_means_of_the_image(
    chain: Chain, trained: Path, undisturbed: Path, tmp_path: Path, level: int
) -> None:
    """Stopped after a block, or reduced where none ends at that scale."""
    more = ["--format", "zarr", "--size", "512", "--scale", str(2.0**-level)]
    assert jobs.sample.main(arguments(chain, trained, tmp_path, *more)) == 0
    small, large, side = painted(tmp_path), painted(undisturbed), 512 >> level
    assert small.spacing == large.spacing * 2**level
    # Rounding and clipping to 8 bits come after the means here and before them there.
    fine = large.read(0, 0, 512, 512).reshape(3, side, 1 << level, side, 1 << level)
    inside = (fine % 255 != 0).all(axis=(2, 4))
    difference = small.read(0, 0, side, side) - fine.mean(axis=(2, 4))
    assert inside.mean() > 0.2
    assert abs(difference[inside]).max() <= 1


def test_every_block_takes_its_own_number_of_steps(
    chain: Chain, trained: Path, tmp_path: Path
) -> None:
    """Unless --steps names one for all; a finished painting keeps no state, a killed one does."""
    command = arguments(chain, trained, tmp_path, "--size", "256", "--format", "zarr")
    place = command.index("--steps")
    del command[place : place + 2]

    def passes() -> dict[str, int]:
        states = list(tmp_path.glob(".work-*/state.json"))
        return json.loads(states[0].read_text())["passes"] if states else {}

    process = start("jobs.sample", command)
    stop_when(process, lambda: passes().get("D", 0) >= 1, signal.SIGKILL)
    config = Run(trained).config().denoiser
    assert isinstance(config, CascadeConfig)
    expected = {block.name: block.evaluations for block in config.sequence}
    found = passes()
    assert 1 <= found.pop("D") <= expected.pop("D")
    assert found == expected
    assert jobs.sample.main(command) == 0
    (record,) = tmp_path.glob("*.json")
    assert "steps" not in json.loads(record.read_text())["identity"]["recipe"]


def means(values: np.ndarray, side: int) -> np.ndarray:
    c, h, w = values.shape
    return values.reshape(c, h // side, side, w // side, side).mean(axis=(2, 4))


def save_mask(path: Path, known: np.ndarray) -> str:
    Image.fromarray(np.where(known, 255, 0).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def preview(chain: Chain, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Painted at a quarter of the resolution: 64 x 64 for 256 x 256."""
    return paint_preview(chain, trained, tmp_path_factory.mktemp("preview"), 2)


def paint_preview(chain: Chain, trained: Path, out: Path, level: int) -> Path:
    small = ["--size", "256", "--scale", str(2.0**-level), "--format", "zarr"]
    assert jobs.sample.main(arguments(chain, trained, out, *small)) == 0
    return painted(out).path


@pytest.mark.parametrize("level", [2, 3])
def test_a_coarse_image_is_made_fine_and_keeps_its_means(
    chain: Chain,
    trained: Path,
    preview: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    level: int,
) -> None:
    """At a level where a block begins, and inside of a block."""
    if level != 2:
        preview = paint_preview(chain, trained, tmp_path / "preview", level)
    side, cell = 256 >> level, 1 << level
    low = OmeImage.open(preview).read(0, 0, side, side)
    images = []
    for tile in ("auto", "64"):
        out = tmp_path / tile
        more = ["--low", str(preview), "--seed", "5", "--format", "zarr", "--tile", tile]
        assert jobs.sample.main(arguments(chain, trained, out, *more)) == 0
        images.append(pixels(out))
        fine = images[-1].reshape(3, side, cell, side, cell)
        # Where no pixel was clipped to 8 bits, only the rounding of each is left.
        inside = ((fine > 0) & (fine < 255)).all(axis=(2, 4)).all(axis=0)
        assert inside.mean() > 0.2
        assert abs(means(images[-1], cell) - low)[:, inside].max() <= 0.5
        assert fine.std(axis=(2, 4)).mean() > 1  # there are details
    assert abs(images[0].astype(int) - images[1]).max() <= 1
    capsys.readouterr()
    assert jobs.sample.main(arguments(chain, trained, out, *more)) == 0
    assert "already done" in capsys.readouterr().out
    (record,) = out.glob("*.json")
    given = json.loads(record.read_text())["identity"]["given"]
    assert given["low"] == str(preview)
    assert jobs.sample.main(arguments(chain, trained, out, "--seed", "5", "--size", "256")) == 2
    assert "was painted with given" in capsys.readouterr().err


def test_known_pixels_stay_and_the_rest_is_painted_anew(
    chain: Chain, trained: Path, undisturbed: Path, tmp_path: Path
) -> None:
    coarse = np.ones((64, 64), bool)
    coarse[10:50, 21:40] = False
    mask = save_mask(tmp_path / "mask.png", coarse)
    known = ["--known", str(painted(undisturbed).path), "--mask", mask]
    out = tmp_path / "out"
    command = arguments(chain, trained, out, *known, "--seed", "5", "--format", "zarr")
    assert jobs.sample.main([*command, "--solver", "ancestral"]) == 0
    kept = coarse.repeat(8, axis=0).repeat(8, axis=1)
    before, after = pixels(undisturbed), pixels(out)
    summary = str(describe_image(painted(out).path).lines)
    assert "held to known" in summary and "mask.png" in summary
    np.testing.assert_array_equal(before[:, kept], after[:, kept])
    assert (before != after)[:, ~kept].mean() > 0.8


def test_what_does_not_fit_the_painting_is_a_sentence(
    chain: Chain,
    trained: Path,
    undisturbed: Path,
    preview: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, low = str(painted(undisturbed).path), ["--low", str(preview)]
    black = save_mask(tmp_path / "black.png", np.zeros((512, 512), bool))
    odd = save_mask(tmp_path / "odd.png", np.ones((300, 512), bool))
    (tmp_path / "text.png").write_text("not a picture")
    grey = tmp_path / "grey.zarr"
    OmeImage.create(grey, (1, 64, 64), "uint8", 2.0, "micrometer", ["grey"])
    half = tmp_path / "half.zarr"
    OmeImage.create(half, (3, 64, 64), "uint8", 2.0, "micrometer", ["red", "green", "blue"])
    for more, sentence in (
        ([*low, "--size", "512"], "covers 256x256 px, but --size asks for 512x512"),
        ([*low, "--known", whole, "--mask", black], "leave one out"),
        ([*low, "--scale", "0.25"], "1 times those that are painted"),
        (["--low", whole], "give an image at 1, 2, 4"),
        (["--low", str(grey)], "holds grey as uint8"),
        (["--low", str(half)], "is not written to its end"),
        (["--low", str(tmp_path)], "is not an OME-Zarr image"),
        ([*low, "--tile", "6"], "take a multiple of 4, or auto"),
        (["--known", whole], "--known needs --mask"),
        (["--mask", black], "--mask needs --known"),
        (["--known", whole, "--mask", black], "is black all over"),
        (["--known", whole, "--mask", odd], "300x512 pixels, which do not cover the 512x512"),
        (["--known", whole, "--mask", str(tmp_path / "none.png")], "does not exist"),
        (["--known", whole, "--mask", str(tmp_path / "text.png")], "cannot be read as a picture"),
        (["--known", str(preview), "--mask", black], "has pixels of 2 micrometer, but pixels of"),
        (["--known", whole, "--mask", black, "--scale", "2"], "change --scale"),
    ):
        assert jobs.sample.main(arguments(chain, trained, tmp_path / "out", *more)) == 2, more
        assert sentence in " ".join(capsys.readouterr().err.split()), more
    assert not (tmp_path / "out").exists()


def test_layouts_are_compared_with_every_region(chain: Chain) -> None:
    store = Store.open(chain.store)
    regions = store.regions()
    image = store.image(regions[0].image)
    corner = next(r for r in regions if (r.y, r.x) == (0, 0))
    far = layout_distances(image, region_thumbnails(store, regions, corner.side), corner.side)
    match = LayoutMatch.of(far, corner.index)
    assert match.own == 0.0
    assert match.follows
    other = next(r for r in regions if r.index != corner.index)
    assert not LayoutMatch.of(far, other.index).follows
    whole = image.read(0, 0, 256, 256).astype(float)
    means = whole.reshape(3, 64, 4, 64, 4).mean(axis=(2, 4))
    assert abs(thumbnail(image, 0, 0, 256) - means).mean() < 4


def test_mistakes_are_sentences(
    chain: Chain,
    trained: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more, sentence in (
        (["--region", "999"], "has regions 0 to"),
        (["--size", "big"], "--size takes a side"),
        (["--scale", "3"], "--scale takes 4, 2, 1, 0.5"),
        (["--tile", "33"], "take a multiple of 4, or auto"),
        (["--scale", "2"], "knows nothing finer"),
        (["--overlap", "0.5"], "only patch diffusion paints in windows"),
        (["--steps", "0"], "takes a positive number"),
        (["--eta", "0.5"], "belongs to the solver ddim"),
        (["--solver", "ddim", "--eta", "2"], "eta lies between 0"),
        (["--share", "2"], "--share takes K/N"),
        (["--share", "3/2"], "more than the last of 2 shares"),
    ):
        assert jobs.sample.main(arguments(chain, trained, tmp_path, *more)) == 2
        assert sentence in capsys.readouterr().err
    assert jobs.sample.main(arguments(chain, chain.packs, tmp_path)) == 2
    assert "is not a run" in capsys.readouterr().err
    command = arguments(chain, trained, undisturbed, "--size", "512", "--guidance", "3")
    assert jobs.sample.main(command) == 2
    assert "choose another --out or --seed" in capsys.readouterr().err
