"""Embedding: token (i, j) is the vector of tile (i, j), whatever the batches, and made once."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float32
from torch import Tensor

from conditioning.embed import encode_all, main, make_plan
from conditioning.encoders import EncoderCard, build_network, load_encoder, save_encoder
from conditioning.tiles import Tiles, lattice_blocks, resize_tiles, tile_level
from pipeline.ome import OmeImage
from pipeline.store import Region, Store, StoreSpec

BANDS = ("red", "green", "blue")
SHAPES = {"small": (300, 280), "tall": (1100, 520), "wide": (700, 1030)}


def add_image(store: Store, name: str, pixels: np.ndarray) -> OmeImage:
    image = OmeImage.create(
        store.image_path(name), pixels.shape, str(pixels.dtype), 0.5, "micrometer", BANDS
    )
    for key in image.shard_keys():
        y, x, height, width = image.shard_box(key)
        image.write_shard(key, pixels[:, y : y + height, x : x + width])
    image.finish()
    store.write_image_state(name, {"state": "ok", "reason": ""})
    return image


def make_store(path: Path) -> Store:
    """Images of three sizes whose pixels are smooth and differ everywhere."""
    store = Store.create(path, StoreSpec("um", 0.5, BANDS, "uint8", 256))
    for name, (height, width) in SHAPES.items():
        rows, columns = np.mgrid[:height, :width]
        waves = [np.sin(rows / a + columns / b) for a, b in ((31, 47), (83, 29), (211, 173))]
        add_image(store, name, (127 + 100 * np.stack(waves)).astype(np.uint8))
    store.write_regions([Region(0, "tall", 0, 0, 256, 1.0, "train")])
    return store


def make_encoder(folder: Path, seed: int = 0) -> Path:
    card = EncoderCard(
        "test_resnet", 6, 32, BANDS, "uint8", (127.0,) * 3, (70.0,) * 3, training={}, quality={}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network("test_resnet", num_bands=3, dim=6, input_px=32)
    folder.mkdir()
    save_encoder(folder, card, network)
    return folder


@dataclass
class CountingEncoder:
    """A fake: the mean of each band, and a note of how many tiles came in each call."""

    key: str = "mean-0"
    dim: int = 3
    input_px: int = 16
    bands: tuple[str, ...] = BANDS
    calls: list[int] = field(default_factory=list)

    def encode(self, tiles: Tiles) -> Float32[Tensor, "n d"]:
        assert tiles.shape[1:] == (3, 16, 16)
        self.calls.append(len(tiles))
        return torch.from_numpy(tiles.astype(np.float32)).mean((2, 3))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "dataset.zarr")


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of tokens."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def test_a_token_is_the_vector_of_its_tile(store: Store, tmp_path: Path) -> None:
    """Every token of every image equals the encoder on that tile alone, from its level."""
    folder = make_encoder(tmp_path / "enc")
    command = [str(store.path), "--encoder", str(folder), "--footprint", "96", "256"]
    assert main([*command, "--batch-size", "7", "--device", "cpu"]) == 0
    encoder = load_encoder(folder, bands=BANDS, device="cpu")
    for name, (height, width) in SHAPES.items():
        for footprint in (96, 256):
            tokens = store.embedding(encoder.key, footprint, name)
            assert tokens.shape == (height // footprint, width // footprint, 6)
            image = store.image(name)
            level = tile_level(image, footprint, encoder.input_px)
            step = footprint >> level
            places = list(np.ndindex(tokens.shape[:2]))
            tiles = [image.read(i * step, j * step, step, step, level) for i, j in places]
            expected = encoder.encode(np.stack(tiles)).numpy().reshape(tokens.shape)
            np.testing.assert_allclose(tokens, expected, rtol=2e-3, atol=2e-3)
    assert store.resolve_encoder(str(folder)) == encoder.key
    assert store.resolve_encoder("test-resnet") == encoder.key


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_batches_cross_images_and_change_nothing(store: Store, batch_size: int) -> None:
    """Whole batches except the last, each tile once; tokens are the means of their own pixels."""
    encoder = CountingEncoder()
    plan = make_plan(store, encoder, [100])
    assert encode_all(store, encoder, plan, batch_size) == {}
    assert (
        sum(encoder.calls)
        == plan.num_tiles
        == sum(h // 100 * (w // 100) for h, w in SHAPES.values())
    )
    assert all(size == batch_size for size in encoder.calls[:-1])
    for name, (height, width) in SHAPES.items():
        rows, columns = height // 100, width // 100
        pixels = store.image(name).read(0, 0, rows * 100, columns * 100).astype(np.float32)
        means = pixels.reshape(3, rows, 100, columns, 100).mean((2, 4)).transpose(1, 2, 0)
        np.testing.assert_allclose(store.embedding("mean-0", 100, name), means, atol=1.5)


def test_the_same_command_repeats_nothing_and_finishes_what_is_missing(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_encoder(tmp_path / "enc")
    command = [str(store.path), "--encoder", str(folder), "--device", "cpu"]
    assert main([*command, "--footprint", "128", "--dry-run"]) == 0
    assert store.encoders() == []
    assert main([*command, "--footprint", "128"]) == 0
    key = store.resolve_encoder(str(folder))
    before = files(store.path / "embeddings" / key / "128")
    assert main([*command, "--footprint", "128", "256"]) == 0
    assert files(store.path / "embeddings" / key / "128") == before
    assert store.footprints(key) == [128, 256]
    assert "3 lattices are there" in capsys.readouterr().out


def test_other_weights_are_another_encoder_and_take_over_the_name(
    store: Store, tmp_path: Path
) -> None:
    """A folder trained anew: both embeddings stay, its name means the new one."""
    first, second = make_encoder(tmp_path / "enc"), make_encoder(tmp_path / "new", seed=1)
    command = [str(store.path), "--encoder", str(first), "--footprint", "256", "--device", "cpu"]
    assert main(command) == 0
    old = store.resolve_encoder(str(first))
    first.rename(tmp_path / "old")
    second.rename(first)
    assert main(command) == 0
    assert store.resolve_encoder(str(first)) != old
    assert len(store.encoders()) == 2


def test_footprints_that_fit_nowhere_are_said(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipped and named where an image is too small; an error when none is large enough."""
    folder = make_encoder(tmp_path / "enc")
    command = [str(store.path), "--encoder", str(folder), "--device", "cpu", "--footprint"]
    assert main([*command, "290", "600", "4096"]) == 0
    said = capsys.readouterr().out
    assert "footprint 4096: larger than 3 images" in said
    assert "footprint 600: larger than 2 images (small, tall)" in said
    key = store.resolve_encoder(str(folder))
    assert store.embedding(key, 600, "wide").shape == (1, 1, 6)
    assert not store.has_embedding(key, 290, "small")
    assert main([*command, "2048", "4096"]) == 2
    assert "at most 700 px" in capsys.readouterr().err
    assert main([*command, "0"]) == 2


def test_one_unreadable_image_costs_only_itself(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lost shard: exit code 3, the others embedded; once restored, it is finished."""
    folder = make_encoder(tmp_path / "enc")
    command = [str(store.path), "--encoder", str(folder), "--footprint", "128", "--device", "cpu"]
    shard = next(p for p in (store.image_path("tall") / "2" / "c").rglob("*") if p.is_file())
    away = shard.rename(tmp_path / "away")
    assert main(command) == 3
    assert "tall failed at footprint 128" in capsys.readouterr().out
    key = store.resolve_encoder(str(folder))
    assert [store.has_embedding(key, 128, name) for name in SHAPES] == [True, False, True]
    away.rename(shard)
    assert main(command) == 0
    assert store.has_embedding(key, 128, "tall")


@settings(max_examples=30)
@given(
    height=st.integers(40, 1300),
    width=st.integers(40, 1300),
    footprint=st.integers(33, 400),
    side=st.integers(8, 64),
)
def test_blocks_partition_the_lattice(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, footprint: int, side: int
) -> None:
    """Each tile comes once, whole, and from its place: pixels are their own coordinates."""
    path = tmp_path_factory.mktemp("blocks") / "image"
    image = OmeImage.create(path, (2, height, width), "uint16", 1.0, "pixel", ("red", "green"))
    pixels = np.stack(np.mgrid[:height, :width]).astype(np.uint16)
    image.write_shard((0, 0), pixels)
    image.finish()
    seen = np.zeros((height // footprint, width // footprint), int)
    for block in lattice_blocks(image, footprint, side):
        for row, column in np.ndindex(block.tiles.shape[:2]):
            i, j = block.row + row, block.column + column
            seen[i, j] += 1
            centre = (np.array([i, j]) + 0.5) * footprint - 0.5
            tile = block.tiles[row, column].astype(float)
            step = footprint >> tile_level(image, footprint, side)
            np.testing.assert_allclose(tile.mean((1, 2)), centre, atol=0.6 + footprint / step)
    assert (seen == 1).all()


def test_a_tile_is_read_where_its_edges_fall_between_pixels(tmp_path: Path) -> None:
    """The level is the coarsest that is fine enough and divides the footprint."""
    image = OmeImage.create(tmp_path / "image", (1, 9000, 9000), "uint8", 1.0, "pixel", ("red",))
    expected = {64: 0, 191: 0, 192: 1, 200: 1, 204: 1, 4096: 5, 4098: 1, 9000: 3}
    assert {f: tile_level(image, f, 96) for f in expected} == expected
    tiles = np.zeros((1, 1, 96, 96), np.uint8)
    assert resize_tiles(tiles, 96) is tiles
