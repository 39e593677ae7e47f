"""The configuration of a denoiser, by the name of a preset or from a file of what differs."""

import json
from dataclasses import asdict
from pathlib import Path

from model.config import DenoiserConfig, config_from_dict, preset


def read_preset(name: str, *, channels: int, token_dim: int) -> DenoiserConfig:
    """The preset called `name` for images and tokens of these sizes, or that of a file.

    A file (.json) holds fields of a configuration, as a run's config.json does, that replace those
    of the preset that it names as "base".
    """
    if not name.endswith(".json"):
        return preset(name, channels=channels, token_dim=token_dim)
    try:
        content = json.loads(Path(name).read_text())
        known = asdict(preset(content.pop("base"), channels=channels, token_dim=token_dim))
        return config_from_dict({**known, **content})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{name} is no file of a preset ({error}); it holds "base", the name of a preset, and '
            "the fields that differ from it, blocks with all of theirs"
        ) from error
