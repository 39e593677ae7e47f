"""What turns a tile into a vector: self-supervised encoders behind one protocol.

A tile is a square of pixels, whatever its side on the slide; an encoder resamples it to its own
input size, standardises every band with its own mean and deviation, and returns one vector. Where
the weights come from is all that differs: a timm model by name, a model of the Hugging Face hub by
`hf-hub:ID`, or a folder written by `conditioning.pretrain`. Weights are safetensors only. The key
of an encoder is a readable slug and a hash of everything that decides its output (architecture,
weights, input size, bands, normalisation), so two encoders never share a place in a store.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import timm
import torch
from jaxtyping import Float32
from safetensors.torch import load_file, save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from conditioning.card import CARD_NAME, EncoderCard
from conditioning.hub import did_you_mean, pretrained_network
from conditioning.tiles import Tiles, resize_tiles
from pipeline.console import write_bytes_atomic, write_json_atomic

WEIGHTS_NAME = "encoder.safetensors"
RGB = ("red", "green", "blue")


@runtime_checkable
class Encoder(Protocol):
    """Anything that embeds tiles.

    `key` names it in a store: a safe file name, different whenever the vectors would differ. `dim`
    is the length of its vectors, `input_px` the side of the tiles it sees, and `bands` the names
    of the channels of the tiles it is given.
    """

    @property
    def key(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def input_px(self) -> int: ...
    @property
    def bands(self) -> tuple[str, ...]: ...

    def encode(self, tiles: Tiles) -> Float32[Tensor, "n d"]:
        """One vector per tile, on the CPU, each a function of its tile alone.

        `tiles` are counts of shape (n, c, h, w), h = w, channels as in `bands`; sides other than
        `input_px` are resampled by `conditioning.tiles.resize_tiles`.
        """
        ...


@dataclass(frozen=True)
class NetworkEncoder:
    """An encoder that is a network: z = network((x[channels] - mean) / std), x in counts.

    `channels` picks, from the bands it is given, those that the network was trained on; `mean` and
    `std` belong to them.
    """

    key: str
    dim: int
    input_px: int
    bands: tuple[str, ...]
    network: nn.Module
    channels: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @torch.no_grad()
    def encode(self, tiles: Tiles) -> Float32[Tensor, "n d"]:
        pixels = resize_tiles(tiles[:, list(self.channels)], self.input_px)
        inputs = standardise(
            torch.from_numpy(pixels).to(self.device).to(torch.float32), self.mean, self.std
        )
        return self.network(inputs).to("cpu", torch.float32)


def standardise(
    pixels: Float32[Tensor, "n c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Tensor, "n c h w"]:
    """(pixels - mean) / std, band by band; all three in counts."""
    shape = (1, -1, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def load_encoder(
    name_or_dir: str | Path,
    *,
    bands: Sequence[str],
    device: torch.device | str,
    dtype: str = "uint8",
    white_level: float | None = None,
    offline: bool = False,
) -> NetworkEncoder:
    """The encoder that a user asked for, ready for tiles with these `bands` and this `dtype`.

    `name_or_dir` is a folder written by `conditioning.pretrain`, `hf-hub:ID`, or the name of a
    timm model with weights. Encoders from timm and the hub were trained on 8-bit RGB: they take
    the bands red, green and blue, and for uint16 they must be told `white_level`, the count that
    is to them what 255 is in 8 bits. A self-trained encoder takes the bands it was trained on and
    has its own normalisation. `offline` never fetches weights.

    Raises `ValueError` when bands are missing, when the weights are not on this machine and cannot
    be fetched, or when they are not safetensors.
    """
    device = torch.device(device)
    folder = Path(name_or_dir)
    if folder.is_dir():
        return _load_self_trained(folder, tuple(bands), dtype, device)
    if white_level is None:
        if dtype != "uint8":
            raise ValueError(
                f"the encoder {name_or_dir} was trained on 8-bit images and the pixels are "
                f"{dtype}; say with --white-level which count is white (for example 10000 for "
                "reflectance), or train an encoder with conditioning.pretrain"
            )
        white_level = 255.0
    return _load_pretrained(str(name_or_dir), tuple(bands), white_level, device, offline)


def build_network(architecture: str, *, num_bands: int, dim: int, input_px: int) -> nn.Module:
    """An untrained encoder: a timm backbone, a linear layer of `dim` outputs, a standardisation.

    The latter is a batch norm without scale or shift: what a store holds has about unit variance
    in every dimension. `ValueError` names similar architectures when timm has none of this name.
    """
    if not timm.is_model(architecture):
        raise ValueError(
            f"timm has no architecture {architecture!r}; {did_you_mean(architecture)}"
        )
    config = timm.get_pretrained_cfg(architecture)
    fixed_size = config is not None and config.fixed_input_size
    backbone = timm.create_model(
        architecture,
        pretrained=False,
        in_chans=num_bands,
        num_classes=dim,
        img_size=input_px if fixed_size else None,
    )
    return nn.Sequential(backbone, nn.BatchNorm1d(dim, affine=False))


def choose_device(name: str) -> torch.device:
    """The device that --device names; `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {name} and torch sees no GPU here; use cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device is {name!r}, which torch does not know; use auto, cpu or cuda"
        ) from error


def save_encoder(folder: Path, card: EncoderCard, network: nn.Module) -> None:
    """Write a self-trained encoder; `encoder.json` comes last and marks it as finished."""
    state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_bytes_atomic(folder / WEIGHTS_NAME, save(state))
    write_json_atomic(folder / CARD_NAME, asdict(card))


def encoder_key(card: EncoderCard, network: nn.Module) -> str:
    """The key of a self-trained encoder; it does not depend on where the encoder's folder is."""
    decisive = [card.dim, card.input_px, card.bands, card.dtype, card.mean, card.std]
    return _key(card.architecture, decisive, network)


def _load_self_trained(
    folder: Path, bands: tuple[str, ...], dtype: str, device: torch.device
) -> NetworkEncoder:
    card = EncoderCard.read(folder)
    if card.dtype != dtype:
        raise ValueError(
            f"the encoder in {folder} was trained on {card.dtype} and the pixels are {dtype}; "
            "train one on pixels of the same type"
        )
    channels = _channels(f"the encoder in {folder}", card.bands, bands)
    network = build_network(
        card.architecture, num_bands=len(card.bands), dim=card.dim, input_px=card.input_px
    )
    network.load_state_dict(load_file(folder / WEIGHTS_NAME))
    return NetworkEncoder(
        key=encoder_key(card, network),
        dim=card.dim,
        input_px=card.input_px,
        bands=bands,
        network=network.eval().to(device),
        channels=channels,
        mean=card.mean,
        std=card.std,
        device=device,
    )


def _load_pretrained(
    name: str, bands: tuple[str, ...], white_level: float, device: torch.device, offline: bool
) -> NetworkEncoder:
    channels = _channels(f"the encoder {name}", RGB, bands)
    slug, network = pretrained_network(name, offline=offline)
    config = resolve_model_data_config(network)
    input_px = int(config["input_size"][1])
    mean = tuple(white_level * value for value in config["mean"])
    std = tuple(white_level * value for value in config["std"])
    network = network.eval().to(device)
    with torch.no_grad():
        output = network(torch.zeros(1, len(RGB), input_px, input_px, device=device))
    if output.ndim != 2:
        raise ValueError(
            f"the encoder {name} returns an array of shape {tuple(output.shape)} for one tile "
            "where one vector is needed; choose a model with global pooling"
        )
    return NetworkEncoder(
        key=_key(slug, [input_px, mean, std], network),
        dim=output.shape[1],
        input_px=input_px,
        bands=bands,
        network=network,
        channels=channels,
        mean=mean,
        std=std,
        device=device,
    )


def _channels(encoder: str, needed: tuple[str, ...], bands: tuple[str, ...]) -> tuple[int, ...]:
    missing = [band for band in needed if band not in bands]
    if missing:
        raise ValueError(
            f"{encoder} needs the bands {list(needed)} and the images have {list(bands)}; "
            "use an encoder trained on bands that are there"
        )
    return tuple(bands.index(band) for band in needed)


def _key(name: str, decisive: Sequence[Any], network: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps([name, decisive]).encode())
    for parameter, tensor in sorted(network.state_dict().items()):
        array = np.ascontiguousarray(tensor.cpu().numpy())
        digest.update(f"{parameter}{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")[:60]
    return f"{slug}-{digest.hexdigest()[:10]}"
