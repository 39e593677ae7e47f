"""Targets and weights: reparametrising changes nothing but the target."""

import itertools

import pytest
import torch

from model.process import preconditioning_factors
from model.schedule import Cosine, UniformLogSNR, make_schedule
from model.targets import (
    TARGETS,
    WEIGHTS,
    MinSNR,
    Preconditioned,
    Target,
    Variational,
    Weight,
    make_target,
    make_weight,
)

LOG_SNR = torch.tensor([-12.0, -5.0, -1.0, 0.0, 2.0, 7.0], dtype=torch.float64)
SHAPE = (6, 5, 4, 2)
ALL = [make_target(name, 0.3, 0.02) for name in TARGETS]


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def observe(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return clean + torch.exp(-LOG_SNR / 2)[:, None, None, None] * noise


@pytest.mark.parametrize("target", ALL)
def test_the_right_output_is_the_clean_image(target: Target) -> None:
    clean, noise = normal(0), normal(1)
    output = target.of(clean, noise, LOG_SNR)
    found = target.to_estimate(output, observe(clean, noise), LOG_SNR)
    torch.testing.assert_close(found, clean, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(ALL, 2)))
def test_an_estimate_is_the_same_under_every_target_and_losses_differ_by_known_factors(
    one: Target, other: Target
) -> None:
    """A wrong estimate, as outputs of both: what (u_0, n) would make it right says the output."""
    clean, noise = normal(0), normal(1)
    observed, estimate = observe(clean, noise), clean + 0.3 * normal(2)
    implied = (observed - estimate) * torch.exp(LOG_SNR / 2)[:, None, None, None]
    errors = []
    for target in (one, other):
        output = target.of(estimate, implied, LOG_SNR)
        found = target.to_estimate(output, observed, LOG_SNR)
        torch.testing.assert_close(found, estimate, atol=1e-9, rtol=1e-7)
        wrong = output - target.of(clean, noise, LOG_SNR)
        errors.append(wrong.square().mean(dim=(1, 2, 3)) / target.loss_gain(LOG_SNR))
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-6, atol=0)
    plain = (estimate - clean).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(errors[0], plain, rtol=1e-6, atol=0)


def test_gains_are_those_of_the_literature() -> None:
    snr = torch.exp(LOG_SNR)
    epsilon, velocity, clean, _ = (target.loss_gain(LOG_SNR) for target in ALL)
    torch.testing.assert_close(epsilon, snr)
    torch.testing.assert_close(velocity, snr + 1)
    torch.testing.assert_close(clean, torch.ones_like(snr))
    # With unit variances preconditioning is v up to its sign (Salimans and Ho, 2022).
    unit = Preconditioned(1.0)
    torch.testing.assert_close(unit.loss_gain(LOG_SNR), snr + 1)
    u, n = normal(0), normal(1)
    torch.testing.assert_close(unit.of(u, n, LOG_SNR), -make_target("v").of(u, n, LOG_SNR))


def test_a_preconditioned_network_sees_and_gives_unit_variance() -> None:
    clean, noise = 0.3**0.5 * normal(0, (6, 40_000)), 0.02**0.5 * normal(1, (6, 40_000))
    target = Preconditioned(0.3, 0.02)
    observed = clean + torch.exp(-LOG_SNR / 2)[:, None] * noise
    seen = target.input_scale(LOG_SNR)[:, None] * observed
    output = target.of(clean, noise, LOG_SNR)
    for values in (seen, output):
        assert (values.var(dim=1) - 1).abs().max() < 0.05
    assert (seen * output).mean(dim=1).abs().max() < 0.03  # what is linear is already known


def test_the_others_see_u_t() -> None:
    for target in ALL[:3]:
        torch.testing.assert_close(target.input_scale(LOG_SNR), torch.sigmoid(LOG_SNR).sqrt())


def test_points_of_several_levels_have_variances_of_their_own() -> None:
    signal = torch.linspace(0.1, 2.0, 6, dtype=torch.float64)
    noise = torch.linspace(1.0, 0.01, 6, dtype=torch.float64)
    together = Preconditioned(signal, noise)
    clean, drawn = normal(0, (6, 3)), normal(1, (6, 3))
    output = together.of(clean, drawn, LOG_SNR)
    for i in range(6):
        alone = Preconditioned(float(signal[i]), float(noise[i]))
        one = alone.of(clean[i : i + 1], drawn[i : i + 1], LOG_SNR[i : i + 1])
        torch.testing.assert_close(output[i : i + 1], one)
    _, _, _, own = preconditioning_factors(signal, noise, LOG_SNR)
    torch.testing.assert_close(own, LOG_SNR + torch.log(signal / noise))


@pytest.mark.parametrize("weight", [MinSNR(), MinSNR(1.0), Variational(make_schedule("cosine"))])
def test_weights_weigh_the_error_of_the_estimate_alike_under_every_target(weight: Weight) -> None:
    weighed = [weight(target, LOG_SNR) * target.loss_gain(LOG_SNR) for target in ALL]
    for other in weighed[1:]:
        torch.testing.assert_close(other, weighed[0])


def test_min_snr_is_the_published_weight() -> None:
    snr = torch.exp(LOG_SNR)
    cut = snr.clamp(max=5.0)
    epsilon, velocity, clean, _ = ALL
    torch.testing.assert_close(MinSNR()(epsilon, LOG_SNR), cut / snr)
    torch.testing.assert_close(MinSNR()(velocity, LOG_SNR), cut / (snr + 1))
    torch.testing.assert_close(MinSNR()(clean, LOG_SNR), cut)
    torch.testing.assert_close(make_weight("simple")(velocity, LOG_SNR), torch.ones(6).double())


def test_the_variational_weight_has_its_known_values() -> None:
    schedule = make_schedule("cosine")
    weight = Variational(schedule)
    table = weight.table()
    assert table[0] == float("inf")
    assert table[499] == pytest.approx(0.003, abs=5e-4)
    assert table[999] == pytest.approx(499, abs=1)
    time = torch.tensor([1, 2, 250, 500, 998, 999], dtype=torch.float64)
    found = weight(make_target("epsilon"), schedule.log_snr(time / 1000))
    expected = torch.from_numpy(table[time.long() - 1]).clamp(max=1.0)
    torch.testing.assert_close(found, expected)
    assert (table > 1.0).nonzero()[0].tolist() == [0, 998, 999]
    between = weight(make_target("epsilon"), schedule.log_snr(torch.tensor([0.4996]).double()))
    assert float(between[0]) == pytest.approx(table[499])


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="'eps' does not exist; choose epsilon, v, x0"):
        make_target("eps")
    with pytest.raises(ValueError, match="needs the signal's variance"):
        make_target("preconditioned")
    with pytest.raises(ValueError, match="'none' does not exist; choose simple, min-snr"):
        make_weight("none")
    with pytest.raises(ValueError, match="needs the schedule"):
        make_weight("variational")
    assert all(isinstance(make_weight(name, Cosine()), Weight) for name in WEIGHTS)
    assert all(isinstance(target, Target) for target in ALL)
    weight = Variational(UniformLogSNR(-10.0, 10.0), steps=100)
    assert (weight(make_target("v"), LOG_SNR) > 0).all()
