"""The lattice's linear estimate: the best one for a field whose octaves are known."""

import math

import pytest
import torch
from fields import OCTAVES
from torch import Tensor

from model.wiener import cosine_basis, mode_offsets, wiener

SIZES = [(8, 8), (12, 20), (1, 16), (37, 5)]


def modes_of(values: Tensor) -> Tensor:
    rows, columns = (cosine_basis(n, values) for n in values.shape[1:3])
    return torch.einsum("ki,bijc,lj->bklc", rows, values, columns)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_modes_are_an_orthonormal_basis_whose_first_is_the_mean(size: tuple[int, int]) -> None:
    values = normal(2, *size, 3)
    modes = modes_of(values)
    torch.testing.assert_close(modes.square().sum(), values.square().sum())
    mean = values.mean(dim=(1, 2)) * math.sqrt(size[0] * size[1])
    torch.testing.assert_close(modes[:, 0, 0], mean)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("log_snr", [-3.0, 1.0])
def test_no_other_gain_of_a_mode_has_a_smaller_error(
    size: tuple[int, int], log_snr: float
) -> None:
    """The oracle: modes drawn with the signal-to-noise ratio that the filter was told of."""
    draws = 4_000
    signal = (mode_offsets(OCTAVES, OCTAVES.coarse_level, *size) / 2).exp()[
        None, :, :, None
    ] * normal(draws, *size, 1)
    noise = math.exp(-log_snr / 2) * normal(draws + 1, *size, 1)[1:]
    rows, columns = (cosine_basis(n, signal) for n in size)
    y = torch.einsum("ki,bklc,lj->bijc", rows, signal + noise, columns)
    estimate = modes_of(
        wiener(
            OCTAVES, OCTAVES.coarse_level, y, torch.full((draws,), log_snr, dtype=torch.float64)
        )
    )
    gain = (signal * (signal + noise)).mean(0) / (signal + noise).square().mean(0)
    best = gain * (signal + noise)
    torch.testing.assert_close(estimate, best, atol=0.0, rtol=0.15)
    errors = (estimate - signal).square().mean(0), (best - signal).square().mean(0)
    torch.testing.assert_close(errors[0], errors[1], atol=0.0, rtol=0.02)


def test_a_clean_lattice_is_returned_and_a_drowned_one_is_forgotten() -> None:
    y = normal(1, 12, 20, 3)
    clean, drowned = (torch.tensor([v], dtype=torch.float64) for v in (60.0, -60.0))
    torch.testing.assert_close(wiener(OCTAVES, OCTAVES.coarse_level, y, clean), y)
    assert wiener(OCTAVES, OCTAVES.coarse_level, y, drowned).abs().max() < 1e-9


def test_octaves_lie_where_their_cells_are() -> None:
    """A checkerboard of the lattice's cells belongs to its finest octave, the mean to the last."""
    levels = range(OCTAVES.coarse_level, OCTAVES.noise.top_level + 1)
    expected = [OCTAVES.offset(level) for level in levels]
    offsets = mode_offsets(OCTAVES, OCTAVES.coarse_level, 1 << 10, 1 << 10)
    for j, value in enumerate(expected):
        middle = round((1 << 10) * 2.0 ** -(j + 0.5))
        assert float(offsets[middle, 0]) == pytest.approx(value, abs=0.02)
        assert float(offsets[0, middle]) == pytest.approx(value, abs=0.02)
    assert float(offsets[0, 0]) == pytest.approx(expected[-1])
