"""Laws of resampling: nearest points found are those of brute force, sums know no partition, and a
lattice is read back in place, neither transposed nor stretched.
"""

import pytest
import torch
from sparse_points import SIZES_PX, alone, normal, points_of, shuffled

from model.nearest import nearest
from model.points import Points, full_lattice
from model.resample import (
    Splat,
    bilinear,
    cells_of,
    interpolate,
    lattice_present,
    lattice_shape,
    nearest_points,
    quadrature_weights,
)

LEVEL = 3


def cluster(height: int, width: int, corner: tuple[int, int], side: int) -> Points:
    """A dense window in an otherwise empty image."""
    window = full_lattice(side, side)
    sizes = torch.tensor([[height, width]])
    return Points(window.image, window.level, window.y + corner[0], window.x + corner[1], sizes)


@pytest.mark.parametrize(
    "points",
    [
        points_of((200, 90, 400)),
        points_of((300, 30, 500), levels=5, seed=1),
        points_of((5, 3, 4), seed=2),
        cluster(150, 260, (130, 4), 16),
        full_lattice(40, 56, batch=2),
        full_lattice(64, 48, level=3),
    ],
    ids=["uniform", "levels", "few", "cluster", "dense", "coarse"],
)
@pytest.mark.parametrize("level", [2, 4])
def test_nearest_points_are_those_of_all_pairs(points: Points, level: int) -> None:
    """The same points with the same distances; ties by Morton order of the points' places."""
    order = shuffled(len(points))
    points = points.take(order)
    image, y, x = lattice_present(points, level).nonzero().unbind(dim=1)
    index, squared = nearest(points, image, torch.stack([y, x], dim=1), level, 3)
    centres = (2 * points.centres_px()).long()
    queries = (2 * torch.stack([y, x], dim=1) + 1) << level
    distances = (queries[:, None] - centres).square().sum(dim=-1)
    distances = torch.where(image[:, None] == points.image, distances, 2**62)
    bits = torch.arange(20)
    y_bits, x_bits = ((centres[:, i, None] >> bits) & 1 for i in (0, 1))
    morton = ((y_bits << (2 * bits + 1)) + (x_bits << (2 * bits))).sum(dim=1)
    by_place = morton.argsort(stable=True)
    expected = by_place[distances[:, by_place].argsort(dim=1, stable=True)[:, :3]]
    assert torch.equal(squared, distances.gather(1, expected))
    assert torch.equal(index, expected)


def test_fewer_points_than_neighbours_are_all_that_there_is() -> None:
    """Two points: both with weights of inverse squared distance. None: zero. A point at the
    centre takes all.
    """
    sizes = torch.tensor([[16, 16], [16, 16], [16, 16]])
    image, level = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 0, 3, 0])
    points = Points(image, level, torch.tensor([1, 4, 1, 3]), torch.tensor([1, 9, 0, 3]), sizes)
    features = torch.tensor([[1.0], [2.0], [5.0], [7.0]], dtype=torch.float64)
    lattice = nearest_points(points, 3).gather(features)[..., 0]
    centre = torch.tensor([4.0, 4.0])
    near, far = (1 / (points.centres_px()[i] - centre).square().sum() for i in (0, 1))
    torch.testing.assert_close(lattice[0, 0, 0], (near + 2 * far) / (near + far))
    assert torch.equal(lattice[1], torch.zeros(2, 2).double())
    assert lattice[2, 1, 0] == 5.0
    assert 5.0 < lattice[2, 0, 0] < 7.0


def test_nearest_points_know_neither_order_nor_other_images() -> None:
    points = points_of((60, 2, 300), levels=2)
    features = normal(len(points), 3)
    whole = nearest_points(points, LEVEL).gather(features)
    order = shuffled(len(points))
    again = nearest_points(points.take(order), LEVEL).gather(features[order])
    torch.testing.assert_close(again, whole, atol=1e-12, rtol=0)
    for number, (height, width) in enumerate(SIZES_PX):
        one = alone(points, number)
        found = nearest_points(one, LEVEL).gather(features[points.image == number])[0]
        h, w = -(-height >> LEVEL), -(-width >> LEVEL)
        torch.testing.assert_close(whole[number, :h, :w], found, atol=1e-12, rtol=0)
        assert not whole[number, h:].any() and not whole[number, :, w:].any()


def test_sixty_five_thousand_points_of_a_huge_image_are_searched_in_little_memory() -> None:
    """Beyond 2^31 pixels: a random cell of the lattice against all points."""
    side = 2**20
    generator = torch.Generator().manual_seed(3)
    y, x = torch.randint(side, (2, 65_536), generator=generator)
    zero = torch.zeros(65_536, dtype=torch.int64)
    points = Points(zero, zero, y, x, torch.tensor([[side, side]]))
    cells = torch.randint(side >> 13, (50, 2), generator=generator)
    index, _ = nearest(points, zero[:50], cells, 13, 3)
    centres = (cells.double() + 0.5) * 2.0**13
    distances = (centres[:, None] - points.centres_px()).square().sum(dim=-1)
    assert torch.equal(index, distances.topk(3, largest=False).indices)


def test_splats_of_the_parts_of_any_partition_add_up() -> None:
    points, features = points_of((200, 90, 400), levels=2), normal(690, 4)
    whole = Splat.accumulate(points, features, LEVEL)
    order = shuffled(len(points))
    parts = [
        Splat.accumulate(points.take(part), features[part], LEVEL)
        for part in order.split([1, 300, 389])
    ]
    torch.testing.assert_close(sum_of(parts).apply(), whole.apply(), atol=1e-12, rtol=0)
    cells, applied = cells_of(points, LEVEL), whole.apply().flatten(0, 2)
    mine = cells == cells[17]
    torch.testing.assert_close(applied[cells[17], :-1], features[mine].mean(dim=0))
    assert applied[cells[17], -1] == torch.log2(1 + mine.sum().double())
    empty = whole.count.flatten() == 0
    assert empty.any() and not applied[empty].any()


def sum_of(parts: list[Splat]) -> Splat:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def test_a_full_lattice_splats_to_area_means_and_weighs_every_point_alike() -> None:
    height, width = 40, 56
    points, values = full_lattice(height, width), normal(height * width, 2)
    means = values.view(5, 8, 7, 8, 2).mean(dim=(1, 3))
    splat = Splat.accumulate(points, values, 3).apply()[0]
    torch.testing.assert_close(splat[..., :2], means)
    weights = quadrature_weights(points, 3)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(points)))


def test_quadrature_weights_undo_an_uneven_draw() -> None:
    """One cell drawn densely, the others by one point: every occupied cell weighs the same."""
    points = points_of((300, 5, 40))
    weights, cells = quadrature_weights(points, 4), cells_of(points, 4)
    sums = torch.zeros(3).double().index_add(0, points.image, weights)
    torch.testing.assert_close(sums, torch.ones(3).double())
    for number in range(3):
        mine = points.image == number
        occupied = cells[mine].unique()
        share = torch.stack([weights[cells == cell].sum() for cell in occupied])
        torch.testing.assert_close(share, torch.full_like(share, 1 / len(occupied)))


@pytest.mark.parametrize("sizes", [((72, 40), (37, 90)), ((33, 65),), ((5, 9),)])
def test_a_lattice_that_grows_along_one_axis_is_read_as_that_axis(
    sizes: tuple[tuple[int, int], ...],
) -> None:
    """Linear functions are read exactly between the outermost centres, constant beyond; also where
    the lattice does not divide the image. A transposed or stretched lookup fails on either ramp.
    """
    points = points_of((40,) * len(sizes), sizes)
    hl, wl = lattice_shape(points, LEVEL)
    y = ((torch.arange(hl).double() + 0.5) * 2**LEVEL)[:, None].expand(hl, wl)
    x = ((torch.arange(wl).double() + 0.5) * 2**LEVEL).expand(hl, wl)
    centres = points.centres_px()
    last = ((points.sizes_px - 1 >> LEVEL)[points.image] + 0.5) * 2**LEVEL
    inner = torch.minimum(centres.clamp_min(2 ** (LEVEL - 1)), last)
    for axis, ramp in enumerate((y, x)):
        found = interpolate(ramp.expand(len(sizes), hl, wl)[..., None], points, LEVEL)
        torch.testing.assert_close(found[:, 0], inner[:, axis], atol=1e-12, rtol=0)


def test_a_lattice_read_at_its_own_cells_is_itself() -> None:
    lattice = normal(2, 5, 9, 3)
    found = interpolate(lattice, full_lattice(5 << 3, 9 << 3, batch=2, level=3), 3)
    torch.testing.assert_close(found.view(2, 5, 9, 3), lattice, atol=1e-14, rtol=0)
    one = bilinear(lattice[:, :1, :1], torch.tensor([1]), torch.tensor([[7.0, -3.0]]).double())
    assert torch.equal(one[0], lattice[1, 0, 0])


def test_gradients_reach_points_and_lattices() -> None:
    points = points_of((9, 2, 6), ((12, 9), (8, 8), (10, 16)))
    features = normal(17, 2).requires_grad_()
    lattice = normal(3, *lattice_shape(points, 2), 2).requires_grad_()
    near = nearest_points(points, 2)
    assert torch.autograd.gradcheck(near.gather, features)
    assert torch.autograd.gradcheck(lambda f: Splat.accumulate(points, f, 2).apply(), features)
    assert torch.autograd.gradcheck(lambda v: interpolate(v, points, 2), lattice)


def test_what_does_not_fit_a_lattice_gets_a_sentence() -> None:
    points = points_of((30, 20, 10), levels=3)
    with pytest.raises(ValueError, match="coarser than the lattice"):
        Splat.accumulate(points, normal(60, 1), 1)
    with pytest.raises(ValueError, match="need a lattice of 3 x"):
        interpolate(normal(3, 4, 4, 1), points, 3)
