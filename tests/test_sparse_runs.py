"""The papers' method by its commands: packed uniformly and mollified, trained and painted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, succeed, train_arguments
from chain import pack_arguments as cascade_arguments
from processes import run

import jobs.report
import jobs.sample
import jobs.train
import pipeline.pack
from jobs.data import Batches
from jobs.painting import Recipe, paint
from jobs.run import Run
from model.deconvolve import WienerInverse, deconvolve
from model.draw import PointDraw
from model.family import make_passes
from model.generate import ArrayField, Trajectory, advance, finish, start
from model.solver import DDIM, uniform_steps
from model.sparse.config import SparseConfig
from pipeline.ome import OmeImage
from pipeline.packfile import PackSet

POINTS = 2000


@pytest.fixture(scope="module")
def packs(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 uniform pixels a draw of mollified regions of 256 px."""
    out = tmp_path_factory.mktemp("uniform") / "packs"
    arguments = [*cascade_arguments(chain, out), "--points", str(POINTS), "--design", "uniform"]
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


def test_a_finer_image_is_written_with_its_spacing(
    chain: Chain, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mollified noise is a function that can be asked at finer places; coarser ones miss it."""
    command = [str(trained), "--condition", str(chain.store), "--out", str(tmp_path / "out")]
    more = ["--steps", "2", "--size", "64x96", "--format", "zarr", "--scale"]
    assert jobs.sample.main([*command, *more, "2"]) == 0
    (path,) = (tmp_path / "out").glob("*.zarr")
    image = OmeImage.open(path)
    assert image.spacing == pytest.approx(0.25) and image.shape == (3, 128, 192)
    assert jobs.report.main([str(tmp_path / "out"), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "index.html").is_file()
    capsys.readouterr()
    assert jobs.sample.main([*command, *more, "0.5"]) == 2
    assert "lost between pixels 2 times as large" in capsys.readouterr().err


def test_what_is_painted_is_the_wiener_inverse_of_the_last_estimate(
    chain: Chain, packs: Path, trained: Path
) -> None:
    denoiser = Run(trained).load_denoiser(device=torch.device("cpu"))
    condition = Batches(PackSet.open(packs), batch=1, seed=0, augment=False).at(0).condition
    (only,) = make_passes(denoiser, condition, guidance=1.0, tile=64, level=0, steps=2)
    recipe = Recipe(64, 96, 2, 5, 1.0, "ddim")
    found = paint([only], recipe, channels=3, mollifier_sigma_px=1.0).array
    here, there, sharp = (ArrayField(np.zeros((3, 64, 96), np.float32)) for _ in range(3))
    painter, constraint = only.prepare(None)
    assert constraint is None
    (step,) = uniform_steps(*only.log_snrs, 1)
    start(here, only.noise, 5, step.now)
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
    cascade = train_arguments(chain, folder, 2, "--preset", "paper-tiny", "--set")
    assert "--mollifier 1" in refused(*cascade[:-1])
    assert "--design uniform" in refused(*cascade, "mollifier_sigma_px=0")
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
