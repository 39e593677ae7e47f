"""Laws of the noise: the published generator, a function of place, its covariance."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cells import Cells
from model.lattice import Box
from model.noise import NoiseTree
from model.philox import philox_4x32
from model.points import Points, full_lattice
from model.spectrum import NoiseSpectrum

WHITE = NoiseSpectrum(top_level=8)
FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, the generator's publication
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected) -> None:  # type: ignore[no-untyped-def]
    words = philox_4x32(
        tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([w]) for w in key)
    )
    assert tuple(int(word) for word in words) == expected


@settings(max_examples=30)
@given(
    st.integers(0, 5),
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.integers(1, 70),
    st.integers(1, 70),
)
def test_a_window_is_the_crop_of_the_whole(
    level: int, y: int, x: int, height: int, width: int
) -> None:
    tree = NoiseTree(WHITE, channels=2)
    window = Box(level, y, x, height, width)
    whole = window.grow(37)
    ys, xs = window.slices_in(whole)
    assert torch.equal(tree.box(7, window), tree.box(7, whole)[:, ys, xs])


def test_a_cells_mean_is_the_mean_of_its_leaves() -> None:
    tree = NoiseTree(WHITE, channels=3)
    leaves = tree.box(1, Box(0, -128, 256, 256, 512)).double()
    for level in range(1, 8):
        means = torch.nn.functional.avg_pool2d(leaves, 2**level)
        cells = tree.box(1, Box(level, -128 >> level, 256 >> level, *means.shape[1:])).double()
        torch.testing.assert_close(means, cells, atol=3e-7, rtol=0)


def test_white_leaves_are_independent_standard_normals() -> None:
    leaves = NoiseTree(WHITE, channels=2).box(3, Box(0, 0, 0, 512, 512)).double().numpy()
    assert scipy.stats.kstest(leaves.ravel(), "norm").pvalue > 0.01
    flat = leaves.reshape(2, -1)
    assert abs(np.corrcoef(flat)[0, 1]) < 4 / np.sqrt(flat.shape[1])
    for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (31, 32)):
        shifted = (leaves[:, dy:, dx:] * leaves[:, : 512 - dy, : 512 - dx]).mean()
        assert abs(shifted) < 4 / np.sqrt(leaves.size)


def test_variances_follow_the_formula() -> None:
    tree = NoiseTree(WHITE, channels=1)
    fine = None
    for level in range(WHITE.top_level + 1):
        side = 2 ** min(WHITE.top_level - level + 3, 9)
        seeds = torch.arange(40 if side < 64 else 1)
        cells = tree.boxes(seeds, Box(level, 0, 0, side, side)).double()
        error = 5 * np.sqrt(2 / cells.numel())
        assert WHITE.mean_variance(level) == 4.0**-level
        assert abs(cells.square().mean() / WHITE.mean_variance(level) - 1) < error
        if level:
            assert fine is not None
            details = fine[:, :, :side, :side] - torch.nn.functional.avg_pool2d(
                fine[:, :, :side, :side], 2
            ).repeat_interleave(2, 2).repeat_interleave(2, 3)
            error = 5 * np.sqrt(2 / (0.75 * details.numel()))
            assert abs(details.square().mean() / WHITE.detail_variance(level - 1) - 1) < error
        fine = cells


def test_fields_of_a_batch_are_those_of_its_seeds() -> None:
    tree = NoiseTree(WHITE, channels=3)
    seeds = torch.tensor([5, 2**40 + 5, 5])
    batch = tree.boxes(seeds, Box(2, 3, 4, 9, 11))
    for seed, field in zip(seeds.tolist(), batch, strict=True):
        assert torch.equal(field, tree.box(seed, Box(2, 3, 4, 9, 11)))
    assert not torch.equal(batch[0], batch[1])
    other = NoiseTree(WHITE, channels=3, stream=1).box(5, Box(2, 3, 4, 9, 11))
    assert not torch.equal(batch[0], other)


def test_noise_is_defined_beyond_2_to_the_31_pixels() -> None:
    tree = NoiseTree(WHITE, channels=1)
    far = Box(0, 2**33, 2**33, 4, 4)
    assert torch.equal(tree.box(0, far), tree.box(0, far.grow(2))[:, 2:-2, 2:-2])


def test_a_box_above_the_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="above the tree's top level"):
        NoiseTree(WHITE, 1).box(0, Box(9, 0, 0, 1, 1))


@settings(max_examples=40)
@given(
    st.integers(0, 8),
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.integers(1, 40),
)
def test_sparse_cells_are_those_of_the_box(level: int, y: int, x: int, count: int) -> None:
    tree, seeds = NoiseTree(WHITE, channels=2), torch.tensor([7, 2**40 + 3])
    box = Box(level, y, x, 23, 19)
    generator = torch.Generator().manual_seed(count)
    image, rows, columns = (
        torch.randint(most, (count,), generator=generator) for most in (2, 23, 19)
    )
    found = tree.cells(seeds, level, Cells(image, rows + y, columns + x)).float()
    assert torch.equal(found, tree.boxes(seeds, box)[image, :, rows, columns])


def test_points_of_mixed_levels_are_the_exact_means_of_their_fields() -> None:
    tree, seeds = NoiseTree(WHITE, channels=3), torch.tensor([1, 2])
    sizes, generator = ((300, 500), (64, 1000)), torch.Generator().manual_seed(0)
    parts = [full_lattice(*size, level=level) for size in sizes for level in (0, 2, 5, 6, 8)]
    image = torch.cat([p.image + i // 5 for i, p in enumerate(parts)])
    level, y, x = (torch.cat([getattr(p, n) for p in parts]) for n in ("level", "y", "x"))
    points = Points(image, level, y, x, torch.tensor(sizes))
    order = torch.randperm(len(points), generator=generator)[:3000]
    found = tree.at(seeds, points.take(order))
    for i, size in enumerate(sizes):
        for depth in (0, 2, 5, 6, 8):
            h, w = (-(-extent >> depth) for extent in size)
            whole = tree.box(int(seeds[i]), Box(depth, 0, 0, h, w))
            mine = (image[order] == i) & (level[order] == depth)
            assert torch.equal(found[mine], whole[:, y[order][mine], x[order][mine]].T)


def test_sparse_points_far_out_and_mistakes() -> None:
    tree, far = NoiseTree(WHITE, 1), 2**33
    sizes = torch.tensor([[far + 4, far + 4]])
    zero, last = torch.zeros(2, dtype=torch.int64), torch.tensor([0, far + 3])
    points = Points(zero, zero, last, last, sizes)
    found = tree.at(torch.tensor([0]), points)
    assert torch.equal(found[1], tree.box(0, Box(0, far + 3, far + 3, 1, 1))[:, 0, 0])
    with pytest.raises(ValueError, match="2 seeds do not fit points of 1 images"):
        tree.at(torch.tensor([0, 1]), points)
    above = Points(zero, zero + 9, zero, zero, sizes)
    with pytest.raises(ValueError, match="above the tree's top level"):
        tree.at(torch.tensor([0]), above)
    assert tree.at(torch.tensor([0]), points.take(torch.tensor([], dtype=torch.int64))).shape == (
        0,
        1,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_has_the_same_integers_and_normals() -> None:
    words = tuple(torch.randint(2**32, (4, 10_000), generator=torch.Generator().manual_seed(0)))
    key = (words[0].flip(0), words[1].flip(0))
    there = philox_4x32(tuple(w.cuda() for w in words), (key[0].cuda(), key[1].cuda()))
    for word, other in zip(philox_4x32(words, key), there, strict=True):
        assert torch.equal(word, other.cpu())
    tree, seeds, box = NoiseTree(WHITE, 3), torch.tensor([5, 6]), Box(0, -7, 90, 300, 200)
    here, there_ = tree.boxes(seeds, box), tree.boxes(seeds.cuda(), box).cpu()
    torch.testing.assert_close(here, there_, atol=1e-6, rtol=0)
    points = full_lattice(100, 70, batch=2)
    far = tree.at(seeds.cuda(), points.to(torch.device("cuda"))).cpu()
    torch.testing.assert_close(tree.at(seeds, points), far, atol=1e-6, rtol=0)
