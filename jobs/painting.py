"""From a denoiser and a condition to a whole image: the loop over steps, resumable at each.

The fields of a trajectory are arrays in memory, or memory maps in a folder. After every step the
folder's state is replaced, so that a killed painting goes on with the step that it was in; the
noise, a function of place, needs no state.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from model.deconvolve import WienerInverse, deconvolve
from model.editing import Constraint, Edited, start_from
from model.family import Denoiser, mollifier_of, noise_of, sampled_range
from model.generate import (
    ArrayField,
    Estimator,
    Trajectory,
    advance,
    finish,
    fresh_noise,
    start,
)
from model.solver import Solver, make_solver, uniform_steps
from pipeline import console


@dataclass(frozen=True)
class Recipe:
    """What decides a painting, given the denoiser, the condition and any constraint.

    height, width: cells of the field (pixels at scale 1). steps: evaluations of the denoiser;
    guidance counts each twice. level: of the field's cells, below 0 finer than the training's.
    overlap: of the windows of patch diffusion. eta: of the solver ddim, where it adds noise.
    """

    height: int
    width: int
    steps: int
    seed: int
    guidance: float
    solver: str
    level: int = 0
    overlap: float | None = None
    eta: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What names the painting; what does not concern it is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def make_solver(self) -> Solver:
        return make_solver(self.solver, self.eta)


def paint(
    denoiser: Denoiser,
    painter: Estimator,
    recipe: Recipe,
    work: Path | None = None,
    report: Callable[[int, int], None] = lambda step, cells: None,
    constraint: Constraint | None = None,
) -> ArrayField:
    """The painted field, standardised x0_hat; where the process is mollified, sharpened by the
    Wiener inverse of the mollifier.

    Args:
        work: folder of the trajectory's fields; None keeps them in memory.
        report: called with the step (from 0) and the cells done, tile by tile.
        constraint: what the image is held to, see `model.editing`; a folder's trajectory knows
            nothing of it.
    """
    sigma_px = mollifier_of(denoiser)
    if constraint is not None:
        if sigma_px:
            raise ValueError(
                f"the denoiser paints images mollified by {sigma_px:g} px, of which no exact "
                "values are known before they are painted; edit with a run whose "
                "mollifier_sigma_px is 0"
            )
        painter = Edited(painter, constraint)
    solver = recipe.make_solver()
    shape = (denoiser.config.channels, recipe.height, recipe.width)
    fields = [_field(work, name, shape) for name in ("u0", "u1")]
    memory: list[ArrayField] | list[None] = [None, None]
    if solver.remembers:
        memory = [_field(work, name, shape) for name in ("estimate0", "estimate1")]
    first, last = sampled_range(denoiser)
    steps = uniform_steps(first, last, max(recipe.steps - 1, 1))
    done, seconds_before = _done(work, recipe)
    started = time.monotonic()
    noise = noise_of(denoiser)
    if done == 0:
        start(fields[0], noise, recipe.seed, first, level=recipe.level)
        if constraint is not None:
            start_from(fields[0], constraint, first, level=recipe.level)
    for number in range(done, recipe.steps):
        here, there = number % 2, (number + 1) % 2
        state = Trajectory(fields[here], fields[there], memory[here], memory[there])
        if number + 1 < recipe.steps:
            fresh = fresh_noise(noise, recipe.seed, number)
            advance(painter, solver, steps[number], state, partial(report, number), fresh)
        else:
            finish(painter, last if number else first, state, partial(report, number))
        _mark(work, recipe, number + 1, seconds_before + time.monotonic() - started)
    painted, other = fields[recipe.steps % 2], fields[(recipe.steps + 1) % 2]
    if not sigma_px:
        return painted
    # What was painted stays as it is, so that a killed command can do this again.
    deconvolve(painted, other, WienerInverse(sigma_px * 2.0**-recipe.level))
    return other


def _field(work: Path | None, name: str, shape: tuple[int, int, int]) -> ArrayField:
    if work is None:
        return ArrayField(np.zeros(shape, np.float32))
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.f32"
    whole = file.is_file() and file.stat().st_size == 4 * int(np.prod(shape))
    return ArrayField(np.memmap(file, np.float32, "r+" if whole else "w+", shape=shape))


def painting_seconds(work: Path) -> float:
    """What the finished steps took, in all processes that took them."""
    return float(json.loads((work / "state.json").read_text())["seconds"])


def _done(work: Path | None, recipe: Recipe) -> tuple[int, float]:
    """Steps that earlier processes finished of the same recipe, and the seconds they took."""
    file = None if work is None else work / "state.json"
    if file is None or not file.is_file():
        return 0, 0.0
    state = json.loads(file.read_text())
    same = state["recipe"] == recipe.to_json()
    return (int(state["done"]), float(state["seconds"])) if same else (0, 0.0)


def _mark(work: Path | None, recipe: Recipe, done: int, seconds: float) -> None:
    if work is not None:
        state = {"recipe": recipe.to_json(), "done": done, "seconds": round(seconds, 1)}
        console.write_json_atomic(work / "state.json", state)
