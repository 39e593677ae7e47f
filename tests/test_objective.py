"""Laws of the objective: noise at the cells of a draw, unit variances, and where gradients go."""

import dataclasses
import math

import pytest
import torch
from fields import CONFIG, DESIGN, OCTAVES, condition, denoiser, draw_of

from model.denoiser import PyramidDenoiser, crop
from model.draw import WindowDraw
from model.haar import detail, repeat
from model.lattice import Box
from model.noise import NoiseTree
from model.objective import DrawNoise, draw_noise, level_losses
from model.process import precondition


def white_image(batch: int, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, side, side, 2, generator=generator, dtype=torch.float64)


def test_noise_of_a_draw_is_the_field_at_its_cells() -> None:
    draw = draw_of(white_image(2), DESIGN)
    tree, seeds = NoiseTree(OCTAVES.noise, 2), torch.tensor([3, 4])
    noise = draw_noise(tree, seeds, draw)
    index = torch.arange(2).repeat_interleave(draw.origins.shape[1])
    for level in range(3):
        whole = tree.boxes(seeds, Box(level, 0, 0, 64 >> level, 64 >> level))
        origins = draw.origins[:, :, level].flatten(0, 1)
        expected = crop(whole.permute(0, 2, 3, 1), index, origins, (16, 16))
        here = draw.windows_present[:, :, level].flatten(0, 1)
        torch.testing.assert_close(noise.windows[level] * here, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", range(4))
def test_preconditioning_rebuilds_the_truth_and_has_unit_variance(level: int) -> None:
    """With signal and noise of the variances it was told, c_in y and F have variance 1."""
    signal, noise = OCTAVES.variances(level)
    generator = torch.Generator().manual_seed(0)
    for log_snr in (-6.0, 0.0, 6.0):
        factors = precondition(OCTAVES, level, torch.tensor([log_snr], dtype=torch.float64))
        truth, xi = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
        truth = truth * math.sqrt(signal)
        y = truth + math.exp(-log_snr / 2) * math.sqrt(noise) * xi
        target = (truth - factors.c_skip.flatten() * y) / factors.c_out.flatten()
        assert abs((factors.c_in.flatten() * y).var() - 1) < 0.02
        assert abs(target.var() - 1) < 0.02
        assert abs(torch.corrcoef(torch.stack([target, y]))[0, 1]) < 0.02
        assert factors.log_snr.item() == pytest.approx(log_snr + math.log(signal / noise))


def test_every_octave_goes_from_drowned_to_clean() -> None:
    low, high = OCTAVES.log_snr_range()
    offsets = [OCTAVES.offset(level) for level in range(OCTAVES.noise.top_level + 1)]
    assert low + max(offsets) == pytest.approx(-6.0)
    assert high + min(offsets) == pytest.approx(6.0)
    # Uniform in the range, every octave is between -3 and 3 with probability >= 0.2.
    assert 6.0 / (high - low) >= 0.2


def test_an_untrained_network_is_the_wiener_estimate_and_its_loss_the_errors_variance() -> None:
    """At initialisation F = 0 below the lattice; at a clean level the loss is then 1.

    The image has exactly the variances that the octaves claim; with hardly any noise the parents
    are known, and what is left of each level is noise of variance one in units of c_out.
    """
    torch.manual_seed(0)
    net = PyramidDenoiser(CONFIG, OCTAVES).double().requires_grad_(False)
    levels = [torch.randn(4, 8, 8, 2).double() * 0.3]
    for level in reversed(range(3)):
        up = repeat(levels[0])
        spread = math.sqrt(OCTAVES.residual[level] * 4 / 3)
        levels.insert(0, up + detail(spread * torch.randn(up.shape).double()))
    draw = draw_of(levels[0], DESIGN)
    log_snr = torch.full((4,), 12.0, dtype=torch.float64)
    noise = draw_noise(NoiseTree(OCTAVES.noise, 2), torch.arange(4), draw)
    noise = DrawNoise(noise.lattice.double(), [w.double() for w in noise.windows])
    losses = level_losses(net, draw, noise, log_snr, condition(4))
    inside = [
        float(draw.windows_present[:, :, level, 2:-2, 2:-2].double().mean()) for level in range(3)
    ]
    for level in range(3):
        assert losses[level] / inside[level] == pytest.approx(1.0, abs=0.15)


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts() -> None:
    net, tree = denoiser(), NoiseTree(OCTAVES.noise, 2)
    draw, seeds = draw_of(white_image(2), DESIGN), torch.tensor([5, 6])
    log_snr = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    whole = level_losses(net, draw, draw_noise(tree, seeds, draw), log_snr, condition(2))
    parts = []
    for i in range(2):
        part = WindowDraw(
            *(getattr(draw, f.name)[i : i + 1] for f in dataclasses.fields(WindowDraw))
        )
        given = dataclasses.replace(condition(1), values=condition(2).values[i : i + 1])
        noise = draw_noise(tree, seeds[i : i + 1], part)
        parts.append(level_losses(net, part, noise, log_snr[i : i + 1], given))
    torch.testing.assert_close(whole, torch.stack(parts).mean(dim=0))


def test_every_parameter_learns() -> None:
    net = denoiser().requires_grad_(True)
    draw, seeds = draw_of(white_image(2), DESIGN), torch.tensor([5, 6])
    given = dataclasses.replace(condition(2), keep=torch.tensor([True, False]))
    noise = draw_noise(NoiseTree(OCTAVES.noise, 2), seeds, draw)
    log_snr = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    level_losses(net, draw, noise, log_snr, given).sum().backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not still, still


def test_what_is_absent_is_not_scored() -> None:
    net, tree = denoiser(), NoiseTree(OCTAVES.noise, 2)
    draw, seeds = draw_of(white_image(1), DESIGN), torch.tensor([5])
    gone = draw.lattice_present.clone()
    gone[:, :2] = False
    hidden = dataclasses.replace(draw, lattice=draw.lattice * gone, lattice_present=gone)
    log_snr = torch.zeros(1, dtype=torch.float64)
    noise = draw_noise(tree, seeds, draw)
    shouted = DrawNoise(torch.where(gone, noise.lattice, 1e6), noise.windows)
    quiet = level_losses(net, hidden, noise, log_snr, condition(1))
    loud = level_losses(net, hidden, shouted, log_snr, condition(1))
    torch.testing.assert_close(quiet, loud)
