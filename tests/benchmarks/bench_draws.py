"""What draws cost: naming cells, packing a region and reading a training sample.

Times and peaks of arrays in one run; nothing is asserted about time. Figures to keep go to
docs/benchmarks.md.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.bench_costs import SIDES, report, seconds

import conditioning.embed
import conditioning.pretrain
import pipeline.ingest
import pipeline.pack
from conditioning.tokens import around
from jobs.data import Batches
from model.design import (
    CascadeDesign,
    Extent,
    MixedDesign,
    PointDesign,
    SobolDesign,
    UniformDesign,
)
from model.draw import BlockDraw, Draw, TopDraw
from pipeline.draws import CascadeLevels, RegionLevels, mollified
from pipeline.packfile import PackSet, PackSettings, PackStatistics, RegionEntry
from pipeline.phantom import draw_slide

SIDE_PX = 4096


def peak_mb(work: Callable[[], object]) -> float:
    """Most that arrays held at once."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def cost(work: Callable[[], object]) -> str:
    return f"{1e3 * seconds(work):.1f} ms, {peak_mb(work):.1f} MB"


def test_naming_cells_does_not_depend_on_the_size_of_the_image() -> None:
    rows = []
    for design in (UniformDesign(), MixedDesign(), SobolDesign()):
        for height, width in ((SIDE_PX, SIDE_PX), (31_623, 31_623), (2**20, 2**20)):
            image = Extent(height, width)

            def work(design=design, image=image) -> None:  # type: ignore[no-untyped-def]
                design.cells(image, (0, 1, 2))

            rows.append((f"{_name(design)}, {height} x {width} px", cost(work)))
    for side in (SIDE_PX, 32_768):
        image = Extent(side, side)
        rows.append(
            (
                f"cascade, {side} x {side} px: {CascadeDesign().describe(image)}",
                cost(lambda image=image: CascadeDesign().draw(image, (0, 1, 2))),  # type: ignore[misc]
            )
        )
    pixels = np.arange(SIDE_PX**2)
    permute = np.random.Generator(np.random.Philox(0)).permutation
    rows.append(("a permutation of 4096 x 4096 px, in full", cost(lambda: permute(pixels))))
    report("65,536 cells", rows)


def test_packing_a_region() -> None:
    """From its pixels to the values of a draw; reading it comes on top."""
    random, valid = np.random.default_rng(0), np.ones((SIDE_PX, SIDE_PX), bool)
    pixels = random.integers(0, 256, (3, SIDE_PX, SIDE_PX), dtype=np.uint8)
    image, rows = Extent(SIDE_PX, SIDE_PX), []
    rows.append(("levels", cost(lambda: RegionLevels.of(pixels, valid, 5))))
    rows.append(("levels of a cascade", cost(lambda: CascadeLevels.of(pixels, valid, 8))))
    holes = valid.copy()
    holes[:1000, :1500] = False
    rows.append(("with holes to fill", cost(lambda: CascadeLevels.of(pixels, holes, 8))))
    rows.append(("mollified, sigma 1 px", cost(lambda: mollified(pixels, valid, 1.0, 256))))
    levels = RegionLevels.of(pixels, valid, 5)
    for design in (UniformDesign(), MixedDesign(), SobolDesign()):

        def work(design=design) -> None:  # type: ignore[no-untyped-def]
            levels.payload(design, image, (0, 1, 2), 256)

        rows.append((f"one draw, {_name(design)}", cost(work)))
    cascade, ours = CascadeLevels.of(pixels, valid, 8), CascadeDesign()
    rows.append(("one draw, cascade", cost(lambda: cascade.payload(ours, image, (0, 1, 2), 256))))
    report("one region of 4096 x 4096 px, 3 bands", rows)


def test_reading_a_training_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read over those that reach the batch (values, lattice where it is drawn; tokens are
    mapped), of packs that the commands made from one region. Of a cascade a sample is a window of
    one block.
    """
    rows, read = [], 0
    plain = PackSet._range

    def counted(self: PackSet, *place: Any, **part: Any) -> bytes:
        nonlocal read
        payload = plain(self, *place, **part)
        read += len(payload)
        return payload

    monkeypatch.setattr(PackSet, "_range", counted)
    with tempfile.TemporaryDirectory() as folder:
        store, encoder = _embedded(Path(folder))
        for name, options in (
            ("uniform", []),
            ("uniform", ["--mollifier", "1"]),
            ("mixed", ["--lattice"]),
            ("sobol", []),
            ("cascade", []),
        ):
            out = Path(folder) / "-".join([name, *options])
            arguments = [store, "--encoder", encoder, "--out", str(out), "--design", name]
            arguments += [*options, "--packs-per-region", "16"]

            started = time.perf_counter()
            assert pipeline.pack.main(arguments) == 0
            made = time.perf_counter() - started
            packs = PackSet.open(out)
            parts = range(4) if name == "cascade" else (None,)
            for part in parts:
                batches = Batches(packs, batch=1, seed=0, augment=False, part=part)
                read = 0
                used = 2 * 3 * _values(batches.at(0).draw, packs)
                said = " ".join([name, *options]) + ("" if part is None else f", {'TABCD'[part]}")
                rows.append(
                    (
                        said,
                        f"{read / used:.3f} ({read / 1e3:.0f} kB), sample in "
                        f"{1e3 * seconds(lambda batches=batches: batches.at(0)):.1f} ms; "  # type: ignore[misc]
                        f"16 draws packed in {made:.1f} s",
                    )
                )
    report("bytes read per training sample over bytes used", rows)


@pytest.mark.parametrize("dim", [128, 1536])
def test_reading_the_tokens_of_a_window(dim: int) -> None:
    """Of A, in regions of any side, with tokens of 128, 256 and 1024 px; on a warm disk."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            packs = _of_tokens(Path(folder), side, dim)
            (entry,), window_px = packs.regions, min(2048, side)
            corner = (side - window_px,) * 2

            def work(packs=packs, entry=entry, corner=corner, px=window_px) -> None:  # type: ignore[no-untyped-def]
                np.array(around(packs.tokens(entry)[0], corner, px).values)

            def whole(packs=packs, entry=entry) -> None:  # type: ignore[no-untyped-def]
                np.array(packs.tokens(entry)[0].values)

            rows.append((f"{side}²", f"{cost(work)}; all of the finest: {cost(whole)}"))
    report(f"tokens of a window, {dim} numbers each", rows)


def _of_tokens(folder: Path, side: int, dim: int) -> PackSet:
    """Packs of one region that holds tokens alone."""
    lattices = tuple((px, side // px, side // px) for px in (128, 256, 1024))
    file = folder / f"{side}.npy"
    np.save(file, np.zeros((sum(gy * gx for _, gy, gx in lattices), dim), np.float16))
    settings = PackSettings(
        *("store", "", "encoder", lattices, "cascade", 65_536, 8, None, 1, 0, side, "um", 0.5),
        *(("red", "green", "blue"), "uint8"),
    )
    first = tuple((px / 2, px / 2) for px, _, _ in lattices)
    span = ((0, file.stat().st_size),)
    entry = RegionEntry(0, "image", 0, 0, "train", file.name, first, span)
    return PackSet(folder, settings, PackStatistics((), (), (), (), (), ()), [entry])


def _values(draw: Draw, packs: PackSet) -> int:
    """Cells of a sample: of a window its fine cells and its parents."""
    if isinstance(draw, TopDraw):
        return draw.present.numel()
    if isinstance(draw, BlockDraw):
        return draw.values[0, 0].numel() + draw.parents_present.numel()
    return packs.design.num_values(Extent(SIDE_PX, SIDE_PX))


def _name(design: PointDesign) -> str:
    return type(design).__name__.removesuffix("Design").lower()


def _embedded(folder: Path) -> tuple[str, str]:
    """A store of one region of 4096 px, embedded at 256 px."""
    slide, store, encoder = (folder / name for name in ("slide.tif", "dataset.zarr", "encoder"))
    draw_slide(slide, height_px=SIDE_PX, width_px=SIDE_PX, mpp=0.5, seed=0)
    region = ["--region", str(SIDE_PX), "--min-tissue", "0", "--cluster", "inline"]
    assert pipeline.ingest.main([str(slide), "--out", str(store), *region]) == 0
    sizes = ["--steps", "2", "--batch-size", "8", "--input-size", "32", "--dim", "128"]
    arguments = [str(store), "--out", str(encoder), *sizes, "--footprints", "256"]
    assert conditioning.pretrain.main(arguments) == 0
    arguments = [str(store), "--encoder", str(encoder), "--footprint", "256"]
    assert conditioning.embed.main(arguments) == 0
    return str(store), str(encoder)
