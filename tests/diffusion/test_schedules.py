from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.noise_levels import DiscreteLevels, LevelRange
from ditlab.diffusion.schedules import (
    VPSchedule,
    cosine_levels,
    make_schedule,
    noise_levels,
    respace,
    vp_sigma,
    vp_sigma_inverse,
)
from ditlab.errors import DitlabError


class Silent(torch.nn.Module):
    in_shape = (1, 2, 2)

    def forward(self, x, t, label=None):
        return torch.zeros(len(x), 2, 2, 2)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(
    "table",
    [
        "betas",
        "alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ],
)
def test_tables_equal_the_published_ones(golden, name, table):
    expected = golden("02_schedules")[f"{name}1000.{table}"].numpy()
    np.testing.assert_allclose(getattr(make_schedule(name, 1000), table), expected, rtol=1e-10)


def test_respacing_keeps_the_published_steps(golden):
    values = golden("02_schedules").about["values"]
    for steps, expected in ((1000, values["space_timesteps"]), (300, values["space_timesteps_300"])):
        for spec, respaced in expected.items():
            assert respace(steps, spec) == respaced, spec
    assert respace(1000, [10, 15, 20]) == values["space_timesteps"]["10,15,20"]
    assert respace(1000, 250) == values["space_timesteps"]["250"]
    for spec, (outcome, detail) in values["odd_specs"].items():
        if outcome == "ok":
            assert len(respace(1000, spec)) == detail
        else:
            with pytest.raises(DitlabError, match="at most 500 steps in section 0, found 600"):
                respace(1000, spec)


@pytest.mark.parametrize("spec", ["", "ten", "ddim", "0", "-5", "1001", "ddim999", "10,,3", []])
def test_a_respacing_that_cannot_be_read_is_refused(spec):
    with pytest.raises(DitlabError, match="respacing"):
        respace(1000, spec)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("spec", ["ddim50", "10,15,20", "10", "ddim10", "ddim25", "27", "1"])
def test_respaced_betas_equal_the_published_ones(golden, name, spec):
    short = make_schedule(name, 1000).respaced(spec)
    np.testing.assert_allclose(short.betas, golden("02_schedules")[f"respaced.{spec}.{name}.betas"].numpy(), rtol=1e-10)
    np.testing.assert_allclose(short.sigmas, make_schedule(name, 1000).sigmas[short.timesteps], rtol=1e-9)
    assert np.isfinite(short.posterior_log_variance_clipped).all()


@pytest.mark.parametrize("steps", [1000, 4000])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_network_is_told_the_steps_of_the_full_process(golden, steps, rescale):
    full = make_schedule("cosine", steps)
    denoiser = VPDenoiser(Silent(), full, rescale_time=rescale)
    expected = golden("02_schedules")[f"model_t.steps{steps}.10.rescale_{rescale}"]
    sigmas = full.respaced("10").sigmas
    assert [denoiser.time(float(sigma)) for sigma in sigmas] == pytest.approx(expected.tolist(), rel=1e-6)
    in_float32 = denoiser.time(torch.from_numpy(sigmas).float())
    assert isinstance(in_float32, torch.Tensor)
    assert torch.equal(in_float32.float(), expected.float())


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_comes_back_from_its_levels(name):
    full = make_schedule(name, 1000)
    np.testing.assert_allclose(VPSchedule.from_sigmas(full.sigmas).betas, full.betas, rtol=1e-9)


@pytest.mark.parametrize("steps", [18, 40])
@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
def test_discretizations_equal_the_published_ones(golden, name, steps):
    np.testing.assert_allclose(
        noise_levels(name, steps), golden("05_edm_samplers")[f"t_steps.{name}.{steps}"].numpy(), rtol=1e-9
    )


def test_continuous_levels_equal_the_published_ones(golden):
    fixture = golden("05_edm_samplers")
    time = fixture["vp.t"].numpy()
    np.testing.assert_allclose(vp_sigma(time), fixture["vp.sigma(t)"].numpy(), rtol=1e-9)
    np.testing.assert_allclose(
        vp_sigma_inverse(fixture["vp.sigma(t)"].numpy()), fixture["vp.sigma_inv(sigma(t))"].numpy(), rtol=1e-9
    )
    # The recorded ones were summed in float32, which costs most at the lowest levels.
    np.testing.assert_allclose(cosine_levels(), fixture["iddpm.u"].numpy(), rtol=1e-4)
    np.testing.assert_allclose(noise_levels("edm", 18), fixture["kdiff.karras"].numpy()[:-1], rtol=1e-5)


def test_a_single_level_and_a_single_step_work():
    assert noise_levels("edm", 1).tolist() == pytest.approx([80])
    short = make_schedule("linear", 1000).respaced("1")
    assert DiscreteLevels(short.sigmas, short.timesteps).step(float(short.sigmas[0])) == 0
    assert DiscreteLevels(short.sigmas).step(torch.from_numpy(short.sigmas)).tolist() == [0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_schedule("lienar", 1000),  # pyright: ignore
        lambda: make_schedule("linear", 20),
        lambda: make_schedule("cosine", 0),
        lambda: VPSchedule(np.array([0.1, 1.5])),
        lambda: VPSchedule(np.array([])),
        lambda: VPSchedule(np.array([0.1]), np.array([1, 2])),
        lambda: noise_levels("edn", 18),  # pyright: ignore
        lambda: noise_levels("edm", 0),
        lambda: noise_levels("edm", 18, 3.0, 2.0),
        lambda: noise_levels("iddpm", 18, 1.0, 1.0001),
        lambda: DiscreteLevels(np.array([2.0, 1.0])),
        lambda: LevelRange(3.0, 2.0),
        lambda: LevelRange(0.0, 80.0).grid("ddim50"),
    ],
)
def test_what_makes_no_schedule_is_refused(make):
    with pytest.raises(DitlabError):
        make()


@settings(max_examples=60, deadline=None)
@given(
    steps=st.sampled_from([30, 1000, 4000]),
    name=st.sampled_from(["linear", "cosine"]),
    position=st.floats(0, 1),
)
def test_step_numbers_are_exact_on_the_grid_and_monotone_between(steps, name, position):
    levels = DiscreteLevels(make_schedule(name, steps).sigmas)
    index = min(int(position * steps), steps - 1)
    sigma = float(levels.sigmas[index])
    assert levels.step(sigma) == index
    assert levels.step(torch.tensor([sigma], dtype=torch.float32)).item() == index
    if index + 1 < steps:
        middle = float(np.sqrt(levels.sigmas[index] * levels.sigmas[index + 1]))
        assert levels.step(middle) == pytest.approx(index + 0.5, abs=1e-6)
        assert levels.step(torch.tensor([middle], dtype=torch.float64)).item() == pytest.approx(index + 0.5, abs=1e-6)
        nearer = float(levels.sigmas[index] ** 0.7 * levels.sigmas[index + 1] ** 0.3)
        assert levels.step(nearer, "round") == index


def test_grids_of_levels():
    levels = DiscreteLevels(make_schedule("linear", 1000).sigmas)
    np.testing.assert_array_equal(levels.grid("ddim50"), levels.sigmas[::20])
    assert (levels.min, levels.max, len(levels)) == (levels.sigmas[0], levels.sigmas[-1], 1000)
    grid = LevelRange(0.01, 30.0).grid("12")
    assert grid[0] == pytest.approx(0.01)
    assert grid[-1] == pytest.approx(30)
    assert len(grid) == 12
    assert (np.diff(grid) > 0).all()
