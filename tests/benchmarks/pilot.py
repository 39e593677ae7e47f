"""What the design of the draw decides: uniform, mixed and exact at equal time of one core.

    python tests/benchmarks/pilot.py SLIDE --out DIR [--minutes 12] [--designs uniform] [--seeds 0]
    python tests/benchmarks/pilot.py --out DIR --table

Crops of 512 px of one slide, the right quarter held out; 2,048 values of a crop a sample (0.78 %),
beside which exact is given the exact coarse lattice of 32 x 32 means; an 8 x 8 thumbnail as the
condition; 1.3 to 1.4 million parameters; white noise, noise levels drawn by the shifted cosine.
uniform and mixed train the same sparse-operator denoiser (v; features come to the lattice from the
three nearest points). exact is mixed with what the design asks of sparse operators: the lattice
reads exact means of u_t beside the mean features of each cell, which are left out half of the time
and come from one keyed draw in painting. Minutes are those of the process's own CPU on one thread,
so that a busy machine changes nothing. docs/experiments.md has the results, and those of a joint
pyramid, which the cascade has replaced.

Measured on held-out crops: power of what is painted over that of what is real, by octave, and the
mean squared error of x0_hat at the points of a draw when they are evaluated sparsely (as in
training) and within the whole crop (as in painting), at every noise level.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.evaluate.spectrum import Spectrum
from model.attention import Condition
from model.design import Extent, MixedDesign, PointDesign, Sampling, UniformDesign
from model.draw import PointDraw
from model.family import WHOLE, make_denoiser, make_objectives, make_passes
from model.generate import ArrayField, Pass, Trajectory, advance, finish, start
from model.lattice import Box
from model.solver import DDIM, uniform_steps
from model.sparse.config import SparseConfig
from model.sparse.denoiser import Means, SparseOperatorDenoiser
from pipeline.draws import RegionLevels
from pipeline.moments import Moments
from pipeline.packfile import ABSENT, PackStatistics
from pipeline.readers import open_reader

SIDE, LEVEL, GRID = 512, 4, 8
POINTS = 2048
BATCH, LEARNING_RATE, WARMUP = 8, 1e-3, 50
PAINTED, MEASURED, STEPS, TILE = 8, 4, 25, 128
LOG_SNRS = (-9.0, -7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0)

LATTICE = (SIDE >> LEVEL) ** 2
DESIGNS: dict[str, PointDesign] = {
    "uniform": UniformDesign(POINTS, LEVEL),
    "mixed": MixedDesign(POINTS, LEVEL, window=16),
    "exact": MixedDesign(POINTS + LATTICE, LEVEL, window=16, lattice=True),
}
UNET: dict[str, Any] = {
    "token_dim": 3,
    "token_width": 48,
    "embedding_width": 64,
    "unet_attention": 1,
    "unet_layers": 1,
    "unet_head_dim": 16,
    "unet_groups": 16,
}
SPARSE = SparseConfig(
    channels=3,
    coarse_level=LEVEL,
    width=32,
    blocks=2,
    heads=2,
    normalisation="stable",
    cross_attention="none",
    self_attention=False,
    tokens="lattice",
    mollifier_sigma_px=0.0,
    schedule="shifted-cosine",
    target="v",
    unet_widths=(32, 48, 64),
    unet_self_attention=False,
    unet_dropout=0.0,
    **UNET,
)
CONFIGS = {
    "uniform": SPARSE,
    "mixed": SPARSE,
    "exact": replace(SPARSE, means=True, resampling="splat", sums="subset", feature_dropout=0.5),
}


class Slide:
    """Crops of a slide in memory, standardised as packs would be."""

    def __init__(self, path: Path) -> None:
        with open_reader(path) as reader:
            _, height, width = reader.shape
            self.pixels = reader.read(0, 0, height, width)
        self.border = width * 3 // 4
        moments = None
        random = np.random.default_rng(0)
        for _ in range(32):
            here = Moments.of(self.levels(self.corner(random)))
            moments = here if moments is None else moments + here
        assert moments is not None
        self.statistics = PackStatistics(
            tuple(moments.mean().tolist()),
            tuple(map(tuple, moments.colour().tolist())),
            moments.signal(),
            moments.residual(),
            (0.0,) * 3,
            (1.0,) * 3,
        )

    def corner(self, random: np.random.Generator, held_out: bool = False) -> tuple[int, int]:
        """A random crop, of the left three quarters or of what is held out."""
        height, width = self.pixels.shape[1:]
        low, high = (self.border, width - SIDE) if held_out else (0, self.border - SIDE)
        return int(random.integers(height - SIDE + 1)), int(random.integers(low, high + 1))

    def crop(self, corner: tuple[int, int]) -> np.ndarray:
        y, x = corner
        return self.pixels[:, y : y + SIDE, x : x + SIDE]

    def levels(self, corner: tuple[int, int], turned: int = 0) -> RegionLevels:
        pixels = np.rot90(self.crop(corner), turned % 4, axes=(1, 2))
        pixels = pixels[:, ::-1] if turned & 4 else pixels
        return RegionLevels.of(pixels, np.ones((SIDE, SIDE), bool), LEVEL)

    def standardised(self, means: np.ndarray) -> Tensor:
        return torch.from_numpy(self.statistics.standardise(means.astype(np.float32)))

    def condition(self, levels: list[RegionLevels], keep: list[bool]) -> Condition:
        """The 8 x 8 thumbnails, as tokens."""
        side = SIDE // GRID
        cells = side >> LEVEL
        places = (np.stack(np.meshgrid(*[np.arange(GRID)] * 2, indexing="ij"), -1) + 0.5) * side
        thumbnails = [
            each.means(LEVEL).reshape(GRID, cells, GRID, cells, 3).mean(axis=(1, 3))
            for each in levels
        ]
        values = torch.stack([self.standardised(t).reshape(GRID**2, 3) for t in thumbnails])
        centres = torch.from_numpy(places.reshape(-1, 2).astype(np.float32))
        sides = torch.full((len(levels), GRID**2), float(side))
        centres = centres.expand(len(levels), -1, -1)
        return Condition(values, centres, sides, (GRID, GRID), torch.tensor(keep))


def draw_of(
    slide: Slide, levels: list[RegionLevels], design: PointDesign, keys: list[int]
) -> PointDraw:
    """One draw of each crop."""
    extent, scale = Extent(SIDE, SIDE), 256
    lattice = torch.stack([slide.standardised(each.means(LEVEL)) for each in levels])
    there = torch.ones_like(lattice[..., :1], dtype=torch.bool)
    cells = np.stack([design.cells(extent, (key, 0)) for key in keys])
    fixed = np.stack([each.points(c, scale) for each, c in zip(levels, cells, strict=True)])
    present = torch.from_numpy(fixed[..., :1] != ABSENT)
    values = slide.standardised(fixed / scale) * present
    return PointDraw(lattice, there, values, present, torch.from_numpy(cells), (SIDE, SIDE))


def train(
    slide: Slide, name: str, seed: int, minutes: float, folder: Path
) -> SparseOperatorDenoiser:
    """The averaged weights after so many minutes of CPU."""
    config = CONFIGS[name]
    octaves = config.octaves(slide.statistics.signal, slide.statistics.residual)
    torch.manual_seed(seed)
    denoiser = make_denoiser(config, octaves)
    assert isinstance(denoiser, SparseOperatorDenoiser)
    objective = make_objectives(denoiser)[WHOLE]
    average = {key: value.clone() for key, value in denoiser.state_dict().items()}
    optimizer = torch.optim.AdamW(denoiser.parameters(), LEARNING_RATE, (0.9, 0.99))
    random = np.random.default_rng(seed)
    begun, step, said = time.process_time(), 0, 0.0
    while (done := (time.process_time() - begun) / (60 * minutes)) < 1:
        step += 1
        levels = [slide.levels(slide.corner(random), random.integers(8)) for _ in range(BATCH)]
        keys = random.integers(2**31, size=BATCH).tolist()
        condition = slide.condition(levels, (random.random(BATCH) > 0.1).tolist())
        uniform = torch.from_numpy((np.arange(BATCH) + random.random(BATCH)) / BATCH).float()
        draw = draw_of(slide, levels, DESIGNS[name], keys)
        losses = objective(draw, condition, torch.tensor(keys), uniform)
        for group in optimizer.param_groups:
            rise = min(step / WARMUP, 1)
            group["lr"] = LEARNING_RATE * rise * (0.55 + 0.45 * np.cos(np.pi * done))
        optimizer.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (1 + step) / (10 + step))
        for key, value in denoiser.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        if done - said > 0.1:
            said = done
            print(f"{name} {seed}: step {step}, loss {float(losses.sum()):.3f}", flush=True)
    denoiser.load_state_dict(average)
    torch.save({"steps": step, "weights": average}, folder / f"{name}-{seed}.pt")
    return denoiser.eval().requires_grad_(False)


def pass_of(denoiser: SparseOperatorDenoiser, condition: Condition) -> Pass:
    sampling = Sampling(DESIGNS["exact"], POINTS / SIDE**2)
    (only,) = make_passes(
        denoiser, condition, guidance=1.0, tile=TILE, level=0, steps=STEPS, sampling=sampling
    )
    return only


def dense_estimate(
    denoiser: SparseOperatorDenoiser, condition: Condition, field: np.ndarray, log_snr: float
) -> np.ndarray:
    """x0_hat on a whole crop of u_t."""
    painter, _ = pass_of(denoiser, condition).prepare(None)
    out = np.empty_like(field)
    for box, _, x0 in painter.estimate(ArrayField(field), log_snr):
        out[:, box.y : box.y + box.height, box.x : box.x + box.width] = x0.numpy()
    return out


def paint(denoiser: SparseOperatorDenoiser, condition: Condition, seed: int) -> np.ndarray:
    fields = [ArrayField(np.zeros((3, SIDE, SIDE), np.float32)) for _ in range(2)]
    only = pass_of(denoiser, condition)
    steps, (painter, _) = uniform_steps(*only.log_snrs, STEPS - 1), only.prepare(None)
    start(fields[0], only.noise, seed, steps[0].now)
    for step in steps:
        advance(painter, DDIM(), step, Trajectory(fields[0], fields[1]))
        fields.reverse()
    finish(painter, steps[-1].after, Trajectory(fields[0], fields[1]))
    return fields[1].array


def errors(
    slide: Slide, denoiser: SparseOperatorDenoiser, name: str, log_snr: float
) -> tuple[float, float]:
    """Mean squared error of x0_hat at pixels of held-out draws: sparse, dense."""
    random, found = np.random.default_rng(7), []
    for key in range(MEASURED):
        corner = slide.corner(random, held_out=True)
        levels = [slide.levels(corner)]
        condition = slide.condition(levels, [True])
        truth = slide.standardised(levels[0].means(0)).permute(2, 0, 1)
        noise = denoiser.noise.box(key, Box(0, 0, 0, SIDE, SIDE))
        at = torch.tensor([log_snr])
        u = at.sigmoid().sqrt() * truth + (-at).sigmoid().sqrt() * noise
        dense = torch.from_numpy(dense_estimate(denoiser, condition, u.numpy(), log_snr))
        draw = draw_of(slide, levels, DESIGNS[name], [key])
        points, values = draw.points()
        xi = denoiser.noise.at(torch.tensor([key]), points)
        there = values + torch.exp(-at / 2) * xi
        means = None
        if denoiser.config.means:
            y = torch.nn.functional.avg_pool2d(u, 1 << LEVEL).permute(1, 2, 0)[None]
            y = y / at.sigmoid().sqrt()
            means = Means(y, torch.ones_like(y[..., :1]))
        evaluation = denoiser.prepare(condition, at, means)
        out = denoiser(there, denoiser.support(points), evaluation)
        sparse = denoiser.estimate(out, there, points, at)
        pixel = points.level == 0
        truth_there = values[pixel]
        dense_there = dense[:, points.y[pixel], points.x[pixel]].T
        found.append(
            [
                float((estimate - truth_there).square().mean())
                for estimate in (sparse[pixel], dense_there)
            ]
        )
    return tuple(np.mean(found, axis=0).tolist())


def measure(
    slide: Slide, denoiser: SparseOperatorDenoiser, name: str, seed: int, folder: Path
) -> dict[str, Any]:
    random, rows = np.random.default_rng(5), []
    real, painted = Spectrum.zero(), Spectrum.zero()
    for number in range(PAINTED):
        corner = slide.corner(random, held_out=True)
        condition = slide.condition([slide.levels(corner)], [True])
        values = paint(denoiser, condition, 1000 * seed + number).transpose(1, 2, 0)
        image = slide.statistics.to_pixels(values).transpose(2, 0, 1)
        for y, x in np.ndindex(2, 2):
            part = (slice(None), slice(256 * y, 256 * y + 256), slice(256 * x, 256 * x + 256))
            real += Spectrum.of(slide.crop(corner)[part])
            painted += Spectrum.of(image[part])
        if number < 2:
            pair = np.concatenate([slide.crop(corner), np.clip(image, 0, 255)], axis=2)
            rows.append(pair.transpose(1, 2, 0).round().astype(np.uint8))
    Image.fromarray(np.concatenate(rows)).save(folder / f"{name}-{seed}.png")
    return {
        "octaves": np.log2(painted.variances() / real.variances()).round(3).tolist(),
        "errors": {str(level): errors(slide, denoiser, name, level) for level in LOG_SNRS},
    }


def table(folder: Path) -> None:
    for name in DESIGNS:
        files = sorted(folder.glob(f"{name}-*.json"))
        results = [json.loads(file.read_text()) for file in files]
        if not results:
            continue
        octaves = np.array([result["octaves"] for result in results])
        spread = octaves.std(axis=0, ddof=1) if len(octaves) > 1 else np.zeros(octaves.shape[1])
        cells = [f"{m:+.2f} ± {s:.2f}" for m, s in zip(octaves.mean(axis=0), spread, strict=True)]
        print(f"| {name} ({len(results)} seeds) | {' | '.join(cells)} |")
    for name in DESIGNS:
        for file in sorted(folder.glob(f"{name}-*.json")):
            found = json.loads(file.read_text())["errors"]
            cells = [f"{s:.4f} / {d:.4f}" for s, d in found.values()]
            print(f"| {file.stem}: sparse / dense | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        table(options.out)
        return
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    slide = Slide(options.slide)
    for seed in options.seeds:
        for name in options.designs:
            record = options.out / f"{name}-{seed}.json"
            if record.is_file():
                continue
            denoiser = train(slide, name, seed, options.minutes, options.out)
            parameters = sum(p.numel() for p in denoiser.parameters())
            steps = torch.load(options.out / f"{name}-{seed}.pt")["steps"]
            result = measure(slide, denoiser, name, seed, options.out)
            result |= {"steps": steps, "parameters": parameters, "minutes": options.minutes}
            record.write_text(json.dumps(result, indent=1))
            print(name, seed, result, flush=True)


if __name__ == "__main__":
    main()
