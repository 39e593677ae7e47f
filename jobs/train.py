"""python -m jobs.train: train a denoiser on pixel packs, on one device or many.

The global batch is a function of (seed, step), so the number of ranks changes nothing but the
speed, and a run resumes where its last checkpoint was. SIGTERM (a preempted job) saves first.
"""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from jobs.data import Batch, Batches
from jobs.engine import Ranks, build, from_first_rank, joined
from jobs.preview import write_preview
from jobs.record import HEARTBEAT_S, RunState
from jobs.run import Run, RunConfig, SupersededError
from model.config import PyramidConfig, SparseConfig, changed, preset
from model.family import Denoiser, make_denoiser, make_objective, sampled_range
from pipeline import console
from pipeline.packfile import PackSet

PROG = "python -m jobs.train"


@dataclass(frozen=True)
class Train:
    """Train a denoiser on packs; the same command resumes.

        python -m jobs.train packs --run run --preset tiny --steps 2000 --batch 4
        torchrun --nproc-per-node 8 -m -- jobs.train packs --run run
        deepspeed --no_local_rank --module jobs.train packs --run run

    Under srun every task is a rank.
    """

    packs: Annotated[Path, tyro.conf.Positional]
    """Folder of pixel packs."""
    run: Path
    """Folder of the run."""
    preset: str = "brush"
    """Kind and size of the denoiser: brush (450M parameters), small, or tiny (two CPU cores);
    paper and paper-tiny are the papers' sparse operators, for packs of --design uniform
    --mollifier 1, infinity-diff and infinity-diff-tiny the same as an autoencoder; patch-brush and
    patch are patch diffusion, for packs of --design patch."""
    steps: int = 100_000
    """Steps of the whole run."""
    max_minutes: float | None = None
    """Stop after this much training time, resumptions included, even if steps are left."""
    batch: int = 16
    """Regions in one step, over all ranks."""
    learning_rate: float = 1e-4
    """Peak of the schedule of AdamW."""
    warmup: int = 200
    """Steps over which the learning rate rises; it falls by a cosine to a tenth at the end."""
    ema: float = 0.999
    """Decay of the averaged weights that sampling uses; shorter at the start."""
    condition_dropout: float = 0.1
    """How often a condition is dropped, for guidance."""
    augment: bool = True
    """Regions are turned and mirrored; --no-augment leaves them as they are."""
    noise_floor: float = 0.005
    """Least noise variance of an octave coarser than the lattice; 0 is white noise, which patch
    diffusion always has."""
    zero: int = 0
    """DeepSpeed ZeRO stage: 0, 1 or 2."""
    precision: str = "auto"
    """fp32, or bf16 for the arithmetic of layers (weights stay fp32); auto is bf16 on a GPU."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    """Another seed starts from other weights and sees other batches and noise."""
    backend: Literal["reference", "triton", "torchsparse"] = "reference"
    """What computes sparse operators (presets paper...): reference is plain torch, triton fused
    kernels on a GPU. No weight depends on it."""
    set: tuple[str, ...] = ()
    """Choices of the preset to change, as NAME=VALUE: an ablation is one field of
    model.config."""
    init_from: str | None = None
    """Weights to start from: weights.safetensors or ema.safetensors of another run."""
    dry_run: bool = False
    """Print the plan and stop."""


def make_config(options: Train, packs: PackSet) -> RunConfig:
    """Resolve options and packs into what the run is."""
    settings, statistics = packs.settings, packs.statistics
    denoiser = preset(
        options.preset,
        channels=len(settings.bands),
        token_dim=len(statistics.token_mean),
    )
    if isinstance(denoiser, PyramidConfig | SparseConfig):
        denoiser = replace(denoiser, classes=len(settings.classes))
    if isinstance(denoiser, SparseConfig):
        denoiser = replace(denoiser, coarse_level=settings.coarse_level)
    denoiser = changed(denoiser, options.set)
    denoiser.check_design(packs.design, settings.mollifier_sigma_px)
    free = {"packs", "run", "set", "backend", "max_minutes", "save_every", "log_every", "dry_run"}
    training = {k: v for k, v in asdict(options).items() if k not in free}
    octaves = denoiser.octaves(statistics.signal, statistics.residual, options.noise_floor)
    return RunConfig(options.preset, denoiser, octaves, settings, statistics, training)


def train(options: Train) -> int:
    """Run the command; returns its exit code."""
    if options.zero not in (0, 1, 2) or options.precision not in ("auto", "fp32", "bf16"):
        raise ValueError(
            f"--zero takes 0, 1 or 2 and --precision auto, fp32 or bf16, "
            f"not {options.zero} and {options.precision!r}"
        )
    for name in ("steps", "batch", "save_every", "log_every"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} takes a positive number, not {getattr(options, name)}"
            )
    packs = PackSet.open(options.packs)
    config = make_config(options, packs)
    torch.manual_seed(options.seed)
    denoiser = make_denoiser(config.denoiser, config.octaves, options.backend)
    if options.init_from is not None:
        initialise(denoiser, Path(options.init_from))
    parameters = sum(p.numel() for p in denoiser.parameters())
    batches = Batches(
        packs, options.batch, options.seed, options.condition_dropout, options.augment
    )
    low, high = sampled_range(denoiser)
    plan = (
        f"train: preset {options.preset}, {parameters / 1e6:.1f}M parameters, {options.steps} "
        f"steps of {options.batch} regions, log-SNR {low:.1f} to {high:.1f}"
        + (f", at most {options.max_minutes:g} minutes" if options.max_minutes else "")
    )
    run = Run(options.run)
    needed_bytes = run.checkpoint_bytes(parameters)
    if options.dry_run:
        console.say_plan(plan, options.run, needed_bytes)
        return console.EXIT_DONE
    with joined() as ranks:
        if options.batch % ranks.world:
            raise ValueError(
                f"a batch of {options.batch} does not divide among {ranks.world} ranks; "
                f"ask for --batch {-(-options.batch // ranks.world) * ranks.world}"
            )
        before = run.state() if ranks.rank == 0 else None
        if ranks.rank == 0:
            if _finished(before, options):
                run.check_same(config)
                console.say(f"train: {options.run} is already done")
            else:
                console.say_plan(plan, options.run, needed_bytes)
                run.claim(config, console.command_line(PROG, options))
        before = from_first_rank(before, ranks)
        status = "done"
        if not _finished(before, options):
            trainer = Trainer(options, denoiser, ranks, run, packs)
            try:
                status = trainer.loop(batches, before)
            except SupersededError as superseded:
                console.say(f"train: rank {ranks.rank} stops: {superseded}")
                status = "superseded"
            except BaseException:
                if ranks.rank == 0:
                    run.fail()
                raise
    return console.EXIT_DONE if status == "done" else console.EXIT_PREEMPTED


def initialise(denoiser: Denoiser, file: Path) -> None:
    """Load weights of a denoiser of the same size."""
    if not file.is_file():
        raise ValueError(f"--init-from {file} does not exist; name a .safetensors file")
    weights, own = load_file(file), denoiser.state_dict()
    other = sorted(k for k in {*weights, *own} if k not in weights or k not in own)
    other += sorted(k for k in weights if k in own and weights[k].shape != own[k].shape)
    if other:
        raise ValueError(
            f"--init-from {file} holds weights of another denoiser ({other[0]} and "
            f"{len(other) - 1} more differ); use the preset and encoder that it was trained with"
        )
    denoiser.load_state_dict(weights)


def _finished(before: RunState | None, options: Train) -> bool:
    """Whether an earlier process took the last step, or used up the time that is given now."""
    if before is None or before.status != "done":
        return False
    limit = options.max_minutes
    return before.step >= options.steps or (limit is not None and before.seconds >= 60 * limit)


class Trainer:
    """The loop: batch, loss, step, average, log, checkpoint."""

    def __init__(
        self,
        options: Train,
        denoiser: Denoiser,
        ranks: Ranks,
        run: Run,
        packs: PackSet,
    ) -> None:
        self.options, self.ranks, self.run, self.packs = options, ranks, run, packs
        cuda = ranks.device.type == "cuda"
        bf16 = options.precision == "bf16" or (options.precision == "auto" and cuda)
        self.objective = make_objective(denoiser)
        self.ema = {name: p.detach().clone().float() for name, p in denoiser.named_parameters()}
        self.engine = build(
            self.objective,
            learning_rate=options.learning_rate,
            batch=options.batch,
            world=ranks.world,
            zero=options.zero,
        )
        self.bf16 = bf16
        self.ema = {name: value.to(ranks.device) for name, value in self.ema.items()}
        self.stopping = self.superseded = False
        self.beat = time.monotonic()

    def loop(self, batches: Batches, before: RunState | None) -> str:
        """Train on to the end, the time limit (`done`) or SIGTERM (`preempted`)."""
        options, first = self.options, 0
        if before is not None and before.checkpoint is not None:
            first = self._resume(before)
        if self.ranks.rank == 0:
            self.run.forget_metrics_after(first)
        seconds_before = before.seconds if before is not None and first else 0.0
        handler = signal.signal(signal.SIGTERM, self._stop)
        started = time.monotonic()
        source = batches.iterate(first, self.ranks.rank, self.ranks.world)
        step, status = first, "done"
        limit_s = options.max_minutes and 60 * options.max_minutes - seconds_before
        for step in console.progress(
            range(first + 1, options.steps + 1),
            total=options.steps - first,
            desc="train",
            limit_s=limit_s,
        ):
            batch = next(source).to(self.ranks.device)
            seconds, stopping = self._agree(seconds_before + time.monotonic() - started)
            losses = self._step(step, seconds, batch)
            if step % options.log_every == 0 or step == 1:
                self._log(step, losses, seconds)
            self._show_life()
            if stopping:
                status = "preempted"
                break
            if options.max_minutes is not None and seconds >= 60 * options.max_minutes:
                break
            if step % options.save_every == 0 and step < options.steps:
                self._save(step, seconds, "running")
        source.close()
        self._save(step, seconds_before + time.monotonic() - started, status)
        if self.ranks.rank == 0:
            console.say(f"train: {status} at step {step}; {self.run.path}")
        signal.signal(signal.SIGTERM, handler)
        return status

    def _step(self, step: int, seconds: float, batch: Batch) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(step, seconds)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, self.bf16):
            losses = self.engine(batch.draw, batch.condition, batch.seeds, batch.uniform)
        self.engine.backward(losses.sum())
        self.engine.step()
        decay = min(self.options.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in self.objective.denoiser.named_parameters():
                self.ema[name].lerp_(parameter.float(), 1 - decay)
        return losses.detach()

    def _learning_rate(self, step: int, seconds: float) -> float:
        """Linear rise, cosine fall; a time limit ends the fall as the number of steps does."""
        done = step / self.options.steps
        if self.options.max_minutes is not None:
            done = max(done, min(seconds / (60 * self.options.max_minutes), 1.0))
        rise = min(step / max(self.options.warmup, 1), 1.0)
        return self.options.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * done))

    def _agree(self, seconds: float = 0.0) -> tuple[float, bool]:
        """Rank 0's clock, and whether any rank was told to stop: the same on all ranks.

        Raises a `SupersededError` on all of them once rank 0 has seen another owner: a rank that
        went on alone would wait for the others for ever.
        """
        mine = [seconds if self.ranks.rank == 0 else 0.0, self.stopping, self.superseded]
        if self.ranks.world > 1:
            shared = torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            mine = shared.tolist()
        if mine[2]:
            raise SupersededError(f"another process has taken {self.run.path} over")
        return mine[0], bool(mine[1])

    def _write(self, action: Callable[[], Any]) -> None:
        """What rank 0 does to the run, unless another process owns it; see `_agree`."""
        if self.ranks.rank == 0:
            try:
                action()
            except SupersededError:
                self.superseded = True

    def _show_life(self) -> None:
        """Renew the heartbeat."""
        if time.monotonic() - self.beat > HEARTBEAT_S:
            self.beat = time.monotonic()
            self._write(self.run.update)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _log(self, step: int, losses: Tensor, seconds: float) -> None:
        if self.ranks.world > 1:
            torch.distributed.all_reduce(losses, op=torch.distributed.ReduceOp.SUM)
            losses = losses / self.ranks.world
        line = {
            "step": step,
            "loss": float(losses.sum()),
            "level_losses": [round(float(value), 5) for value in losses],
            "learning_rate": self._learning_rate(step, seconds),
            "seconds": round(seconds, 2),
        }

        def write() -> None:
            self.run.append_metrics(line)
            self.run.log_scalars(step, losses)

        self._write(write)

    def _save(self, step: int, seconds: float, status: str) -> None:
        folder = self.run.checkpoint_folder(step)
        self._write(self.run.check_owner)
        self._agree()
        self.engine.save_checkpoint(str(folder / "deepspeed"), tag="state")

        def write() -> None:
            weights = dict(self.objective.denoiser.named_parameters())
            self.run.check_owner()
            self.run.write_weights(step, "weights", weights)
            self.run.write_weights(step, "ema", self.ema)
            self.run.update(status=status, step=step, seconds=seconds, checkpoint=folder.name)
            self.run.drop_old_checkpoints()
            write_preview(self.run, self.packs, step, self.ranks.device)

        self._write(write)
        self._agree()

    def _resume(self, before: RunState) -> int:
        folder = self.run.own_engine_state(str(before.checkpoint))
        loaded, _ = self.engine.load_checkpoint(str(folder), tag="state")
        if loaded is None:
            raise ValueError(
                f"{folder.parent} has lost its deepspeed folder, so the run cannot go on; start "
                f"another --run with --init-from {folder.parent / 'weights.safetensors'}"
            )
        ema = self.run.read_weights(before.step, "ema")
        self.ema = {name: value.to(self.ranks.device) for name, value in ema.items()}
        if self.ranks.rank == 0:
            console.say(f"train: resuming at step {before.step}")
        return before.step


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Train, train, argv, prog=PROG)


if __name__ == "__main__":
    raise SystemExit(main())
