"""How a training came along: losses and held-out errors, part by part, from metrics.jsonl.

A part is a block of a cascade, or the whole of another denoiser. The held-out error is that of F,
what the network adds to the best linear estimate of each octave (docs/method.md, section 2), in
units of that estimate's deviation: 1 is the linear (Wiener) estimate.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.family import WHOLE


@dataclass(frozen=True)
class Losses:
    """Of one step: `loss` is the mean of `level_losses`, the losses of `levels`, fine to coarse;
    older runs name no levels.
    """

    step: int
    part: str
    loss: float
    levels: tuple[int, ...]
    level_losses: tuple[float, ...]


@dataclass(frozen=True)
class HeldOut:
    """One measurement: errors in rows by log-SNR around the part's middle and columns by level, on
    regions of `split`.
    """

    step: int
    part: str
    split: str
    log_snrs: tuple[float, ...]
    levels: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        """Over log-SNRs and levels."""
        return sum(map(sum, self.errors)) / sum(map(len, self.errors))


@dataclass(frozen=True)
class Progress:
    """Of a whole run, in the order of metrics.jsonl."""

    losses: tuple[Losses, ...]
    held_out: tuple[HeldOut, ...]

    @classmethod
    def read(cls, file: Path) -> "Progress":
        """Lines that are whole; a kill may have cut the last one short."""
        losses, held_out = [], []
        for text in file.read_text().splitlines() if file.is_file() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if "held_out" in line:
                held_out.append(_held_out(line))
            elif all(isinstance(line.get(name), int | float) for name in ("step", "loss")):
                losses.append(_losses(line))
        return cls(tuple(losses), tuple(held_out))

    @property
    def parts(self) -> tuple[str, ...]:
        """Coarse to fine."""
        lines: list[Losses | HeldOut] = [*self.losses, *self.held_out]
        level = {line.part: max(line.levels, default=0) for line in lines}
        return tuple(sorted(level, key=lambda part: -level[part]))

    def last_held_out(self) -> tuple[HeldOut, ...]:
        """The last measurement of every part that has one."""
        last = {line.part: line for line in self.held_out}
        return tuple(last[part] for part in self.parts if part in last)


def _losses(line: dict[str, Any]) -> Losses:
    of_levels = tuple(float(value) for value in line.get("level_losses") or ())
    levels = tuple(line.get("levels") or range(len(of_levels)))
    part = str(line.get("part", WHOLE))
    return Losses(int(line["step"]), part, float(line["loss"]), levels, of_levels)


def _held_out(line: dict[str, Any]) -> HeldOut:
    return HeldOut(
        int(line["step"]),
        str(line["part"]),
        str(line["split"]),
        tuple(line["log_snrs"]),
        tuple(line["levels"]),
        tuple(tuple(row) for row in line["held_out"]),
    )
