"""Patch diffusion by its commands: packed, trained, killed, resumed and painted like ours."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, succeed, train_arguments
from processes import run, start, stop_when
from safetensors.torch import load_file

import jobs.sample
import jobs.train
import pipeline.pack
from jobs.data import Batches
from model.baselines import PatchObjective
from model.config import PatchConfig
from model.draw import PatchDraw
from model.family import make_denoiser, make_objectives
from pipeline.ome import OmeImage
from pipeline.packfile import DrawnPatch, PackSet
from pipeline.store import Store

STEPS = 4


def pack_arguments(chain: Chain, out: Path, *more: str) -> list[str]:
    return [
        *(str(chain.store), "--encoder", str(chain.encoder), "--out", str(out)),
        *("--design", "patch", *more),
    ]


@pytest.fixture(scope="module")
def packs(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One patch a region, of the regions that lie on the lattice of the embedded tiles."""
    out = tmp_path_factory.mktemp("patches") / "packs"
    succeed(pipeline.pack.main(pack_arguments(chain, out)))
    return out


@pytest.fixture(scope="module")
def small_packs(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen patches of 64 px a region."""
    out = tmp_path_factory.mktemp("small") / "packs"
    succeed(pipeline.pack.main(pack_arguments(chain, out, "--window", "64")))
    return out


def arguments(chain: Chain, packs: Path, folder: Path, *more: str) -> list[str]:
    given = train_arguments(chain, folder, STEPS, "--learning-rate", "0.001", *more)
    return [str(packs), *given[1:], "--preset", "patch"]


@pytest.fixture(scope="module")
def trained(chain: Chain, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run("jobs.train", arguments(chain, packs, folder))
    return folder


def test_a_patch_is_a_tile_of_the_store_with_its_own_embedding(
    chain: Chain, small_packs: Path
) -> None:
    packs, store = PackSet.open(small_packs), Store.open(chain.store)
    settings = packs.settings
    assert settings.packs_per_region == 16
    for entry in packs.regions[:3]:
        whole = store.embedding(settings.encoder_key, 64, entry.image)
        seen = set()
        for pack in range(settings.packs_per_region):
            drawn = packs.draw(entry, pack)
            assert isinstance(drawn, DrawnPatch)
            y, x = drawn.origin.tolist()
            pixels = store.image(entry.image).read(entry.y + y, entry.x + x, 64, 64)
            np.testing.assert_array_equal(
                drawn.values / settings.value_scale, pixels.transpose(1, 2, 0)
            )
            assert (entry.y + y) % 64 == (entry.x + x) % 64 == 0
            seen.add((y, x))
        assert len(seen) == 16
        tokens = packs.tokens(entry)[0].values
        first = whole[entry.y // 64 : entry.y // 64 + 4, entry.x // 64 : entry.x // 64 + 4]
        np.testing.assert_array_equal(tokens, first)


@pytest.mark.parametrize("augment", [False, True])
def test_batches_give_every_patch_the_token_of_its_place(
    chain: Chain, small_packs: Path, augment: bool
) -> None:
    packs, store = PackSet.open(small_packs), Store.open(chain.store)
    batches = Batches(packs, batch=4, seed=1, augment=augment)
    entries = [entry for entry in packs.regions if entry.split == "train"]
    statistics = packs.statistics
    known = {}
    for entry in entries:
        whole = store.embedding(packs.settings.encoder_key, 64, entry.image).astype(np.float32)
        for y in range(entry.y, entry.y + 256, 64):
            for x in range(entry.x, entry.x + 256, 64):
                pixels = store.image(entry.image).read(y, x, 64, 64)
                known[fingerprint(pixels.reshape(3, -1))] = whole[y // 64, x // 64]
    for step in range(4):
        batch = batches.at(step)
        assert batch.condition.values.shape[:2] == (4, 1)
        assert (batch.condition.centres_px == 32).all()
        assert isinstance(batch.draw, PatchDraw)
        pixels = statistics.to_pixels(batch.draw.values.permute(0, 2, 3, 1).numpy())
        for patch, token in zip(pixels, batch.condition.values[:, 0].numpy(), strict=True):
            own = known[fingerprint(np.rint(patch).astype(np.uint8).reshape(-1, 3).T)]
            expected = (own - statistics.token_mean) / statistics.token_std
            np.testing.assert_allclose(token, expected, rtol=1e-4, atol=1e-4)


def fingerprint(pixels: np.ndarray) -> bytes:
    """Of a tile's bands, the same however it is turned."""
    return np.sort(pixels, axis=1).tobytes()


def test_two_ranks_have_the_loss_of_one(small_packs: Path) -> None:
    packs = PackSet.open(small_packs)
    config = PatchConfig(
        channels=3,
        token_dim=len(packs.statistics.token_mean),
        patch_px=64,
        unet_widths=(16, 32),
        unet_attention=1,
    )
    config.check_design(packs.design)
    torch.manual_seed(0)
    octaves = config.octaves(packs.statistics.signal, packs.statistics.residual)
    (objective,) = make_objectives(make_denoiser(config, octaves)).values()
    assert isinstance(objective, PatchObjective)
    torch.nn.init.normal_(objective.denoiser.unet.conv_out.weight, std=0.1)
    batches = Batches(packs, batch=4, seed=5)

    def loss(rank: int, world: int) -> torch.Tensor:
        batch = batches.at(3, rank, world)
        return objective(batch.draw, batch.condition, batch.seeds, batch.uniform)

    with torch.no_grad():
        torch.testing.assert_close(loss(0, 1), (loss(0, 2) + loss(1, 2)) / 2)


def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(
    chain: Chain, packs: Path, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def state(of: Path) -> dict[str, object]:
        file = of / "state.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    command = arguments(chain, packs, folder)
    stop_when(start("jobs.train", command), lambda: state(folder).get("step") == 2, signal.SIGKILL)
    assert "resuming at step 2" in run("jobs.train", command)
    for name in ("weights", "ema"):
        one, other = (
            load_file(of / "checkpoints" / str(state(of)["checkpoint"]) / f"{name}.safetensors")
            for of in (trained, folder)
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(list((trained / "samples").glob("*.png"))) == STEPS // 2


def test_it_paints_sizes_of_its_own_the_same_in_any_strips(
    chain: Chain, trained: Path, tmp_path: Path
) -> None:
    images = []
    for tile in ("auto", "100"):
        out = tmp_path / tile
        command = [str(trained), "--condition", str(chain.store), "--out", str(out)]
        command += ["--region", "3", "--size", "260x330", "--steps", "3", "--format", "zarr"]
        succeed(jobs.sample.main([*command, "--tile", tile, "--overlap", "0.5"]))
        (folder,) = out.glob("*.zarr")
        images.append(OmeImage.open(folder).read(0, 0, 260, 330).astype(int))
    assert abs(images[0] - images[1]).max() <= 1
    assert images[0].std() > 5
    assert jobs.sample.main([*command, "--overlap", "0.75"]) == 2  # another image


def test_mistakes_are_sentences(
    chain: Chain, packs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = [str(trained), "--condition", str(chain.store), "--out", str(tmp_path / "images")]
    for command, more, sentence in (
        (jobs.sample, ["--size", "128"], "which an image of 128x128 px cannot hold"),
        (jobs.sample, ["--size", "512", "--scale", "0.5"], "leave --scale at 1"),
        (jobs.sample, ["--overlap", "1.5"], "a part of a window in [0, 1)"),
    ):
        assert command.main([*sample, *more]) == 2
        assert sentence in capsys.readouterr().err
    run_of, large = tmp_path / "run", ("--window", "512", "--points", "262144")
    assert jobs.train.main(train_arguments(chain, run_of, 2, "--preset", "patch")) == 2
    assert "needs --design patch --window 256" in capsys.readouterr().err
    assert jobs.train.main([*arguments(chain, packs, run_of), "--preset", "tiny"]) == 2
    assert "needs --design cascade" in capsys.readouterr().err
    assert pipeline.pack.main(pack_arguments(chain, tmp_path / "p", *large)) == 2
    assert "hold no patch of 512 px" in capsys.readouterr().err
    assert pipeline.pack.main(pack_arguments(chain, tmp_path / "p", "--window", "128")) == 2
    assert "patches of 128 px need --footprint 128" in capsys.readouterr().err
    assert not run_of.exists()


def test_regions_off_the_lattice_of_tiles_are_left_out(chain: Chain, packs: Path) -> None:
    """Regions lie every 128 px; patches of 256 px only where an embedded tile lies."""
    opened, regions = PackSet.open(packs), Store.open(chain.store).regions()
    assert opened.settings.lattices == ((256, 1, 1),)
    aligned = [r.index for r in regions if r.y % 256 == r.x % 256 == 0]
    assert [entry.key for entry in opened.regions] == aligned
    assert len(aligned) < len(regions)
