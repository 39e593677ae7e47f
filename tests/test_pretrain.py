"""Pretraining: vectors do not collapse, a killed run ends where it would, no tile strays."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

import conditioning.pretrain
from conditioning.encoders import load_encoder
from conditioning.pretrain import main
from conditioning.tiles import TileSampler, read_ahead
from conditioning.vicreg import effective_rank, schedule, view_retrieval
from conditioning.views import random_view
from pipeline.ome import OmeImage
from pipeline.store import Region, Store, StoreSpec

T = TypeVar("T")
BANDS = ("red", "green", "blue", "nir")
PATCH = 64
OPTIONS = ["--arch", "test_resnet", "--dim", "16", "--input-size", "32", "--batch-size", "16"]
OPTIONS += ["--footprints", "48", "64", "--device", "cpu", "--checkpoint-every", "4"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Results are bit-equal at one number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def textures(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches of four kinds (two colours, each smooth or striped), and the kinds."""
    kinds = rng.integers(4, size=(side // PATCH, side // PATCH))
    colours = np.array([[200, 120, 180, 90], [110, 160, 120, 150]])
    wide = kinds.repeat(PATCH, 0).repeat(PATCH, 1)
    rows, columns = np.mgrid[:side, :side]
    stripes = 40 * (((rows + columns) // 3) % 2 * 2 - 1) * (wide // 2)
    pixels = colours[wide % 2].transpose(2, 0, 1) + stripes + rng.normal(0, 8, (4, side, side))
    return pixels.clip(0, 255).astype(np.uint8), kinds


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A store of one image, its left half to train on; and the kind of every patch."""
    path = tmp_path_factory.mktemp("pretrain") / "dataset.zarr"
    pixels, kinds = textures(np.random.default_rng(0), 1024)
    store = Store.create(path, StoreSpec("um", 0.5, BANDS, "uint8", 256))
    image = OmeImage.create(store.image_path("a"), pixels.shape, "uint8", 0.5, "micrometer", BANDS)
    image.write_shard((0, 0), pixels)
    image.finish()
    store.write_image_state("a", {"state": "ok", "reason": ""})
    corners = [(y, x) for y in range(0, 1024, 256) for x in range(0, 1024, 256)]
    store.write_regions(
        [Region(0, "a", y, x, 256, 1.0, "train" if x < 512 else "val") for y, x in corners]
    )
    return path, kinds


def test_held_out_patches_are_told_apart(
    dataset: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nearest centroid of what was seen, on what was not: kinds are separated, colour included."""
    path, kinds = dataset
    assert main([str(path), "--out", str(tmp_path / "enc"), "--steps", "40", *OPTIONS]) == 0
    assert "effective rank" in capsys.readouterr().out
    encoder = load_encoder(tmp_path / "enc", bands=BANDS, device="cpu")
    pixels = Store.open(path).image("a").read(0, 0, 1024, 1024)
    grid = pixels.reshape(4, 16, PATCH, 16, PATCH).transpose(1, 3, 0, 2, 4)
    seen, unseen = (
        grid[:, :8].reshape(-1, 4, PATCH, PATCH),
        grid[:, 8:].reshape(-1, 4, PATCH, PATCH),
    )
    vectors, held_out = encoder.encode(seen).numpy(), encoder.encode(unseen).numpy()
    labels, truth = kinds[:, :8].ravel(), kinds[:, 8:].ravel()
    centroids = np.stack([vectors[labels == kind].mean(0) for kind in range(4)])
    distances = np.linalg.norm(held_out[:, None] - centroids, axis=2)
    assert (distances.argmin(1) == truth).mean() > 0.9
    quality = json.loads((tmp_path / "enc" / "encoder.json").read_text())["quality"]
    assert quality["split"] == "val"
    assert quality["effective_rank"] > 1.5


def test_a_killed_run_ends_with_the_same_weights(
    dataset: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between checkpoints, in a later bank, and run again: the same bytes."""
    path, _ = dataset
    monkeypatch.setattr(conditioning.pretrain, "STEPS_PER_BANK", 3)
    command = [str(path), "--steps", "8", *OPTIONS]
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    assert main([*command, "--out", str(whole)]) == 0

    def stop_at_six(items: Iterable[T], *, total: int, desc: str) -> Iterator[T]:
        for done, item in enumerate(items):
            if done == 6:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(conditioning.pretrain, "progress", stop_at_six)
        with pytest.raises(KeyboardInterrupt):
            main([*command, "--out", str(halted)])
    assert not (halted / "encoder.json").exists()
    assert main([*command, "--out", str(halted)]) == 0
    for name in ("encoder.safetensors", "encoder.json", "metrics.jsonl"):
        assert (whole / name).read_bytes() == (halted / name).read_bytes(), name
    assert not (halted / "checkpoint.safetensors").exists()

    before = (whole / "encoder.json").stat()
    assert main([*command, "--out", str(whole)]) == 0
    after = (whole / "encoder.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--footprints", "0"], "must be sides of at least 1 px"),
        (["--arch", "no_such_net"], "timm has no architecture"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    dataset: tuple[Path, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    sentence: str,
) -> None:
    assert main([str(dataset[0]), "--out", str(tmp_path / "enc"), *extra]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "enc").exists()


def test_another_seed_into_the_same_folder_is_refused(
    dataset: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(dataset[0]), "--out", str(tmp_path / "enc"), "--steps", "1", *OPTIONS]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "enc").exists()
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 2
    assert "made with seed = 0 where the command has 1" in capsys.readouterr().err


def test_sampled_tiles_lie_in_their_regions(tmp_path: Path) -> None:
    """Pixels say whether they may be seen: no sampled tile holds one that may not."""
    store = Store.create(tmp_path / "s.zarr", StoreSpec("px", 1.0, ("red",), "uint16", 320))
    image = OmeImage.create(
        store.image_path("a"), (1, 1100, 900), "uint16", 1.0, "pixel", ("red",)
    )
    region = Region(0, "a", 160, 320, 320, 1.0, "train")
    pixels = np.zeros((1, 1100, 900), np.uint16)
    pixels[:, 160:480, 320:640] = 60000
    image.write_shard((0, 0), pixels)
    image.finish()
    sampler = TileSampler(store, [region], 24, (10, 5000), seed=3)
    tiles = sampler.sample(200, 1)
    assert (tiles == 60000).all()
    np.testing.assert_array_equal(tiles, sampler.sample(200, 1))


def test_views_are_the_eight_orientations_of_crops() -> None:
    """A view of a ramp is a ramp along one axis, with 60 to 100 % of its slope, up to gain."""
    rng = np.random.default_rng(0)
    ramp = torch.linspace(-1, 1, 40).expand(64, 2, 40, 40).contiguous()
    view = random_view(ramp, 32, rng)[:, :, 1:-1, 1:-1]
    down, across = (view.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3))
    slope = torch.maximum(down, across) / (2 / 39 * 40 / 32)
    assert (torch.minimum(down, across) < 1e-4).all()
    assert 0 < (down > across).float().mean() < 1
    assert slope.min() > 0.6 * 0.75
    assert slope.max() < 1.25


def test_measures_of_collapse_at_their_extremes() -> None:
    rng = np.random.default_rng(0)
    isotropic = rng.standard_normal((4000, 10)).astype(np.float32)
    line = isotropic[:, :1] * np.ones((1, 10), np.float32)
    assert effective_rank(isotropic) == pytest.approx(10, rel=0.01)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(np.ones((5, 3), np.float32)) == 0
    assert view_retrieval(isotropic[:50], isotropic[:50]) == 1
    assert view_retrieval(isotropic[:50], isotropic[50:100]) < 0.2


def test_the_schedule_rises_to_one_and_falls_to_nearly_nothing() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert max(rates) == rates[10] == 1
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert rates[-1] < 1e-3


def test_reading_ahead_changes_nothing_and_hands_errors_on() -> None:
    def broken() -> Iterator[int]:
        yield from range(3)
        raise OSError("gone")

    assert list(read_ahead(iter(range(5)))) == list(range(5))
    items = read_ahead(broken())
    assert [next(items) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        list(items)
