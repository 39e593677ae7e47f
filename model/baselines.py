"""The opponent: patch diffusion, and its fusion into large images (Graikos et al., CVPR 2024).

A diffusion model of patches of 256 px, each conditioned on its own SSL embedding: one token for
the cross-attention of diffusers' U-Net, dropped at random for classifier-free guidance. A large
image is denoised in overlapping windows. Each is conditioned on an embedding between those of the
four nearest tiles (`slerp`), and at every step the windows' x0_hat are averaged, with equal
weights, before the solver moves on. Published: 75 % overlap, guidance 3, 50 steps.

What differs from the published system: it diffuses the latents of a pretrained VAE, this one
pixels, 4 x 4 of which are one place of the U-Net (`pixel_unshuffle`), since there are no such
weights for any number of bands. A token is alone, so softmax attends to it whatever the query: it
acts as a bias, there as here. And it has the care that our own model has: white noise leaves
coarse octaves clear when fine ones drown, so that each Haar octave l of a patch, and the patch's
mean as one more, is preconditioned at its own variances S_l of the signal and sigma^2 N_l of the
noise (`process`; EDM's factors, as in a block of the cascade), and Muon moves its kernels:

    x0_hat = sum_l [ c_skip,l y_l + c_out,l F_l ],    F = net( sum_l c_in,l y_l, lambda, token),
    y = u_t / sqrt(abar) = u_0 + sigma xi,    lambda = -2 ln sigma.

The loss is the mean over octaves of the squared error of F. With one gain for all of a patch
(`octave_gains=False`, S = N = 1) F is the velocity of Salimans and Ho (2022) up to its sign, and
the U-Net has to learn another blur at every noise level. White noise needs no shifted schedule at
256 px; the log-SNR covers every octave of a patch from drowned to clean, and training draws it as
the cosine schedule does, more often where the image is decided.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.attention import Condition
from model.cascade.objective import NOISE_STREAM, keyed_normals
from model.coarse import make_unet, unet_time
from model.config import PUBLISHED_OVERLAP, PatchConfig
from model.draw import PatchDraw
from model.generate import Field
from model.haar import composed, means, pyramid
from model.lattice import Box
from model.process import Octaves, precondition
from model.schedule import Cosine, draw_log_snr

_PARALLEL = 1e-6


class PatchDenoiser(nn.Module):
    """x0_hat of patches from y = u_t / sqrt(abar), one token each and the log-SNR."""

    def __init__(self, config: PatchConfig, octaves: Octaves) -> None:
        super().__init__()
        self.config, self.octaves = config, octaves
        self.null = nn.Parameter(torch.zeros(config.token_width))
        self.content = nn.Linear(config.token_dim, config.token_width)
        cells = config.unshuffle**2
        self.unet = make_unet(config, cells * config.channels, cells * config.channels)
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def encode(
        self, values: Float[Tensor, "n d"], keep: Bool[Tensor, " n"]
    ) -> Float[Tensor, "n 1 t"]:
        """Standardised embeddings as what is attended to; the null token where they are
        dropped.
        """
        return torch.where(keep[:, None], self.content(values), self.null)[:, None]

    def correct(
        self, seen: "Seen", log_snr: Float[Tensor, " n"], tokens: Float[Tensor, "n 1 t"]
    ) -> Float[Tensor, "n c h w"]:
        """F of all octaves together."""
        x = F.pixel_unshuffle(seen.scaled, self.config.unshuffle)
        known = log_snr if seen.levels else seen.factors[0].log_snr
        out = self.unet(x, unet_time(known), encoder_hidden_states=tokens).sample
        return F.pixel_shuffle(out, self.config.unshuffle).to(x)

    def forward(
        self,
        observed: Float[Tensor, "n c h w"],
        log_snr: Float[Tensor, " n"],
        tokens: Float[Tensor, "n 1 t"],
    ) -> Float[Tensor, "n c h w"]:
        """x0_hat."""
        seen = Seen(self.octaves, observed, log_snr)
        return seen.estimate(self.correct(seen, log_snr, tokens))


class Seen:
    """Observed patches, octave by octave and their mean last, and what each is preconditioned by.

    Where nothing is preconditioned apart (coarse level 0), the pixels are the only octave.
    """

    def __init__(
        self, octaves: Octaves, observed: Float[Tensor, "n c h w"], log_snr: Float[Tensor, " n"]
    ) -> None:
        self.levels = octaves.coarse_level
        self.parts = pyramid(observed, self.levels)
        self.factors = [precondition(octaves, level, log_snr) for level in range(self.levels + 1)]

    @property
    def scaled(self) -> Float[Tensor, "n c h w"]:
        """sum_l c_in,l y_l."""
        pairs = zip(self.factors, self.parts, strict=True)
        return composed([factors.c_in * y for factors, y in pairs])

    def estimate(self, out: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """x0_hat = sum_l [ c_skip,l y_l + c_out,l F_l ]."""
        found = zip(self.factors, self.parts, pyramid(out, self.levels), strict=True)
        return composed([torch.addcmul(f.c_skip * y, f.c_out, own) for f, y, own in found])

    def targets(self, truth: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n c _ _"]]:
        """What F should have been, octave by octave."""
        wanted = zip(self.factors, self.parts, pyramid(truth, self.levels), strict=True)
        return [(own - f.c_skip * y) / f.c_out for f, y, own in wanted]


class PatchObjective(nn.Module):
    """The mean squared error of F on drawn patches in every octave, fine to coarse, the mean last,
    as a module that DeepSpeed can wrap.

    The log-SNR is drawn by the cosine schedule, cut to the range of the octaves. Noise is keyed by
    the sample's seed. It need not be known by place here, so that it is not taken from the keyed
    field but has its law: white.
    """

    def __init__(self, denoiser: PatchDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.low, self.high = denoiser.octaves.log_snr_range()

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the losses."""
        return tuple(range(self.denoiser.octaves.coarse_level + 1))

    def forward(
        self,
        draw: PatchDraw,
        condition: Condition,
        seeds: Int64[Tensor, " b"],
        uniform: Float[Tensor, " b"],
    ) -> Float[Tensor, " levels"]:
        """`seeds` name the noise fields; `uniform` in [0, 1) is the noise level's place in its
        range.
        """
        log_snr = draw_log_snr(Cosine(), uniform, self.low, self.high)
        return self.losses(draw, condition, seeds, log_snr)

    def losses(
        self,
        draw: PatchDraw,
        condition: Condition,
        seeds: Int64[Tensor, " b"],
        log_snr: Float[Tensor, " b"],
    ) -> Float[Tensor, " levels"]:
        """At given log-SNRs."""
        present = draw.present.to(draw.values)
        truth = draw.values * present
        noise = keyed_normals(seeds, NOISE_STREAM, truth.shape[1:]).to(truth)
        sigma = torch.exp(-log_snr / 2)[:, None, None, None]
        observed = (truth + sigma * noise) * present
        tokens = self.denoiser.encode(condition.values[:, 0], condition.keep)
        seen = Seen(self.denoiser.octaves, observed, log_snr)
        found = pyramid(self.denoiser.correct(seen, log_snr, tokens), seen.levels)
        # Over all cells, absent ones too: the loss of a batch is the mean of those of its parts.
        errors = [
            ((own - wanted).square() * means(present, level)).mean()
            for level, (own, wanted) in enumerate(zip(found, seen.targets(truth), strict=True))
        ]
        return torch.stack(errors)


def slerp(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], t: Float[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """From a (t = 0) to b (t = 1) along the great circle between their directions, at constant
    angular speed; the length goes from |a| to |b| linearly.

    direction = [ sin((1 - t) w) a/|a| + sin(t w) b/|b| ] / sin w,  w the angle between them
    (Shoemake, 1985). Parallel directions are joined by a straight line, and so are opposite ones,
    between which no great circle is the shortest.
    """
    tiny = torch.finfo(a.dtype).tiny
    length_a, length_b = (v.norm(dim=-1, keepdim=True).clamp_min(tiny) for v in (a, b))
    a, b, t = a / length_a, b / length_b, t[:, None]
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))[:, None]
    sine = angle.sin()
    curved = sine > _PARALLEL
    sine = torch.where(curved, sine, torch.ones_like(sine))
    weight_a = torch.where(curved, ((1 - t) * angle).sin() / sine, 1 - t)
    weight_b = torch.where(curved, (t * angle).sin() / sine, t)
    return (weight_a * a + weight_b * b) * torch.lerp(length_a, length_b, t)


def between_tiles(
    lattice: Float[Tensor, "gy gx d"], y: Float[Tensor, " n"], x: Float[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """Embeddings at places in units of the lattice: slerp along x in the two nearest rows, then
    along y between these; exact at the lattice's own places, constant beyond its rim.
    """
    (y0, y1, ty), (x0, x1, tx) = (
        _neighbours(place, count) for place, count in zip((y, x), lattice.shape[:2], strict=True)
    )
    upper = slerp(lattice[y0, x0], lattice[y0, x1], tx)
    lower = slerp(lattice[y1, x0], lattice[y1, x1], tx)
    return slerp(upper, lower, ty)


def _neighbours(
    place: Float[Tensor, " n"], count: int
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"], Float[Tensor, " n"]]:
    place = place.clamp(0, count - 1)
    first = place.floor().long().clamp(0, max(count - 2, 0))
    return first, (first + 1).clamp_max(count - 1), place - first


def window_starts(extent: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis, `stride` apart, the last flush with the
    border.
    """
    starts = list(range(0, extent - window + 1, stride))
    return starts if starts[-1] == extent - window else [*starts, extent - window]


@dataclass(frozen=True)
class PatchPainter:
    """Patch diffusion over fields of pixels: windows that overlap, averaged at every step.

    guidance: classifier-free guidance, x0 = null + guidance (conditional - null); 1
    evaluates the condition alone. tile: the field is painted in strips of this width, whose
    windows go down row by row, so that memory is O(tile x patch); windows across the border of two
    strips are evaluated in both. overlap: of neighbouring windows, in [0, 1). batch: windows that
    are evaluated at once.
    """

    denoiser: PatchDenoiser
    condition: Condition
    guidance: float = 1.0
    tile: int = 4096
    overlap: float = PUBLISHED_OVERLAP
    batch: int = 16

    @property
    def stride(self) -> int:
        """Pixels from one window to the next."""
        return max(round(self.denoiser.config.patch_px * (1.0 - self.overlap)), 1)

    @torch.no_grad()
    def estimate(
        self, field: Field, log_snr: float
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """(box, u_t, x0_hat) of boxes that partition the field, which must not change
        meanwhile.
        """
        _, height, width = field.shape
        self.denoiser.config.check_painting(self.overlap, height, width, level=0)
        for left in range(0, width, self.tile):
            yield from self._strip(field, log_snr, left, min(left + self.tile, width))

    def _strip(
        self, field: Field, log_snr: float, left: int, right: int
    ) -> Iterator[tuple[Box, Float[Tensor, "c h w"], Float[Tensor, "c h w"]]]:
        """Columns left ... right: a row of windows is added to the sums of the pixels that it
        covers; those above the next row of windows are then complete.
        """
        like = next(self.denoiser.parameters())
        channels, height, width = field.shape
        patch = self.denoiser.config.patch_px
        rows = window_starts(height, patch, self.stride)
        columns = window_starts(width, patch, self.stride)
        across = _coverage(columns, width, patch, like)[left:right]
        down = _coverage(rows, height, patch, like)
        columns = [x for x in columns if x < right and x + patch > left]
        first, last = columns[0], columns[-1] + patch
        sums = like.new_zeros(channels, patch, right - left)
        for y, following in pairwise([*rows, height]):
            u = field.read(Box(0, y, first, patch, last - first)).to(like)
            windows = torch.stack([u[:, :, x - first : x - first + patch] for x in columns])
            for x, x0 in zip(columns, self._windows(windows, log_snr, y, columns), strict=True):
                start, stop = max(x, left), min(x + patch, right)
                sums[:, :, start - left : stop - left] += x0[:, :, start - x : stop - x]
            done = following - y
            box = Box(0, y, left, done, right - left)
            mean = sums[:, :done] / (down[y:following, None] * across)
            yield box, u[:, :done, left - first : right - first], mean
            sums = F.pad(sums[:, done:], (0, 0, 0, done))

    def _windows(
        self, u: Float[Tensor, "n c h w"], log_snr: float, y: int, columns: Sequence[int]
    ) -> Float[Tensor, "n c h w"]:
        """x0_hat of the windows of one row, each under the embedding at its centre."""
        half = self.denoiser.config.patch_px / 2
        condition = self.condition
        gy, gx = condition.grid
        lattice = condition.values[0, : gy * gx].unflatten(0, (gy, gx)).to(u)
        (first_y, first_x), pitch = condition.centres_px[0, 0], condition.footprints_px[0, 0]
        at_x = (torch.tensor(columns, device=u.device) + half - first_x) / pitch
        at_y = torch.full_like(at_x, y + half).sub(first_y).div(pitch)
        values = between_tiles(lattice, at_y.to(u), at_x.to(u))
        scale = (1.0 + math.exp(-log_snr)) ** 0.5
        out = []
        for part, given in zip(u.split(self.batch), values.split(self.batch), strict=True):
            level = torch.full((len(part),), log_snr, device=u.device, dtype=u.dtype)
            keep = condition.keep[:1].expand(len(part))
            x0 = self.denoiser(part * scale, level, self.denoiser.encode(given, keep))
            if self.guidance != 1.0:
                none = self.denoiser.encode(given, torch.zeros_like(keep))
                x0 = torch.lerp(self.denoiser(part * scale, level, none), x0, self.guidance)
            out.append(x0)
        return torch.cat(out)


def _coverage(
    starts: Sequence[int], extent: int, window: int, like: Tensor
) -> Float[Tensor, " n"]:
    """How many windows cover each pixel of one axis."""
    counts = like.new_zeros(extent)
    for start in starts:
        counts[start : start + window] += 1
    return counts
