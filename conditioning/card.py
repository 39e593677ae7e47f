"""What a self-trained encoder says of itself: `encoder.json`, written last, read without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD_NAME = "encoder.json"


@dataclass(frozen=True)
class EncoderCard:
    """What `encoder.json` holds: how to rebuild a self-trained encoder, and how it was made.

    `mean` and `std` are per band, in counts of `dtype`. `training` and `quality` are for the
    reader and for resuming; they do not change what the encoder computes.
    """

    architecture: str
    dim: int
    input_px: int
    bands: tuple[str, ...]
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    training: Mapping[str, Any]
    quality: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "EncoderCard":
        """The card in `folder`; `ValueError` when it is not a finished encoder of this version."""
        path = folder / CARD_NAME
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {CARD_NAME}, so it is not a finished encoder; "
                "run `python -m conditioning.pretrain` with it as --out until it ends"
            )
        values = json.loads(path.read_text())
        expected = set(cls.__dataclass_fields__)
        if set(values) != expected:
            raise ValueError(
                f"{path} has the fields {sorted(values)} where {sorted(expected)} are expected; "
                "train the encoder again with this version"
            )
        tuples = {name: tuple(values[name]) for name in ("bands", "mean", "std")}
        return cls(**{**values, **tuples})
