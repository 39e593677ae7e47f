"""Encoders: weights from a folder or the hub's cache, keys after the weights, bands by name."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from conditioning.encoders import (
    EncoderCard,
    build_network,
    choose_device,
    load_encoder,
    save_encoder,
)
from conditioning.tiles import resize_tiles

RGB = ("red", "green", "blue")
MODEL = "test_convnext.r160_in1k"


def card(bands: tuple[str, ...] = RGB, dtype: str = "uint8", mean: float = 120.0) -> EncoderCard:
    return EncoderCard(
        architecture="test_resnet",
        dim=8,
        input_px=32,
        bands=bands,
        dtype=dtype,
        mean=(mean,) * len(bands),
        std=(50.0,) * len(bands),
        training={},
        quality={},
    )


def write_encoder(folder: Path, seed: int = 0, made: EncoderCard | None = None) -> Path:
    """An encoder folder with random weights."""
    made = made or card()
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network("test_resnet", num_bands=len(made.bands), dim=8, input_px=32)
    save_encoder(folder, made, network)
    return folder


def random_tiles(count: int, bands: int = 3, side: int = 32, dtype: str = "uint8") -> np.ndarray:
    top = np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, top, (count, bands, side, side)).astype(dtype)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache without network that holds a timm model with random weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / f"models--timm--{MODEL}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(MODEL, pretrained=False)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    config = {
        "architecture": "test_convnext",
        "num_classes": 1000,
        "pretrained_cfg": timm.get_pretrained_cfg(MODEL).to_dict(),
    }
    (snapshot / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_saved_encoder_computes_what_the_network_did(tmp_path: Path) -> None:
    """load(save(network)) is the network on standardised counts."""
    folder = write_encoder(tmp_path / "enc")
    encoder = load_encoder(folder, bands=RGB, device="cpu")
    tiles = random_tiles(5)
    network = build_network("test_resnet", num_bands=3, dim=8, input_px=32).eval()
    network.load_state_dict(load_file(folder / "encoder.safetensors"))
    with torch.no_grad():
        expected = network((torch.from_numpy(tiles).float() - 120) / 50)
    torch.testing.assert_close(encoder.encode(tiles), expected)
    assert (encoder.dim, encoder.input_px, encoder.bands) == (8, 32, RGB)


def test_the_key_follows_weights_and_normalisation_and_not_the_place(tmp_path: Path) -> None:
    first = write_encoder(tmp_path / "first")
    moved = shutil.copytree(first, tmp_path / "moved")
    other_weights = write_encoder(tmp_path / "weights", seed=1)
    other_mean = write_encoder(tmp_path / "mean", made=card(mean=121.0))
    keys = [
        load_encoder(folder, bands=RGB, device="cpu").key
        for folder in (first, moved, other_weights, other_mean)
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert all(key.startswith("test-resnet-") for key in keys)


def test_bands_are_taken_by_name(tmp_path: Path) -> None:
    """A permuted and longer band list gives the same vectors; an absent band is refused."""
    folder = write_encoder(tmp_path / "enc")
    tiles = random_tiles(3)
    infrared = random_tiles(3, bands=1)
    expected = load_encoder(folder, bands=RGB, device="cpu").encode(tiles)
    permuted = load_encoder(folder, bands=("nir", "blue", "red", "green"), device="cpu")
    given = np.concatenate([infrared, tiles[:, [2, 0, 1]]], axis=1)
    torch.testing.assert_close(permuted.encode(given), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"needs the bands .*'blue'.* and the images have"):
        load_encoder(folder, bands=("red", "green"), device="cpu")


def test_sixteen_bits_keep_their_resolution(tmp_path: Path) -> None:
    """Counts above 255 reach the network unclipped, and pixels of another type are refused."""
    folder = write_encoder(tmp_path / "enc", made=card(dtype="uint16"))
    encoder = load_encoder(folder, bands=RGB, device="cpu", dtype="uint16")
    tiles = random_tiles(2, dtype="uint16")
    with torch.no_grad():
        expected = encoder.network((torch.from_numpy(tiles.astype(np.float32)) - 120) / 50)
    torch.testing.assert_close(encoder.encode(tiles), expected)
    with pytest.raises(ValueError, match="trained on uint16 and the pixels are uint8"):
        load_encoder(folder, bands=RGB, device="cpu")


@pytest.mark.parametrize("name", [MODEL, "test_convnext", f"hf-hub:timm/{MODEL}"])
def test_weights_come_from_the_hub_cache(hub_cache: Path, name: str) -> None:
    """The vectors are those of the cached weights without the classifier."""
    encoder = load_encoder(name, bands=("nir", *RGB), device="cpu")
    snapshot = hub_cache / f"models--timm--{MODEL}" / "snapshots" / ("0" * 40)
    network = timm.create_model(MODEL, pretrained=False)
    network.load_state_dict(load_file(snapshot / "model.safetensors"))
    network.reset_classifier(0)
    tiles = random_tiles(2, bands=4, side=encoder.input_px)
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(tiles[:, 1:]).float() - mean) / std)
    torch.testing.assert_close(encoder.encode(tiles), expected)
    assert encoder.dim == expected.shape[1]


def test_a_model_and_its_tag_are_one_encoder(hub_cache: Path) -> None:
    keys = {load_encoder(name, bands=RGB, device="cpu").key for name in (MODEL, "test_convnext")}
    assert len(keys) == 1


def test_eight_bit_encoders_must_be_told_what_is_white(hub_cache: Path) -> None:
    """With white at 2550 instead of 255, ten times the counts give the same vectors."""
    with pytest.raises(ValueError, match="--white-level"):
        load_encoder(MODEL, bands=RGB, device="cpu", dtype="uint16")
    dim, bright = (
        load_encoder(MODEL, bands=RGB, device="cpu", dtype=dtype, white_level=white)
        for dtype, white in (("uint8", None), ("uint16", 2550.0))
    )
    tiles = random_tiles(2, side=dim.input_px)
    torch.testing.assert_close(
        bright.encode(tiles.astype(np.uint16) * 10), dim.encode(tiles), rtol=1e-4, atol=1e-5
    )
    assert dim.key != bright.key


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("test_resnet.r160_in1k", "not on this machine"),
        ("hf-hub:nobody/nothing", "not on this machine"),
        ("no_such_net", "neither a folder nor a model"),
        ("resnet5", "did you mean"),
        ("resnet50.no_such_tag", "no pretrained weights"),
        ("lcnet_035", "no pretrained weights"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(hub_cache: Path, name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_encoder(name, bands=RGB, device="cpu")


def test_a_half_made_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no encoder\.json"):
        load_encoder(tmp_path, bands=RGB, device="cpu")
    with pytest.raises(ValueError, match="torch does not know"):
        choose_device("abacus")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_shrinking_is_an_antialiased_mean_in_the_images_own_type(dtype: str) -> None:
    """Torch's float64 interpolation rounded, which in 8 bits may be off by one more."""
    tiles = random_tiles(2, side=100, dtype=dtype)
    resized = resize_tiles(tiles, 37)
    exact = functional.interpolate(
        torch.from_numpy(tiles.astype(np.float64)), size=37, mode="bilinear", antialias=True
    ).numpy()
    assert resized.dtype == tiles.dtype
    assert np.abs(resized - exact).max() <= (1.5 if dtype == "uint8" else 0.55)
    constant = np.full_like(tiles, np.iinfo(dtype).max)
    assert (resize_tiles(constant, 37) == np.iinfo(dtype).max).all()
