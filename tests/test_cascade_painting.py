"""Laws of a generated image: no tiling is seen, a preview is its exact means, noise is keyed."""

import fields
import numpy as np
import pytest
import torch
from fields import CONFIG, area_means, paint64

from jobs.painting import Recipe
from model.cascade.painter import BlockPainter
from model.cascade.range import ValueRange
from model.editing import Known, KnownPixels, LowImage, start_from
from model.family import make_passes
from model.generate import ArrayField, Pass, start
from model.lattice import Box
from model.noise import NoiseTree
from model.noise_band import BandNoise

TOP, FINE = CONFIG.top.level, CONFIG.blocks[0].fine


def passes_of(
    *,
    guidance: float = 1.0,
    tile: int = 1024,
    level: int = 0,
    steps: int = 3,
    seed: int = 0,
    early: int | None = None,
    autoguidance: float | None = None,
) -> list[Pass]:
    """early: seed of the denoiser that is guided away from."""
    net, given = fields.denoiser(seed), fields.condition(1)
    return make_passes(
        net,
        given,
        guidance=guidance,
        tile=tile,
        level=level,
        steps=steps,
        early=None if early is None else fields.denoiser(early),
        autoguidance=autoguidance,
    )


def recipe_of(
    size: tuple[int, int], level: int = 0, solver: str = "dpm++2m", seed: int = 7
) -> Recipe:
    height, width = (side >> level for side in size)
    return Recipe(height, width, 3, seed=seed, guidance=1.0, solver=solver, level=level)


@pytest.mark.parametrize(
    ("size", "guidance", "solver"),
    [
        ((96, 160), 1.5, "dpm++2m"),
        ((96, 160), 1.0, "ancestral"),
        ((32, 32), 1.0, "dpm++2m"),
        ((64, 32), 1.5, "ancestral"),
    ],
)
def test_any_tiling_of_every_block_gives_the_same_image(
    size: tuple[int, int], guidance: float, solver: str
) -> None:
    recipe = recipe_of(size, solver=solver)
    whole = paint64(passes_of(guidance=guidance), recipe)
    assert 0.1 < whole.std() < 10
    for tile in (24, 40) if size == (96, 160) else (8, 16):
        tiled = paint64(passes_of(guidance=guidance, tile=tile), recipe)
        np.testing.assert_allclose(tiled, whole, atol=1e-10, rtol=0)


def test_autoguidance_leads_away_from_the_early_estimate_in_any_tiling() -> None:
    """Of one evaluation a block is on the line through both estimates, under the same parents."""
    recipe = recipe_of((96, 160))
    late, early = (paint64(passes_of(seed=seed, steps=1), recipe) for seed in (0, 1))
    found = paint64(passes_of(steps=1, early=1, autoguidance=2.5), recipe)
    top = [area_means(image, TOP) for image in (early, late, found)]
    np.testing.assert_allclose(top[2], top[0] + 2.5 * (top[1] - top[0]), atol=1e-10)
    assert np.abs(top[1] - top[0]).max() > 1e-3
    above = ArrayField(area_means(found, TOP))
    estimates = []
    for passes in (passes_of(seed=1), passes_of(), passes_of(early=1, autoguidance=2.5)):
        painter, _ = passes[1].prepare(above)
        field = ArrayField(np.random.default_rng(0).normal(size=(2, 96 >> FINE, 160 >> FINE)))
        ((_, _, x0),) = painter.estimate(field, 0.3)
        estimates.append(x0.double().numpy())
    away = estimates[0] + 2.5 * (estimates[1] - estimates[0])
    np.testing.assert_allclose(estimates[2], away, atol=1e-5)
    for tile in (24, 40):
        tiled = paint64(passes_of(steps=1, early=1, autoguidance=2.5, tile=tile), recipe)
        np.testing.assert_allclose(tiled, found, atol=1e-10, rtol=0)


def test_without_weight_or_early_weights_there_is_no_autoguidance() -> None:
    recipe = recipe_of((64, 96))
    plain = paint64(passes_of(), recipe)
    for given in ({"early": 1, "autoguidance": 1.0}, {"autoguidance": 2.0}):
        np.testing.assert_array_equal(paint64(passes_of(**given), recipe), plain)
    guided = paint64(passes_of(guidance=1.5, early=1, autoguidance=2.0), recipe)
    assert np.abs(guided - paint64(passes_of(guidance=1.5), recipe)).max() > 1e-3


def test_guidance_is_a_line_and_a_block_without_tokens_ignores_it() -> None:
    recipe = recipe_of((64, 96))
    images = {g: paint64(passes_of(guidance=g, steps=1), recipe) for g in (0.0, 1.0, 2.5)}
    top = {g: area_means(image, TOP) for g, image in images.items()}
    # Of one evaluation at the first noise level; finer blocks see other parents.
    np.testing.assert_allclose(top[2.5], top[0.0] + 2.5 * (top[1.0] - top[0.0]), atol=1e-10)
    assert np.abs(top[1.0] - top[0.0]).max() > 1e-3
    _, a, b = passes_of(guidance=2.5)
    for each, number in ((a, 2), (b, 1)):
        painter, _ = each.prepare(ArrayField(np.zeros((2, 4, 4))))
        assert isinstance(painter, BlockPainter) and len(painter.given) == number


@pytest.mark.parametrize("level", [1, 2, 3, 5])
def test_a_preview_is_exactly_the_area_mean_of_the_image_of_its_seed(level: int) -> None:
    """Whether a block ends at its level or its cells are means of a finer one's."""
    size = (96, 160)
    image = paint64(passes_of(guidance=1.5), recipe_of(size))
    preview = paint64(passes_of(guidance=1.5, level=level, tile=24), recipe_of(size, level))
    np.testing.assert_allclose(preview, area_means(image, level), atol=1e-10, rtol=0)
    assert preview.std() > 0.1


@pytest.mark.parametrize("level", [1, 2, 3, 5, 6])
def test_given_means_are_kept_at_any_level_whatever_the_tiles(level: int) -> None:
    """Those of a block's parents, in between two blocks' levels, and coarser than the top."""
    size = (128, 192)
    random = np.random.default_rng(3)
    low = np.round(random.normal(size=(2, 128 >> level, 192 >> level)) * 256) / 256
    edit = LowImage(ArrayField(low), level)
    images = [
        paint64(passes_of(guidance=1.5, tile=tile), recipe_of(size), edit=edit)
        for tile in (1024, 64)
    ]
    np.testing.assert_allclose(images[0], images[1], atol=1e-10, rtol=0)
    np.testing.assert_allclose(area_means(images[0], level), low, atol=1e-10, rtol=0)
    assert np.abs(area_means(images[0], level - 1) - low.repeat(2, 1).repeat(2, 2)).max() > 0.1
    for coarser in [fine for fine in (TOP, FINE) if fine < level]:
        passes = passes_of(guidance=1.5, level=coarser)
        preview = paint64(passes, recipe_of(size, coarser), edit=edit)
        np.testing.assert_allclose(preview, area_means(images[0], coarser), atol=1e-10, rtol=0)


def known_pixels(size: tuple[int, int]) -> KnownPixels:
    """Ragged pieces: cells of all levels are known wholly, in part and not at all."""
    random = np.random.default_rng(5)
    values = np.round(random.normal(size=(2, *size)) * 256) / 256
    mask = np.zeros((1, *size))
    mask[0, 13:75, 7:81] = 1
    mask[0, 60:, 130:] = 1
    mask[0, ::9, 100::7] = 1
    return KnownPixels(Known(ArrayField(values), ArrayField(mask)), 0)


@pytest.mark.parametrize("solver", ["dpm++2m", "ancestral"])
def test_known_pixels_are_kept_bit_for_bit_and_previews_stay_exact_means(solver: str) -> None:
    size = (96, 160)
    edit, recipe = known_pixels(size), recipe_of(size, solver=solver)
    image = paint64(passes_of(guidance=1.5), recipe, edit=edit)
    known = np.broadcast_to(edit.known.mask.read(Box(0, 0, 0, *size)).numpy() > 0, image.shape)
    values = edit.known.values.read(Box(0, 0, 0, *size)).numpy()
    np.testing.assert_array_equal(image[known], values[known])
    tiled = paint64(passes_of(guidance=1.5, tile=24), recipe, edit=edit)
    np.testing.assert_allclose(tiled, image, atol=1e-10, rtol=0)
    plain = paint64(passes_of(guidance=1.5), recipe)
    assert np.abs(image - plain)[~known].max() > 1e-3  # it reaches beyond itself
    for level in (2, 5):
        preview = paint64(
            passes_of(guidance=1.5, level=level), recipe_of(size, level, solver), edit=edit
        )
        np.testing.assert_allclose(preview, area_means(image, level), atol=1e-10, rtol=0)


def test_each_pass_starts_from_the_keyed_noise_of_its_octaves() -> None:
    """Bit for bit, wherever a window is asked for; beside what the parents tell."""
    net = fields.denoiser()
    tree = NoiseTree(net.octaves.noise, 2)
    expected = {"T": tree, "A": BandNoise(tree, 5), "B": BandNoise(tree, 2)}
    finest = {"T": 5, "A": 2, "B": 0}
    for each in passes_of():
        noise, level = expected[each.name], each.level
        assert each.noise == noise and level == finest[each.name]
        low, _ = each.log_snrs
        sigma = (1.0 + np.exp(low)) ** -0.5
        shape = (2, 96 >> level, 160 >> level)
        field = ArrayField(np.zeros(shape))
        start(field, each.noise, 7, low, level=level, tile=24)
        window = Box(level, 1, 1, shape[1] - 1, shape[2] - 2)
        assert torch.equal(field.read(window), (noise.box(7, window) * sigma).double())


def test_a_block_reads_its_parents_beside_the_noise_of_its_octaves() -> None:
    """The first u_t is sqrt(abar) of what the parents tell, which holds their means exactly, and
    noise that has none.
    """
    _, a, _ = passes_of()
    above = ArrayField(np.random.default_rng(1).normal(size=(2, 3, 5)))
    low, _ = a.log_snrs
    alpha, sigma = (1.0 + np.exp(-low)) ** -0.5, (1.0 + np.exp(low)) ** -0.5
    field = ArrayField(np.zeros((2, 24, 40)))
    start(field, a.noise, 7, low, level=FINE)
    _, constraint = a.prepare(above)
    assert constraint is not None
    start_from(field, constraint, low, level=FINE, tile=16)
    whole = Box(FINE, 0, 0, 24, 40)
    base = constraint.guess(whole, torch.zeros(2, 24, 40).double()).numpy()
    noise = a.noise.box(7, whole).numpy()
    np.testing.assert_allclose(field.array, alpha * base + sigma * noise, atol=1e-6, rtol=0)
    np.testing.assert_allclose(area_means(base, TOP - FINE), above.array, atol=1e-12, rtol=0)
    assert np.abs(area_means(noise, TOP - FINE)).max() < 1e-6
    # A projection: what has the parents' means stays as it is.
    for values in (base, field.array):
        once = constraint.project(whole, torch.from_numpy(values))
        np.testing.assert_allclose(area_means(once.numpy(), TOP - FINE), above.array, atol=1e-12)
        torch.testing.assert_close(constraint.project(whole, once), once)
    np.testing.assert_allclose(constraint.project(whole, torch.from_numpy(base)).numpy(), base)
    with pytest.raises(ValueError, match="cuts through parents of 8 cells"):
        constraint.project(Box(FINE, 4, 0, 8, 8), torch.zeros(2, 8, 8).double())
    with pytest.raises(ValueError, match="a tile of 20 is not a multiple of a parent, 8 cells"):
        passes_of(tile=20)[1].prepare(above)


def values_of(width: float) -> ValueRange:
    """A range of so many deviations around the mean, in mixed bands."""
    colour = torch.tensor([[1.0, 0.25], [0.25, 0.5]]).double()
    edge = torch.full((6, 2), width).double()
    return ValueRange(colour, torch.tensor([0.5, -0.5]).double(), -edge, edge)


def test_a_range_of_values_keeps_means_and_tiles_and_leaves_alone_what_is_inside() -> None:
    """Previews stay exact means, and estimates that no image contradicts stay as they are."""
    net, given, size = fields.denoiser(), fields.condition(1), (96, 160)

    def painted(values: ValueRange | None, tile: int = 1024, level: int = 0) -> np.ndarray:
        passes = make_passes(
            net, given, guidance=1.5, tile=tile, level=level, steps=3, values=values
        )
        return paint64(passes, recipe_of(size, level))

    free, held = painted(None), painted(values_of(0.5))
    np.testing.assert_allclose(painted(values_of(1e6)), free, atol=1e-8, rtol=0)
    assert np.abs(free - held).max() > 0.1
    np.testing.assert_allclose(painted(values_of(0.5), tile=24), held, atol=1e-10, rtol=0)
    for level in (FINE, TOP):
        preview = painted(values_of(0.5), level=level)
        np.testing.assert_allclose(preview, area_means(held, level), atol=1e-10, rtol=0)
    colour, mean = values_of(0.5).colour, values_of(0.5).mean
    top = np.einsum("ij,jhw->ihw", colour, area_means(held, TOP)) + mean.numpy()[:, None, None]
    assert np.abs(top).max() < 0.5 + 1e-9
