"""Laws of conditions: where tokens are read, and that a dropped condition says nothing."""

import dataclasses

import torch
from fields import condition, denoiser

from model.attention import look_up


def test_look_up_is_exact_on_linear_lattices_and_not_transposed() -> None:
    """Tokens that grow along y and x are read as y and x, in pixels, from any first place."""
    gy, gx, pitch, first = 4, 7, 32.0, torch.tensor([[20.0, 5.0]], dtype=torch.float64)
    y = first[0, 0] + pitch * torch.arange(gy, dtype=torch.float64)
    x = first[0, 1] + pitch * torch.arange(gx, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]
    rows = torch.tensor([[20.0, 33.3, 77.0, 116.0]], dtype=torch.float64)
    columns = torch.tensor([[5.0, 6.5, 100.0, 197.0, 151.25]], dtype=torch.float64)
    pitches = torch.tensor([pitch], dtype=torch.float64)
    found = look_up(lattice, first, pitches, rows, columns)[0]
    torch.testing.assert_close(found[..., 0], rows[0][:, None].expand(4, 5))
    torch.testing.assert_close(found[..., 1], columns[0][None].expand(4, 5))


def test_look_up_is_constant_beyond_the_rim_and_with_one_token() -> None:
    lattice = torch.arange(6.0, dtype=torch.float64).reshape(1, 1, 2, 3)
    first, pitch = torch.zeros(1, 2).double(), torch.tensor([10.0]).double()
    far = torch.tensor([[-50.0, 90.0]], dtype=torch.float64)
    assert look_up(lattice, first, pitch, far, far)[0, ..., 0].tolist() == [[0, 2], [3, 5]]
    one = look_up(lattice[:, :, :1, :1], first, pitch, far, far)
    assert one.unique().tolist() == [0.0]


def test_a_dropped_condition_keeps_places_and_forgets_content() -> None:
    net = denoiser()
    given = condition(2)
    other = dataclasses.replace(given, values=given.values + 3.0)
    dropped, dropped_other = net.encode(given.dropped()), net.encode(other.dropped())
    assert torch.equal(dropped.attended, dropped_other.attended)
    assert torch.equal(dropped.lattice, dropped_other.lattice)
    assert not torch.allclose(net.encode(given).attended, net.encode(other).attended)
    assert not torch.allclose(dropped.attended[0, 0], dropped.attended[0, 1])


def test_the_order_of_attended_tokens_does_not_matter() -> None:
    """Beyond the finest lattice, whose order is its geometry, tokens are a set."""
    net = denoiser()
    given = condition(1)
    extra = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    places = torch.rand(1, 4, 2, dtype=torch.float64) * 64

    def estimate(order: list[int]) -> torch.Tensor:
        wide = dataclasses.replace(
            given,
            values=torch.cat([given.values, extra[:, order]], 1),
            centres_px=torch.cat([given.centres_px, places[:, order]], 1),
            footprints_px=torch.cat([given.footprints_px, torch.full((1, 4), 64.0).double()], 1),
        )
        means = torch.linspace(-1, 1, 8 * 12 * 2, dtype=torch.float64).reshape(1, 8, 12, 2)
        ones, log_snr = torch.ones(1, 8, 12, 1).double(), torch.zeros(1).double()
        return net.lattice(means, ones, log_snr, net.encode(wide)).layer.estimate

    torch.testing.assert_close(estimate([0, 1, 2, 3]), estimate([2, 0, 3, 1]))
    assert not torch.allclose(estimate([0, 1, 2, 3]), estimate([0, 0, 0, 0]))
