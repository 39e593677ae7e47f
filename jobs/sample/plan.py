"""A sample command, resolved against its run and its store: what is painted, and how."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from conditioning.encoders import choose_device
from jobs.engine import multiplies_in_bf16
from jobs.painting import Recipe
from jobs.run import Run, RunConfig
from jobs.sample.given import Given, find_given
from jobs.sample.options import Sample
from jobs.subject import RegionSubject, Subject, regions_for, subjects_without_condition
from model.cascade.config import CascadeConfig
from model.config import DenoiserConfig
from model.family import computes_densely, shares
from model.lattice import at_level
from model.solver import make_solver
from pipeline.store import Store

SCALES = {2.0**-level: level for level in range(-2, 4)}


@dataclass(frozen=True)
class Plan:
    """A sample command, resolved: one recipe, several subjects."""

    config: RunConfig
    subjects: tuple[Subject, ...]
    recipe: Recipe
    size_px: tuple[int, int]
    tile: int
    device: torch.device
    given: Given | None

    @property
    def is_autoguided(self) -> bool:
        """Whether weights early in training take part."""
        asked, denoiser = self.recipe.autoguidance, self.config.denoiser
        if asked is not None:
            return asked != 1.0
        return isinstance(denoiser, CascadeConfig) and denoiser.is_autoguided


def make_plan(options: Sample) -> Plan:
    """Resolve the options against the run and the store."""
    config = Run(options.run).config()
    _check_trained(config)
    if options.scale not in SCALES:
        raise ValueError(f"--scale takes 4, 2, 1, 0.5, 0.25 or 0.125, not {options.scale:g}")
    _check_label(options.label, config)
    level, coarse = SCALES[options.scale], config.denoiser.cell_px
    given = find_given(options, config, level)
    subjects = _share(options.share, _subjects(options, config, given))
    size_px = subjects[0].size_px
    _check_size(size_px, given)
    device = choose_device(options.device)
    overlap = config.denoiser.check_painting(options.overlap, *size_px, level)
    make_solver(options.solver, options.eta)
    # The field is whole coarse cells; what lies beyond the asked size is painted and cut off.
    recipe = Recipe(
        at_level(-(-size_px[0] // coarse) * coarse, level),
        at_level(-(-size_px[1] // coarse) * coarse, level),
        options.steps,
        options.seed,
        options.guidance,
        options.solver,
        level,
        overlap,
        options.eta or None,
        _bf16(options.precision, device, config.denoiser),
        _autoguidance(options, config.denoiser),
    )
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps takes a positive number, not {options.steps}")
    tile = _tile(options.tile, device, config.denoiser, level, given)
    return Plan(config, tuple(subjects), recipe, size_px, tile, device, given)


def _subjects(options: Sample, config: RunConfig, given: Given | None) -> Sequence[Subject]:
    """What is to be painted after; a `ValueError` for options that contradict each other."""
    if options.unconditional is not None:
        if options.condition is not None or options.region:
            raise ValueError(
                "--unconditional paints after no region; leave --condition and --region out, or "
                "--unconditional"
            )
        size_px = _size(options.size, config.packs.side_px, given)
        run, number = Run(options.run), options.unconditional
        return subjects_without_condition(
            run, config, number, options.seed, size_px, options.label
        )
    if options.condition is None:
        raise ValueError(
            "--condition is missing: name the dataset store whose regions the images are painted "
            "after, or ask for --unconditional N images of a run with a latent model"
        )
    store = Store.open(options.condition)
    regions = regions_for(store, config, options.region)
    size_px = _size(options.size, regions[0].side, given)
    return [
        RegionSubject(store, config, region, options.seed, size_px, options.fill, options.label)
        for region in regions
    ]


def _check_trained(config: RunConfig) -> None:
    """A `ValueError` where some of the run's blocks were never trained."""
    names = tuple(shares(config.denoiser))
    trained, given = config.training.get("blocks", names), config.training.get("init_from")
    missing = [name for name in names if name not in trained]
    if missing and not given:
        raise ValueError(
            f"this run trained blocks {', '.join(trained)} alone and block {missing[0]} never; "
            "join it with runs of the others: python -m jobs.train --steps 0 --init-from ..."
        )


def _check_label(label: str | None, config: RunConfig) -> None:
    """A `ValueError` for a class that the run does not know."""
    if label is None:
        return
    if not config.denoiser.classes:
        raise ValueError(
            f"--label {label} was asked for, but the run was trained without labels; ingest a CSV "
            "with a column label, pack and train again, or leave --label out"
        )
    if label not in config.packs.classes:
        raise ValueError(
            f"--label {label} is none of the run's classes, which are "
            f"{', '.join(config.packs.classes)}"
        )


def _autoguidance(options: Sample, config: DenoiserConfig) -> float | None:
    """The weight that was asked for; a `ValueError` where it cannot be had."""
    weight = options.autoguidance
    if weight is None:
        return None
    if not isinstance(config, CascadeConfig):
        raise ValueError(
            f"--autoguidance {weight:g} is for cascades, which keep their weights early in "
            "training; leave it out"
        )
    if weight < 1.0:
        raise ValueError(f"--autoguidance takes 1 (none) or more, not {weight:g}")
    if weight != 1.0 and not Run(options.run).keeps_early():
        raise ValueError(
            f"{options.run} kept no weights early in its training, so that there is nothing to "
            f"guide away from; leave --autoguidance {weight:g} out, or train again"
        )
    return weight


def _size(text: str, side: int, given: Given | None) -> tuple[int, int]:
    if text == "region":
        return given.size_px if given else (side, side)
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--size takes a side like 4096 or HxW like 4096x8192, not {text!r}")
    return int(parts[0]), int(parts[-1])


def _check_size(size_px: tuple[int, int], given: Given | None) -> None:
    """A `ValueError` where an image is given that covers another size than what is asked for."""
    if given is not None and size_px != given.size_px:
        raise ValueError(
            f"{given.image.path} covers {given.size_px[0]}x{given.size_px[1]} px, but --size asks "
            f"for {size_px[0]}x{size_px[1]}; leave --size out"
        )


def _share(text: str, subjects: Sequence[Subject]) -> Sequence[Subject]:
    """Every N-th image from the K-th on."""
    number, slash, shares = text.partition("/")
    if not (slash and number.isdecimal() and shares.isdecimal() and int(number) >= 1):
        raise ValueError(f"--share takes K/N like 2/5, not {text!r}")
    if int(number) > int(shares):
        raise ValueError(f"--share {text} asks for more than the last of {shares} shares")
    if int(shares) > len(subjects):
        raise ValueError(
            f"--share {text} leaves shares without an image: there are {len(subjects)}; name more "
            "with --region (or --unconditional) or ask for fewer shares (SLURM: --array)"
        )
    return subjects[int(number) - 1 :: int(shares)]


def _bf16(precision: str, device: torch.device, denoiser: DenoiserConfig) -> bool:
    """Whether layers compute in bfloat16."""
    if precision == "auto":
        return computes_densely(denoiser) and multiplies_in_bf16(device)
    return precision == "bf16"


def _tile(
    text: str, device: torch.device, denoiser: DenoiserConfig, level: int, given: Given | None
) -> int:
    cell = given.cell if given else 1
    if text == "auto":
        suits = denoiser.tile_px(device.type == "cuda")
        return max(suits, at_level(denoiser.cell_px, level), cell)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--tile takes auto or a side in pixels, not {text!r}")
    if int(text) % cell:
        raise ValueError(
            f"--tile {text} would cut through pixels of --low, which are squares of {cell} of the "
            f"painting's; take a multiple of {cell}, or auto"
        )
    if isinstance(denoiser, CascadeConfig):
        parent = 1 << max(block.octaves for block in denoiser.blocks)
        if int(text) % parent:
            raise ValueError(
                f"--tile {text} would cut through parents, squares of up to {parent} cells; take "
                f"a multiple of {parent}, or auto"
            )
    return int(text)
