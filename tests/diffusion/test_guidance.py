"""Guidance wraps any denoiser: numbers of the originals, closed forms, and what it costs."""

from __future__ import annotations

import math
import re

import numpy as np
import pydantic
import pytest
import torch

from ditlab.diffusion.baselines import EmpiricalBayesDenoiser
from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.guidance import guided
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.network_denoisers import EDMDenoiser, VPDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.samplers import (
    DDIMConfig,
    DDPMConfig,
    DPMSolverConfig,
    HeunConfig,
    ImageNoise,
    evaluations,
    sample,
)
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.rng import torch_generator

LINEAR = make_schedule("linear", 1000)
SHAPE = (3, 8, 8)


class Counting(torch.nn.Module):
    """A network that notes the sizes of the batches it gets."""

    def __init__(self, network):
        super().__init__()
        self.network, self.in_shape, self.num_classes = network, network.in_shape, network.num_classes
        self.batches = []

    def forward(self, x, t, label=None):
        self.batches.append(len(x))
        return self.network(x, t, label)


def dit(**changes) -> DiT:
    network = DiT(DiTConfig(image_size=(8, 8), patch=2, width=32, depth=2, heads=2, num_classes=4, **changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=torch_generator(0, "weights"))
    return network.eval().requires_grad_(False)


# ---- the numbers of the originals ----


@pytest.mark.goldens("01_dit_?", having="out.cfg_*")
def test_guided_outputs_of_the_original_dit(golden, golden_name, dit_of, use_frequencies):
    fixture = golden(golden_name)
    use_frequencies(fixture)
    channels, learned = fixture.config["in_channels"], fixture.config["learn_sigma"]
    count = len(fixture["in.cfg_x"]) // 2
    x, t, label = (fixture[f"in.cfg_{name}"][:count] for name in ("x", "t", "y"))
    sigma = torch.from_numpy(LINEAR.sigmas)[t]
    y = x * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    for match in fixture.matches(r"(out|out64)\.cfg_(.+)"):
        network, expected = dit_of(fixture), fixture[match[0]][:count]
        network = network.to(expected.dtype)
        denoiser = VPDenoiser(network, LINEAR, variance="learned-range" if learned else "fixed-large")
        config = GuidanceConfig(scale=float(match[2]), channels=min(3, channels))
        result = guided(denoiser, config).predict(y.to(expected.dtype), sigma, label)
        tolerance = fixture.tolerance(f"{match[1]}.*")
        if match[1] == "out":
            # The state is rounded twice more than in the original, on its way to y and back.
            tolerance *= max(1.0, expected.abs().max().item())
        assert (result.eps - expected[:, :channels]).abs().max() <= tolerance
        if learned:
            assert (result.v - expected[:, channels:]).abs().max() <= tolerance


@pytest.mark.golden_keys("02_sampling", r"\w+\.dit\.ddpm_zero_cfg.+\.clip_(True|False)\.traj")
def test_the_original_guided_sampling_loop(golden, golden_dit, golden_key):
    recorded = golden("02_sampling")
    schedule, scale, clip = re.fullmatch(r"(\w+)\.dit\.ddpm_zero_cfg(.+)\.clip_(\w+)\.traj", golden_key).groups()
    states = []
    sample(
        guided(
            VPDenoiser(golden_dit, make_schedule(schedule, recorded.config["T"])),
            GuidanceConfig(scale=float(scale), channels=min(3, golden_dit.in_shape[0])),
        ),
        DDPMConfig(steps=recorded.config["respacing"], clip=clip == "True"),
        recorded["in.x_T"],
        label=recorded["in.y"],
        noise=lambda step: torch.zeros_like(recorded["in.x_T"]),
        callback=lambda step: states.append(step.x_next),
    )
    expected = recorded[golden_key][:, : len(recorded["in.x_T"])]
    if len(expected) != len(states):
        states = [states[0], states[len(states) // 2], states[-1]]
    error, largest = recorded.values["float32_vs_float64"][golden_key][:2]
    tolerance = recorded.tolerance("all") * error + recorded.tolerance("all", 1) * largest
    assert (torch.stack(states) - expected).abs().max().item() <= tolerance


@pytest.mark.golden_keys("06_mdt_power_cosine_cfg", r"scale\..+")
def test_power_cosine_scales_of_the_original(golden, golden_key):
    recorded = golden("06_mdt_power_cosine_cfg")
    scale, power, steps = re.fullmatch(r"scale\.s(.+)\.p(.+)\.T(\d+)", golden_key).groups()
    config, expected = GuidanceConfig(float(scale), "power-cosine", float(power)), recorded[golden_key]
    if not config.on:
        assert (expected == 1).all()
        return
    schedule = make_schedule("linear", int(steps))
    denoiser = guided(VPDenoiser(dit(), schedule), config)
    levels = torch.from_numpy(schedule.sigmas)[recorded[f"in.t.T{steps}"]]
    weights = denoiser.weight(levels)
    assert (weights - expected).abs().max() <= recorded.tolerance("scale") * max(1, config.scale)
    # One level at a time is the same.
    each = [denoiser.weight(float(sigma)) for sigma in levels[:10]]
    np.testing.assert_allclose(each, weights[:10].numpy(), rtol=1e-12)


def test_power_cosine_outputs_of_the_original(golden):
    """The original fed a network that returns a recorded output: the guided half is reproduced to rounding."""
    recorded = golden("06_mdt_power_cosine_cfg")
    count, channels = len(recorded["in.x"]) // 2, recorded["in.x"].shape[1]

    class Recorded(torch.nn.Module):
        in_shape, num_classes = tuple(recorded["in.x"].shape[1:]), count

        def forward(self, x, t, label=None):
            # The batch as the original builds it: each image twice, the same steps, classes and then none.
            torch.testing.assert_close(x, recorded["out.network_input"], rtol=1e-5, atol=1e-5)
            assert label.tolist() == [*range(count), *[count] * count]
            return recorded["in.model_out"]

    scale, power = recorded.config["combos"][0]
    config = GuidanceConfig(scale=scale, schedule="power-cosine", power=power, channels=min(3, channels))
    schedule = make_schedule("linear", recorded.config["T"][0])
    denoiser = guided(VPDenoiser(Recorded(), schedule), config)
    sigma = torch.from_numpy(schedule.sigmas)[recorded["in.t"][:count]].float()
    y = recorded["in.x"][:count] * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    result = denoiser.predict(y, sigma, torch.arange(count))
    expected, atol = recorded["out.cfg"][:count], recorded.tolerance("scale") * max(1, scale)
    torch.testing.assert_close(result.eps, expected[:, :channels], rtol=1e-5, atol=atol)
    assert torch.equal(result.v, expected[:, channels:])


# ---- any denoiser ----


class OfClasses(Denoiser):
    """The optimal denoiser of normal classes N(m_k, s^2), and of the point masses or normals they make up together."""

    def __init__(self, means, s):
        self.means, self.s = means, s
        self.shape, self.num_classes, self.levels = tuple(means.shape[1:]), len(means), LevelRange(0.0, math.inf)

    def estimate(self, y, sigma, label=None):
        table = torch.cat([self.means, self.means.mean(0, keepdim=True)])
        mean = table[torch.full((len(y),), self.num_classes) if label is None else label].to(y)
        x0 = mean + (y - mean) * self.s**2 / (self.s**2 + sigma * sigma)
        return Prediction(x0, (y - x0) / sigma, None)


def test_guided_scores_of_gaussians():
    """The guided noise estimate is -sigma times the score of p_c^w p_u^(1-w), here another normal in closed form."""
    means = torch.randn(3, *SHAPE, dtype=torch.float64)
    inner, w, sigma = OfClasses(means, 0.5), 2.5, 0.7
    denoiser = guided(inner, GuidanceConfig(scale=w))
    y, label = torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([0, 2, 1, 3])
    result = denoiser.predict(y, sigma, label)
    # Normals of one variance: the product's mean is m_u + w (m_c - m_u), its variance the same.
    table = torch.cat([means, means.mean(0, keepdim=True)])
    centre = table[3] + w * (table[label] - table[3])
    score = -(y - centre) / (0.25 + sigma**2)
    torch.testing.assert_close(result.eps, -sigma * score)
    torch.testing.assert_close(result.x0 + sigma * result.eps, y)
    assert result.v is None
    # Sampling lands on the guided normal: with Heun, to its mean and standard deviation.
    noise = ImageNoise(range(400), SHAPE)
    ones = torch.zeros(400, dtype=torch.int64)
    drawn = sample(denoiser, HeunConfig(steps=40), noise.initial().double(), label=ones)
    assert (drawn.mean(0) - (table[3] + w * (table[0] - table[3]))).abs().mean() < 0.05
    assert drawn.std(0).mean().item() == pytest.approx(0.5, abs=0.03)


class BayesOfClasses(Denoiser):
    """An empirical-Bayes denoiser a class, and one of all images for no class."""

    def __init__(self, images, classes):
        self.num_classes = int(classes.max()) + 1
        self.each = [EmpiricalBayesDenoiser(images[classes == k]) for k in range(self.num_classes)]
        self.each.append(EmpiricalBayesDenoiser(images))
        self.shape, self.levels = self.each[0].shape, self.each[0].levels

    def estimate(self, y, sigma, label=None):
        rows = [self.each[int(k)].estimate(y[i : i + 1], sigma, None) for i, k in enumerate(label)]
        return Prediction(torch.cat([r.x0 for r in rows]), torch.cat([r.eps for r in rows]), None)


@pytest.mark.parametrize(
    "config",
    [DDIMConfig(steps="10"), DDPMConfig(steps="10"), HeunConfig(steps=6), DPMSolverConfig(steps=6, levels="edm")],
)
def test_any_sampler_draws_guided_memories(config):
    images = torch.rand(12, *SHAPE, generator=torch_generator(0, "images")) * 2 - 1
    classes = torch.arange(12) % 3
    inner = BayesOfClasses(images, classes)
    noise = ImageNoise(range(3), SHAPE)
    label = torch.tensor([0, 1, 2])
    drawn = sample(guided(inner, GuidanceConfig(scale=1.5)), config, noise.initial(), label=label, noise=noise)
    nearest = torch.cdist(drawn.flatten(1), images.flatten(1))
    # Guided towards a class, memories are still that class's images.
    assert (classes[nearest.argmin(1)] == label).all()
    assert nearest.amin(1).max() < 0.5


@pytest.mark.parametrize("make", [lambda: VPDenoiser(dit(), LINEAR), lambda: EDMDenoiser(dit(learn_sigma=False))])
def test_guidance_of_networks(make):
    inner = make()
    y, label = torch.randn(5, *SHAPE), torch.tensor([0, 1, 2, 3, 4])
    conditional = inner.predict(y, 0.5, label)
    without = inner.predict(y, 0.5, torch.full((5,), 4))
    for scale in (0.0, 0.5, 3.0):
        denoiser = guided(inner, GuidanceConfig(scale=scale))
        result = denoiser.predict(y, 0.5, label)
        expected = without.eps + scale * (conditional.eps - without.eps)
        torch.testing.assert_close(result.eps, expected, rtol=1e-4, atol=1e-5)
        # y = x0 + sigma eps holds for guided estimates, and a tensor of levels gives the same.
        torch.testing.assert_close(result.x0 + 0.5 * result.eps, y, rtol=1e-4, atol=1e-5)
        each = denoiser.predict(y, torch.full((5,), 0.5), label)
        torch.testing.assert_close(each.x0, result.x0, rtol=1e-4, atol=1e-5)
        # The row whose label is "no class" has nothing to be guided by.
        torch.testing.assert_close(result.x0[4], without.x0[4], rtol=1e-4, atol=1e-5)
        if conditional.v is not None:
            torch.testing.assert_close(result.v, conditional.v, rtol=1e-4, atol=1e-5)


def test_it_passes_on_what_the_denoiser_says():
    inner = VPDenoiser(dit(), LINEAR)
    denoiser = guided(inner, GuidanceConfig(scale=2.0))
    for name in (
        "shape",
        "levels",
        "num_classes",
        "peak",
        "pixel_space",
        "blind",
        "origin",
        "variance",
        "device",
        "module",
    ):
        assert getattr(denoiser, name) is getattr(inner, name) or getattr(denoiser, name) == getattr(inner, name)
    assert denoiser.scale(0.5) == inner.scale(0.5)
    assert denoiser.time(0.5) == inner.time(0.5)


def test_channels():
    shape = (4, 8, 8)
    means = torch.randn(2, *shape)
    inner, y, label = OfClasses(means, 0.5), torch.randn(2, *shape), torch.tensor([0, 1])
    plain = inner.predict(y, 0.5, label)
    for channels, count in ((None, 3), (3, 3), (1, 1), (4, 4), ("all", 4)):
        result = guided(inner, GuidanceConfig(scale=3.0, channels=channels)).predict(y, 0.5, label)
        changed = (result.eps - plain.eps).abs().amax((0, 2, 3)) > 1e-4
        assert changed.tolist() == [True] * count + [False] * (4 - count)
        assert torch.equal(result.eps[:, count:], plain.eps[:, count:])
    # Of images other than four-channel latents, all channels are guided where nothing else is said.
    assert [GuidanceConfig().guided_channels(count) for count in (1, 3, 4, 32)] == [1, 3, 3, 32]


# ---- what it costs ----


def test_one_call_a_step_and_no_second_half_where_nothing_is_guided():
    network = Counting(dit())
    inner = VPDenoiser(network, LINEAR)
    grid = inner.levels.grid("8")[::-1]
    config = GuidanceConfig(scale=2.0, interval=(float(grid[5]), float(grid[2])))
    noise = ImageNoise(range(3), SHAPE)
    label = torch.tensor([0, 1, 2])
    sample(guided(inner, config), DDIMConfig(steps="8"), noise.initial(), label=label)
    # low < sigma <= high: the levels 2, 3 and 4 of the 8.
    assert network.batches == [3, 3, 6, 6, 6, 3, 3, 3]
    assert evaluations(DDIMConfig(steps="8"), guided(inner, config)) == (8, 11)
    assert evaluations(DDIMConfig(steps="8"), guided(inner, GuidanceConfig(scale=2.0))) == (8, 16)
    assert evaluations(DDIMConfig(steps="8"), inner) == (8, 8)
    assert guided(inner, GuidanceConfig()) is inner


def test_outside_the_interval_it_is_the_conditional_estimate():
    inner = VPDenoiser(dit(), LINEAR)
    y, label = torch.randn(3, *SHAPE), torch.tensor([0, 1, 2])
    denoiser = guided(inner, GuidanceConfig(scale=4.0, interval=(0.3, 1.0)))
    for sigma in (0.1, 0.3, 1.01, 20.0):
        assert torch.equal(denoiser(y, sigma, label), inner(y, sigma, label))
    assert denoiser.weight(1.0) == 4
    # In one batch, each image by its own level.
    levels = torch.tensor([0.1, 0.5, 2.0])
    torch.testing.assert_close(denoiser.weight(levels), torch.tensor([1.0, 4.0, 1.0]))
    result = denoiser(y, levels, label)
    torch.testing.assert_close(result[[0, 2]], inner(y, levels, label)[[0, 2]], rtol=1e-4, atol=1e-5)


def test_power_cosine_without_numbered_steps_counts_by_the_linear_process():
    config = GuidanceConfig(scale=4.0, schedule="power-cosine")
    numbered = guided(VPDenoiser(dit(), LINEAR), config)
    other = guided(EDMDenoiser(dit(learn_sigma=False)), config)
    for step in (0, 250, 600, 999):
        assert other.weight(float(LINEAR.sigmas[step])) == pytest.approx(numbered.weight(float(LINEAR.sigmas[step])))
    # Beyond its ends it stays what it is there: none at pure noise, all of it at the image.
    assert other.weight(1e-5) == pytest.approx(4)
    assert other.weight(500.0) == pytest.approx(1)


def test_gradients_flow_through():
    denoiser = guided(VPDenoiser(dit(), LINEAR), GuidanceConfig(scale=2.0))
    y = torch.randn(2, *SHAPE, requires_grad=True)
    denoiser(y, 0.5, torch.tensor([0, 1])).sum().backward()
    assert torch.isfinite(y.grad).all()
    assert y.grad.abs().max() > 0


# ---- what it refuses ----


def test_bad_input_is_one_sentence():
    with pytest.raises(DitlabError, match="expected a class-conditional denoiser, found an unconditional one"):
        guided(VPDenoiser(DiT(DiTConfig(image_size=(8, 8), width=16, depth=1, heads=1)), LINEAR), GuidanceConfig(2.0))
    with pytest.raises(DitlabError, match="also knows 'no class'"):
        guided(VPDenoiser(dit(null_class=False), LINEAR), GuidanceConfig(2.0))
    denoiser = guided(VPDenoiser(dit(), LINEAR), GuidanceConfig(2.0))
    y = torch.zeros(1, *SHAPE)
    for call in (denoiser.predict, denoiser.estimate):
        with pytest.raises(DitlabError, match="expected a label for each image, found none"):
            call(y, 0.5)
    with pytest.raises(DitlabError, match=r"expected labels from 0 to 4 \(none\), found 5"):
        denoiser(y, 0.5, torch.tensor([5]))
    with pytest.raises(DitlabError, match="expected labels from 0 to 3, found 4"):
        VPDenoiser(dit(null_class=False), LINEAR)(y, 0.5, torch.tensor([4]))
    with pytest.raises(DitlabError, match="expected channels of at most 3, found 4"):
        guided(VPDenoiser(dit(), LINEAR), GuidanceConfig(2.0, channels=4))
    for settings, says in (
        ({"scale": -1.0}, "expected a scale of at least 0"),
        ({"scale": math.nan}, "expected a scale of at least 0"),
        ({"power": 0.0}, "expected a power above 0"),
        ({"interval": (2.0, 1.0)}, "expected an interval 0 <= low < high < infinity, found 2 and 1"),
        ({"channels": 0}, "expected channels of at least 1, or 'all', found 0"),
    ):
        with pytest.raises(DitlabError, match=says):
            GuidanceConfig(**settings)


@pytest.mark.parametrize(
    "config",
    [GuidanceConfig(), GuidanceConfig(4.0, "power-cosine", 2.0, (0.1, 2.0), "all"), GuidanceConfig(channels=3)],
)
def test_configs_go_through_json(config):
    adapter = pydantic.TypeAdapter(GuidanceConfig)
    assert adapter.validate_json(adapter.dump_json(config)) == config


def test_attention_is_not_looked_at_through_guidance():
    from ditlab.analyses.attention.maps import attention_maps

    inner, label = VPDenoiser(dit(), LINEAR), torch.tensor([1, 2])
    images = torch.zeros(2, *SHAPE)
    assert attention_maps(inner, images, 0.5, label=label).of(1).shape == (16, 16)
    with pytest.raises(DitlabError, match=r"maps of 2 images, found those of 4.*use the denoiser without guidance"):
        attention_maps(guided(inner, GuidanceConfig(2.0)), images, 0.5, label=label)
