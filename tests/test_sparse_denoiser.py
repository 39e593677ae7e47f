"""Laws of the papers' denoiser: sparse points, tiles and whole images are one function."""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from fields import condition as token_lattice
from fields import levels_of
from sparse_points import normal, points_of, shuffled
from torch import Tensor, nn

import model.mollify
import model.noise
import model.sparse.painter
from model.attention import Condition
from model.config import config_from_dict, preset
from model.design import Extent, MixedDesign, PointDesign, Sampling, UniformDesign
from model.draw import PointDraw
from model.dropout import KeyedDropout, dropping
from model.generate import ArrayField
from model.lattice import Box
from model.operator_attention import AttentionSums
from model.operators import triton_kernels
from model.points import Points, full_lattice
from model.schedule import draw_log_snr, log_snr_range
from model.sparse.config import SparseConfig
from model.sparse.denoiser import Means, SparseOperatorDenoiser
from model.sparse.objective import SparseObjective
from model.sparse.painter import SparsePainter, Subset, keyed_subset
from model.sparse.support import TileSupport
from model.spectrum import NoiseSpectrum

HEIGHT, WIDTH = 16, 24
SIGNAL = (0.05, 0.1, 0.2, 0.2, 0.2, 0.25)
PUBLISHED = SparseConfig(
    channels=2,
    token_dim=6,
    coarse_level=2,
    width=8,
    blocks=1,
    kernel=3,
    heads=2,
    token_width=8,
    embedding_width=8,
    unet_widths=(16, 32),
    unet_attention=1,
    unet_layers=1,
    unet_head_dim=8,
    unet_groups=8,
)
CONFIGS = {
    "published": PUBLISHED,
    "means": replace(
        PUBLISHED,
        normalisation="stable",
        cross_attention="lookup",
        self_attention=False,
        tokens="lattice",
        resampling="splat",
        means=True,
        mollifier_sigma_px=0.0,
        schedule="shifted-cosine",
        target="preconditioned",
        weight="min-snr",
        unet_self_attention=False,
    ),
    "subset": replace(
        PUBLISHED,
        classes=3,
        vector_dim=4,
        blocks=2,
        normalisation="stable",
        cross_attention="softmax",
        tokens="lattice",
        sums="subset",
        schedule="linear",
        target="v",
    ),
    "alone": replace(
        PUBLISHED,
        kernel=5,
        cross_attention="none",
        resampling="splat",
        mollifier_sigma_px=0.0,
        schedule="uniform",
        target="x0",
    ),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def network(config: SparseConfig, seed: int = 0) -> SparseOperatorDenoiser:
    """A float64 denoiser whose zero-initialised layers have been given weights."""
    torch.manual_seed(seed)
    net = SparseOperatorDenoiser(config, config.octaves(SIGNAL, ())).double()
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def condition(config: SparseConfig, batch: int) -> Condition:
    """Every source that a configuration takes."""
    given, kept = token_lattice(batch, pitch=16.0), torch.ones(batch, dtype=torch.bool)
    if config.classes:
        labels = torch.arange(batch) % config.classes
        given = replace(given, labels=labels, keep_label=kept)
    if config.vector_dim:
        vector = normal(batch, config.vector_dim, seed=5)
        given = replace(given, vector=vector, keep_vector=kept)
    return given


def rows(values: Any, chosen: slice) -> Any:
    """Some images of a dataclass of tensors of a batch."""
    parts = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    parts = {name: part[chosen] for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(values, **parts)


def log_snrs(batch: int) -> Tensor:
    return torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)[:batch]


def means_of(config: SparseConfig, batch: int, height: int = HEIGHT) -> Means | None:
    if not config.means:
        return None
    observed = normal(batch, height // config.cell_px, WIDTH // config.cell_px, 2, seed=7)
    return Means(observed, torch.ones_like(observed[..., :1]))


def evaluate(net: SparseOperatorDenoiser, points: Points, observed: Tensor) -> Tensor:
    """The output at points of a batch, under the condition and noise levels of `batch` images."""
    config, batch = net.config, points.batch
    given = condition(config, batch), log_snrs(batch), means_of(config, batch)
    return net(observed, net.support(points), net.prepare(*given))


def scattered(*counts: int, levels: int = 1) -> Points:
    return points_of(counts, ((HEIGHT, WIDTH),) * len(counts), levels=levels)


def paint(net: SparseOperatorDenoiser, u: Tensor, log_snr: float = 0.5, **options: Any) -> Tensor:
    """x0_hat on all of one image, put together from tiles."""
    field = ArrayField(u.numpy())
    out = torch.full(u.shape, torch.nan, dtype=torch.float64)
    painter = SparsePainter(
        net,
        options.pop("given", condition(net.config, 1)),
        sampling=Sampling(UniformDesign(), 0.3),
        **options,
    )
    for box, read, x0 in painter.estimate(field, log_snr):
        ys, xs = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        assert torch.equal(read, u[:, ys, xs])
        out[:, ys, xs] = x0
    return out


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(64).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def test_paper_is_what_was_published() -> None:
    config = preset("paper", channels=3, token_dim=1024)
    assert isinstance(config, SparseConfig)
    assert (config.width, config.blocks, config.kernel) == (64, 3, 7)
    assert (config.normalisation, config.resampling, config.tokens) == ("ratio", "knn", "one")
    assert (config.cross_attention, config.self_attention) == ("operator", True)
    assert (config.mollifier_sigma_px, config.schedule) == (1.0, "cosine")
    assert (config.target, config.weight, config.sums) == ("epsilon", "simple", "all")
    assert not config.means and config.feature_dropout == 0.0
    assert config.unet_dropout == 0.1
    with torch.device("meta"):
        net = SparseOperatorDenoiser(config, config.octaves((0.1,) * 13, ()))
    assert len(net.down) == len(net.up) == 3
    count = sum(p.numel() for p in net.parameters())
    assert abs(count / 450e6 - 1) < 0.05, count
    assert net.octaves.noise == NoiseSpectrum(12, 1.0)


@EVERY
def test_the_order_of_points_does_not_matter(config: SparseConfig) -> None:
    net, points = network(config), scattered(90, 70, levels=1 if config.mollifier_sigma_px else 3)
    observed, order = normal(160, 2), shuffled(160)
    out = evaluate(net, points, observed)
    assert out.std() > 0.1
    mixed = evaluate(net, points.take(order), observed[order])
    torch.testing.assert_close(mixed, out[order], **CLOSE)


@EVERY
def test_images_of_a_ragged_batch_do_not_touch_each_other(config: SparseConfig) -> None:
    net, points, observed = network(config), scattered(80, 0, 45), normal(125, 2)
    given, means = condition(config, 3), means_of(config, 3)
    together = evaluate(net, points, observed)
    for image in range(3):
        mine, one = points.image == image, slice(image, image + 1)
        alone = replace(points.take(mine), image=torch.zeros(int(mine.sum()), dtype=torch.int64))
        alone = replace(alone, sizes_px=points.sizes_px[one])
        evaluation = net.prepare(
            rows(given, one), log_snrs(3)[one], rows(means, one) if means else None
        )
        out = net(observed[mine], net.support(alone), evaluation)
        torch.testing.assert_close(out, together[mine], **CLOSE)


@EVERY
@pytest.mark.parametrize(("normalisation", "resampling"), [("ratio", "splat"), ("stable", "knn")])
def test_all_points_of_an_image_are_the_dense_evaluation(
    config: SparseConfig, normalisation: str, resampling: str
) -> None:
    """The output, and x0_hat put together from tiles, at any of the points."""
    net = network(replace(config, normalisation=normalisation, resampling=resampling, sums="all"))
    u, log_snr = normal(2, HEIGHT, WIDTH), torch.tensor([0.5], dtype=torch.float64)
    observed = u.flatten(1).T * (1 + torch.exp(-log_snr)).sqrt()
    means = None
    if config.means:
        y = observed.view(1, HEIGHT, WIDTH, 2)
        lattice = levels_of(y, config.coarse_level)[-1]
        means = Means(lattice, torch.ones_like(lattice[..., :1]))
    evaluation = net.prepare(condition(config, 1), log_snr, means)
    every, whole = full_lattice(HEIGHT, WIDTH), Box(0, 0, 0, HEIGHT, WIDTH)
    tile = TileSupport(whole, whole, HEIGHT, WIDTH, net.config, torch.device("cpu"))
    sparse, dense = (net(observed, s, evaluation) for s in (net.support(every), tile))
    torch.testing.assert_close(dense, sparse, **CLOSE)
    order = shuffled(len(every))
    some = net(observed[order], net.support(every.take(order)), evaluation)
    x0 = net.estimate(some, observed[order], every.take(order), log_snr)
    tiled = paint(net, u, tile=8)[:, every.y[order], every.x[order]].T
    torch.testing.assert_close(tiled, x0, **CLOSE)


@EVERY
def test_any_tiling_gives_the_same_image(config: SparseConfig) -> None:
    net, u = network(config), normal(2, HEIGHT, WIDTH)
    whole = paint(net, u, tile=WIDTH, guidance=2.5)
    assert whole.std() > 0.1
    for tile in (8, 16):
        parts = paint(net, u, tile=tile, guidance=2.5)
        torch.testing.assert_close(parts, whole, **CLOSE)


def wave(level: int) -> Tensor:
    """A smooth function on the image, at the centres of the cells of a level."""
    height, width = (round(side * 2.0**-level) for side in (HEIGHT, WIDTH))
    y, x = ((torch.arange(n).double() + 0.5) * 2.0**level for n in (height, width))
    first = torch.sin(y[:, None] / 5 + x / 9)
    return torch.stack([first, torch.cos(x / 7 - y[:, None] / 11)])


@pytest.mark.parametrize("name", ["published", "subset"])
@pytest.mark.parametrize("normalisation", ["ratio", "stable"])
def test_finer_fields_of_one_function_converge(name: str, normalisation: str) -> None:
    """What is learned is an operator on functions: kernels, lattice, sums and tokens mean the same
    at every resolution, and errors shrink with the pixel.
    """
    config = replace(CONFIGS[name], normalisation=normalisation, sums="all")
    net, found = network(config), []
    for level in (0, -1, -2):
        x0 = paint(net, wave(level), tile=WIDTH << -level, level=level)
        found.append(levels_of(x0.permute(1, 2, 0)[None], -level)[-1])
    steps = [float((fine - coarse).square().mean()) for coarse, fine in pairwise(found)]
    assert 0 < steps[1] < 0.35 * steps[0] < 0.35 * float(found[0].var())


@pytest.mark.parametrize("level", [1, -1])
def test_any_tiling_gives_the_same_image_at_other_resolutions(level: int) -> None:
    net, u = network(CONFIGS["subset"]), wave(level) + 0.1 * normal(*wave(level).shape)
    every = network(replace(CONFIGS["subset"], sums="all"))
    cell = 4 << -level if level < 0 else 4 >> level
    for one in (net, every):
        whole = paint(one, u, tile=12 * cell, level=level, guidance=2.0)
        parts = paint(one, u, tile=2 * cell, level=level, guidance=2.0)
        torch.testing.assert_close(parts, whole, **CLOSE)
    pixels = Sampling(UniformDesign(), 4.0**-level)
    full = SparsePainter(
        net,
        condition(net.config, 1),
        1.0,
        12 * cell,
        pixels,
        level,
    )
    ((box, _, x0),) = full.estimate(ArrayField(u.numpy()), 0.5)
    assert box == Box(level, 0, 0, *u.shape[1:])
    torch.testing.assert_close(x0, paint(every, u, tile=12 * cell, level=level), **CLOSE)


def test_guidance_is_the_line_through_both_estimates() -> None:
    net, u = network(PUBLISHED), normal(2, HEIGHT, WIDTH)
    full = paint(net, u, tile=16)
    null = paint(net, u, tile=16, given=condition(PUBLISHED, 1).dropped())
    assert (null - full).abs().max() > 1e-3
    guided = paint(net, u, tile=16, guidance=2.5)
    torch.testing.assert_close(guided, null + 2.5 * (full - null), **CLOSE)


def test_a_subset_of_all_pixels_is_all_of_them() -> None:
    net, u = network(CONFIGS["subset"]), normal(2, HEIGHT, WIDTH)
    every = network(replace(CONFIGS["subset"], sums="all"))
    field = ArrayField(u.numpy())
    painter = SparsePainter(net, condition(net.config, 1), tile=WIDTH)
    ((_, _, by_subset),) = painter.estimate(field, 0.5)
    torch.testing.assert_close(by_subset, paint(every, u, tile=WIDTH), **CLOSE)
    assert not torch.allclose(by_subset, paint(net, u, tile=WIDTH), atol=1e-4)


def test_a_subset_is_drawn_as_in_training() -> None:
    """Cells of every level that the design draws, each with the exact mean of the field over it;
    where the image is too small for its windows, pixels.
    """
    design, field = MixedDesign(points=300, coarse_level=2, window=6), normal(2, 64, 96)
    sampling = Sampling(design, 0.2)
    for side in (8, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.sparse.painter, "READ_PX", side)
            points = keyed_subset(64, 96, sampling)
            subset = Subset(points, network(CONFIGS["means"]).support(points))
            read = subset.read(ArrayField(field.numpy()))
        levels = levels_of(field.permute(1, 2, 0)[None], 2)
        assert len(points) == round(0.2 * 64 * 96)
        assert set(points.level.tolist()) == {0, 1}
        for level in (0, 1):
            here = points.level == level
            expected = levels[level][0, points.y[here], points.x[here]]
            torch.testing.assert_close(read[here], expected, **CLOSE)
    # Of training's sums over these cells and painting's over the field, all are alike.
    net, log_snr = network(replace(CONFIGS["means"], sums="subset")), 0.5
    given = condition(net.config, 1)
    painter = SparsePainter(net, given, tile=32, sampling=sampling)
    y = field * (1 + np.exp(-log_snr)) ** 0.5
    lattice = levels_of(y.permute(1, 2, 0)[None], 2)[-1]
    means = Means(lattice, torch.ones_like(lattice[..., :1]))
    evaluation = net.prepare(given, torch.tensor([log_snr]).double(), means)
    observed = read * (1 + np.exp(-log_snr)) ** 0.5
    (trained,) = net.sums(observed, net.support(points), evaluation)
    ((painted,),) = painter._sums(ArrayField(field.numpy()), [evaluation])
    torch.testing.assert_close(painted, trained, **CLOSE)
    few = keyed_subset(HEIGHT, WIDTH, sampling)
    assert len(few) == 77 and not few.level.any()


@EVERY
def test_sums_do_not_depend_on_how_an_image_is_divided(config: SparseConfig) -> None:
    net, whole = network(config), Box(0, 0, 0, HEIGHT, WIDTH)
    observed = normal(HEIGHT * WIDTH, 2)
    evaluation = net.prepare(condition(config, 1), log_snrs(1), means_of(config, 1))
    inner = [
        Box(0, y, x, height, width)
        for y, height in ((0, 4), (4, 12))
        for x, width in ((0, 8), (8, 4), (12, 12))
    ]
    supports = [
        TileSupport(whole, box, HEIGHT, WIDTH, config, torch.device("cpu"))
        for box in (whole, *inner)
    ]
    runs = [net.run(observed, support, evaluation) for support in supports]
    total, *shares = [next(run)() for run in runs]
    for number in range(net.num_sums):
        if isinstance(total, AttentionSums):
            for name in ("keys", "keys_values"):
                parts = torch.stack([getattr(share, name) for share in shares])
                torch.testing.assert_close(parts.sum(dim=0), getattr(total, name), **CLOSE)
        else:
            for box, share in zip(inner, shares, strict=True):
                lattice = Box(2, 0, 0, *total.total.shape[1:3])
                ys, xs = box.cover(2).slices_in(lattice)
                torch.testing.assert_close(share.total, total.total[:, ys, xs], **CLOSE)
                assert torch.equal(share.count, total.count[:, ys, xs])
        answer = net.complete(total, evaluation)
        if number + 1 < net.num_sums:
            total, *shares = [run.send(answer)() for run in runs]
    for run in runs:
        with pytest.raises(StopIteration):
            run.send(answer)


@EVERY
def test_a_dropped_condition_is_its_own_images_affair(config: SparseConfig) -> None:
    """Nobody else's output changes, and what the condition said does not matter any more."""
    net, points, observed = network(config), scattered(60, 60), normal(120, 2)
    means, given = means_of(config, 2), condition(config, 2)
    mine = points.image == 1

    def out(values: Tensor, keep: list[bool]) -> Tensor:
        kept = torch.tensor(keep)
        changes: dict[str, Tensor] = {"values": values, "keep": kept}
        if config.classes:
            changes |= {"keep_label": kept, "keep_vector": kept}
        evaluation = net.prepare(replace(given, **changes), log_snrs(2), means)
        return net(observed, net.support(points), evaluation)

    both, one = out(given.values, [True, True]), out(given.values, [True, False])
    torch.testing.assert_close(one[~mine], both[~mine], **CLOSE)
    assert not torch.allclose(one[mine], both[mine], atol=1e-4)
    loud = given.values.clone()
    loud[1] = torch.nan
    assert torch.equal(out(loud, [True, False]), one)


@EVERY
def test_nothing_is_read_that_was_not_written(
    config: SparseConfig, uninitialised_memory_is_nan: None
) -> None:
    net = network(config).requires_grad_(True)
    points = scattered(70, 0, 9)
    evaluate(net, points, normal(79, 2)).square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
    u = normal(2, HEIGHT, WIDTH)
    assert bool(paint(net.requires_grad_(False), u, tile=16, guidance=2.0).isfinite().all())


# The objective.


def image(batch: int) -> Tensor:
    return normal(batch, HEIGHT, WIDTH, 2, seed=2)


def draw_of(u0: Tensor, design: PointDesign, absent: float = 0.0) -> PointDraw:
    """The cells that `design` draws; a part of them may be absent."""
    batch, height, width, _ = u0.shape
    levels, extent = levels_of(u0, 2), Extent(height, width)
    drawn = np.stack([design.cells(extent, (0, number, 0)) for number in range(batch)])
    cells = torch.from_numpy(drawn)
    values = torch.stack(
        [
            torch.stack([levels[level][number, y, x] for level, y, x in cells[number].tolist()])
            for number in range(batch)
        ]
    )
    present = normal(batch, cells.shape[1], 1, seed=3).erf() * 0.5 + 0.5 >= absent
    there = torch.ones_like(levels[-1][..., :1], dtype=torch.bool)
    return PointDraw(levels[-1], there, values, present, cells, (height, width))


def design_for(config: SparseConfig) -> PointDesign:
    if config.mollifier_sigma_px:
        return UniformDesign(points=90, coarse_level=2)
    return MixedDesign(points=300, coarse_level=2, lattice=config.means, window=6)


def losses(config: SparseConfig, draw: PointDraw, **changes: Any) -> Tensor:
    objective = SparseObjective(changes.pop("net", None) or network(config))
    batch = len(draw.values)
    seeds = changes.pop("seeds", torch.arange(5, 5 + batch))
    uniform = changes.pop("uniform", torch.linspace(0.2, 0.9, batch, dtype=torch.float64))
    return objective(draw, changes.pop("given", condition(config, batch)), seeds, uniform)


@EVERY
def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts(config: SparseConfig) -> None:
    """However ranks share it, and though draws hold different numbers of cells of a level."""
    draw, given = draw_of(image(3), design_for(config), absent=0.2), condition(config, 3)
    uniform = torch.linspace(0.2, 0.9, 3, dtype=torch.float64)
    if not config.mollifier_sigma_px:
        assert len({int((draw.cells[i, :, 0] == 0).sum()) for i in range(3)}) > 1
    whole = losses(config, draw)
    parts = [
        losses(
            config,
            rows(draw, slice(i, i + 1)),
            given=rows(given, slice(i, i + 1)),
            seeds=torch.tensor([5 + i]),
            uniform=uniform[i : i + 1],
        )
        for i in range(3)
    ]
    assert len(whole) == (1 if config.mollifier_sigma_px else 2)
    torch.testing.assert_close(whole, torch.stack(parts).mean(dim=0), **CLOSE)


@EVERY
def test_every_parameter_learns(config: SparseConfig) -> None:
    """But for what softmax cannot see: a bias of all keys and, where the U-Net attends to a single
    token, the query and the key.
    """
    net = network(config).requires_grad_(True)
    given = replace(condition(config, 2), keep=torch.tensor([True, False]))
    if config.vector_dim:
        given = replace(given, keep_vector=given.keep)
    losses(config, draw_of(image(2), design_for(config)), net=net, given=given).sum().backward()
    still = {n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    unseen = [".to_k.bias"]
    if config.tokens == "one":
        unseen += [".attn2.to_q.", ".attn2.to_k.", ".transformer_blocks.0.norm2."]
    assert still == {n for n, _ in net.named_parameters() if any(part in n for part in unseen)}


@EVERY
def test_what_is_absent_may_hold_anything(config: SparseConfig) -> None:
    draw = draw_of(image(2), design_for(config), absent=0.3)
    there = draw.lattice_present.clone()
    there[:, :2] = False
    draw = replace(draw, lattice_present=there, lattice=draw.lattice * there)
    loud = replace(draw, values=torch.where(draw.present, draw.values, torch.nan))
    loud = replace(loud, lattice=torch.where(there, draw.lattice, 1e6))
    assert torch.equal(losses(config, loud), losses(config, draw))


Seen = dict[str, Tensor]


def answering(
    net: SparseOperatorDenoiser, answer: Callable[[Tensor, Points, Tensor], Tensor]
) -> Seen:
    """Let the network say `answer`(y, points, log-SNR at them), and keep what it was shown."""
    seen: Seen = {}

    def forward(observed: Tensor, support: Any, evaluation: Any) -> Tensor:
        seen["observed"] = observed
        return answer(observed, support.points, evaluation.log_snr[support.points.image])

    net.forward = forward  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", ["published", "means", "alone"])
def test_points_see_the_dense_fields_noise(name: str) -> None:
    """y is u_0 plus e^(-lambda/2) times the noise of its cell, as whole boxes of it say."""
    config = CONFIGS[name]
    net, draw = network(config), draw_of(image(2), design_for(config))
    seen = answering(net, lambda observed, points, log_snr: torch.zeros_like(observed))
    seeds, uniform = torch.tensor([3, 8]), torch.tensor([0.3, 0.8], dtype=torch.float64)
    losses(config, draw, net=net, seeds=seeds, uniform=uniform)
    log_snr = draw_log_snr(net.schedule, uniform, *log_snr_range(net.schedule, net.octaves))
    points, truth = draw.points()
    for level in points.level.unique().tolist():
        box = Box(level, 0, 0, HEIGHT >> level, WIDTH >> level)
        noise = net.noise.boxes(seeds, box).double()
        here = points.level == level
        there = noise[points.image[here], :, points.y[here], points.x[here]]
        expected = truth[here] + torch.exp(-log_snr[points.image[here], None] / 2) * there
        torch.testing.assert_close(seen["observed"][here], expected, **CLOSE)


@pytest.mark.parametrize("target", ["epsilon", "v", "x0", "preconditioned"])
@pytest.mark.parametrize("weight", ["simple", "min-snr"])
def test_a_target_changes_the_loss_of_an_estimate_by_a_known_factor(
    target: str, weight: str
) -> None:
    """Whatever the network is asked for, let it mean x0_hat = y / 2: the loss is the mean squared
    error of that, times a factor of each image.
    """
    config = replace(CONFIGS["alone"], target=target, weight=weight)
    net, draw = network(config), draw_of(image(3), UniformDesign(points=90, coarse_level=2))

    def answer(observed: Tensor, points: Points, log_snr: Tensor) -> Tensor:
        """The output whose x0_hat is y / 2: that of u_0 = y / 2 and the noise that is left."""
        noise = observed / 2 * torch.exp(log_snr[:, None] / 2)
        return net.target_at(points).of(observed / 2, noise, log_snr)

    seen = answering(net, answer)
    uniform = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    found = losses(config, draw, net=net, uniform=uniform)
    points, truth = draw.points()
    squared = (seen["observed"] / 2 - truth).square().mean(dim=-1)
    error = torch.zeros(3).double().index_add(0, points.image, squared) / 90
    snr = torch.exp(draw_log_snr(net.schedule, uniform, *log_snr_range(net.schedule, net.octaves)))
    signal, noise = net.octaves.variances(0)
    factor = {
        "epsilon": snr,
        "v": snr + 1,
        "x0": torch.ones(3).double(),
        "preconditioned": (signal + noise / snr) / (signal * noise / snr),
    }[target]
    if weight == "min-snr":
        factor = snr.clamp(max=5)
    torch.testing.assert_close(found, (factor * error).mean()[None], **CLOSE)


def test_means_are_the_same_in_training_and_in_painting() -> None:
    """What the lattice is told of u_t is exact: nothing shifts between a draw and an image."""
    config = CONFIGS["means"]
    net, u0 = network(config), image(1)
    prepare, seen = net.prepare, []

    def keep(given: Condition, log_snr: Tensor, means: Means, *rest: Any) -> Any:
        seen.append((float(log_snr[0]), means))
        return prepare(given, log_snr, means, *rest)

    net.prepare = keep  # type: ignore[method-assign, assignment]
    draw = draw_of(u0, design_for(config))
    losses(config, draw, net=net, seeds=torch.tensor([4]), uniform=torch.tensor([0.6]).double())
    log_snr, trained = seen.pop()
    xi = net.noise.box(4, Box(0, 0, 0, HEIGHT, WIDTH)).double()
    y = u0[0].permute(2, 0, 1) + np.exp(-log_snr / 2) * xi
    paint(net, y * (1 + np.exp(-log_snr)) ** -0.5, log_snr, tile=16)
    _, painted = seen.pop()
    # Noise is float32 at every cell, so that the mean over 16 of them is rounded otherwise.
    torch.testing.assert_close(trained.observed, painted.observed, atol=1e-6, rtol=0)
    assert torch.equal(trained.present, painted.present)


def test_features_are_left_out_by_seed_alone() -> None:
    config = replace(CONFIGS["means"], feature_dropout=0.4)
    objective = SparseObjective(network(config))
    seeds = torch.arange(4000) * 977 + 2**33
    keep = objective._keep(seeds)
    order = shuffled(4000)
    assert keep is not None and torch.equal(objective._keep(seeds[order]), keep[order])
    assert abs(float(keep.double().mean()) - 0.6) < 0.03
    dropped, kept = int((~keep).nonzero()[0]), int(keep.nonzero()[0])
    draw = draw_of(image(1), design_for(config))
    for place, equal in ((kept, True), (dropped, False)):
        seed = seeds[place : place + 1]
        full = losses(CONFIGS["means"], draw, seeds=seed)
        assert torch.equal(losses(config, draw, seeds=seed), full) == equal


def test_dropout_is_a_function_of_the_seed() -> None:
    """The papers' U-Net drops a tenth at the resolutions that attend, each image on its own."""
    config, draw = PUBLISHED, draw_of(image(2), design_for(PUBLISHED))
    net = network(config)
    layers = [layer for layer in net.modules() if isinstance(layer, KeyedDropout)]
    assert len({layer.number for layer in layers}) == len(layers) == 5
    seeds, uniform = torch.tensor([5, 6]), torch.full((2,), 0.5, dtype=torch.float64)
    found = losses(config, draw, net=net, seeds=seeds, uniform=uniform)
    assert torch.equal(losses(config, draw, net=net, seeds=seeds, uniform=uniform), found)
    alone = torch.stack(
        [
            losses(
                config,
                rows(draw, one),
                net=net,
                seeds=seeds[one],
                uniform=uniform[one],
                given=rows(condition(config, 2), one),
            )
            for one in (slice(0, 1), slice(1, 2))
        ]
    )
    torch.testing.assert_close(alone.mean(dim=0), found, **CLOSE)
    without = network(replace(config, unet_dropout=0.0))
    assert not torch.equal(losses(config, draw, net=without, seeds=seeds, uniform=uniform), found)
    u = normal(2, HEIGHT, WIDTH)
    assert torch.equal(paint(net, u, tile=16), paint(without, u, tile=16))


def test_keyed_dropout_keeps_the_mean_and_knows_no_batch() -> None:
    layer, other = KeyedDropout(0.25, 3), KeyedDropout(0.25, 4)
    x, seeds = torch.ones(3, 64, 33, 32), torch.tensor([7, 2**40 + 1, 2**63 - 1])
    assert torch.equal(layer(x), x)
    with dropping(nn.ModuleList([layer, other]), seeds):
        mask, another = layer(x), other(x)
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    # 5 deviations of the mean of 67,584 draws.
    assert (mask.mean(dim=(1, 2, 3)) - 1).abs().max() < 5 * (1 / 3) ** 0.5 / 67_584**0.5
    correlation = torch.corrcoef(torch.stack([*mask.flatten(1), another[0].flatten()]))
    assert (correlation - torch.eye(4)).abs().max() < 5 / 67_584**0.5
    with dropping(layer, seeds[1:2]):
        assert torch.equal(layer(x[:1])[0], mask[1])
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("name", ["published", "means", "subset"])
def test_how_much_is_done_at_once_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name]
    net, u, draw = network(config), normal(2, HEIGHT, WIDTH), draw_of(image(2), design_for(config))
    before = losses(config, draw), paint(net, u, tile=16)
    monkeypatch.setattr(model.noise, "_CELLS_AT_ONCE", 7)
    monkeypatch.setattr(model.mollify, "_VALUES_AT_ONCE", 2_000)
    monkeypatch.setattr(model.sparse.painter, "READ_PX", 8)
    after = losses(config, draw), paint(net, u, tile=16)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], before[1], **CLOSE)


@EVERY
def test_layers_in_half_precision_lose_only_precision(config: SparseConfig) -> None:
    """bfloat16 has 8 bits; sums over points and the loss itself are not taken in it."""
    net, draw = network(config).float(), draw_of(image(2).float(), design_for(config))
    given = condition(config, 2)
    single = {
        name: part.float()
        for name in ("values", "centres_px", "footprints_px", "vector")
        if (part := getattr(given, name)) is not None
    }
    changes = {"given": replace(given, **single), "uniform": torch.tensor([0.3, 0.8])}
    full = losses(config, draw, net=net, **changes)
    with torch.autocast("cpu", torch.bfloat16):
        half = losses(config, draw, net=net, **changes)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)


# What is wrong gets a sentence.


@EVERY
def test_no_points_at_all_are_no_error(config: SparseConfig) -> None:
    net = network(config).requires_grad_(True)
    assert evaluate(net, scattered(0, 0), normal(0, 2)).shape == (0, 2)
    draw = draw_of(image(2), design_for(config))
    nothing = replace(draw, present=torch.zeros_like(draw.present))
    found = losses(config, nothing, net=net)
    found.sum().backward()
    assert found.abs().max() == 0
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in net.parameters())


def test_points_that_cannot_be_are_refused() -> None:
    net, draw = network(PUBLISHED), draw_of(image(1), UniformDesign(points=20, coarse_level=2))
    outside = draw.cells.clone()
    outside[0, 3] = torch.tensor([0, HEIGHT, 0])
    with pytest.raises(ValueError, match="1 points lie outside their image"):
        losses(PUBLISHED, replace(draw, cells=outside))
    twice = draw.cells.clone()
    twice[0, 3] = twice[0, 7]
    with pytest.raises(ValueError, match="1 points occur more than once"):
        losses(PUBLISHED, replace(draw, cells=twice))
    coarse = full_lattice(HEIGHT, WIDTH, level=3)
    with pytest.raises(ValueError, match="a point of level 3 is coarser than the lattice"):
        evaluate(net, coarse, normal(len(coarse), 2))
    with pytest.raises(ValueError, match="need lattices of 2 sizes"):
        net.support(points_of((20, 20), ((24, 40), (32, 40))))
    with pytest.raises(ValueError, match="known at pixels, but points of levels"):
        losses(PUBLISHED, draw_of(image(1), design_for(CONFIGS["alone"])))


def test_what_a_preset_cannot_do_is_refused() -> None:
    subset, mixed = CONFIGS["subset"], MixedDesign(points=300, coarse_level=2, window=6)
    plain = replace(subset, mollifier_sigma_px=0.0)
    plain.check_design(mixed)
    with pytest.raises(ValueError, match="not at the coarser windows of --design mixed"):
        subset.check_design(mixed, 1.0)
    with pytest.raises(ValueError, match="noise is not mollified: at another resolution"):
        plain.check_painting(None, 64, 64, -1)
    subset.check_painting(None, 64, 64, -1)
    with pytest.raises(ValueError, match="lost between pixels 2 times as large"):
        subset.check_painting(None, 64, 64, 1)
    with pytest.raises(ValueError, match="unet_dropout is a part of at least 0 and below 1"):
        replace(subset, unet_dropout=1.0)
    wide = replace(condition(subset, 1), values=normal(1, 7, 7))
    with pytest.raises(ValueError, match="tokens of 7 numbers were given to a model that takes 6"):
        network(subset).prepare(wide, log_snrs(1))


def test_batches_that_do_not_fit_are_refused() -> None:
    config = CONFIGS["means"]
    net, points, observed = network(config), scattered(30, 20), normal(50, 2)
    given, means = condition(config, 2), means_of(config, 2)
    assert means is not None
    with pytest.raises(ValueError, match="a condition of 2 images was given the noise levels of"):
        net.prepare(given, log_snrs(3), means)
    with pytest.raises(ValueError, match="reads the area means of u_t"):
        net.prepare(given, log_snrs(2))
    with pytest.raises(ValueError, match="to a denoiser that reads none"):
        network(PUBLISHED).prepare(given, log_snrs(2), means)
    support = net.support(points)
    with pytest.raises(ValueError, match="points of 2 images were given the condition"):
        net(
            observed,
            support,
            net.prepare(rows(given, slice(1)), log_snrs(1), rows(means, slice(1))),
        )
    with pytest.raises(ValueError, match="2 lattices of 8x6 cells do not fit points of 2 images"):
        net(observed, support, net.prepare(given, log_snrs(2), means_of(config, 2, height=32)))
    with pytest.raises(ValueError, match="49 values do not fit 50 points"):
        net(observed[1:], support, net.prepare(given, log_snrs(2), means))
    with pytest.raises(ValueError, match="2 images was given the noise levels of 1"):
        paint(network(PUBLISHED), normal(2, HEIGHT, WIDTH), tile=8, given=condition(PUBLISHED, 2))
    with pytest.raises(ValueError, match="not whole coarse cells"):
        paint(network(PUBLISHED), normal(2, HEIGHT, WIDTH + 2), tile=8)
    with pytest.raises(ValueError, match="must be a multiple of the coarse cell"):
        paint(network(PUBLISHED), normal(2, HEIGHT, WIDTH), tile=10)


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [("triton", "needs a GPU, but the values are on cpu"), ("torchsparse", "is not here")],
)
def test_a_backend_that_cannot_run_says_so(backend: str, sentence: str) -> None:
    if backend == "torchsparse" and importlib.util.find_spec("torchsparse"):
        pytest.skip("torchsparse is installed")
    if backend == "triton" and triton_kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is on")
    octaves = PUBLISHED.octaves(SIGNAL, ())
    net = SparseOperatorDenoiser(PUBLISHED, octaves, backend).double()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        evaluate(net, scattered(20), normal(20, 2))


def test_a_choice_that_does_not_exist_is_refused() -> None:
    assert config_from_dict(dataclasses.asdict(PUBLISHED)) == PUBLISHED
    for name in ("normalisation", "cross_attention", "resampling", "tokens", "sums"):
        config = copy.copy(PUBLISHED)  # past the tests' own check of types
        object.__setattr__(config, name, "other")
        with pytest.raises(ValueError, match=f"{name} 'other' does not exist; choose"):
            config.__post_init__()
