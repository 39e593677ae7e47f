"""Feature spaces with published weights: CLIP and Inception, each by its own protocol.

Both were trained on 8-bit images in red, green and blue. Their weights are looked for where their
libraries keep what they fetched, or taken from a file that the user names; nothing is fetched. A
pickle is read only if it holds nothing but tensors.
"""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from conditioning.encoders import RGB
from conditioning.tiles import Tiles
from jobs.weights import (
    CLIP_FILE,
    CLIP_REPOSITORY,
    clip_weights,
    inception_place,
    inception_weights,
)
from pipeline.store import Store

CLIP, INCEPTION = "clip-vit-b-32", "inception-v3"
CLIP_ARCHITECTURE = "ViT-B-32-quickgelu"
CLIP_PX, CLIP_DIM, INCEPTION_DIM = 224, 512, 2048


@dataclass(frozen=True)
class EightBits:
    """Red, green and blue of the store's bands in 8 bits; `white_level` is the count that becomes
    255.
    """

    channels: tuple[int, ...]
    white_level: float

    @classmethod
    def of(cls, name: str, store: Store, white_level: float | None) -> "EightBits":
        spec = store.spec
        missing = [band for band in RGB if band not in spec.bands]
        if missing:
            raise ValueError(
                f"{name} needs the bands red, green and blue and {store.path} has "
                f"{','.join(spec.bands)}; use --features with an encoder of the store"
            )
        if white_level is None and spec.dtype != "uint8":
            raise ValueError(
                f"{name} was trained on 8-bit images and {store.path} holds {spec.dtype}; say "
                "with --white-level which count is white (for example 10000 for reflectance)"
            )
        return cls(tuple(spec.bands.index(band) for band in RGB), white_level or 255.0)

    def __call__(self, crops: Tiles) -> UInt8[np.ndarray, "n 3 h w"]:
        shown = crops[:, list(self.channels)]
        if shown.dtype == np.uint8 and self.white_level == 255.0:
            return shown
        return np.clip(np.rint(shown * (255.0 / self.white_level)), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class ClipSpace:
    """CLIP ViT-B/32 as clean-fid uses it."""

    network: nn.Module
    eight_bits: EightBits
    key: str
    label: str
    device: torch.device
    name: str = CLIP
    dim: int = CLIP_DIM
    fid_dim: int = CLIP_DIM
    kid_dim: int = CLIP_DIM
    conditions_images: bool = False

    @torch.no_grad()
    def features(self, crops: Tiles) -> Float32[np.ndarray, "n 512"]:
        side = (CLIP_PX, CLIP_PX)
        resized = [
            np.asarray(Image.fromarray(crop).resize(side, Image.Resampling.BICUBIC))
            for crop in np.ascontiguousarray(self.eight_bits(crops).transpose(0, 2, 3, 1))
        ]
        pixels = torch.from_numpy(np.stack(resized)).to(self.device, torch.float32) / 255
        mean, std = pixels.new_tensor(open_clip.OPENAI_DATASET_MEAN), open_clip.OPENAI_DATASET_STD
        inputs = ((pixels - mean) / pixels.new_tensor(std)).permute(0, 3, 1, 2)
        return self.network(inputs).to("cpu", torch.float32).numpy()


@dataclass(frozen=True)
class InceptionSpace:
    """Inception v3 as torch-fidelity's inception-v3-compat, the TensorFlow original's weights."""

    network: nn.Module
    eight_bits: EightBits
    key: str
    label: str
    device: torch.device
    name: str = INCEPTION
    dim: int = INCEPTION_DIM
    fid_dim: int = INCEPTION_DIM
    kid_dim: int = INCEPTION_DIM
    conditions_images: bool = False

    @torch.no_grad()
    def features(self, crops: Tiles) -> Float32[np.ndarray, "n 2048"]:
        pixels = torch.from_numpy(np.ascontiguousarray(self.eight_bits(crops))).to(self.device)
        return self.network(pixels)[0].to("cpu", torch.float32).numpy()


def load_clip(
    store: Store, weights: Path | None, white_level: float | None, device: torch.device
) -> ClipSpace:
    """The space with these weights (safetensors of open_clip), or those in the cache."""
    eight_bits = EightBits.of(CLIP, store, white_level)
    file = weights or clip_weights()
    if file is None:
        raise ValueError(
            f"the weights of {CLIP} are not on this machine and nothing is fetched here; where "
            f"there is a network run `hf download {CLIP_REPOSITORY} {CLIP_FILE}`, then copy the "
            "file and name it with --weights"
        )
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    prefix = "visual."
    visual = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    with torch.device("meta"):  # half a gigabyte of random numbers would be drawn in vain
        network = open_clip.CLIP(**open_clip.get_model_config(CLIP_ARCHITECTURE)).visual
    try:
        network.load_state_dict(visual, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{file} does not hold open_clip's {CLIP_ARCHITECTURE}; take {CLIP_FILE} of "
            f"{CLIP_REPOSITORY}"
        ) from error
    digest = _digest(file)
    source = f"the weights of {CLIP_REPOSITORY}" if weights is None else f"weights {file.name}"
    return ClipSpace(
        network.eval().requires_grad_(False).to(device),
        eight_bits,
        f"{CLIP}-{digest}-{eight_bits.white_level:g}",
        f"CLIP ViT-B/32 image features by open_clip as clean-fid computes them, {source} "
        f"(sha256 {digest}...)",
        device,
    )


def load_inception(
    store: Store, weights: Path | None, white_level: float | None, device: torch.device
) -> InceptionSpace:
    """The space with these weights (torch-fidelity's state dict), or those in the cache."""
    eight_bits = EightBits.of(INCEPTION, store, white_level)
    file = weights or inception_weights()
    if file is None:
        raise ValueError(
            f"the weights of {INCEPTION} are not on this machine and nothing is fetched here; "
            f"download {URL_INCEPTION_V3} where there is a network and put it at "
            f"{inception_place()} or name it with --weights"
        )
    try:
        # torch-fidelity unpickles without restraint: only what is plain tensors gets that far.
        torch.load(file, weights_only=True)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(INCEPTION_DIM)], feature_extractor_weights_path=str(file)
        )
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{file} does not hold torch-fidelity's Inception v3; download {URL_INCEPTION_V3}"
        ) from error
    digest = _digest(file)
    published = digest[:8] in URL_INCEPTION_V3  # their name ends with it
    return InceptionSpace(
        network.to(device),
        eight_bits,
        f"{INCEPTION}-{digest}-{eight_bits.white_level:g}",
        "Inception v3 features by torch-fidelity (inception-v3-compat, 2048), "
        f"{'the published weights' if published else f'weights {file.name}'} "
        f"(sha256 {digest}...)",
        device,
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:10]
