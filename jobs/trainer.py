"""The training loop: chunks of steps of whichever part is furthest behind, logs, checkpoints.

A denoiser has one part or several (`model.family.make_objectives`). Several are trained side by
side on a CPU, each by a thread with its own cores (a *lane*): small convolutions gain little from
a second core, two blocks gain all of it. On a GPU, or over several ranks, they take turns. Since
parts are independent and their batches are functions of (seed, part, step), neither changes what
any of them becomes.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.averages import Averages
from jobs.data import Batch, Batches, held_out_split
from jobs.engine import Ranks, build, multiplies_in_bf16
from jobs.optimizer import OptimizerName
from jobs.parts import HELD_OUT_WINDOWS, Clock, Goal, Part, Rate
from jobs.preview import write_preview
from jobs.record import HEARTBEAT_S, SPLIT_NAMES, RunState
from jobs.run import Run, SupersededError
from model.cascade.config import CascadeConfig
from model.cascade.denoiser import CascadeDenoiser
from model.family import WHOLE, Denoiser, Objective, computes_densely, make_objectives
from pipeline import console
from pipeline.packfile import PackSet

PERMILLE = 1000


@dataclass(frozen=True)
class Training:
    """The options of `jobs.train` that decide what the loop does with a batch."""

    blocks: tuple[str, ...]
    batch: int
    optimizer: OptimizerName
    learning_rate: float
    warmup: int
    ema: float
    condition_dropout: float
    augment: bool
    zero: int
    precision: str


class CpuClock:
    """CPU seconds of all threads of this process between `start` and `stop`. What measures the
    held-out error is counted, checkpoints and previews are not.
    """

    def __init__(self) -> None:
        self.seconds, self.started = 0.0, 0.0

    def start(self) -> None:
        self.started = time.process_time()

    def stop(self) -> None:
        self.seconds += time.process_time() - self.started


def num_lanes(ranks: Ranks, blocks: Sequence[str], shares: Mapping[str, float]) -> int:
    """How many parts are trained at once: no more than keep busy while each has its share."""
    if ranks.world > 1 or ranks.device.type != "cpu":
        return 1
    least_busy = sum(shares[name] for name in blocks) / max(shares[name] for name in blocks)
    return max(min(len(blocks), torch.get_num_threads(), int(least_busy)), 1)


def goals_of(
    shares: Mapping[str, float],
    blocks: Sequence[str],
    steps: int,
    limit_s: float | None,
    lanes: int,
) -> dict[str, Goal]:
    """How long each part is trained: its share of the steps, and of the time of all lanes."""
    total = sum(shares[name] for name in blocks)
    goals, given, until = {}, 0, 0.0
    for name in blocks:
        share = shares[name] / total
        until += share * steps
        own = round(until) - given
        given += own
        own_s = math.inf if limit_s is None else limit_s * min(share * lanes, 1.0)
        goals[name] = Goal(own, own_s)
    return goals


class Trainer:
    """A denoiser, its parts and the run that they write."""

    def __init__(
        self,
        training: Training,
        goals: Mapping[str, Goal],
        seed: int,
        denoiser: Denoiser,
        ranks: Ranks,
        lanes: int,
        run: Run,
        packs: PackSet,
        clock: Clock = time.perf_counter,
        early: Mapping[str, Tensor] | None = None,
    ) -> None:
        """early: weights early in the training that the denoiser begins with, where they are
        known.
        """
        self.training, self.ranks, self.lanes = training, ranks, lanes
        self.run, self.packs, self.denoiser, self.clock = run, packs, denoiser, clock
        dense = computes_densely(denoiser.config) or ranks.device.type == "cuda"
        fast = multiplies_in_bf16(ranks.device) and dense
        self.bf16 = training.precision == "bf16" or (training.precision == "auto" and fast)
        objectives = make_objectives(denoiser)
        numbers = {name: number for number, name in enumerate(objectives)}
        engines = {
            name: build(
                objectives[name],
                optimizer=training.optimizer,
                learning_rate=training.learning_rate,
                batch=training.batch,
                world=ranks.world,
                zero=training.zero,
            )
            for name in goals
        }
        self.averages = Averages(denoiser, ranks.device, early)
        self.parts = [
            self._part(name, objectives[name], engines[name], numbers[name], goal, seed)
            for name, goal in goals.items()
        ]
        # A signal is told to this process; stopping is what all ranks have agreed on.
        self.told = self.stopping = self.superseded = False
        self.cpu = CpuClock()
        self.beat = time.monotonic()

    def _part(
        self, name: str, objective: Objective, engine: Any, number: int, goal: Goal, seed: int
    ) -> Part:
        training, place = self.training, None if name == WHOLE else number
        batches = Batches(
            self.packs,
            training.batch,
            seed,
            training.condition_dropout,
            training.augment and self._turned(place),
            part=place,
            tokens=self._reads_tokens(place),
            top_window=self._top_window,
        )
        return Part(
            name,
            objective,
            engine,
            batches,
            goal,
            Rate(training.learning_rate, training.warmup),
            training.ema,
            self.averages.of(self.denoiser, objective),
            self.ranks,
            self.bf16,
            None if place is None or self.ranks.rank else self._held_out(place),
            self.clock,
        )

    def _turned(self, place: int | None) -> bool:
        """Whether samples of the part of this number are turned and mirrored."""
        config = self.denoiser.config
        return (
            place is None or not isinstance(config, CascadeConfig) or config.sequence[place].turned
        )

    def _reads_tokens(self, place: int | None) -> bool:
        """Whether the part of this number reads tokens."""
        config = self.denoiser.config
        return (
            not place or not isinstance(config, CascadeConfig) or config.blocks[place - 1].tokens
        )

    @property
    def _top_window(self) -> int | None:
        config = self.denoiser.config
        return config.top.training_side if isinstance(config, CascadeConfig) else None

    def _held_out(self, place: int) -> tuple[Batch, str]:
        """Windows that were not trained on, where there are any, always the same."""
        split = held_out_split(self.packs)
        batches = Batches(
            self.packs,
            HELD_OUT_WINDOWS,
            0,
            0.0,
            augment=False,
            split=split,
            part=place,
            tokens=self._reads_tokens(place),
            top_window=self._top_window,
        )
        return batches.at(0).to(self.ranks.device), split

    @property
    def step(self) -> int:
        """Steps of all parts."""
        return sum(part.step for part in self.parts)

    @property
    def seconds(self) -> float:
        """Training time: of all parts, over the lanes that took it."""
        return sum(part.seconds for part in self.parts) / self.lanes

    def loop(self, before: RunState | None, save_every: int, log_every: int) -> str:
        """Train on to every part's goal (`done`) or SIGTERM (`preempted`)."""
        if before is not None and before.checkpoint is not None:
            self._resume(before)
        if self.ranks.rank == 0:
            self.run.forget_metrics_after(self.step)
        handler = signal.signal(signal.SIGTERM, self._stop)
        self.cpu.start()
        try:
            with self._threads(), console.counter(total=PERMILLE, desc="train") as count:
                self._train(save_every, log_every, count)
        finally:
            for part in self.parts:
                part.close()
            signal.signal(signal.SIGTERM, handler)
        status = "done" if all(part.finished for part in self.parts) else "preempted"
        self._save(status)
        if self.ranks.rank == 0:
            console.say(f"train: {status} at step {self.step}{self._errors()}; {self.run.path}")
        return status

    def _train(self, save_every: int, log_every: int, count: Callable[[int, int], None]) -> None:
        saved = self.step
        for part in self.parts:  # what an earlier process was stopped before
            if part.held_out_due(log_every):
                self._log_held_out(part)
        waiting: dict[Future[tuple[Tensor, float]], Part] = {}
        with ThreadPoolExecutor(max_workers=self.lanes) as pool:
            while True:
                saving = self.step - saved >= save_every
                idle = [p for p in self.parts if not p.finished and p not in waiting.values()]
                while idle and len(waiting) < self.lanes and not (saving or self.stopping):
                    part = min(idle, key=lambda p: p.progress)
                    idle.remove(part)
                    # To the next line of the log, wherever an earlier process was stopped.
                    steps = log_every - part.step % log_every
                    waiting[self._submit(pool, part, steps)] = part
                if not waiting:
                    if saving and idle and not self.stopping:
                        self._save("running")
                        saved = self.step
                        continue
                    return
                for future in wait(waiting, HEARTBEAT_S, FIRST_COMPLETED).done:
                    part = waiting.pop(future)
                    self._log(part, *future.result())
                    if part.held_out_due(log_every) and not self.stopping:
                        self._log_held_out(part)
                self._show_life()
                count(self._permille(), 0)

    def _submit(
        self, pool: ThreadPoolExecutor, part: Part, steps: int
    ) -> "Future[tuple[Tensor, float]]":
        if self.lanes > 1:
            return pool.submit(part.train, steps, self._alone)
        # Ranks must meet in one order, and a GPU's stream is the calling thread's.
        done: Future[tuple[Tensor, float]] = Future()
        done.set_result(part.train(steps, self._together))
        return done

    def _alone(self, seconds: float) -> tuple[float, bool]:
        self.stopping = self.stopping or self.told
        return seconds, self.stopping

    def _together(self, seconds: float) -> tuple[float, bool]:
        self._show_life()
        return self._agree(seconds)

    def _permille(self) -> int:
        """Of the training that is done, by the parts' shares of it."""
        goals = [min(part.goal.seconds, part.goal.steps) for part in self.parts]
        done = sum(g * min(p.progress, 1.0) for g, p in zip(goals, self.parts, strict=True))
        return int(PERMILLE * done / max(sum(goals), 1e-9))

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Cores are divided among the lanes for as long as the block lasts."""
        before = torch.get_num_threads()
        torch.set_num_threads(max(before // self.lanes, 1))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _agree(self, seconds: float = 0.0) -> tuple[float, bool]:
        """Rank 0's clock, and whether any rank was told to stop: the same on all ranks.

        Raises a `SupersededError` on all of them once rank 0 has seen another owner: a rank that
        went on alone would wait for the others for ever.
        """
        stopping = self.told or self.stopping
        mine = [seconds if self.ranks.rank == 0 else 0.0, stopping, self.superseded]
        if self.ranks.world > 1:
            shared = torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            mine = shared.tolist()
        if mine[2]:
            raise SupersededError(f"another process has taken {self.run.path} over")
        self.stopping = bool(mine[1])
        return mine[0], self.stopping

    def _write(self, action: Callable[[], Any]) -> None:
        """What rank 0 does to the run, unless another process owns it; see `_agree`."""
        if self.ranks.rank == 0:
            try:
                action()
            except SupersededError:
                self.superseded = True
                self.stopping = self.lanes > 1 or self.stopping

    def _show_life(self) -> None:
        """Renew the heartbeat."""
        if time.monotonic() - self.beat > HEARTBEAT_S:
            self.beat = time.monotonic()
            self._write(self.run.update)

    def _stop(self, *_: Any) -> None:
        self.told = True

    def _log(self, part: Part, losses: Tensor, learning_rate: float) -> None:
        if self.ranks.world > 1:
            torch.distributed.all_reduce(losses, op=torch.distributed.ReduceOp.SUM)
            losses = losses / self.ranks.world
        if not losses.isfinite().all():
            self._refuse_divergence(part)
        levels = getattr(part.objective, "levels", range(len(losses)))
        loss = float(losses.mean())
        line = {
            "step": self.step,
            "part": part.name,
            "part_step": part.step,
            "loss": loss,
            "levels": list(levels),
            "level_losses": [round(float(value), 5) for value in losses],
            "learning_rate": learning_rate,
            "seconds": round(self.seconds, 2),
        }
        scalars = {f"loss/{part.name}": loss}
        for level, value in zip(levels, losses, strict=True):
            scalars[f"loss/{part.name}/level{level}"] = float(value)
        self._write(lambda: self._append(line, scalars))

    def _refuse_divergence(self, part: Part) -> None:
        """On all ranks, which have the same losses and weights."""
        state = self.run.state()
        rate = self.training.learning_rate
        advice = f"start another --run with a --learning-rate lower than {rate:g}"
        if state is not None and state.checkpoint is not None:
            kept = self.run.path / "checkpoints" / state.checkpoint / "weights.safetensors"
            advice += f", from the start or with --init-from {kept}"
        raise ValueError(
            f"{self.run.path} has diverged: {part.name} is no longer finite after step "
            f"{self.step}; {advice}"
        )

    def _log_held_out(self, part: Part) -> None:
        measured = part.held_out()
        line = {"step": self.step, "part": part.name, "part_step": part.step, **measured}
        errors = torch.tensor(measured["held_out"])
        scalars = {f"held_out/{part.name}": float(errors.mean())}
        for level, value in zip(measured["levels"], errors.mean(dim=0), strict=True):
            scalars[f"held_out/{part.name}/level{level}"] = float(value)
        self._write(lambda: self._append(line, scalars))

    def _append(self, line: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        self.run.append_metrics(line)
        self.run.log_scalars(int(line["step"]), scalars)

    def _errors(self) -> str:
        """Held-out errors for people."""
        known = [p for p in self.parts if p.held_out_error is not None]
        if not known:
            return ""
        of = SPLIT_NAMES[str(known[0].held_out_batch and known[0].held_out_batch[1])]
        best = {p.name: p.averages.error for p in known if p.averages.error is not None}
        errors = ", ".join(f"{p.name} {best.get(p.name, p.held_out_error):.3f}" for p in known)
        least = ", the least so far, with which images are generated" if best else ""
        return f"; error of F on {of} regions (1 is the linear estimate){least}: {errors}"

    def _save(self, status: str) -> None:
        self.cpu.stop()
        for part in self.parts:
            if not all(p.isfinite().all() for p in part.objective.parameters()):
                self._refuse_divergence(part)
        step, folder = self.step, self.run.checkpoint_folder(self.step)
        self._write(self.run.check_owner)
        self._agree()
        for part in self.parts:
            part.engine.save_checkpoint(str(folder / "deepspeed"), tag=part.name)
        console.flush_tree(folder / "deepspeed")
        self._agree()

        def write() -> None:
            weights = dict(self.denoiser.named_parameters())
            self.run.check_owner()
            trained = [part.name for part in self.parts]
            self.run.write_weights(step, "weights", weights, trained)
            for part in self.parts:
                part.averages.settle()
            for name, averages in self._averages().items():
                self.run.write_weights(step, name, averages, trained)
            console.flush_tree(folder)  # a crash of the node must not lose what state.json names
            self.run.update(
                status=status,
                step=step,
                seconds=self.seconds,
                cpu_seconds=round(self.cpu.seconds, 2),
                checkpoint=folder.name,
                parts={part.name: [part.step, part.seconds] for part in self.parts},
                measured={part.name: part.held_out_step for part in self.parts},
                early={p.name: p.averages.follows for p in self.parts if p.averages.knows_early},
                errors={
                    part.name: part.averages.error
                    for part in self.parts
                    if part.averages.error is not None
                },
            )
            self.run.drop_old_checkpoints()
            write_preview(self.run, self.packs, step, self.ranks.device)

        self._write(write)
        self._agree()
        self.cpu.start()

    def _averages(self) -> dict[str, dict[str, Tensor]]:
        """By the names of their files."""
        return self.averages.files(cascade=isinstance(self.denoiser, CascadeDenoiser))

    def _resume(self, before: RunState) -> None:
        self.cpu.seconds = before.cpu_seconds
        folder = self.run.own_engine_state(str(before.checkpoint))
        for part in self.parts:
            loaded, _ = part.engine.load_checkpoint(str(folder), tag=part.name)
            if loaded is None:
                raise ValueError(
                    f"{folder.parent} has lost its deepspeed folder, so the run cannot go on; "
                    f"start another --run with --init-from {folder.parent / 'weights.safetensors'}"
                )
            steps, seconds = before.parts[part.name]
            measured = before.measured.get(part.name, int(steps))
            error = before.errors.get(part.name)
            part.resume(int(steps), float(seconds), measured, error)
            part.averages.knows_early = part.name in before.early
            part.averages.follows = before.early.get(part.name, False)
        own = {id(p) for part in self.parts for p in part.objective.parameters()}
        weights = self.run.read_weights(before.step, "weights")
        with torch.no_grad():
            for kind, averages in self._averages().items():
                # Older runs kept no other averages than those that images are generated with.
                known = (folder.parent / f"{kind}.safetensors").is_file()
                found = self.run.read_weights(before.step, kind if known else "ema")
                for name, value in found.items():
                    averages[name].copy_(value)
            for name, parameter in self.denoiser.named_parameters():
                if id(parameter) not in own:  # of a block that is not trained here
                    parameter.copy_(weights[name])
        if self.ranks.rank == 0:
            console.say(f"train: resuming at step {before.step}")
