"""A small picture of what a run generates now, beside the real.

Of a cascade: windows of every block, top to bottom from the coarsest, in pairs of the real window
and the one that the block generates under its true parents. Of the others a region that is not
trained on, if there is any: on the left as its packs know it (the cells of its lattice), on the
right generated after its tokens; patch diffusion generates its corner, a diffusion autoencoder the
region after the vector that it makes of a draw.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from conditioning.tokens import fit, to_condition, with_labels
from jobs.data import Batch, Batches, held_out_split
from jobs.painting import Recipe, paint
from jobs.run import Run, RunConfig
from model.attention import Tokens
from model.cascade.denoiser import CascadeBlock, CascadeDenoiser, OctaveBlock, Parents
from model.cascade.objective import NOISE_STREAM, keyed_normals
from model.draw import BlockDraw, Draw, PointDraw, TopDraw
from model.family import Denoiser, make_passes, mollifier_of
from model.haar import zero_mean
from model.solver import DPMSolverPP2M
from model.sparse.denoiser import SparseOperatorDenoiser
from pipeline.packfile import PackSet

STEPS = 12
SIDE_PX = 512
PAIRS, WINDOW_PX, GAP_PX, ABSENT_GREY = 4, 160, 4, 160


def write_preview(run: Run, packs: PackSet, step: int, device: torch.device) -> None:
    """Write run/samples/step-N.png."""
    config = run.config()
    denoiser = run.load_denoiser(device=device)
    if isinstance(denoiser, CascadeDenoiser):
        picture = _blocks(denoiser, config, packs, device)
    else:
        picture = _region(denoiser, config, packs, device)
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"step-{step:08d}.png")


def _blocks(
    denoiser: CascadeDenoiser, config: RunConfig, packs: PackSet, device: torch.device
) -> UInt8[np.ndarray, "h w 3"]:
    """Pairs of real and generated windows, a row a block."""
    split, rows = held_out_split(packs), []
    for part, block in enumerate(denoiser.blocks.values()):
        assert isinstance(block, CascadeBlock)
        batches = Batches(
            packs, PAIRS, 0, 0.0, augment=False, split=split, part=part, most_for_one=1
        )
        batch = batches.at(0).to(device)
        real, generated = batch.draw.values, generated_windows(block, batch)
        tiles = [
            _tile(values, weight, config)
            for pair in zip(real, generated, _weights(batch.draw), strict=True)
            for values, weight in ((pair[0], pair[2]), (pair[1], pair[2]))
        ]
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows)[:-GAP_PX, :-GAP_PX]


@torch.no_grad()
def generated_windows(block: CascadeBlock, batch: Batch) -> Float[Tensor, "b c h w"]:
    """What a block generates in the windows of a batch under their true parents."""
    draw, body, tokens = batch.draw, block.body, block.encode(batch.condition)
    assert isinstance(draw, TopDraw | BlockDraw)
    noise = keyed_normals(batch.seeds, NOISE_STREAM, draw.values.shape[1:]).to(draw.values)
    base: Tensor | float = 0.0
    if isinstance(body, OctaveBlock):
        assert isinstance(draw, BlockDraw)
        parents = Parents(draw.parents, draw.parents_present, draw.y_px, draw.x_px)
        base, noise = body.base(parents), zero_mean(noise, body.block.octaves)
    level = body.block.fine if isinstance(body, OctaveBlock) else body.level

    def estimate(observed: Tensor, log_snr: float) -> Tensor:
        levels = observed.new_full((len(observed),), log_snr)
        if isinstance(body, OctaveBlock):
            assert not isinstance(tokens, Tokens)
            return body(observed, parents, tokens, levels)
        assert isinstance(draw, TopDraw) and isinstance(tokens, Tokens)
        return body(observed, draw.present, tokens, levels, draw.origin)

    solver, (first, last) = DPMSolverPP2M(), block.log_snr_range()
    u = noise * 2.0**-level * (1 + math.exp(first)) ** -0.5
    before = None
    for step in solver.steps(first, last, STEPS - 1):
        x0 = estimate(u * (1 + math.exp(-step.now)) ** 0.5, step.now)
        u, before = solver(u, x0, before, step), x0
    return base + estimate(u * (1 + math.exp(-last)) ** 0.5, last)


def _weights(draw: Draw) -> Float[Tensor, "b 1 h w"]:
    """Which cells are there, at the resolution of the values."""
    assert isinstance(draw, TopDraw | BlockDraw)
    return F.interpolate(draw.weight, size=draw.values.shape[2:])


def _tile(
    values: Float[Tensor, "c h w"], weight: Float[Tensor, "1 h w"], config: RunConfig
) -> UInt8[np.ndarray, "side side 3"]:
    """Standardised values as a square with a gap to the right and below; grey where absent."""
    pixels = config.statistics.to_pixels(values.permute(1, 2, 0).float().cpu().numpy())
    rgb = to_uint8(pixels, config)
    rgb[weight[0].cpu().numpy() == 0] = ABSENT_GREY
    shown = np.full((WINDOW_PX + GAP_PX,) * 2 + (3,), 255, np.uint8)
    shown[:WINDOW_PX, :WINDOW_PX] = _square(rgb, WINDOW_PX)
    return shown


def _region(
    denoiser: Denoiser, config: RunConfig, packs: PackSet, device: torch.device
) -> UInt8[np.ndarray, "h w 3"]:
    """A real region and a generated one, side by side."""
    entry = min(packs.regions, key=lambda e: (e.split == "train", e.key))
    side = min(config.packs.side_px, SIDE_PX)
    tokens = fit(packs.tokens(entry), side, side)
    condition = to_condition([tokens], config.token_scale(), [True])
    condition = with_labels(condition, config.packs.classes, [entry.label], [True]).to(device)
    if isinstance(denoiser, SparseOperatorDenoiser) and denoiser.encoder is not None:
        draw = Batches(packs, batch=1, seed=0, split=entry.split).draw([packs.draw(entry, 0)])
        assert isinstance(draw, PointDraw)
        kept = torch.ones(1, dtype=torch.bool, device=device)
        condition = replace(condition, vector=denoiser.encode(draw.to(device)), keep_vector=kept)
    passes = make_passes(
        denoiser,
        condition,
        guidance=1.0,
        tile=side,
        level=0,
        steps=STEPS,
        sampling=config.packs.sampling(),
    )
    recipe = Recipe(side, side, STEPS, seed=0, guidance=1.0, solver="dpm++2m")
    field = paint(
        passes,
        recipe,
        channels=denoiser.config.channels,
        mollifier_sigma_px=mollifier_of(denoiser),
    )
    generated = config.statistics.to_pixels(field.array.transpose(1, 2, 0))
    cells = side >> config.packs.coarse_level
    lattice = packs.lattice(entry)[:cells, :cells]
    real = to_uint8(lattice.astype(np.float32) / config.packs.value_scale, config)
    halves = [_square(real, SIDE_PX), _square(to_uint8(generated, config), SIDE_PX)]
    return np.concatenate(halves, axis=1)


def to_uint8(pixels: Float[np.ndarray, "h w c"], config: RunConfig) -> UInt8[np.ndarray, "h w 3"]:
    """Something to look at: the first three bands (one band thrice), 16-bit data by its range."""
    if config.packs.dtype == "uint16":
        deviation = np.linalg.norm(np.array(config.statistics.colour), axis=1)
        high = np.array(config.statistics.mean) + 3 * deviation
        pixels = pixels * (255.0 / high)
    bands = pixels[..., [0, 1, 2] if pixels.shape[-1] >= 3 else [0, 0, 0]]
    return np.clip(np.rint(bands), 0, 255).astype(np.uint8)


def _square(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST))
