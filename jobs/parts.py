"""Training one part of a denoiser: a block of a cascade, or a denoiser of one piece.

Parts share no parameters. Each has its own objective, optimizer, batches, learning rate and clock,
so that whoever trains it, when and beside what, makes no difference to what it becomes.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.averages import PartAverages
from jobs.data import Batch, Batches
from jobs.engine import Ranks
from model.cascade.objective import HELD_OUT_LOG_SNRS, BlockObjective
from model.draw import BlockDraw, TopDraw
from model.family import Objective

HELD_OUT_WINDOWS = 16
HELD_OUT_FIRST, HELD_OUT_GROWTH = 8, 1.25
"""Steps at which the held-out error is measured: the first, and the ratio of one to the next. That
takes 3 % of a few thousand steps; a part with few regions is at its best after a hundred or two.
"""
Clock = Callable[[], float]
"""Tells seconds: by the time of day, or CPU time."""
LAST_RATE = 0.05
"""Of the peak learning rate, at the end."""


@dataclass(frozen=True)
class Goal:
    """How long a part is trained: so many steps, and at most so many seconds."""

    steps: int
    seconds: float = math.inf

    def progress(self, steps: int, seconds: float) -> float:
        """From 0 to 1 (or beyond), by whichever is nearer to its end."""
        if self.steps == 0:
            return 1.0
        return max(steps / self.steps, seconds / self.seconds)


@dataclass(frozen=True)
class Rate:
    """Learning rate: a linear rise over `warmup` steps, then a cosine to a twentieth of `peak`."""

    peak: float
    warmup: int

    def at(self, step: int, progress: float) -> float:
        rise = min(step / max(self.warmup, 1), 1.0)
        fall = (1 + LAST_RATE + (1 - LAST_RATE) * math.cos(math.pi * min(progress, 1.0))) / 2
        return self.peak * rise * fall


class Part:
    """One part of a denoiser in training.

    averages: of its weights, shared with the run. held_out: the batch on which its error is
    measured, and the split that it is of; None for kinds that have no such measure.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        engine: Any,
        batches: Batches,
        goal: Goal,
        rate: Rate,
        ema_decay: float,
        averages: PartAverages,
        ranks: Ranks,
        bf16: bool,
        held_out: tuple[Batch, str] | None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.name, self.objective, self.engine, self.goal = name, objective, engine, goal
        self.batches, self.rate, self.ranks, self.bf16 = batches, rate, ranks, bf16
        self.ema_decay, self.held_out_batch, self.clock = ema_decay, held_out, clock
        self.step, self.seconds, self.averages = 0, 0.0, averages
        self.held_out_error: float | None = None
        self.held_out_step = 0
        self._source: Iterator[Batch] | None = None
        self._weights: list[Tensor] = list(objective.parameters())
        assert len(averages.running) == len(self._weights)

    @property
    def progress(self) -> float:
        return self.goal.progress(self.step, self.seconds)

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0

    @property
    def learning_rate(self) -> float:
        return self.rate.at(self.step, self.progress)

    def train(
        self, steps: int, agree: Callable[[float], tuple[float, bool]]
    ) -> tuple[Tensor, float]:
        """Up to so many steps, fewer where the goal is reached or `agree` says stop; returns the
        losses of the last one and the learning rate.

        agree: given this rank's clock, the clock of all and whether to stop.
        """
        losses = torch.zeros(1)
        for _ in range(steps):
            started = self.clock()
            if self._source is None:
                source = self.batches.iterate(self.step, self.ranks.rank, self.ranks.world)
                self._source = source
            batch = next(self._source).to(self.ranks.device)
            self.step += 1
            losses = self._step(batch)
            self.seconds, stop = agree(self.seconds + self.clock() - started)
            if stop or self.finished:
                break
        return losses, self.learning_rate

    def _step(self, batch: Batch) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate
        with torch.autocast(self.ranks.device.type, torch.bfloat16, self.bf16):
            losses = self.engine(batch.draw, batch.condition, batch.seeds, batch.uniform)
        self.engine.backward(losses.mean())
        self.engine.step()
        self.averages.update(self._weights, self.step, self.ema_decay, self.progress)
        return losses.detach()

    def resume(self, step: int, seconds: float, measured: int, error: float | None) -> None:
        """Go on after so many steps, with weights and averages that are those of then.

        measured: the last step at which the held-out error was. error: of the best averages.
        """
        self.step, self.seconds, self.held_out_step = step, seconds, measured
        self.averages.error = error

    def held_out_due(self, log_every: int) -> bool:
        """Whether the held-out error is to be measured now. Between two lines of the log it is
        not, so that a run that was interrupted there measures where an undisturbed one does.
        """
        if self.held_out_batch is None or self.step == self.held_out_step:
            return False
        if self.finished:
            return True
        return self.step % log_every == 0 and self.step >= next_measurement(self.held_out_step)

    def held_out(self) -> dict[str, Any]:
        """The averaged weights' error of F on held-out windows, over cells that are valid: rows by
        log-SNR, columns by level, fine to coarse. The best linear estimate has about 1.
        """
        assert self.held_out_batch is not None and isinstance(self.objective, BlockObjective)
        batch, split = self.held_out_batch
        assert isinstance(batch.draw, TopDraw | BlockDraw)
        with torch.no_grad():
            kept = [weight.clone() for weight in self._weights]
            torch._foreach_copy_(self._weights, self.averages.running)
            with torch.autocast(self.ranks.device.type, torch.bfloat16, self.bf16):
                errors = self.objective.held_out(batch.draw, batch.condition, batch.seeds)
                errors = errors / mean_weight(batch.draw)
            torch._foreach_copy_(self._weights, kept)
        self.held_out_step, self.held_out_error = self.step, float(errors.mean())
        if split == "val":  # test regions decide nothing
            self.averages.judge(self.held_out_error)
        return {
            "split": split,
            "log_snrs": list(HELD_OUT_LOG_SNRS),
            "levels": list(self.objective.levels),
            "held_out": [[round(float(value), 4) for value in row] for row in errors],
        }

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._source is not None:
            self._source.close()  # type: ignore[attr-defined]
            self._source = None


def next_measurement(step: int) -> int:
    """The first step after this one at which the held-out error is measured."""
    due = float(HELD_OUT_FIRST)
    while int(due) <= step:
        due *= HELD_OUT_GROWTH
    return int(due)


def mean_weight(draw: TopDraw | BlockDraw) -> float:
    """Of the cells of a batch; losses are means over all of them, each with its weight."""
    return max(float(draw.weight.mean()), 1e-6)
