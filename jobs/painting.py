"""From the passes of a denoiser to a whole image: the loop over passes and steps, resumable at
each step.

The fields of a trajectory are arrays in memory, or memory maps in a folder. After every step the
folder's state is replaced, so that a killed command goes on with the step that it was in; the
noise, a function of place, needs no state. What a pass has made stays for the next one.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.deconvolve import WienerInverse, deconvolve
from model.editing import Edit, Edited, hold, start_from
from model.generate import (
    ArrayField,
    Field,
    Pass,
    Trajectory,
    advance,
    finish,
    fresh_noise,
    reduce_field,
    start,
)
from model.lattice import coarser
from model.solver import Solver, make_solver
from pipeline import console


@dataclass(frozen=True)
class Recipe:
    """What decides an image, given the denoiser, the condition and what is known of it.

    height, width: cells of the field (pixels at scale 1). steps: evaluations of the denoiser in
    each pass, None for its own numbers; guidance counts each twice. bf16: whether layers compute
    in bfloat16. level: of the field's cells, below 0 finer than the training's.
    overlap: of the windows of patch diffusion. eta: of the solver ddim, where it adds noise.
    autoguidance: of a cascade's blocks, None for each one's own.
    """

    height: int
    width: int
    steps: int | None
    seed: int
    guidance: float
    solver: str
    level: int = 0
    overlap: float | None = None
    eta: float | None = None
    bf16: bool = False
    autoguidance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What names the image; what does not concern it is left out."""
        parts = asdict(self).items()
        return {name: v for name, v in parts if v is not None and v is not False}

    def make_solver(self) -> Solver:
        return make_solver(self.solver, self.eta)


def paint(
    passes: Sequence[Pass],
    recipe: Recipe,
    *,
    channels: int,
    mollifier_sigma_px: float = 0.0,
    work: Path | None = None,
    report: Callable[[int, int], None] = lambda start, amount: None,
    edit: Edit | None = None,
    device: str = "cpu",
) -> ArrayField:
    """The generated field, standardised; where the process is mollified, sharpened by the Wiener
    inverse of the mollifier.

    Args:
        work: folder of the trajectories' fields; None keeps them in memory.
        report: called with the work done before a step and what was added to it, tile by tile, in
            units of cells (see `work_of`).
        edit: what is known of the image, see `model.editing`; a folder's trajectory knows nothing
            of it.
        device: what the layers of the denoiser run on.
    """
    if edit is not None and mollifier_sigma_px:
        raise ValueError(
            f"the denoiser paints images mollified by {mollifier_sigma_px:g} px, of which no "
            "exact values are known before they are painted; edit with a run whose "
            "mollifier_sigma_px is 0"
        )
    state = _State(work, recipe)
    above: Field | None = None
    other: ArrayField | None = None
    spent = 0
    for trajectory in passes:
        shape = (channels, *_sides(recipe, trajectory.level))
        given = edit.given(trajectory.level, shape) if edit is not None else None
        if given is None:
            counted = partial(report_from, report, spent)
            with torch.autocast(device, torch.bfloat16, recipe.bf16):
                above, other = _generate(trajectory, recipe, shape, above, state, counted, edit)
        else:
            above = given
        spent += work_of(trajectory, recipe)
    assert isinstance(above, ArrayField), "the last pass is generated"
    last = passes[-1].level
    if last < recipe.level:
        shape = (channels, recipe.height, recipe.width)
        reduced = state.field("reduced", shape)
        reduce_field(above, reduced, recipe.level - last)
        return reduced
    if not mollifier_sigma_px:
        return above
    # What was painted stays as it is, so that a killed command can do this again.
    assert other is not None
    deconvolve(above, other, WienerInverse(mollifier_sigma_px * 2.0**-recipe.level))
    return other


def report_from(report: Callable[[int, int], None], before: int, start: int, amount: int) -> None:
    """Report the work of one pass as that of the whole."""
    report(before + start, amount)


def work_of(trajectory: Pass, recipe: Recipe) -> int:
    """Cells that a pass evaluates, over all its steps."""
    height, width = _sides(recipe, trajectory.level)
    return height * width * trajectory.evaluations


def _sides(recipe: Recipe, level: int) -> tuple[int, int]:
    """Cells of a level down and across the image."""
    up = level - recipe.level
    return coarser(recipe.height, up), coarser(recipe.width, up)


def _generate(
    trajectory: Pass,
    recipe: Recipe,
    shape: tuple[int, int, int],
    above: Field | None,
    state: "_State",
    report: Callable[[int, int], None],
    edit: Edit | None,
) -> tuple[ArrayField, ArrayField]:
    """One pass, from the step that an earlier process left it in: its field, and another of the
    same shape that is no longer needed.
    """
    name, steps = trajectory.name, trajectory.evaluations
    solver = recipe.make_solver()
    fields = [state.field(f"{name}-u{i}", shape) for i in (0, 1)]
    memory: list[ArrayField] | list[None] = [None, None]
    if solver.remembers:
        memory = [state.field(f"{name}-estimate{i}", shape) for i in (0, 1)]
    painter, constraint = trajectory.prepare(above)
    if edit is not None:
        held = edit.constraint(trajectory.level)
        constraint = hold(held, constraint)
        painter = Edited(painter, constraint)
    first, last = trajectory.log_snrs
    plan = solver.steps(first, last, max(steps - 1, 1))
    done = state.done(name)
    cells = shape[1] * shape[2]
    started = time.monotonic()
    if done == 0:
        start(fields[0], trajectory.noise, recipe.seed, first, level=trajectory.level)
        if constraint is not None:
            start_from(fields[0], constraint, first, level=trajectory.level)
    for number in range(done, steps):
        here, there = number % 2, (number + 1) % 2
        now = Trajectory(fields[here], fields[there], memory[here], memory[there])
        counted = partial(report, number * cells)
        if number + 1 < steps:
            fresh = fresh_noise(trajectory.noise, recipe.seed, number)
            advance(painter, solver, plan[number], now, counted, fresh)
        else:
            finish(painter, last if number else first, now, counted)
        state.mark(name, number + 1, time.monotonic() - started)
        started = time.monotonic()
    return fields[steps % 2], fields[(steps + 1) % 2]


class _State:
    """How far the passes of an image have come, in its folder; in memory nothing is kept."""

    def __init__(self, work: Path | None, recipe: Recipe) -> None:
        self.work, self.recipe = work, recipe
        self.passes: dict[str, int] = {}
        self.seconds = 0.0
        file = None if work is None else work / "state.json"
        if file is not None and file.is_file():
            state = json.loads(file.read_text())
            if state["recipe"] == recipe.to_json():
                self.passes, self.seconds = state.get("passes", {}), float(state["seconds"])

    def done(self, name: str) -> int:
        """Steps of a pass that were finished."""
        return self.passes.get(name, 0)

    def mark(self, name: str, done: int, seconds: float) -> None:
        """Record a step and what it took."""
        self.passes[name] = done
        self.seconds += seconds
        if self.work is not None:
            state: dict[str, Any] = {"recipe": self.recipe.to_json(), "passes": self.passes}
            state["seconds"] = round(self.seconds, 1)
            console.write_json_atomic(self.work / "state.json", state)

    def field(self, name: str, shape: tuple[int, int, int]) -> ArrayField:
        """A field in memory, or one of the folder's, as an earlier process left it."""
        return _field(self.work, name, shape)


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
