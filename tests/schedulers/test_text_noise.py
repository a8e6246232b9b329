"""Noise schedules and random times of block diffusion, against recorded ones."""

import pytest
import torch
from block_text_cases import CASES, named, recorded

from imgdit.schedulers.text_noise import MOST_SIGMA, block_times, loglinear_masking, loglinear_sigma, masking

TABLE = CASES["noise"]["table"]


@pytest.mark.parametrize("noise", TABLE)
def test_noise_is_as_recorded(noise):
    times = torch.tensor(CASES["noise"]["t"])
    found = masking(times, noise)
    torch.testing.assert_close(-found.weight, torch.tensor(TABLE[noise]["loss_scale"]), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.rate, torch.tensor(TABLE[noise]["move_chance"]), rtol=1e-4, atol=0)


def test_the_loglinear_noise_level_is_as_recorded():
    times, table = torch.tensor(CASES["noise"]["t"]), TABLE["loglinear"]
    sigma = loglinear_sigma(times)
    torch.testing.assert_close(sigma, torch.tensor(table["total_noise"]), rtol=1e-4, atol=0)
    assert pytest.approx(table["sigma_max"], rel=1e-5) == MOST_SIGMA
    derivative = loglinear_masking(times).weight * torch.expm1(sigma)
    torch.testing.assert_close(derivative, torch.tensor(table["rate_noise"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", named("sample_t"))
def test_times_are_as_recorded(name):
    case, found = CASES[name], recorded(name)
    times = block_times(
        case["batch"], case["length"], case["block_size"], low=case["eps_min"], high=case["eps_max"],
        antithetic=case["antithetic"], uniforms=found["uniform"],
    )  # fmt: skip
    torch.testing.assert_close(times, found["t"], rtol=0, atol=1e-6)


def test_antithetic_times_fill_the_range_evenly():
    times = block_times(2, 20, 2, low=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(times[:, ::2], times[:, 1::2])
    assert torch.equal((times[:, ::2].flatten().sort().values * 20).long(), torch.arange(20))


def test_unknown_noise_and_bounds_are_refused():
    with pytest.raises(ValueError, match="loglinear"):
        masking(torch.ones(1), "linear")
    with pytest.raises(ValueError, match="low <= high"):
        block_times(1, 4, 2, low=0.8, high=0.3)
