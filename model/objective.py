"""The training objective on a draw of cells.

A draw holds exact area means of u_0 at the coarse lattice and in nested windows. Noise is
evaluated at the same cells, and only there: along a chain each window's noise refines that of the
window above it, one Philox call a parent. The loss is the sum over levels of the mean squared
error of F (see `process`), over cells that exist and have all their neighbours; at the lattice
every cell does.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.attention import Condition
from model.denoiser import Layer, PyramidDenoiser, crop
from model.draw import WindowDraw
from model.lattice import Box
from model.noise import NoiseTree
from model.schedule import draw_log_snr, log_snr_range


@dataclass(frozen=True)
class DrawNoise:
    """Noise means at the cells of a draw, in the draw's layout; `windows[l]` is level l of all
    chains.
    """

    lattice: Float[Tensor, "b hl wl c"]
    windows: list[Float[Tensor, "n w w c"]]


def draw_noise(tree: NoiseTree, seeds: Int64[Tensor, " b"], draw: WindowDraw) -> DrawNoise:
    """The fields named by `seeds` at the cells of `draw`; zero at window cells without a parent in
    the draw.
    """
    b, chains, levels, window = draw.windows.shape[:4]
    hl, wl = draw.lattice.shape[1:3]
    lattice = tree.boxes(seeds, Box(levels, 0, 0, hl, wl)).permute(0, 2, 3, 1)
    index = torch.arange(b, device=seeds.device).repeat_interleave(chains)
    half = (window // 2, window // 2)
    parents, places, corner = lattice, index, torch.zeros_like(draw.origins[:, :, 0]).flatten(0, 1)
    windows = []
    for level in reversed(range(levels)):
        origins = draw.origins[:, :, level].flatten(0, 1)
        held = crop(parents, places, origins // 2 - corner, half)
        children = tree.children(held.permute(0, 3, 1, 2), seeds[index], level, origins // 2)
        parents = children.permute(0, 2, 3, 1).float()
        places, corner = torch.arange(b * chains, device=seeds.device), origins
        windows.append(parents)
    return DrawNoise(lattice, windows[::-1])


class PyramidObjective(nn.Module):
    """Losses of a batch at every level, as a module that DeepSpeed can wrap.

    The log-SNR is uniform over the range in which every octave goes from drowned to clean.
    """

    def __init__(self, denoiser: PyramidDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.tree = NoiseTree(denoiser.octaves.noise, denoiser.config.channels)
        self.low, self.high = log_snr_range(denoiser.schedule, denoiser.octaves)

    def forward(
        self,
        draw: WindowDraw,
        condition: Condition,
        seeds: Int64[Tensor, " b"],
        uniform: Float[Tensor, " b"],
    ) -> Float[Tensor, " levels"]:
        """`seeds` name the noise fields; `uniform` in [0, 1) is the noise level's place in its
        range.
        """
        noise = draw_noise(self.tree, seeds, draw)
        log_snr = draw_log_snr(self.denoiser.schedule, uniform, self.low, self.high)
        return level_losses(self.denoiser, draw, noise, log_snr, condition)


def level_losses(
    denoiser: PyramidDenoiser,
    draw: WindowDraw,
    noise: DrawNoise,
    log_snr: Float[Tensor, " b"],
    condition: Condition,
) -> Float[Tensor, " levels"]:
    """Mean squared error of F at every level, fine to coarse; their sum is the objective."""
    b, chains, levels, window = draw.windows.shape[:4]
    device = draw.lattice.device
    tokens = denoiser.encode(condition)
    sigma = torch.exp(-log_snr / 2)[:, None, None, None]
    halo = denoiser.config.halo
    interior = torch.zeros(window, window, 1, device=device, dtype=draw.lattice.dtype)
    interior[halo : window - halo, halo : window - halo] = 1.0

    present = draw.lattice_present.to(draw.lattice)
    observed = (draw.lattice + sigma * noise.lattice) * present
    descent = denoiser.lattice(observed, present, log_snr, tokens)
    target = denoiser.correction_target(levels, draw.lattice, descent.known, log_snr)
    losses = [mean_square(descent.correction - target, present, float(present.numel()))]

    image = torch.arange(b, device=device).repeat_interleave(chains)
    sigma, log_snr = sigma[image], log_snr[image]
    index, corner = image, torch.zeros_like(draw.origins[:, :, 0]).flatten(0, 1)
    for level in reversed(range(levels)):
        origins = draw.origins[:, :, level].flatten(0, 1)
        margin = (window // 2 + 2, window // 2 + 2)
        parents: Layer = descent.layer.detached().crop(index, origins // 2 - corner - 1, margin)
        truth = draw.windows[:, :, level].flatten(0, 1)
        present = draw.windows_present[:, :, level].flatten(0, 1).to(truth)
        observed = (truth + sigma * noise.windows[level]) * present
        descent = denoiser.descend(
            level, parents, observed, present, origins, log_snr, tokens, image
        )
        target = denoiser.correction_target(level, truth, descent.known, log_snr)
        most = len(present) * float(interior.sum())
        losses.append(mean_square(descent.correction - target, present * interior, most))
        index, corner = torch.arange(b * chains, device=device), origins
    return torch.stack(losses[::-1])


def mean_square(
    error: Float[Tensor, "n h w c"],
    weight: Float[Tensor, "n h w 1"],
    most: float,
) -> Float[Tensor, ""]:
    """Weighted sum over `most`, the weight of a batch whose every cell is there.

    Not over the weight that is: every cell counts alike, wherever windows stick out, and the loss
    of a batch is the mean of the losses of its parts, however ranks share it.
    """
    return (error.square().mean(dim=-1, keepdim=True) * weight).sum() / most
