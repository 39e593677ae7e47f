"""python -m jobs.latents: fit the latent model that paints images without a condition.

A run whose preset has a latent (`infinity-diff`) holds an encoder beside its denoiser. The draws
of every training region are encoded with the averaged weights, in one keyed turn each where the
run turned them, and a small diffusion model of the vectors is fitted (`model.latent`). A killed
command goes on with the part or near the step that it was in.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from conditioning.encoders import choose_device
from jobs.data import Batches, Sample, turn
from jobs.latent_model import (
    RECORD_NAME,
    WEIGHTS_NAME,
    WORK_NAME,
    FitOptions,
    LatentFit,
    write_latents,
    write_tensors,
)
from jobs.run import Run, RunConfig
from model.draw import PointDraw
from model.latent import LatentConfig, LatentDenoiser
from model.sparse.config import SparseConfig
from model.sparse.denoiser import SparseOperatorDenoiser
from pipeline import console
from pipeline.packfile import PackSet

PROG = "python -m jobs.latents"
PART = 256


@dataclass(frozen=True)
class Latents:
    """Fit the latent model of a trained run, for images without a condition; the same command
    resumes.

        python -m jobs.latents run packs
        python -m jobs.latents run packs --steps 20000 --layers 20

    The run needs a preset with a latent, such as infinity-diff. Images are then painted by
    python -m jobs.sample run --unconditional N.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    packs: Annotated[Path, tyro.conf.Positional]
    """The packs that it was trained on."""
    steps: int = 5000
    """Steps of fitting."""
    batch: int = 512
    """Vectors in one step, as published."""
    encode_batch: int = 8
    """Draws that are encoded at once."""
    learning_rate: float = 3e-4
    """Peak of the schedule of AdamW; it rises, then falls by a cosine to a tenth."""
    ema: float = 0.999
    """Decay of the averaged weights; shorter at the start."""
    width: int | None = None
    """Of the model's layers; by default twice the latent's, at least 256, as published."""
    layers: int = 10
    """How many there are; published with 10 and 20."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Of the noise on the vectors."""
    target: Literal["v", "epsilon", "x0"] = "v"
    """What the model estimates."""
    seed: int = 0
    """Another seed starts from other weights and sees other batches and noise."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass(frozen=True)
class Plan:
    """A latents command, resolved. made_from: what the vectors follow from."""

    run: Run
    packs: PackSet
    augment: bool
    latent: LatentConfig
    fit: FitOptions
    made_from: dict[str, Any]
    draws: list[tuple[int, int]]
    device: torch.device

    def done(self) -> dict[str, Any]:
        """Everything that the latent model follows from."""
        return {**self.made_from, "config": asdict(self.latent), "fit": asdict(self.fit)}

    @property
    def work(self) -> Path:
        return self.run.path / WORK_NAME

    @property
    def parts(self) -> list[range]:
        """The draws of every file of encodings."""
        return [
            range(first, min(first + PART, len(self.draws)))
            for first in range(0, len(self.draws), PART)
        ]


def make_plan(options: Latents) -> Plan:
    """Resolve the options against the run and its packs."""
    for name in ("steps", "batch", "encode_batch"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} takes a positive number, not {getattr(options, name)}"
            )
    run = Run(options.run)
    config, state = run.config(), run.state()
    dim = config.denoiser.latent_dim if isinstance(config.denoiser, SparseConfig) else 0
    if not dim:
        raise ValueError(
            f"{options.run} was trained with preset {config.preset}, which has no latent to make "
            "images from; train one with --preset infinity-diff or infinity-diff-tiny"
        )
    if state is None or state.checkpoint is None:
        raise ValueError(f"{options.run} has no checkpoint yet; let python -m jobs.train run on")
    packs = PackSet.open(options.packs)
    _check_packs(packs, config, options)
    regions = [i for i, entry in enumerate(packs.regions) if entry.split == "train"]
    draws = [(i, pack) for i in regions for pack in range(packs.settings.packs_per_region)]
    latent = LatentConfig(
        dim=dim,
        width=options.width or max(2 * dim, 256),
        layers=options.layers,
        schedule=options.schedule,
        target=options.target,
    )
    fit = FitOptions(
        options.steps, options.batch, options.learning_rate, options.ema, options.seed
    )
    made_from = {"checkpoint": state.checkpoint, "draws": len(draws), "started": state.seconds}
    augment = bool(config.training["augment"])
    device = choose_device(options.device)
    return Plan(run, packs, augment, latent, fit, made_from, draws, device)


def _check_packs(packs: PackSet, config: RunConfig, options: Latents) -> None:
    there, here = asdict(config.packs), asdict(packs.settings)
    for name, value in there.items():
        if here[name] != value:
            raise ValueError(
                f"{options.packs} were made with {name} = {here[name]}, the packs that "
                f"{options.run} was trained on with {value}; name those"
            )


def latents(options: Latents) -> int:
    """Run the command; returns its exit code."""
    plan = make_plan(options)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LatentDenoiser(plan.latent).parameters())
    vectors = len(plan.draws)
    console.say_plan(
        f"latents: {vectors} draws of training regions, vectors of {plan.latent.dim}; "
        f"{parameters / 1e6:.1f}M parameters, {plan.fit.steps} steps of {plan.fit.batch} on "
        f"{plan.device}",
        options.run,
        # Vectors; weights, averages and two moments, twice while they are replaced; the result.
        4 * (vectors * plan.latent.dim + 9 * parameters),
    )
    if options.dry_run:
        return console.EXIT_DONE
    record = plan.run.path / RECORD_NAME
    if record.is_file() and json.loads(record.read_text())["made_from"] == plan.done():
        console.say(f"latents: {options.run} already has this latent model")
        return console.EXIT_DONE
    z = _encoded(plan, options.encode_batch)
    folder = _folder(plan.work / "fit", plan.done())
    fitting = LatentFit(z, plan.latent, plan.fit, folder, plan.device)
    loss = fitting.run()
    spread = fitting.model.std.double()
    measured = {
        "vectors": vectors,
        "regions": len({region for region, _ in plan.draws}),
        "loss": round(loss, 5),
        "std": [round(float(v), 5) for v in (spread.min(), spread.median(), spread.max())],
        "parameters": parameters,
    }
    made = {"checkpoint": plan.made_from["checkpoint"], "made_from": plan.done()}
    command = console.command_line(PROG, options)
    write_latents(
        plan.run,
        plan.latent,
        fitting.weights(),
        {**made, "measured": measured, "command": command},
    )
    console.say(
        f"latents: done, loss {loss:.3f} of {vectors} vectors of {measured['regions']} regions; "
        f"{plan.run.path / WEIGHTS_NAME}"
    )
    return console.EXIT_DONE


def _folder(folder: Path, identity: dict[str, Any]) -> Path:
    """A folder of work made from `identity`; emptied where it was made from something else."""
    file = folder / "identity.json"
    if not file.is_file() or json.loads(file.read_text()) != identity:
        shutil.rmtree(folder, ignore_errors=True)
        console.write_json_atomic(file, identity)
    return folder


def _encoded(plan: Plan, batch: int) -> Float[Tensor, "n d"]:
    """z of all draws; parts that are there are kept."""
    folder = _folder(plan.work / "encodings", plan.made_from)
    files = [folder / f"part-{number:05d}.safetensors" for number in range(len(plan.parts))]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    if missing:
        denoiser = plan.run.load_denoiser(device=plan.device)
        assert isinstance(denoiser, SparseOperatorDenoiser)
        total = sum(len(plan.parts[i]) for i in missing)
        with console.counter(total=total, desc="latents: encode") as count:
            for i in missing:
                z = [torch.zeros(0, plan.latent.dim)]
                for first in range(plan.parts[i].start, plan.parts[i].stop, batch):
                    numbers = range(first, min(first + batch, plan.parts[i].stop))
                    z.append(denoiser.encode(_draw(plan, numbers).to(plan.device)).cpu())
                    count(0, len(numbers))
                write_tensors(files[i], {"z": torch.cat(z)})
    return torch.cat([load_file(file)["z"] for file in files])


def _draw(plan: Plan, numbers: range) -> PointDraw:
    """Draws of the list, each in its own keyed turn where the run turned them."""
    turned = []
    for number in numbers:
        region, pack = plan.draws[number]
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, number))))
        element = int(random.integers(8)) if plan.augment else 0
        sample = Sample(plan.packs.draw(plan.packs.regions[region], pack), [])
        turned.append(turn(sample, element, plan.packs.settings.side_px).drawn)
    draw = Batches(plan.packs, batch=1, seed=0).draw(turned)
    assert isinstance(draw, PointDraw)
    return draw


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Latents, latents, argv, prog=PROG)


if __name__ == "__main__":
    raise SystemExit(main())
