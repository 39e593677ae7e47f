"""Laws of the step from one level to the next."""

import torch

from model.haar import detail, parent_means, repeat, slope_detail


def test_details_and_means_rebuild_the_level() -> None:
    values = torch.randn(2, 8, 12, 3, dtype=torch.float64)
    torch.testing.assert_close(repeat(parent_means(values)) + detail(values), values)
    assert parent_means(detail(values)).abs().max() < 1e-14


def test_slopes_are_exact_on_linear_images() -> None:
    y, x = torch.meshgrid(
        torch.arange(24, dtype=torch.float64), torch.arange(32, dtype=torch.float64), indexing="ij"
    )
    image = torch.stack([3 * y - x, 0.5 * x + 2 * y + 1], dim=-1)[None]
    parents = parent_means(image)
    slopes = slope_detail(parents, torch.ones_like(parents[..., :1]))
    torch.testing.assert_close(slopes, detail(image)[:, 2:-2, 2:-2])


def test_slopes_ignore_what_is_absent() -> None:
    parents = torch.randn(1, 6, 6, 1, dtype=torch.float64)
    present = torch.ones(1, 6, 6, 1, dtype=torch.float64)
    present[:, 2, 3] = 0
    changed = parents.clone()
    changed[:, 2, 3] = 1e6
    assert torch.equal(slope_detail(parents, present), slope_detail(changed, present))
    assert slope_detail(parents, torch.zeros_like(present)).abs().max() == 0
