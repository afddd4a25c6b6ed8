from __future__ import annotations

import re

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


@pytest.mark.golden_keys("02_schedules", r"[a-z]+\d+\.\w+")
def test_tables_equal_the_published_ones(golden, golden_key):
    fixture = golden("02_schedules")
    name, steps, table = re.fullmatch(r"([a-z]+)(\d+)\.(\w+)", golden_key).groups()
    result = getattr(make_schedule(name, int(steps)), table)
    np.testing.assert_allclose(result, fixture[golden_key].numpy(), rtol=fixture.tolerance("arrays"))


def test_respacing_keeps_the_published_steps(golden):
    fixture = golden("02_schedules")
    full = int(fixture.mapped("values.space_timesteps")[0])
    for name, cases in fixture.values.items():
        steps = int(name.removeprefix("space_timesteps_")) if name.startswith("space_timesteps_") else full
        for spec, expected in cases.items():
            if name == "odd_specs" and expected[0] == "ok":
                assert len(respace(steps, spec)) == expected[1], spec
            elif name == "odd_specs":
                with pytest.raises(DitlabError, match=refusal(expected[1])):
                    respace(steps, spec)
            else:
                assert respace(steps, spec) == expected, spec
                if not spec.startswith("ddim"):
                    counts = [int(count) for count in spec.split(",")]
                    assert (
                        respace(steps, counts) == respace(steps, counts if len(counts) > 1 else counts[0]) == expected
                    )


def refusal(sentence: str) -> str:
    """What ditlab says where the original says this."""
    section = re.search(r"section of (\d+) steps into (\d+)", sentence)
    return rf"at most {section[1]} steps in section \d+, found {section[2]}" if section else "no integer stride"


@pytest.mark.parametrize("spec", ["", "ten", "ddim", "0", "-5", "1001", "ddim999", "10,,3", []])
def test_a_respacing_that_cannot_be_read_is_refused(spec):
    with pytest.raises(DitlabError, match="respacing"):
        respace(1000, spec)


@pytest.mark.golden_keys("02_schedules", r"respaced\..+\.betas")
def test_respaced_betas_equal_the_published_ones(golden, golden_key):
    fixture = golden("02_schedules")
    spec, name = re.fullmatch(r"respaced\.(.+)\.(\w+)\.betas", golden_key).groups()
    full = make_schedule(name, int(fixture.mapped("values.space_timesteps")[0]))
    short = full.respaced(spec)
    np.testing.assert_allclose(short.betas, fixture[golden_key].numpy(), rtol=fixture.tolerance("arrays"))
    np.testing.assert_allclose(short.sigmas, full.sigmas[short.timesteps], rtol=1e-9)
    assert np.isfinite(short.posterior_log_variance_clipped).all()


@pytest.mark.golden_keys("02_schedules", r"model_t\..+")
def test_a_network_is_told_the_steps_of_the_full_process(golden, golden_key):
    steps, spec, rescale = re.fullmatch(r"model_t\.steps(\d+)\.(.+)\.rescale_(\w+)", golden_key).groups()
    full = make_schedule("cosine", int(steps))
    denoiser = VPDenoiser(Silent(), full, rescale_time=rescale == "True")
    expected = golden("02_schedules")[golden_key]
    sigmas = full.respaced(spec).sigmas
    assert [denoiser.time(float(sigma)) for sigma in sigmas] == pytest.approx(expected.tolist(), rel=1e-6)
    in_float32 = denoiser.time(torch.from_numpy(sigmas).float())
    assert isinstance(in_float32, torch.Tensor)
    assert torch.equal(in_float32.float(), expected.float())


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_comes_back_from_its_levels(name):
    full = make_schedule(name, 1000)
    np.testing.assert_allclose(VPSchedule.from_sigmas(full.sigmas).betas, full.betas, rtol=1e-9)


@pytest.mark.golden_keys("05_edm_samplers", r"t_steps\..+")
def test_discretizations_equal_the_published_ones(golden, golden_key):
    fixture = golden("05_edm_samplers")
    _, name, steps = golden_key.split(".")
    settings = fixture.config["edm_kwargs"] if name == "edm" else {}
    levels = noise_levels(name, int(steps), **settings)
    np.testing.assert_allclose(levels, fixture[golden_key].numpy(), rtol=fixture.tolerance("samplers, t_steps"))


def test_continuous_levels_equal_the_published_ones(golden):
    fixture = golden("05_edm_samplers")
    rtol = fixture.tolerance("samplers, t_steps")
    time, sigma = fixture["vp.t"].numpy(), fixture["vp.sigma(t)"].numpy()
    np.testing.assert_allclose(vp_sigma(time), sigma, rtol=rtol)
    np.testing.assert_allclose(vp_sigma_inverse(sigma), fixture["vp.sigma_inv(sigma(t))"].numpy(), rtol=rtol)
    # The recorded ones were summed in float32, which costs most at the lowest levels.
    u = fixture["iddpm.u"].numpy()
    np.testing.assert_allclose(cosine_levels(len(u) - 1), u, rtol=1e-4)
    steps, low, high = (fixture.config["kdiff"][key] for key in ("n", "sigma_min", "sigma_max"))
    karras = noise_levels("edm", steps, low, high)
    np.testing.assert_allclose(karras, fixture["kdiff.karras"].numpy()[:-1], rtol=fixture.tolerance("kdiff schedules"))


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
