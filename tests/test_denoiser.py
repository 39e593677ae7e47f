"""Laws of the denoiser: what is computed does not depend on where the borders of the work are."""

import dataclasses

import pytest
import torch
from fields import CONFIG, DESIGN, OCTAVES, condition, denoiser, draw_of, levels_of
from torch import Tensor

from model.config import PyramidConfig, config_from_dict, preset
from model.denoiser import Layer, PyramidDenoiser
from model.generate import ArrayField, Painter
from model.haar import parent_means
from model.lattice import Box
from model.noise import NoiseTree
from model.objective import draw_noise

HEIGHT, WIDTH = 64, 96


def image(batch: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, height, width, 2, generator=generator, dtype=torch.float64)


def paint(net: PyramidDenoiser, y: Tensor, log_snr: float, **options: int) -> Tensor:
    """x0_hat on all of one image, put together from tiles."""
    alpha = float(torch.sigmoid(torch.tensor(log_snr, dtype=torch.float64)).sqrt())
    field = ArrayField((y[0].permute(2, 0, 1) * alpha).numpy())
    out = torch.full(field.shape, torch.nan, dtype=torch.float64)
    painter = Painter(net, condition(1), held_level=options.pop("held_level", 2), **options)
    for box, u, x0 in painter.estimate(field, log_snr):
        ys, xs = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        torch.testing.assert_close(u, field.read(box))
        out[:, ys, xs] = x0
    return out.permute(1, 2, 0)[None]


@pytest.mark.parametrize("log_snr", [-4.0, 0.0, 5.0])
def test_any_tiling_gives_the_same_image(log_snr: float) -> None:
    net, y = denoiser(), image(1)
    whole = paint(net, y, log_snr, tile=96)
    assert whole.std() > 0.1
    for tile in (8, 24, 64):
        torch.testing.assert_close(paint(net, y, log_snr, tile=tile), whole, atol=1e-10, rtol=0)
    for held in (1, 3):
        other = paint(net, y, log_snr, tile=24, held_level=held)
        torch.testing.assert_close(other, whole, atol=1e-10, rtol=0)


def test_a_coarser_field_is_the_coarse_levels_of_the_same_estimate() -> None:
    net, y = denoiser(), image(1)
    fine = paint(net, y, 0.0, tile=32)
    for base in (1, 2):
        means = levels_of(y, base)[base]
        coarse = paint(net, means, 0.0, tile=16, base_level=base)
        torch.testing.assert_close(coarse, levels_of(fine, base)[base], atol=1e-10, rtol=0)


@pytest.mark.parametrize("log_snrs", [(-9.0, -5.0), (-1.0, 2.0), (5.0, 9.0)])
def test_training_windows_are_crops_of_the_dense_evaluation(log_snrs: tuple[float, ...]) -> None:
    """What a window computes in its valid interior is what generation computes there, so that at
    no noise level x0_hat is worse dense than sparse at the same cells.
    """
    net, u0 = denoiser(), image(2, 64, 64)
    draw = draw_of(u0, DESIGN)
    log_snr = torch.tensor(log_snrs, dtype=torch.float64)
    tree = NoiseTree(OCTAVES.noise, 2)
    seeds = torch.tensor([11, 12])
    noise = draw_noise(tree, seeds, draw)
    sigma = torch.exp(-log_snr / 2)
    tokens = net.encode(condition(2))
    present = draw.lattice_present.double()
    observed = draw.lattice + sigma[:, None, None, None] * noise.lattice
    layer = net.lattice(observed, present, log_snr, tokens).layer
    chains = draw.origins.shape[1]
    index = torch.arange(2).repeat_interleave(chains)
    places, corner = index, torch.zeros_like(draw.origins[:, :, 0]).flatten(0, 1)
    dense = []
    for b in range(2):
        xi = tree.box(int(seeds[b]), Box(0, 0, 0, 64, 64)).permute(1, 2, 0)[None].double()
        y = u0[b : b + 1] + sigma[b] * xi
        one = dataclasses.replace(condition(1), values=condition(2).values[b : b + 1])
        alpha = float(torch.sigmoid(log_snr[b]).sqrt())
        field = ArrayField((y[0].permute(2, 0, 1) * alpha).numpy())
        painter = Painter(net, one, tile=64, held_level=3)
        ((_, _, x0),) = painter.estimate(field, float(log_snr[b]))
        dense.append(levels_of(x0.permute(1, 2, 0)[None], 2))
    compared = 0
    for level in reversed(range(3)):
        origins = draw.origins[:, :, level].flatten(0, 1)
        margin = (DESIGN.window // 2 + 2,) * 2
        parents: Layer = layer.crop(places, origins // 2 - corner - 1, margin)
        here = draw.windows_present[:, :, level].flatten(0, 1).double()
        truth = draw.windows[:, :, level].flatten(0, 1)
        y = (truth + sigma[index][:, None, None, None] * noise.windows[level]) * here
        layer = net.descend(level, parents, y, here, origins, log_snr[index], tokens, index).layer
        places, corner = torch.arange(len(index)), origins
        inside = slice(DESIGN.halo, DESIGN.window - DESIGN.halo)
        for window, b, origin in zip(layer.estimate, index.tolist(), origins, strict=True):
            whole = dense[b][level][0]
            for i in range(*inside.indices(DESIGN.window)):
                for j in range(*inside.indices(DESIGN.window)):
                    row, column = int(origin[0]) + i, int(origin[1]) + j
                    if 0 <= row < whole.shape[0] and 0 <= column < whole.shape[1]:
                        # The noise of windows is held in float32, and large at -9.
                        torch.testing.assert_close(
                            window[i, j], whole[row, column], atol=2e-5, rtol=0
                        )
                        compared += 1
    assert compared > 1_000


def test_a_cells_estimate_is_the_mean_of_those_below_it() -> None:
    net, y = denoiser(), image(1)
    tokens, log_snr = net.encode(condition(1)), torch.zeros(1, dtype=torch.float64)
    means = levels_of(y, 3)[3]
    lattice = net.lattice(means, torch.ones_like(means[..., :1]), log_snr, tokens).layer.estimate
    pixels = paint(net, y, 0.0, tile=32)
    torch.testing.assert_close(levels_of(pixels, 3)[3], lattice, atol=1e-10, rtol=0)


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    net = denoiser()
    means = levels_of(image(2), 3)[3]
    ones, log_snr = torch.ones_like(means[..., :1]), torch.tensor([0.0, 3.0]).double()
    before = net.lattice(means, ones, log_snr, net.encode(condition(2))).layer
    changed = dataclasses.replace(condition(2), keep=torch.tensor([True, False]))
    means[1] += 1.0
    log_snr[1] = -3.0
    after = net.lattice(means, ones, log_snr, net.encode(changed)).layer
    torch.testing.assert_close(before.estimate[0], after.estimate[0], atol=1e-12, rtol=0)
    assert not torch.allclose(before.estimate[1], after.estimate[1])


def test_absent_cells_change_nothing() -> None:
    net = denoiser()
    means = levels_of(image(1), 2)[2]
    present = torch.ones_like(means[..., :1])
    present[:, 4:8, 4:8] = 0
    parents = Layer(
        parent_means(means), torch.randn(1, 8, 12, 8).double(), parent_means(present).round()
    )
    index, zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    log_snr, tokens = torch.zeros(1).double(), net.encode(condition(1))

    def estimate(filling: float) -> Tensor:
        gone = parents.present == 0
        filled = Layer(
            torch.where(gone, filling, parents.estimate), parents.features, parents.present
        )
        around = filled.crop(index, zero - 1, (10, 14))
        shown = torch.where(present > 0, means, torch.zeros_like(means))
        return net.descend(2, around, shown, present, zero, log_snr, tokens, index).layer.estimate

    assert torch.equal(estimate(0.0), estimate(1e6))
    assert estimate(0.0)[:, 4:8, 4:8].abs().max() == 0


def test_guidance_is_the_line_through_both_estimates() -> None:
    net, y = denoiser(), image(1)
    field = ArrayField(y[0].permute(2, 0, 1).numpy())

    def estimate(guidance: float, dropped: bool = False) -> Tensor:
        given = condition(1).dropped() if dropped else condition(1)
        painter = Painter(net, given, guidance=guidance, tile=96, held_level=2)
        return next(painter.estimate(field, 0.0))[2]

    null, full = estimate(1.0, dropped=True), estimate(1.0)
    assert (null - full).abs().max() > 1e-3
    torch.testing.assert_close(estimate(2.5), null + 2.5 * (full - null))


@pytest.mark.parametrize(("name", "millions"), [("tiny", 6.4), ("small", 35), ("brush", 450)])
def test_presets_have_the_size_they_claim(name: str, millions: float) -> None:
    with torch.device("meta"):
        config = preset(name, channels=3, token_dim=1024)
        octaves = dataclasses.replace(
            OCTAVES,
            signal=(0.1,) * 13,
            residual=(0.1,) * 5,
            noise=dataclasses.replace(OCTAVES.noise, top_level=12, coarse_level=5),
        )
        net = PyramidDenoiser(config, octaves)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(count / millions - 1) < 0.05, count


def test_configurations_survive_json_and_unknown_keys_are_errors() -> None:
    import json

    stored = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert config_from_dict(stored) == CONFIG
    with pytest.raises(ValueError, match="unknown keys \\['colour'\\]"):
        config_from_dict({**stored, "colour": 1})
    with pytest.raises(ValueError, match="choose one of"):
        preset("huge", channels=3, token_dim=8)
    with pytest.raises(ValueError, match="as many widths"):
        PyramidConfig(channels=3, token_dim=8, coarse_level=4)


def test_a_denoiser_refuses_octaves_of_another_lattice() -> None:
    with pytest.raises(ValueError, match="coarse level of 3"):
        PyramidDenoiser(PyramidConfig(channels=2, token_dim=6), OCTAVES)
