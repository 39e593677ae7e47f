"""Spaces in which crops are compared: what a network says about a 256 px crop, as one vector.

    clip-vit-b-32   CLIP ViT-B/32 image features, 512 numbers, by open_clip, as clean-fid computes
                    them (clip_vit_b_32): PIL bicubic to 224 px in 8 bits, CLIP's normalisation
    inception-v3    the 2048 numbers of torch-fidelity's inception-v3-compat, resized to 299 px
    efficientnet-lite0    112 numbers in its middle for Crop FID, 1280 at its end for KID, of a
                    package that is installed with this one (`jobs.evaluate.lite0`)
    an encoder      the store's own, which sees its own bands at its own size

What the first two say can be compared with the literature, n being equal; the third compares
stores and machines. An encoder that also conditions the images, or was trained on the same store,
only compares images of one store and run: it is the last resort, and labelled. Nothing is ever
fetched from a network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32

from conditioning.encoders import RGB, NetworkEncoder, load_encoder
from conditioning.tiles import Tiles
from jobs.evaluate.lite0 import LITE0, load_lite0
from jobs.evaluate.published import (
    CLIP,
    INCEPTION,
    load_clip,
    load_inception,
)
from jobs.weights import clip_weights, inception_weights, lite0_weights
from pipeline.store import Store


@runtime_checkable
class FeatureSpace(Protocol):
    """One vector per crop. `key` is different whenever the vectors would differ; `label` is a
    sentence for the reader; `conditions_images` says that the same network conditions them. Crop
    FID reads the first `fid_dim` numbers, KID the last `kid_dim`.
    """

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def fid_dim(self) -> int: ...
    @property
    def kid_dim(self) -> int: ...
    @property
    def conditions_images(self) -> bool: ...

    def features(self, crops: Tiles) -> Float32[np.ndarray, "n d"]:
        """The vectors of crops with the store's bands and dtype, each a function of its crop."""
        ...


def columns_of(space: FeatureSpace) -> dict[str, slice]:
    """Which numbers of a space's vectors each distance reads."""
    return {"crop_fid": slice(space.fid_dim), "kid": slice(space.dim - space.kid_dim, None)}


@dataclass(frozen=True)
class EncoderSpace:
    """An encoder as `conditioning.embed` uses it."""

    encoder: NetworkEncoder
    label: str
    conditions_images: bool

    @property
    def name(self) -> str:
        return self.encoder.key

    @property
    def key(self) -> str:
        return self.encoder.key

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def fid_dim(self) -> int:
        return self.encoder.dim

    @property
    def kid_dim(self) -> int:
        return self.encoder.dim

    def features(self, crops: Tiles) -> Float32[np.ndarray, "n d"]:
        return self.encoder.encode(crops).numpy()


@dataclass(frozen=True)
class FeatureChoice:
    """What a user asked for: `name` is auto, a published space, an encoder's folder or its name in
    the store; `encoder` where the conditioning encoder lies, if told.
    """

    name: str
    weights: Path | None
    encoder: Path | None
    white_level: float | None


def choose_space(
    choice: FeatureChoice, store: Store, conditioning: Sequence[str], device: torch.device
) -> FeatureSpace:
    """The feature space that was asked for; for auto the first whose weights are there and that
    can see the store's pixels.

    conditioning: keys of the encoders that conditioned the images.
    """
    name, white_level = choice.name, choice.white_level
    in_8_bits = white_level is not None or store.spec.dtype == "uint8"
    auto = name == "auto" and in_8_bits and set(RGB) <= set(store.spec.bands)
    if name == CLIP or (auto and clip_weights()):
        return load_clip(store, choice.weights, white_level, device)
    if name == INCEPTION or (auto and inception_weights()):
        return load_inception(store, choice.weights, white_level, device)
    if name == LITE0 or (auto and lite0_weights()):
        return load_lite0(store, white_level, device)
    if name == "auto" and choice.encoder is not None:
        name = str(choice.encoder)
    elif name == "auto" and len(conditioning) == 1:
        name = conditioning[0]
    elif name == "auto":
        raise ValueError(
            f"none of {CLIP}, {INCEPTION} and {LITE0} is on this machine and sees "
            f"{store.spec.dtype} of {','.join(store.spec.bands)}, and {store.path} was embedded "
            f"by {', '.join(conditioning) or 'no encoder'}; name one with --features"
        )
    return load_encoder_space(store, name, conditioning, device)


def load_encoder_space(
    store: Store, name: str, conditioning: Sequence[str], device: torch.device
) -> EncoderSpace:
    """The space of an encoder that the user calls `name`: a folder, or known to the store."""
    if Path(name).is_dir():
        spec = store.spec
        encoder = load_encoder(name, bands=spec.bands, dtype=spec.dtype, device=device)
        self_trained = True
    else:
        key = store.resolve_encoder(name)
        encoder = store_encoder(store, key, device)
        names = store.encoder_attributes(key)["names"]
        self_trained = any(Path(n).is_dir() or Path(n).is_absolute() for n in names)
    conditions = encoder.key in conditioning
    kind = "self-trained encoder" if self_trained else f"pretrained encoder {name}"
    also = ", which also conditions the images" if conditions else ""
    scope = "one store and run" if conditions else "one store"
    return EncoderSpace(encoder, f"{kind}{also}: comparable only within {scope}", conditions)


def store_encoder(store: Store, key: str, device: torch.device) -> NetworkEncoder:
    """The encoder that embedded the store under `key`, by the names it is registered with."""
    attributes = store.encoder_attributes(key)
    for name in sorted(attributes["names"], key=lambda name: not Path(name).is_absolute()):
        if Path(name).is_absolute() and not Path(name).is_dir():
            continue
        try:
            encoder = load_encoder(
                name,
                bands=store.spec.bands,
                dtype=store.spec.dtype,
                device=device,
                white_level=attributes["white_level"],
                offline=True,
            )
        except ValueError:
            continue
        if encoder.key == key:
            return encoder
    raise ValueError(
        f"the encoder {key} of {store.path} is no longer at {', '.join(attributes['names'])}; "
        "name its folder with --encoder"
    )
