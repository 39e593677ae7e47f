"""An encoder from a store's own tiles: `python -m conditioning.pretrain dataset.zarr --out DIR`.

A timm backbone is trained from scratch with VICReg (`conditioning.vicreg`) on views that keep
stain and brightness (`conditioning.views`). Only tiles of the train split are seen. They come from
a bank in memory that is drawn anew every 64 steps; bank b depends on the seed and b alone, the
batch of step s on the seed and s, so a killed run continues from its last checkpoint to the
weights it would have had. `encoder.json` is written last and marks the end.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tyro.conf import Positional

from conditioning.card import CARD_NAME, EncoderCard
from conditioning.encoders import choose_device, encoder_key, save_encoder, standardise
from conditioning.tiles import Tiles, TileSampler, read_ahead, resize_tiles
from conditioning.vicreg import (
    Objective,
    Trainer,
    effective_rank,
    refuse_other_settings,
    view_retrieval,
)
from conditioning.views import random_view
from pipeline.console import (
    EXIT_DONE,
    progress,
    run,
    say,
    say_plan,
    write_bytes_atomic,
)
from pipeline.store import Region, Store

CHECKPOINT_NAME = "checkpoint.safetensors"
METRICS_NAME = "metrics.jsonl"
BANK_BATCHES = 16
STEPS_PER_BANK = 64
BANK_MARGIN = 1.25
SAMPLE_TILES = 512
CHECKPOINT_COPIES = 3
COLLAPSED_RANK = 2.0
STREAM_BANK, STREAM_BATCH, STREAM_STATISTICS, STREAM_QUALITY = 0, 1, 3, 4


@dataclass(frozen=True)
class Pretrain:
    """Train a small encoder on the tiles of a dataset store, without labels and without downloads.

        python -m conditioning.pretrain dataset.zarr --out encoder
        python -m conditioning.pretrain dataset.zarr --out encoder --arch resnet50 --steps 20000

    The folder it writes is what --encoder of conditioning.embed and pipeline.pack takes. The same
    command continues a run that was stopped.
    """

    dataset: Positional[Path]
    """the store written by pipeline.ingest"""
    out: Path
    """the folder of the encoder: encoder.json, encoder.safetensors, metrics.jsonl"""
    arch: str = "test_resnet"
    """a timm architecture, trained from scratch; the default learned fastest of those tried"""
    dim: int = 128
    """length of the vectors"""
    input_size: int = 96
    """side in pixels of the tiles that the encoder sees"""
    footprints: tuple[int, ...] = (128, 4096)
    """sides in level-0 pixels; tiles are drawn log-uniformly from the smallest to the largest"""
    steps: int = 80
    """optimizer steps; 80 take a minute on two CPU cores, take 10000 or more on a GPU"""
    batch_size: int = 64
    """tiles per step, each seen in two views"""
    learning_rate: float = 3e-3
    """peak of the cosine schedule of AdamW"""
    seed: int = 0
    """fixes the initial weights and every draw"""
    checkpoint_every: int = 50
    """steps between checkpoints"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    dry_run: bool = False
    """print the plan and stop"""


def pretrain(options: Pretrain) -> int:
    """Plan, train, measure, write; returns the exit code."""
    _check_options(options)
    store = Store.open(options.dataset)
    regions = _regions_of(store, "train")
    if not regions:
        raise ValueError(
            f"{store.path} has no region of the train split to learn from; ingest more images, "
            "or with a smaller --region or --min-tissue"
        )
    settings = _settings(options, store)
    if (options.out / CARD_NAME).is_file():
        refuse_other_settings(options.out, EncoderCard.read(options.out).training, settings)
        (options.out / CHECKPOINT_NAME).unlink(missing_ok=True)
        say(f"pretrain: {options.out} holds this encoder already, nothing to do")
        return EXIT_DONE
    objective = Objective(
        architecture=options.arch,
        num_bands=len(store.spec.bands),
        dim=options.dim,
        input_px=options.input_size,
        num_steps=options.steps,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    trainer = Trainer(objective, choose_device(options.device))
    if (options.out / CHECKPOINT_NAME).is_file():
        trainer.restore(options.out / CHECKPOINT_NAME, settings)
    _say_plan(options, trainer, regions)
    if options.dry_run:
        return EXIT_DONE
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    card = _train_and_measure(options, trainer, store, regions, settings)
    _say_summary(options, card, trainer, time.monotonic() - started)
    return EXIT_DONE


def _check_options(options: Pretrain) -> None:
    least = {"dim": 2, "input_size": 16, "steps": 1, "batch_size": 2, "checkpoint_every": 1}
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} is {getattr(options, name)} and must be at least {smallest}; raise it"
            )
    if not options.footprints or min(options.footprints) < 1:
        raise ValueError(
            f"--footprints are {list(options.footprints)} and must be sides of at least 1 px; "
            "give one or more"
        )


def _settings(options: Pretrain, store: Store) -> dict[str, Any]:
    """What decides the weights, as JSON values: two commands that agree on it are one run."""
    names = ("arch", "dim", "input_size", "steps", "batch_size", "learning_rate", "seed")
    values = {name: getattr(options, name) for name in names}
    return {**values, "footprints": list(options.footprints), "store": store.fingerprint()}


def _regions_of(store: Store, split: str) -> list[Region]:
    images = set(store.image_ids())
    return [r for r in store.regions() if r.split == split and r.image in images]


def _train_and_measure(
    options: Pretrain,
    trainer: Trainer,
    store: Store,
    regions: Sequence[Region],
    settings: Mapping[str, Any],
) -> EncoderCard:
    """Run to the last step, measure on tiles of the val split, and write the encoder."""
    footprints_px = (min(options.footprints), max(options.footprints))
    side_px = round(BANK_MARGIN * options.input_size)
    seen = TileSampler(store, regions, side_px, footprints_px, options.seed)
    held_out = _regions_of(store, "val")
    measured = replace(seen, regions=held_out or regions)
    sample = seen.sample(SAMPLE_TILES, STREAM_STATISTICS)
    mean = tuple(sample.mean((0, 2, 3), dtype=np.float64).tolist())
    std = tuple(sample.std((0, 2, 3), dtype=np.float64).clip(1.0).tolist())

    def inputs(tiles: Tiles) -> Float32[Tensor, "n c s s"]:
        return standardise(torch.from_numpy(tiles).to(trainer.device).float(), mean, std)

    _train(options, trainer, map(inputs, _batches(seen, options, trainer.step)), settings)
    num_chunks = max(SAMPLE_TILES // options.batch_size, 1)
    update_bn(
        inputs(resize_tiles(sample, options.input_size)).tensor_split(num_chunks), trainer.network
    )
    trainer.network.eval()
    tiles = inputs(measured.sample(SAMPLE_TILES, STREAM_QUALITY))
    quality = {"split": "val" if held_out else "train", **_quality(trainer, tiles, num_chunks)}
    card = EncoderCard(
        architecture=options.arch,
        dim=options.dim,
        input_px=options.input_size,
        bands=store.spec.bands,
        dtype=store.spec.dtype,
        mean=mean,
        std=std,
        training=settings,
        quality=quality,
    )
    save_encoder(options.out, card, trainer.network)
    (options.out / CHECKPOINT_NAME).unlink(missing_ok=True)
    return card


def _batches(sampler: TileSampler, options: Pretrain, first_step: int) -> Iterator[Tiles]:
    """The tiles of every step from `first_step` to the last; banks are read ahead of their use."""
    numbers = range(first_step // STEPS_PER_BANK, -(-options.steps // STEPS_PER_BANK))
    num_tiles = BANK_BATCHES * options.batch_size
    banks = (sampler.sample(num_tiles, STREAM_BANK, number) for number in numbers)
    for number, bank in zip(numbers, read_ahead(banks), strict=True):
        served = number * STEPS_PER_BANK
        for step in range(max(served, first_step), min(served + STEPS_PER_BANK, options.steps)):
            rng = np.random.default_rng([options.seed, STREAM_BATCH, step])
            yield bank[rng.choice(num_tiles, options.batch_size, replace=False)]


def _train(
    options: Pretrain,
    trainer: Trainer,
    batches: Iterator[Float32[Tensor, "n c s s"]],
    settings: Mapping[str, Any],
) -> None:
    """Advance to the last step; a line of metrics per step, a checkpoint now and then."""
    metrics = options.out / METRICS_NAME
    if metrics.is_file():
        kept = metrics.read_text().splitlines(keepends=True)[: trainer.step]
        write_bytes_atomic(metrics, "".join(kept).encode())
    left = options.steps - trainer.step
    with metrics.open("a") as log:
        for tiles in progress(batches, total=left, desc="pretrain"):
            loss = trainer.advance(tiles)
            log.write(json.dumps({"step": trainer.step, "loss": loss}) + "\n")
            log.flush()
            if trainer.step % options.checkpoint_every == 0 or trainer.step == options.steps:
                trainer.save(options.out / CHECKPOINT_NAME, settings)
                say(f"pretrain: step {trainer.step} of {options.steps}, loss {loss:.2f}")


@torch.no_grad()
def _quality(
    trainer: Trainer, tiles: Float32[Tensor, "n c s s"], num_chunks: int
) -> dict[str, float]:
    """What the vectors of these tiles tell: deviation, effective rank, whether views match."""
    objective = trainer.objective
    rng = np.random.default_rng([objective.seed, STREAM_QUALITY])
    views = (random_view(tiles, objective.input_px, rng) for _ in range(2))
    first, second = (
        torch.cat([trainer.network(chunk) for chunk in view.tensor_split(num_chunks)])
        .cpu()
        .numpy()
        for view in views
    )
    return {
        "std": float(first.std(0).mean()),
        "effective_rank": effective_rank(first),
        "view_retrieval": view_retrieval(first, second),
        "tiles": len(first),
    }


def _say_plan(options: Pretrain, trainer: Trainer, regions: Sequence[Region]) -> None:
    side = min(region.side for region in regions)
    smallest, largest = (min(f, side) for f in (min(options.footprints), max(options.footprints)))
    num_images = len({region.image for region in regions})
    millions = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
    bands = trainer.objective.num_bands
    if largest < max(options.footprints):
        say(f"  footprints above {side} px are cut to it, the side of a region")
    say_plan(
        f"pretrain: {options.arch}, {millions:.1f} M parameters, {bands} bands at "
        f"{options.input_size} px to {options.dim} numbers, on {trainer.device}\n"
        f"  from     {options.dataset}: {len(regions)} train regions of {num_images} images, "
        f"footprints {smallest} to {largest} px\n"
        f"  steps    {trainer.step} of {options.steps} done, {options.batch_size} tiles each\n"
        f"  to       {options.out}",
        options.out,
        CHECKPOINT_COPIES * trainer.checkpoint_bytes(),
    )


def _say_summary(options: Pretrain, card: EncoderCard, trainer: Trainer, elapsed_s: float) -> None:
    quality = card.quality
    say(
        f"pretrain: {encoder_key(card, trainer.network)} written to {options.out} in "
        f"{elapsed_s:.0f} s\n"
        f"  on {quality['tiles']} tiles of the {quality['split']} split: effective rank "
        f"{quality['effective_rank']:.1f} of {card.dim}, {quality['view_retrieval']:.0%} of the "
        "views find their other view\n"
        f"  next: python -m conditioning.embed {options.dataset} --encoder {options.out}"
    )
    if quality["effective_rank"] < COLLAPSED_RANK:
        say(
            "  warning: the vectors have nearly collapsed (effective rank below "
            f"{COLLAPSED_RANK:.0f}); use more --steps, a larger --batch-size, or more varied "
            "images"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(Pretrain, pretrain, argv, prog="python -m conditioning.pretrain")


if __name__ == "__main__":
    raise SystemExit(main())
