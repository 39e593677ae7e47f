"""Laws of a block's evaluation: its halo, the image's border, its octaves and its parents."""

import dataclasses
import math

import pytest
import torch
from fields import CONFIG, OCTAVES, block_of, condition, denoiser, window_of
from torch import Tensor

from model.attention import Tokens
from model.cascade.config import BlockConfig
from model.cascade.denoiser import CascadeDenoiser, LookedUp, OctaveBlock, Parents
from model.cascade.top import TopDenoiser
from model.draw import BlockDraw
from model.haar import details, means, up, zero_mean
from model.wiener import cosine_basis, mode_offsets, wiener

BLOCKS = pytest.mark.parametrize("name", ["A", "B"])
LOG_SNRS = (-4.0, 0.0, 5.0)
CLOSE = {"atol": 1e-10, "rtol": 0.0}


def normal(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def levels(value: float, batch: int = 1) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


def body_of(net: CascadeDenoiser, name: str) -> OctaveBlock:
    body = block_of(net, name).body
    assert isinstance(body, OctaveBlock)
    return body


def parents_of(draw: BlockDraw) -> Parents:
    return Parents(draw.parents, draw.parents_present, draw.y_px, draw.x_px)


def tokens_of(net: CascadeDenoiser, name: str, batch: int = 1) -> LookedUp | None:
    tokens = block_of(net, name).encode(condition(batch, (4, 4)))
    assert not isinstance(tokens, Tokens)
    return tokens


def image_of(block: BlockConfig, parents: tuple[int, int], batch: int = 1) -> Tensor:
    """Pixels of so many parents; those of the coarser block are constant below its fine cells."""
    h, w = ((side << block.octaves) for side in parents)
    return up(normal(batch, 2, h, w), block.fine)


def observed_of(body: OctaveBlock, draw: BlockDraw, sigma: float = 0.0, seed: int = 5) -> Tensor:
    """The details that a draw's parents do not tell, and noise."""
    truth = zero_mean(draw.values, body.block.octaves) - body.predicted(parents_of(draw))
    return truth + sigma * zero_mean(normal(*truth.shape, seed=seed), body.block.octaves)


@BLOCKS
@pytest.mark.parametrize("log_snr", LOG_SNRS)
def test_a_window_is_the_crop_of_the_dense_evaluation_beyond_its_halo(
    name: str, log_snr: float
) -> None:
    """And not beyond a parent less: what is declared is what the network needs."""
    net = denoiser()
    body, tokens = body_of(net, name), tokens_of(net, name)
    halo, n = body.block.halo, body.block.octaves
    side = 2 * halo + 3
    image = image_of(body.block, (side + 3, side + 4))
    dense = window_of(image, body.block, (0, 0), (side + 3, side + 4))
    window = window_of(image, body.block, (2, 1), (side, side))
    outputs = [
        body(observed_of(body, draw), parents_of(draw), tokens, levels(log_snr))
        for draw in (dense, window)
    ]
    whole = outputs[0][..., 2 << n : (2 + side) << n, 1 << n : (1 + side) << n]

    def error(without: int) -> float:
        inner = slice(without << n, -(without << n))
        return float((whole - outputs[1])[..., inner, inner].abs().max())

    assert error(halo) < 1e-10
    assert error(halo - 1) > 1e-9


@BLOCKS
@pytest.mark.parametrize("log_snr", LOG_SNRS)
@pytest.mark.parametrize("first", [True, False])
def test_a_window_at_the_border_is_the_dense_evaluation_there(
    name: str, log_snr: float, first: bool
) -> None:
    """Up to a halo away from those of the window's borders that lie inside the image."""
    net = denoiser()
    body, tokens = body_of(net, name), tokens_of(net, name)
    halo, n = body.block.halo, body.block.octaves
    side, size = halo + 3, (halo + 5, halo + 4)
    image = image_of(body.block, size)
    origin = (0, 0) if first else (2, 1)
    dense, window = (
        window_of(image, body.block, *place) for place in (((0, 0), size), (origin, (side,) * 2))
    )
    whole, found = (
        body(observed_of(body, draw), parents_of(draw), tokens, levels(log_snr))
        for draw in (dense, window)
    )
    assert whole.abs().max() > 0.1
    here = slice(0, 3 << n) if first else slice(halo << n, side << n)
    rows, columns = (slice(0, 3 << n) if first else slice(-3 << n, None) for _ in size)
    torch.testing.assert_close(found[..., here, here], whole[..., rows, columns], **CLOSE)


@pytest.mark.parametrize("name", CONFIG.names)
def test_images_of_a_batch_do_not_touch_each_other(name: str) -> None:
    net = denoiser()
    block, log_snr = block_of(net, name), torch.tensor([0.0, 3.0]).double()
    image = normal(2, 2, 128, 128)

    def estimate(image: Tensor, keep: list[bool], log_snr: Tensor) -> Tensor:
        given = dataclasses.replace(condition(2), keep=torch.tensor(keep))
        tokens = block.encode(given)
        if isinstance(block.body, TopDenoiser):
            assert tokens is not None
            y = means(image, block.body.level)
            return block.body(y, torch.ones_like(y[:, :1]), tokens, log_snr)
        draw = window_of(image, block.body.block, (0, 0), (4, 4))
        return block.body(observed_of(block.body, draw), parents_of(draw), tokens, log_snr)

    before = estimate(image, [True, True], log_snr)
    changed = torch.stack([image[0], image[1] + normal(2, 128, 128, seed=9)])
    after = estimate(changed, [True, False], torch.tensor([0.0, -3.0]).double())
    torch.testing.assert_close(before[0], after[0], **CLOSE)
    assert not torch.allclose(before[1], after[1])


@BLOCKS
def test_an_estimate_has_no_mean_in_any_parent_and_its_base_has_the_parents(name: str) -> None:
    body = body_of(denoiser(), name)
    draw = window_of(image_of(body.block, (5, 7)), body.block, (0, 0), (5, 7))
    tokens, n = tokens_of(denoiser(), name), body.block.octaves
    x0 = body(observed_of(body, draw), parents_of(draw), tokens, levels(1.0))
    assert x0.std() > 0.1
    assert means(x0, n).abs().max() < 1e-12
    parents = body.inner(draw.parents)
    torch.testing.assert_close(means(body.base(parents_of(draw)), n), parents, **CLOSE)


def gaussian_details(body: OctaveBlock, parents: tuple[int, int], batch: int) -> Tensor:
    """White details of the variances that a block claims of its octaves."""
    n = body.block.octaves
    white = details(normal(batch, 2, *(side << n for side in parents), seed=7), n)
    cells = [4.0**level * 4 / 3 for level in reversed(range(n))]
    pairs = zip(white, cells, body.variances, strict=True)
    return sum(((part * math.sqrt(c * s)) for part, c, (s, _) in pairs), torch.zeros(1).double())


@BLOCKS
@pytest.mark.parametrize("log_snr", LOG_SNRS)
def test_an_untrained_block_is_the_wiener_estimate_of_every_octave(
    name: str, log_snr: float
) -> None:
    """F = 0 at first. Of Gaussian octaves of the right variances every loss is then one, and what
    the network sees has unit variance in every octave.
    """
    net = CascadeDenoiser(CONFIG, OCTAVES).double().requires_grad_(False)
    body, n = body_of(net, name), body_of(net, name).block.octaves
    batch, side = 16, 48 >> n
    truth = gaussian_details(body, (side, side), batch)
    noise = zero_mean(normal(*truth.shape, seed=8), n) * 2.0**-body.block.fine
    observed = truth + math.exp(-log_snr / 2) * noise
    nothing = torch.zeros(batch, 2, side + 6, side + 6).double()
    places = torch.zeros(batch, side).double()
    parents = Parents(nothing, torch.ones_like(nothing[:, :1]), places, places)
    seen: list[Tensor] = []
    hook = body.net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    estimate = body(observed, parents, None, levels(log_snr, batch))
    hook.remove()
    gains = [s / (s + noise * math.exp(-log_snr)) for s, noise in body.variances]
    expected = sum(
        (gain * part for gain, part in zip(gains, details(observed, n), strict=True)),
        torch.zeros(1).double(),
    )
    torch.testing.assert_close(estimate, expected, **CLOSE)
    weight = torch.ones(batch, 1, side, side).double()
    losses = body.losses(truth, observed, parents, None, levels(log_snr, batch), weight)
    scaled = details(seen[0][:, :2], n)
    for level, loss, part in zip(reversed(range(n)), losses, scaled, strict=True):
        # An octave's field repeats its details, three for four cells, at all finer cells.
        count = 0.75 * part.numel() / 4**level
        assert abs(loss - 1) < 5 * math.sqrt(2 / count), level
        assert abs(part.square().mean() - 1) < 5 * math.sqrt(2 / count), level


@pytest.mark.parametrize("log_snr", [-9.0, -6.0, -2.0])
def test_an_untrained_top_block_is_the_wiener_filter_and_its_loss_one_in_every_mode(
    log_snr: float,
) -> None:
    net = CascadeDenoiser(CONFIG, OCTAVES).double().requires_grad_(False)
    top, batch, h, w = block_of(net, "T").body, 1_000, 4, 6
    assert isinstance(top, TopDenoiser)
    ratios = mode_offsets(OCTAVES, top.level, h, w).exp() * 4.0**-top.level
    rows, columns = (cosine_basis(side, ratios) for side in (h, w))
    truth = rows.T @ (ratios.sqrt() * normal(batch, 2, h, w)) @ columns
    noise = normal(batch, 2, h, w, seed=3) * 2.0**-top.level
    observed = truth + math.exp(-log_snr / 2) * noise
    tokens = block_of(net, "T").encode(condition(1).dropped())
    assert tokens is not None
    given = dataclasses.replace(
        tokens,
        attended=tokens.attended.expand(batch, -1, -1),
        lattice=tokens.lattice.expand(batch, -1, -1, -1),
        condition=condition(batch),
    )
    present, seen = torch.ones(batch, 1, h, w).double(), []
    hook = top.net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    estimate = top(observed, present, given, levels(log_snr, batch))
    loss = top.loss(truth, observed, present, present, given, levels(log_snr, batch))
    hook.remove()
    expected = wiener(OCTAVES, top.level, observed.permute(0, 2, 3, 1), levels(log_snr, batch))
    torch.testing.assert_close(estimate, expected.permute(0, 3, 1, 2), **CLOSE)
    scaled = rows @ seen[0][:, :2] @ columns.T
    total = ratios + 4.0**-top.level * math.exp(-log_snr)
    spread = (ratios * 4.0**-top.level * math.exp(-log_snr) / total).sqrt()
    missed = rows @ (truth - estimate) @ columns.T / spread
    for found in (scaled, missed):
        assert abs(found.square().mean(dim=(0, 1)) - 1).max() < 5 * math.sqrt(1 / batch)
    torch.testing.assert_close(loss[0], missed.square().mean(), **CLOSE)


def test_noise_levels_go_from_drowned_to_clean_in_every_octave() -> None:
    net = denoiser()
    for name in CONFIG.names:
        block = block_of(net, name)
        low, high = block.log_snr_range()
        assert low + max(block.body.offsets) == pytest.approx(-6.0)
        assert high + min(block.body.offsets) == pytest.approx(6.0)
        assert low < block.middle() < high
    assert body_of(net, "A").offsets == [OCTAVES.offset(level) for level in (4, 3, 2)]


def test_octaves_of_another_cascade_are_refused() -> None:
    other = dataclasses.replace(OCTAVES, residual=OCTAVES.residual[:3])
    with pytest.raises(ValueError, match="measured below level 3, the cascade's top block is of"):
        CascadeDenoiser(CONFIG, other)


def test_a_parent_looks_up_every_token_of_half_its_side() -> None:
    """Tokens finer than parents are told one by one, each at its place in the parent."""
    net = denoiser()
    body, cell = body_of(net, "A"), 1 << CONFIG.blocks[0].parents
    finer = condition(1, (6, 10), cell / 2)
    tokens = block_of(net, "A").encode(finer)
    assert isinstance(tokens, LookedUp)
    draw = window_of(image_of(body.block, (3, 5)), body.block, (0, 0), (3, 5))
    found = body.looked_up(tokens, parents_of(draw))
    features = tokens.encoder.features(finer, finer.values)[0, :60].unflatten(0, (3, 2, 5, 2))
    torch.testing.assert_close(found[0], features.permute(4, 1, 3, 0, 2).flatten(0, 2), **CLOSE)
