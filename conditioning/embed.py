"""Tokens for every image of a store: `python -m conditioning.embed dataset.zarr --encoder NAME`.

For a footprint f the image is a lattice of whole tiles of f x f level-0 pixels, h // f by w // f;
token (i, j) is the encoder's vector of the tile whose rows are [i f, (i + 1) f). Tiles
stream through the encoder in batches that run across image borders, the next block being read
meanwhile. An image's tokens are written in one step once all are there, so what exists is whole,
and the same command does only what is missing.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, Float32, UInt8, UInt16
from tyro.conf import Positional

from conditioning.encoders import Encoder, choose_device, load_encoder
from conditioning.tiles import TileBlock, lattice_blocks, lattice_shape, read_ahead
from pipeline.console import EXIT_DONE, EXIT_PARTIAL, progress, run, say, say_plan
from pipeline.store import Store

BYTES_PER_NUMBER = 2
LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Embed:
    """Embed every image of a dataset store on lattices of tiles, one per footprint.

        python -m conditioning.embed dataset.zarr --encoder encoder
        python -m conditioning.embed dataset.zarr --encoder vit_small_patch14_dinov2.lvd142m
        python -m conditioning.embed dataset.zarr --encoder hf-hub:OWNER/MODEL --footprint 128 256

    The same command does only what is missing. Footprints larger than an image are skipped and
    reported.
    """

    dataset: Positional[Path]
    """the store written by pipeline.ingest"""
    encoder: str
    """a timm model with weights, hf-hub:ID, or a folder written by conditioning.pretrain"""
    footprint: tuple[int, ...] = (128, 256, 1024, 4096)
    """sides of the tiles in level-0 pixels; the finest are most of the work"""
    batch_size: int = 64
    """tiles per call of the encoder"""
    white_level: float | None = None
    """for uint16 images and encoders trained on 8 bits: the count that is white"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    dry_run: bool = False
    """print the plan and stop"""


class Target(NamedTuple):
    """The tokens of one image at one footprint."""

    footprint_px: int
    image_id: str


@dataclass(frozen=True)
class Plan:
    """What is to be done, how large each lattice is, and which images are too small for what."""

    todo: dict[Target, tuple[int, int]]
    num_done: int
    too_small: dict[int, list[str]]

    @property
    def num_tiles(self) -> int:
        """Tiles to encode."""
        return sum(rows * columns for rows, columns in self.todo.values())


class Tile(NamedTuple):
    """One tile at the encoder's size, and its place in the lattice of `target`."""

    target: Target
    row: int
    column: int
    pixels: UInt8[np.ndarray, "c h w"] | UInt16[np.ndarray, "c h w"]


@dataclass
class Lattice:
    """The tokens of one image as they arrive."""

    values: Float16[np.ndarray, "gy gx d"]
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = self.values.shape[0] * self.values.shape[1]

    def put(self, row: int, column: int, vector: Float32[np.ndarray, " d"]) -> None:
        """Take one token; each place is given once."""
        self.values[row, column] = vector
        self.missing -= 1


def embed(options: Embed) -> int:
    """Plan, encode, write; returns the exit code."""
    footprints = sorted(set(options.footprint))
    if not footprints or footprints[0] < 1 or options.batch_size < 1:
        raise ValueError(
            f"--footprint is {list(options.footprint)} and --batch-size {options.batch_size}; "
            "give at least one footprint, all numbers at least 1"
        )
    store = Store.open(options.dataset)
    encoder = load_encoder(
        options.encoder,
        bands=store.spec.bands,
        device=choose_device(options.device),
        dtype=store.spec.dtype,
        white_level=options.white_level,
    )
    plan = make_plan(store, encoder, footprints)
    _say_plan(options, encoder, plan)
    if options.dry_run:
        return EXIT_DONE
    register(store, encoder, options.encoder, options.white_level)
    started = time.monotonic()
    failures = encode_all(store, encoder, plan, options.batch_size)
    elapsed_s = time.monotonic() - started
    for target, reason in failures.items():
        say(f"embed: {target.image_id} failed at footprint {target.footprint_px}: {reason}")
    say(
        f"embed: {len(plan.todo) - len(failures)} lattices written in {elapsed_s:.0f} s, "
        f"{plan.num_done} were there, {len(failures)} failed; see "
        f"{store.path / 'embeddings' / encoder.key}\n"
        f"  next: python -m pipeline.pack {options.dataset} --encoder {options.encoder} "
        "--out packs/"
    )
    return EXIT_PARTIAL if failures else EXIT_DONE


def make_plan(store: Store, encoder: Encoder, footprints: Sequence[int]) -> Plan:
    """Which images of `store` still need which footprints; `ValueError` when no footprint fits
    into any image.
    """
    image_ids = store.image_ids()
    todo: dict[Target, tuple[int, int]] = {}
    too_small: dict[int, list[str]] = {}
    num_done, sides = 0, {}
    for image_id in image_ids:
        image = store.image(image_id)
        sides[image_id] = min(image.shape[1:])
        for footprint in footprints:
            shape = lattice_shape(image, footprint)
            if 0 in shape:
                too_small.setdefault(footprint, []).append(image_id)
            elif store.has_embedding(encoder.key, footprint, image_id):
                num_done += 1
            else:
                todo[Target(footprint, image_id)] = shape
    if not todo and not num_done:
        raise ValueError(
            f"no footprint of {list(footprints)} px fits into any of the {len(image_ids)} images "
            f"of {store.path}, whose shorter sides are at most "
            f"{max(sides.values(), default=0)} px; give a smaller --footprint"
        )
    ordered = dict(sorted(todo.items()))
    return Plan(todo=ordered, num_done=num_done, too_small=too_small)


def register(store: Store, encoder: Encoder, name: str, white_level: float | None) -> None:
    """Make the store know the encoder by what the user called it; a name belongs to the encoder
    that took it last.
    """
    names = {name, str(Path(name))}
    if Path(name).is_dir():
        names.add(str(Path(name).resolve()))
    for other in store.encoders():
        attributes = store.encoder_attributes(other)
        kept = set(attributes["names"])
        if other == encoder.key:
            names |= kept
        elif kept & names:
            store.register_encoder(other, {**attributes, "names": sorted(kept - names)})
    store.register_encoder(
        encoder.key,
        {
            "names": sorted(names),
            "dim": encoder.dim,
            "input_px": encoder.input_px,
            "white_level": white_level,
        },
    )


def encode_all(store: Store, encoder: Encoder, plan: Plan, batch_size: int) -> dict[Target, str]:
    """Encode and write everything in `plan.todo`; returns what could not be read, and why."""
    failures: dict[Target, str] = {}
    lattices: dict[Target, Lattice] = {}
    blocks = read_ahead(_blocks(store, encoder, plan, failures))
    tiles = progress(_tiles(blocks), total=plan.num_tiles, desc="embed")
    blank: Float32[np.ndarray, " d"] | None = None
    for batch in _batched(tiles, batch_size):
        # Sparse mosaics are mostly tiles of nothing but 0, which all have one vector.
        shown = [tile.pixels.any() for tile in batch]
        pixels = [tile.pixels for tile, is_shown in zip(batch, shown, strict=True) if is_shown]
        if blank is None and not all(shown):
            blank = encoder.encode(np.zeros_like(batch[0].pixels)[None]).numpy()[0]
        vectors = np.empty((len(batch), encoder.dim), np.float32)
        if pixels:
            vectors[shown] = encoder.encode(np.stack(pixels)).numpy()
        if not all(shown):
            vectors[~np.array(shown)] = blank
        largest = np.abs(vectors).max()
        if not largest < LARGEST_FLOAT16:
            raise ValueError(
                f"the encoder {encoder.key} returned {largest} and float16, in which tokens are "
                f"kept, ends at {LARGEST_FLOAT16:.0f}; use another encoder"
            )
        for tile, vector in zip(batch, vectors, strict=True):
            target = tile.target
            if target not in lattices:
                empty = np.empty((*plan.todo[target], encoder.dim), np.float16)
                lattices[target] = Lattice(empty)
            lattices[target].put(tile.row, tile.column, vector)
            if not lattices[target].missing:
                store.write_embedding(
                    encoder.key,
                    target.footprint_px,
                    target.image_id,
                    lattices.pop(target).values,
                    {"encoder": encoder.key, "footprint_px": target.footprint_px},
                )
    return failures


def _blocks(
    store: Store, encoder: Encoder, plan: Plan, failures: dict[Target, str]
) -> Iterator[tuple[Target, TileBlock]]:
    """Every block of the plan; an image that cannot be read ends early and is in `failures`."""
    for target in plan.todo:
        try:
            image = store.image(target.image_id)
            for block in lattice_blocks(image, target.footprint_px, encoder.input_px):
                yield target, block
        except (OSError, RuntimeError, ValueError) as error:
            failures[target] = str(error)


def _tiles(blocks: Iterator[tuple[Target, TileBlock]]) -> Iterator[Tile]:
    for target, block in blocks:
        for row, column in np.ndindex(block.tiles.shape[:2]):
            pixels = block.tiles[row, column]
            yield Tile(target, block.row + row, block.column + column, pixels)


def _batched(tiles: Iterator[Tile], batch_size: int) -> Iterator[tuple[Tile, ...]]:
    while batch := tuple(itertools.islice(tiles, batch_size)):
        yield batch


def _say_plan(options: Embed, encoder: Encoder, plan: Plan) -> None:
    lines = [
        f"embed: {encoder.key}, tiles of {encoder.input_px} px to {encoder.dim} numbers",
        f"  to do    {len(plan.todo)} lattices, {plan.num_tiles} tiles; "
        f"{plan.num_done} lattices are there",
        f"  to       {options.dataset / 'embeddings' / encoder.key}",
    ]
    for footprint, image_ids in sorted(plan.too_small.items()):
        shown = ", ".join(image_ids[:3]) + (" ..." if len(image_ids) > 3 else "")
        lines.append(
            f"  skipped  footprint {footprint}: larger than {len(image_ids)} images ({shown})"
        )
    needed_bytes = BYTES_PER_NUMBER * encoder.dim * plan.num_tiles
    say_plan("\n".join(lines), options.dataset, needed_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(Embed, embed, argv, prog="python -m conditioning.embed")


if __name__ == "__main__":
    raise SystemExit(main())
