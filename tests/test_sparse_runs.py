"""The papers' method by its commands: packed uniformly and mollified, trained and painted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, succeed, train_arguments
from chain import pack_arguments as zoom_arguments
from processes import run

import jobs.sample
import jobs.train
import pipeline.pack
from jobs.data import Batches
from jobs.painting import Recipe, paint
from jobs.run import Run
from model.deconvolve import WienerInverse, deconvolve
from model.draw import PointDraw
from model.family import make_painter, noise_of, sampled_range
from model.generate import ArrayField, Trajectory, advance, finish, start
from model.lattice import at_level
from model.solver import DDIM, uniform_steps
from model.sparse.config import SparseConfig
from pipeline.ome import OmeImage
from pipeline.packfile import PackSet

POINTS = 2000


@pytest.fixture(scope="module")
def packs(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 uniform pixels a draw of mollified regions of 256 px."""
    out = tmp_path_factory.mktemp("uniform") / "packs"
    arguments = [*zoom_arguments(chain, out), "--points", str(POINTS), "--design", "uniform"]
    succeed(pipeline.pack.main([*arguments, "--mollifier", "1"]))
    return out


def arguments(chain: Chain, packs: Path, folder: Path, *more: str) -> list[str]:
    given = train_arguments(chain, folder, 2, "--preset", "paper-tiny", *more)
    return [str(packs), *given[1:]]


@pytest.fixture(scope="module")
def trained(chain: Chain, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "run"
    run("jobs.train", arguments(chain, packs, folder))
    return folder


def test_the_papers_method_trains_and_paints(chain: Chain, trained: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    # The noise that is asked for has the mollified field's variance at the start: 0.28 squared.
    assert lines[0]["level_losses"][0] == pytest.approx(0.0796, rel=0.1)
    images = []
    for number, tile in enumerate(("64", "128")):
        out = tmp_path / str(number)
        command = [str(trained), "--condition", str(chain.store), "--out", str(out)]
        more = ["--steps", "3", "--solver", "ddim", "--tile", tile, "--format", "zarr"]
        assert jobs.sample.main([*command, "--size", "128x192", *more]) == 0
        (image,) = out.glob("*.zarr")
        images.append(OmeImage.open(image).read(0, 0, 128, 192).astype(int))
    # The same image in tiles of another size, up to float32 and rounding.
    assert np.abs(images[0] - images[1]).max() <= 1
    assert images[0].std() > 1


def test_other_resolutions_are_written_with_their_spacing(
    chain: Chain, trained: Path, tmp_path: Path
) -> None:
    for scale in ("2", "0.5"):
        out = tmp_path / scale
        command = [str(trained), "--condition", str(chain.store), "--out", str(out)]
        more = ["--steps", "2", "--size", "64x96", "--format", "zarr", "--scale", scale]
        assert jobs.sample.main([*command, *more]) == 0
        (path,) = out.glob("*.zarr")
        image, times = OmeImage.open(path), float(scale)
        assert image.spacing == pytest.approx(0.5 / times)
        assert image.shape == (3, round(64 * times), round(96 * times))


def test_other_resolutions_are_the_same_image(packs: Path, trained: Path) -> None:
    """The same noise and the same condition, finer and coarser: what is seen on the ground."""
    denoiser = Run(trained).load_denoiser(device=torch.device("cpu"))
    condition = Batches(PackSet.open(packs), batch=1, seed=0, augment=False).at(0).condition
    (step,), seen = uniform_steps(*sampled_range(denoiser), 1), {}
    for level in (0, -1, 1):
        shape = (3, at_level(64, level), at_level(96, level))
        here, there = (ArrayField(np.zeros(shape, np.float32)) for _ in range(2))
        tile = at_level(96, level)
        painter = make_painter(denoiser, condition, guidance=1.0, tile=tile, level=level)
        start(here, noise_of(denoiser), 5, step.now, level=level)
        advance(painter, DDIM(), step, Trajectory(here, there))
        finish(painter, step.after, Trajectory(there, here))
        block = at_level(8, level)
        seen[level] = here.array.reshape(3, 8, block, 12, block).mean(axis=(2, 4))
    for level in (-1, 1):
        difference = np.abs(seen[level] - seen[0]).mean() / np.abs(seen[0]).mean()
        assert difference < 0.15, level


def test_what_is_painted_is_the_wiener_inverse_of_the_last_estimate(
    chain: Chain, packs: Path, trained: Path
) -> None:
    denoiser = Run(trained).load_denoiser(device=torch.device("cpu"))
    condition = Batches(PackSet.open(packs), batch=1, seed=0, augment=False).at(0).condition
    painter = make_painter(denoiser, condition, guidance=1.0, tile=64, level=0)
    found = paint(denoiser, painter, Recipe(64, 96, 2, 5, 1.0, "ddim")).array
    here, there, sharp = (ArrayField(np.zeros((3, 64, 96), np.float32)) for _ in range(3))
    (step,) = uniform_steps(*sampled_range(denoiser), 1)
    start(here, noise_of(denoiser), 5, step.now)
    advance(painter, DDIM(), step, Trajectory(here, there))
    finish(painter, step.after, Trajectory(there, here))
    deconvolve(here, sharp, WienerInverse(1.0))
    np.testing.assert_array_equal(found, sharp.array)
    assert np.abs(found - here.array).max() > 0.01


def test_batches_are_of_points(packs: Path) -> None:
    draw = Batches(PackSet.open(packs), batch=3, seed=0).at(0).draw
    assert isinstance(draw, PointDraw)
    points, values = draw.points()
    assert points.counts().tolist() == [POINTS] * 3
    # Standardised by the statistics of what was packed: unit variance, up to these few regions.
    assert values.std(dim=0).numpy() == pytest.approx(1.0, abs=0.4)


def test_packs_and_presets_that_do_not_fit_are_refused(
    chain: Chain, packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*command: str) -> str:
        assert jobs.train.main(list(command)) == 2
        return capsys.readouterr().err

    folder = tmp_path / "run"
    zoom = train_arguments(chain, folder, 2, "--preset", "paper-tiny", "--set")
    assert "--mollifier 1" in refused(*zoom[:-1])
    assert "--design uniform" in refused(*zoom, "mollifier_sigma_px=0")
    assert "--mollifier 0" in refused(str(packs), *train_arguments(chain, folder, 2)[1:])
    changes = arguments(chain, packs, folder, "--set")
    assert "does not exist; choose one of knn, splat" in refused(*changes, "resampling=nearest")
    assert "changes no field of this preset" in refused(*changes, "resample=knn")
    assert "takes a value of that kind, not 'seven'" in refused(*changes, "kernel=seven")
    assert "do not divide into heads of 32" in refused(*changes, "unet_widths=16,48,96")
    assert "set mollifier_sigma_px to 0" in refused(*changes, "means=true")
    assert not folder.exists()


def test_an_ablation_is_one_field(chain: Chain, packs: Path, tmp_path: Path) -> None:
    changes = ["--set", "normalisation=stable", "unet_widths=32,64", "self_attention=false"]
    options = arguments(chain, packs, tmp_path / "run", *changes, "--steps", "1")
    assert jobs.train.main(options) == 0
    config = Run(tmp_path / "run").config().denoiser
    assert isinstance(config, SparseConfig)
    assert (config.normalisation, config.unet_widths) == ("stable", (32, 64))
    assert not config.self_attention
