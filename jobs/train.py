"""python -m jobs.train: train a denoiser on pixel packs, on one device or many.

The global batch is a function of (seed, step), so the number of ranks changes nothing but the
speed, and a run resumes where its last checkpoint was. SIGTERM (a preempted job) saves first. The
loop itself is `jobs.trainer`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from jobs.engine import Ranks, from_first_rank, joined
from jobs.optimizer import OptimizerName
from jobs.parts import Clock, Goal
from jobs.presets import read_preset
from jobs.record import RunState
from jobs.run import Run, RunConfig, SupersededError, network_form, trained_parts
from jobs.trainer import Trainer, Training, goals_of, num_lanes
from model.cascade.config import NETWORK, CascadeConfig
from model.cascade.denoiser import CascadeDenoiser
from model.config import DenoiserConfig, SparseConfig, changed
from model.family import WHOLE, Denoiser, computes_densely, make_denoiser, shares
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
    """Kind and size of the denoiser: the cascades brush (440M parameters), small, or tiny (two CPU
    cores); paper and paper-tiny are the papers' sparse operators, for packs of --design uniform
    --mollifier 1, infinity-diff and infinity-diff-tiny the same as an autoencoder; patch-brush and
    patch are patch diffusion, for packs of --design patch. Or a .json file of fields that differ
    from those of the preset that it names as "base"."""
    steps: int = 100_000
    """Steps of the whole run; blocks of a cascade share them. 0 trains nothing and keeps the
    weights of --init-from."""
    max_minutes: float | None = None
    """Stop after this much training time, resumptions included, even if steps are left; previews
    and checkpoints do not count."""
    max_cpu_minutes: float | None = None
    """The same in CPU time of all threads together, which a busy machine does not shorten: 12 on
    two cores are about 6 minutes. For CPUs, instead of --max-minutes; resume with as many
    threads."""
    blocks: tuple[str, ...] = ()
    """Blocks of a cascade to train (T, A, B, C, D), so that nodes can share the work; by default
    all. The weights of several such runs are joined by --init-from."""
    batch: int = 16
    """Draws in one step, over all ranks; of a cascade windows of a block, of regions smaller than
    a window up to 4 times as many."""
    optimizer: Literal["auto", "muon", "adamw"] = "auto"
    """auto is adamw for sparse operators, muon otherwise (Muon for matrices and kernels, AdamW for
    the rest)."""
    learning_rate: float | None = None
    """Peak of the schedule; by default 0.002 with muon, 0.0001 with adamw."""
    warmup: int = 200
    """Steps over which the learning rate rises; it falls by a cosine to a twentieth at the end."""
    ema: float = 0.999
    """Decay of the averaged weights; shorter at the start. Sampling uses the last ones, and of a
    cascade, block by block, those with the least error on validation regions."""
    condition_dropout: float = 0.1
    """How often a condition is dropped, for guidance."""
    augment: bool = True
    """Regions are turned and mirrored, but not for blocks of a cascade with --set
    BLOCK.turned=false; --no-augment leaves all as they are."""
    zero: int = 0
    """DeepSpeed ZeRO stage: 0, 1 or 2; the latter with --optimizer adamw."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32, or bf16 for the arithmetic of layers (weights stay fp32); auto is bf16 on a GPU, and
    on CPUs that multiply in it but for sparse operators."""
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
    """Choices of the preset to change, as NAME=VALUE, or BLOCK.NAME=VALUE: an ablation is one
    field of model.config."""
    init_from: tuple[Path, ...] = ()
    """Weights to start from: weights.safetensors or ema.safetensors of another run; of several
    runs, each gives the --blocks that it trained."""
    dry_run: bool = False
    """Print the plan and stop."""


def make_config(options: Train, packs: PackSet) -> RunConfig:
    """Resolve options and packs into what the run is."""
    settings, statistics = packs.settings, packs.statistics
    denoiser = read_preset(
        options.preset,
        channels=len(settings.bands),
        token_dim=len(statistics.token_mean),
    )
    if isinstance(denoiser, CascadeConfig | SparseConfig):
        denoiser = replace(denoiser, classes=len(settings.classes))
    if isinstance(denoiser, SparseConfig):
        denoiser = replace(denoiser, coarse_level=settings.coarse_level)
    denoiser = changed(denoiser, options.set)
    denoiser.check_design(packs.design, settings.mollifier_sigma_px)
    training = {name: getattr(options, name) for name in DECIDES}
    training |= asdict(make_training(options, denoiser))
    training["init_from"] = [str(file) for file in options.init_from]
    octaves = denoiser.octaves(statistics.signal, statistics.residual)
    return RunConfig(options.preset, denoiser, octaves, settings, statistics, training)


DECIDES = ("steps", "seed", "preset")
"""Options that decide what is trained, beside those of `Training`."""


def make_training(options: Train, denoiser: DenoiserConfig) -> Training:
    """The options of the loop, resolved; a `ValueError` where they contradict each other."""
    for name in ("batch", "save_every", "log_every"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} takes a positive number, not {getattr(options, name)}"
            )
    if options.steps < (0 if options.init_from else 1):
        raise ValueError(
            f"--steps takes a positive number, not {options.steps} (0 only with --init-from)"
        )
    if options.zero not in (0, 1, 2):
        raise ValueError(f"--zero takes 0, 1 or 2, not {options.zero}")
    optimizer: OptimizerName = "muon" if computes_densely(denoiser) else "adamw"
    if options.optimizer != "auto":
        optimizer = options.optimizer
    elif options.zero:
        optimizer = "adamw"
    if options.zero and optimizer == "muon":
        raise ValueError(
            f"Muon moves whole matrices, which --zero {options.zero} cuts into pieces; take "
            "--zero 0 or --optimizer adamw"
        )
    if options.max_minutes is not None and options.max_cpu_minutes is not None:
        raise ValueError(
            f"--max-minutes {options.max_minutes:g} and --max-cpu-minutes "
            f"{options.max_cpu_minutes:g} are two limits of one kind; give one of them"
        )
    for name in ("max_minutes", "max_cpu_minutes", "learning_rate"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} takes a positive number, not {value:g}")
    names = tuple(shares(denoiser))
    unknown = [name for name in options.blocks if name not in names]
    if unknown:
        raise ValueError(
            f"--blocks {unknown[0]} does not exist; this preset has {', '.join(names)}"
        )
    blocks = tuple(name for name in names if name in options.blocks) or names
    rate = options.learning_rate
    if rate is None:
        rate = 2e-3 if optimizer == "muon" else 1e-4
    return Training(
        blocks=blocks,
        batch=options.batch,
        optimizer=optimizer,
        learning_rate=rate,
        warmup=options.warmup,
        ema=options.ema,
        condition_dropout=options.condition_dropout,
        augment=options.augment,
        zero=options.zero,
        precision=options.precision,
    )


def train(options: Train) -> int:
    """Run the command; returns its exit code."""
    packs = PackSet.open(options.packs)
    config = make_config(options, packs)
    training = make_training(options, config.denoiser)
    torch.manual_seed(options.seed)
    denoiser = make_denoiser(config.denoiser, config.octaves, options.backend)
    run = Run(options.run)
    begun = run.state()
    early: dict[str, Tensor] | None = None
    if options.init_from and (begun is None or begun.checkpoint is None):
        early = initialise(denoiser, options.init_from, training.blocks)
    parameters = sum(p.numel() for p in denoiser.parameters())
    plan = (
        f"train: preset {options.preset}, {parameters / 1e6:.1f}M parameters, {options.steps} "
        f"steps of {options.batch}, {training.optimizer} at {training.learning_rate:g}"
        + (f", at most {options.max_minutes:g} minutes" if options.max_minutes else "")
        + (f", at most {options.max_cpu_minutes:g} CPU minutes" if options.max_cpu_minutes else "")
        + (f", blocks {', '.join(training.blocks)}" if training.blocks != (WHOLE,) else "")
    )
    needed_bytes = run.checkpoint_bytes(parameters)
    if options.dry_run:
        if begun is not None:
            run.check_same(config)
        console.say_plan(plan, options.run, needed_bytes)
        return console.EXIT_DONE
    with joined() as ranks:
        if options.batch % ranks.world:
            raise ValueError(
                f"a batch of {options.batch} does not divide among {ranks.world} ranks; "
                f"ask for --batch {-(-options.batch // ranks.world) * ranks.world}"
            )
        parts = shares(config.denoiser)
        lanes = num_lanes(ranks, training.blocks, parts)
        clock, limit_s = clock_of(options, ranks)
        goals = goals_of(parts, training.blocks, options.steps, limit_s, lanes)
        before = run.state() if ranks.rank == 0 else None
        if ranks.rank == 0:
            if _finished(before, goals):
                run.check_same(config)
                console.say(f"train: {options.run} is already done")
            else:
                console.say_plan(plan, options.run, needed_bytes)
                run.claim(config, console.command_line(PROG, options))
        before = from_first_rank(before, ranks)
        status = "done"
        if not _finished(before, goals):
            trainer = Trainer(
                training, goals, options.seed, denoiser, ranks, lanes, run, packs, clock, early
            )
            try:
                status = trainer.loop(before, options.save_every, options.log_every)
            except SupersededError as superseded:
                console.say(f"train: rank {ranks.rank} stops: {superseded}")
                status = "superseded"
            except BaseException:
                if ranks.rank == 0:
                    run.fail()
                raise
    return console.EXIT_DONE if status == "done" else console.EXIT_PREEMPTED


def clock_of(options: Train, ranks: Ranks) -> tuple[Clock, float | None]:
    """What tells the training time in seconds, and its limit.

    CPU time is told over all threads, as if none had ever waited: what the time of day is on a
    machine that does nothing else.
    """
    if options.max_cpu_minutes is None:
        return time.perf_counter, options.max_minutes and 60 * options.max_minutes
    if ranks.world > 1 or ranks.device.type != "cpu":
        raise ValueError(
            f"--max-cpu-minutes {options.max_cpu_minutes:g} is for one process on a CPU, not for "
            f"{ranks.world} on {ranks.device.type}; give --max-minutes"
        )
    threads = torch.get_num_threads()
    return lambda: time.process_time() / threads, 60 * options.max_cpu_minutes / threads


def initialise(
    denoiser: Denoiser, files: Sequence[Path], trained: Sequence[str]
) -> dict[str, Tensor] | None:
    """Load weights of a denoiser of the same size; of several files, from each the blocks that its
    run trained. Returns the weights early in the training of these runs, where all kept them.

    trained: the blocks that are trained now, which need no weights.
    """
    weights = joined_weights(denoiser, files, trained)
    early = [file.with_name("early.safetensors") for file in files]
    known = all(file.is_file() for file in early)
    found = joined_weights(denoiser, early, trained) if known else None
    denoiser.load_state_dict(weights)
    return found


def joined_weights(
    denoiser: Denoiser, files: Sequence[Path], trained: Sequence[str]
) -> dict[str, Tensor]:
    """The state of a denoiser with the weights of files, see `initialise`."""
    own = denoiser.state_dict()
    owners: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"--init-from {file} does not exist; name a .safetensors file")
        weights = load_file(file)
        other = sorted(k for k in {*weights, *own} if not _alike(weights.get(k), own.get(k)))
        if other:
            raise ValueError(
                f"--init-from {file} holds weights of another denoiser ({other[0]} and "
                f"{len(other) - 1} more differ); use the preset and encoder that it was trained "
                "with"
            )
        form = network_form(file)
        if isinstance(denoiser, CascadeDenoiser) and form != NETWORK:
            raise ValueError(
                f"--init-from {file} holds weights of a network of form {form}, and this version "
                f"has form {NETWORK} (layer norms since then); train again"
            )
        if len(files) > 1:
            blocks = trained_parts(file)
            if not blocks:
                raise ValueError(
                    f"--init-from {file} does not say which blocks were trained; name one file"
                )
            for block in {*blocks} & {*owners}:
                raise ValueError(
                    f"--init-from {owners[block]} and {file} were both trained on block {block}; "
                    "name runs of different --blocks"
                )
            owners |= dict.fromkeys(blocks, file)
            own_prefixes = tuple(f"blocks.{block}." for block in blocks)
            weights = {k: v for k, v in weights.items() if k.startswith(own_prefixes)}
        own |= weights
    missing = [name for name in shares(denoiser.config) if name not in (*owners, *trained)]
    if len(files) > 1 and missing:
        raise ValueError(
            f"--init-from gives no weights of block {missing[0]}, which is not trained now "
            "either; name a run that trained it as well"
        )
    return own


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def _finished(before: RunState | None, goals: Mapping[str, Goal]) -> bool:
    """Whether an earlier process took the last steps, or used up the time that is given now."""
    if before is None or before.status != "done" or before.checkpoint is None:
        return False
    nothing: list[int | float] = [0, 0.0]
    return all(
        goal.progress(int(steps), seconds) >= 1.0
        for name, goal in goals.items()
        for steps, seconds in [before.parts.get(name, nothing)]
    )


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Train, train, argv, prog=PROG)


if __name__ == "__main__":
    raise SystemExit(main())
