"""From packs to an image without a condition, by the commands."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, pack_arguments, succeed, train_arguments
from processes import run, start, stop_when
from safetensors.torch import load_file

import jobs.info
import jobs.latents
import jobs.report
import jobs.sample
import jobs.train
import pipeline.pack
from jobs.latent_model import FitOptions, LatentFit
from model.latent import LatentConfig, latent_noise
from pipeline.ome import OmeImage


@pytest.fixture(scope="module")
def packs(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("points") / "packs"
    uniform = ["--design", "uniform", "--mollifier", "1", "--points", "600"]
    succeed(pipeline.pack.main([*pack_arguments(chain, out), *uniform]))
    return out


@pytest.fixture(scope="module")
def trained(chain: Chain, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = train_arguments(chain, folder, 2, "--preset", "infinity-diff-tiny")
    run("jobs.train", [str(packs), *arguments[1:]])
    return folder


FIT = ["--steps", "20", "--batch", "32", "--layers", "2", "--width", "32"]


def image_of(out: Path, name: str) -> np.ndarray:
    image = OmeImage.open(out / f"{name}.zarr")
    return image.read(0, 0, *image.shape[1:])


def test_images_are_painted_out_of_nothing(
    trained: Path, packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = [str(trained), "--unconditional", "2", "--size", "64", "--steps", "2"]
    sample += ["--format", "zarr"]
    assert jobs.sample.main([*sample, "--out", str(tmp_path / "none")]) == 2
    assert "run python -m jobs.latents" in capsys.readouterr().err
    latents = [str(trained), str(packs), *FIT]
    succeed(jobs.latents.main([*latents, "--dry-run"]))
    assert not (trained / ".latents").exists()
    succeed(jobs.latents.main(latents))
    record = json.loads((trained / "latents.json").read_text())
    weights = load_file(trained / "latents.safetensors")
    (part,) = (trained / ".latents" / "encodings").glob("part-*")
    z = load_file(part)["z"]
    assert record["measured"]["vectors"] == len(z) == 10
    torch.testing.assert_close(weights["mean"], z.mean(dim=0))
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(len(z)), atol=1e-5, rtol=0)
    capsys.readouterr()
    succeed(jobs.latents.main(latents))
    assert "already has this latent model" in capsys.readouterr().out
    encoded = part.stat().st_mtime_ns
    succeed(jobs.latents.main([*latents, "--seed", "1"]))
    assert part.stat().st_mtime_ns == encoded  # fitted anew to the same vectors
    succeed(jobs.latents.main(latents))

    one, other = tmp_path / "one", tmp_path / "other"
    succeed(jobs.sample.main([*sample, "--out", str(one), "--seed", "4"]))
    assert sorted(p.stem for p in one.glob("*.zarr")) == [
        "unconditional_seed4",
        "unconditional_seed5",
    ]
    succeed(jobs.sample.main([*sample, "--out", str(other), "--seed", "5"]))
    four, five = (image_of(one, f"unconditional_seed{seed}") for seed in (4, 5))
    assert four.shape == (3, 64, 64)
    np.testing.assert_array_equal(image_of(other, "unconditional_seed5"), five)
    assert abs(four.astype(int) - five).mean() > 1
    succeed(jobs.info.main([str(one / "unconditional_seed4.zarr")]))
    assert "without a condition" in capsys.readouterr().out
    assert jobs.report.main([str(one), "--out", str(tmp_path / "report")]) == 2
    assert "painted without a condition" in capsys.readouterr().err


def test_mistakes_are_sentences(
    chain: Chain, trained: Path, packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = [str(trained), "--out", str(tmp_path / "images")]
    store = ["--condition", str(chain.store)]
    for more, sentence in (
        ([], "--condition is missing"),
        (store, "reads no condition; leave --condition out"),
        ([*store, "--unconditional", "1"], "paints after no region"),
        (["--unconditional", "0"], "takes a positive number, not 0"),
    ):
        assert jobs.sample.main([*sample, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert jobs.latents.main([str(trained), str(chain.packs)]) == 2
    assert "were made with design = cascade" in capsys.readouterr().err
    plain = tmp_path / "plain"
    succeed(jobs.train.main(train_arguments(chain, plain, 1)))
    assert jobs.latents.main([str(plain), str(chain.packs)]) == 2
    assert "preset tiny, which has no latent" in capsys.readouterr().err


def test_a_fit_that_was_killed_ends_bit_for_bit_like_an_undisturbed_one(tmp_path: Path) -> None:
    """Weights, averages and moments come back from disk; batches follow from the step."""
    z, config = latent_noise(40, 4, 0).float(), LatentConfig(4, width=16, layers=2)
    options, device = FitOptions(steps=7, batch=16, learning_rate=1e-2, ema=0.9, seed=3), "cpu"

    def fit(folder: str) -> LatentFit:
        return LatentFit(z, config, options, tmp_path / folder, torch.device(device))

    undisturbed = fit("whole")
    undisturbed.run()
    killed = fit("killed")

    def cut_short(steps: range, **_: object) -> list[int]:
        return list(steps)[:4]

    killed.run(cut_short)
    killed._save(4)
    resumed = fit("killed")
    seen: list[int] = []

    def watched(steps: range, **_: object) -> list[int]:
        seen.extend(steps)
        return list(steps)

    resumed.run(watched)
    assert seen == [4, 5, 6]
    for name, value in undisturbed.weights().items():
        assert torch.equal(value, resumed.weights()[name]), name
    started = fit("fresh").weights()
    assert any((value - started[k]).abs().max() > 1e-3 for k, value in resumed.weights().items())


def test_a_killed_command_goes_on_where_it_was(trained: Path, packs: Path) -> None:
    command = [str(trained), str(packs), "--steps", "1500", "--batch", "8", "--layers", "1"]
    command += ["--width", "8"]
    state = trained / ".latents" / "fit" / "state.safetensors"
    state.unlink(missing_ok=True)
    stop_when(start("jobs.latents", command), state.is_file, signal.SIGKILL)
    (part,) = (trained / ".latents" / "encodings").glob("part-*")
    encoded = part.stat().st_mtime_ns
    done = int(load_file(state)["done"])
    assert 0 < done < 1500
    assert f"resuming at step {done}" in run("jobs.latents", command)
    assert part.stat().st_mtime_ns == encoded
    assert int(load_file(state)["done"]) == 1500
