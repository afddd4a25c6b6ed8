from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pydantic
import pytest
import torch

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.likelihood import bits_per_dimension
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.samplers import (
    DDIMConfig,
    DDPMConfig,
    DPMSolverConfig,
    HeunConfig,
    ImageNoise,
    SamplerConfig,
    evaluations,
    invert,
    sample,
)
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError

LINEAR = make_schedule("linear", 1000)


# ---- golden 02: the loops of the original implementation ----


class Blend(torch.nn.Module):
    """The golden's better-behaved network, made of its DiT."""

    def __init__(self, dit, schedule):
        super().__init__()
        self.dit, self.in_shape, self.num_classes = dit, dit.in_shape, dit.num_classes
        self.noise = torch.from_numpy(np.sqrt(1 - schedule.alphas_cumprod))

    def forward(self, x, t, label=None):
        output, channels = self.dit(x, t, label), self.in_shape[0]
        noise = self.noise[t.long()].float().reshape(-1, 1, 1, 1)
        return torch.cat([0.1 * output[:, :channels] + noise * x, 0.3 * output[:, channels:]], 1)


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("02_sampling")


@pytest.fixture(scope="module")
def denoiser_of(golden_dit, recorded):
    def build(schedule: str, network: str) -> VPDenoiser:
        full = make_schedule(schedule, recorded.config["T"])
        return VPDenoiser(Blend(golden_dit, full) if network == "blend" else golden_dit, full)

    return build


def loop_config(recorded, loop: str, clip: bool):
    """The sampler of the part of a key that names the loop, such as "ddim_eta1_on_10"."""
    name, _, spec = loop.partition("_on_")
    if name.startswith("ddpm"):
        return DDPMConfig(steps=recorded.config["respacing"], clip=clip)
    eta = float(name.removeprefix("ddim").removeprefix("_eta") or 0)
    return DDIMConfig(steps=spec or recorded.config["respacing_ddim"], eta=eta, clip=clip)


def near(recorded, key, result):
    error, largest = recorded.values["float32_vs_float64"][key][:2]
    factor, share = recorded.tolerance("all"), recorded.tolerance("all", 1)
    assert (result - recorded[key]).abs().max().item() <= factor * error + share * largest


@pytest.mark.golden_keys("02_sampling", r"\w+\.(dit|blend)\.(ddpm_zero|ddpm_noise|ddim.*)\.clip_(True|False)\.traj")
def test_loops_go_through_the_published_states(recorded, denoiser_of, golden_key):
    schedule, network, loop, clip = re.fullmatch(r"(\w+)\.(\w+)\.(.+)\.clip_(\w+)\.traj", golden_key).groups()
    states = []
    zero = torch.zeros_like(recorded["in.x_T"])
    sample(
        denoiser_of(schedule, network),
        loop_config(recorded, loop, clip == "True"),
        recorded["in.x_T"],
        label=recorded["in.y"],
        noise=lambda k: zero if loop == "ddpm_zero" else recorded["in.noise_seq"][k],
        callback=lambda step: states.append(step.x_next),
    )
    if len(recorded[golden_key]) != len(states):
        states = [states[0], states[len(states) // 2], states[-1]]
    near(recorded, golden_key, torch.stack(states))


@pytest.mark.golden_keys("02_sampling", r"\w+\.\w+\.ddim_reverse\.clip_(True|False)\.sample")
def test_ddim_backwards(recorded, denoiser_of, golden_key):
    schedule, network, _, clip, _ = golden_key.split(".")
    start = 0.5 * recorded["in.x_T"].clamp(-1, 1)
    config = DDIMConfig(steps=recorded.config["respacing"], clip=clip == "clip_True")
    near(recorded, golden_key, invert(denoiser_of(schedule, network), config, start, label=recorded["in.y"]))


@pytest.mark.golden_keys("02_sampling", r"\w+\.\w+\.bpd\.total_bpd")
def test_bits_per_dimension(recorded, denoiser_of, golden_key):
    images, noise = recorded["in.x_T"].clamp(-1, 1), recorded["in.noise_seq"]
    schedule, network, *_ = golden_key.split(".")
    result = bits_per_dimension(
        denoiser_of(schedule, network),
        images,
        lambda k: noise[k],
        steps=recorded.config["respacing"],
        label=recorded["in.y"],
    )
    for name, value in (
        ("total_bpd", result.total),
        ("prior_bpd", result.prior),
        ("vb", result.terms),
        ("xstart_mse", result.x0_mse),
        ("mse", result.eps_mse),
    ):
        expected = recorded[f"{schedule}.{network}.bpd.{name}"]
        torch.testing.assert_close(value, expected, rtol=recorded.tolerance("bpd"), atol=1e-7, msg=name)


# ---- golden 05: the EDM samplers, on a denoiser in closed form ----


class Shrink(Denoiser):
    """D(y) = y k / (k + sigma^2), and the levels it was asked for."""

    def __init__(self, k, levels=None, shape=(2, 4, 4)):
        self.k, self.calls = k, []
        self.shape, self.levels = shape, levels or LevelRange(0.0, math.inf)

    def estimate(self, y, sigma, label=None):
        self.calls.append(sigma)
        x0 = y * (self.k / (self.k + sigma * sigma))
        return Prediction(x0, (y - x0) / sigma, None)


@pytest.fixture(scope="module")
def edm(golden):
    return golden("05_edm_samplers")


def edm_case(edm, name: str):
    """The sampler and the levels of a key such as "ablation_sampler.vp_heun.18"."""
    code, details, steps = re.fullmatch(r"(\w+)(?:\.(.+))?\.(\d+)", name).groups()
    words = (details or "").split("_")
    settings, levels = {"steps": int(steps)}, None
    if code == "edm_sampler":
        settings |= edm.config["edm_kwargs"]
    if "churn" in words:
        churn = edm.config["churn"]
        settings |= {"churn": float(churn["S_churn"]), "churn_noise": churn["S_noise"]}
        settings |= {"churn_min": float(churn["S_min"]), "churn_max": float(churn["S_max"])}
    if "limits" in words:
        levels = LevelRange(*edm.mapped("edm_sampler.limits.<n>"))
    for word in words:
        if word in ("vp", "ve"):
            settings |= {"levels": word, "flow": word}
        elif word in ("edm", "iddpm"):
            settings["levels"] = word
        elif word == "euler":
            settings["second_order"] = False
        elif word.startswith("alpha"):
            settings["alpha"] = float(word.removeprefix("alpha"))
    return HeunConfig(**settings), levels


@pytest.mark.golden_keys("05_edm_samplers", r"k[\d.]+\.(edm|ablation)_sampler\..+")
def test_heun_equals_the_published_sampler(edm, golden_key):
    k, name = re.fullmatch(r"k([\d.]+)\.([a-z].+)", golden_key).groups()
    config, levels = edm_case(edm, name)
    latents, rtol = edm["in.latents"].double(), edm.tolerance("samplers, t_steps")
    denoiser = Shrink(float(k), levels, tuple(latents.shape[1:]))
    result = sample(denoiser, config, latents, noise=lambda step: edm["in.noise_seq"][step])
    torch.testing.assert_close(result, edm[golden_key], rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(denoiser.calls, edm[f"sigma_calls.{name}"].numpy(), rtol=rtol)


@pytest.mark.parametrize(("name", "second_order"), [("euler", False), ("heun", True)])
def test_heun_equals_another_implementation(edm, name, second_order):
    settings, latents = edm.config["kdiff"], edm["in.latents"].double()
    limits = {"sigma_min": settings["sigma_min"], "sigma_max": settings["sigma_max"]}
    config = HeunConfig(steps=settings["n"], second_order=second_order, **limits)
    result = sample(Shrink(edm.config["ks"][1], shape=tuple(latents.shape[1:])), config, latents)
    # Its levels were rounded to float32.
    expected = edm[f"kdiff.sample_{name}"]
    torch.testing.assert_close(result, expected, rtol=edm.tolerance("kdiff schedules"), atol=1e-6)


@pytest.mark.golden_keys("05_edm_samplers", r"t_steps\.(vp|ve)\.\d+")
def test_heun_runs_on_the_other_grids_at_the_published_levels(edm, golden_key):
    _, levels, steps = golden_key.split(".")
    latents = edm["in.latents"].double()
    denoiser = Shrink(1.0, shape=tuple(latents.shape[1:]))
    result = sample(denoiser, HeunConfig(levels=levels, steps=int(steps)), latents)
    np.testing.assert_allclose(denoiser.calls[::2], edm[golden_key].numpy(), rtol=edm.tolerance("samplers, t_steps"))
    if int(steps) >= 40:
        # The exact solution of the flow: y is scaled by sqrt((k + 0) / (k + sigma_max^2)).
        highest = denoiser.calls[0]
        torch.testing.assert_close(result, latents * highest / math.sqrt(1 + highest**2), rtol=0.05, atol=0.05)


@pytest.mark.golden_keys("05_edm_samplers", r"k[\d.]+\.edm_sampler\.\d+")
def test_heun_keeps_float64_inside_and_gives_back_the_dtype_of_the_noise(edm, golden_key):
    k, name = re.fullmatch(r"k([\d.]+)\.([a-z].+)", golden_key).groups()
    dtypes, latents = set(), edm["in.latents"]
    denoiser = Shrink(float(k), shape=tuple(latents.shape[1:]))
    result = sample(denoiser, edm_case(edm, name)[0], latents, callback=lambda step: dtypes.add(step.y_next.dtype))
    assert result.dtype == torch.float32
    assert dtypes == {torch.float64}
    torch.testing.assert_close(result, edm[golden_key].float())


# ---- what holds for any sampler ----

ALL = [
    DDPMConfig(steps="12"),
    DDPMConfig(steps="12", variance="fixed-large", clip=True),
    DDIMConfig(steps="12"),
    DDIMConfig(steps="12", eta=0.5),
    HeunConfig(steps=6),
    HeunConfig(steps=6, churn=2.0),
    HeunConfig(steps=6, flow="vp", alpha=0.7),
    HeunConfig(steps=6, levels="grid", second_order=False),
    DPMSolverConfig(steps=6),
    DPMSolverConfig(steps=6, levels="ve"),
]


@pytest.mark.parametrize("config", ALL)
def test_an_image_does_not_depend_on_its_batch(config):
    shape = (2, 4, 4)
    whole = ImageNoise(range(5), shape)
    part = ImageNoise([4, 1], shape)
    together = sample(Shrink(0.5), config, whole.initial(), noise=whole)
    apart = sample(Shrink(0.5), config, part.initial(), noise=part)
    torch.testing.assert_close(apart, together[[4, 1]], rtol=1e-6, atol=1e-6)
    assert torch.equal(whole(0), ImageNoise(range(5), shape)(0))
    assert not torch.equal(whole(0), whole(1))
    assert not torch.equal(whole.initial(), ImageNoise(range(1, 6), shape).initial())


@pytest.mark.parametrize("config", ALL)
def test_a_callback_sees_every_step(config):
    steps = []
    noise = ImageNoise(range(2), (2, 4, 4))
    result = sample(Shrink(0.5), config, noise.initial(), noise=noise, callback=steps.append)
    count = len(steps)
    assert [step.index for step in steps] == list(range(count))
    assert {step.steps for step in steps} == {count} == {int(config.steps)}
    assert [step.sigma_next for step in steps[:-1]] == [step.sigma for step in steps[1:]]
    assert steps[-1].sigma_next == 0
    assert all(torch.equal(a.y_next, b.y) for a, b in pairwise(steps))
    torch.testing.assert_close(steps[-1].y_next.float(), result)
    assert steps[0].x0.shape == result.shape


def test_ancestral_sampling_is_ddim_with_eta_1():
    noise = ImageNoise(range(2), (2, 4, 4))
    ddpm = sample(Shrink(0.5), DDPMConfig(steps="20", variance="fixed-small"), noise.initial(), noise=noise)
    ddim = sample(Shrink(0.5), DDIMConfig(steps="20", eta=1.0), noise.initial(), noise=noise)
    torch.testing.assert_close(ddpm, ddim, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config", [DDPMConfig(steps="300"), DDIMConfig(steps="300"), HeunConfig(steps=40), DPMSolverConfig(steps=40)]
)
def test_samples_have_the_variance_of_the_data(config):
    # Shrink(k) is the optimal denoiser of normal data with variance k.
    noise = ImageNoise(range(200), (2, 4, 4))
    result = sample(Shrink(0.25), config, noise.initial(), noise=noise)
    assert result.std().item() == pytest.approx(0.5, abs=0.02)


# ---- the second-order solvers, and the denoiser's own steps ----


def exact(k, noise, config):
    """Where the flow of normal data with variance k ends from the sampler's first state, and what the sampler gives."""
    states = []
    denoiser = Shrink(k, LevelRange(1e-3, 50.0))
    sample(denoiser, config, noise, callback=states.append)
    first, last = states[0], states[-1]
    # y / sqrt(k + sigma^2) is constant along the flow; the last step, to level 0, is of first order by construction.
    return first.y * math.sqrt((k + last.sigma**2) / (k + first.sigma**2)), last.y


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda n: DPMSolverConfig(steps=n, levels="ve", sigma_min=1e-3, sigma_max=50.0), 2),
        (lambda n: DPMSolverConfig(steps=n, levels="edm", sigma_min=1e-3, sigma_max=50.0), 2),
        (lambda n: HeunConfig(steps=n, levels="edm", sigma_min=1e-3, sigma_max=50.0), 2),
        (lambda n: HeunConfig(steps=n, levels="ve", sigma_min=1e-3, sigma_max=50.0, second_order=False), 1),
    ],
)
def test_order_of_convergence(make, order):
    noise = ImageNoise(range(2), (2, 4, 4)).initial().double()
    errors = []
    for steps in (40, 80, 160, 320):
        expected, result = exact(0.25, noise, make(steps))
        errors.append((result - expected).abs().max().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.15), slopes
    assert errors[-1] < (2e-3 if order == 2 else 5e-2)


def test_euler_on_the_own_grid_is_ddim(denoiser_of, recorded):
    """To the last bit, when both keep their state in float64."""
    blend = denoiser_of("linear", "blend")
    start, label = recorded["in.x_T"].double(), recorded["in.y"]
    for denoiser, labels in ((blend, label), (Shrink(0.5, blend.levels), None)):
        start = start if labels is not None else ImageNoise(range(2), (2, 4, 4)).initial().double()
        ddim = sample(denoiser, DDIMConfig(steps="13"), start, label=labels)
        euler = sample(denoiser, HeunConfig(steps=13, levels="grid", second_order=False), start, label=labels)
        # A float32 network may round another way at states that differ in the last bit.
        limit = 1e-12 if labels is None else 1e-5
        torch.testing.assert_close(ddim, euler, rtol=limit, atol=limit)


class Asked(torch.nn.Module):
    """A small network that notes the steps that it is asked for."""

    in_shape, num_classes = (2, 4, 4), 0

    def __init__(self):
        super().__init__()
        self.steps = []

    def forward(self, x, t, label=None):
        self.steps.append(t[0].item())
        return 0.9 * x * torch.sigmoid(t / 100 - 3).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "config",
    [
        HeunConfig(steps=7, levels="grid"),
        HeunConfig(steps=7, levels="grid", churn=3.0),
        HeunConfig(steps=7, levels="grid", second_order=False),
        DPMSolverConfig(steps=7),
    ],
)
def test_the_own_grid_asks_for_no_step_between(config):
    network = Asked()
    denoiser = VPDenoiser(network, LINEAR, variance="fixed-small")
    noise = ImageNoise(range(2), denoiser.shape)
    sample(denoiser, config, noise.initial(), noise=noise)
    assert all(step == round(step) for step in network.steps)
    if not getattr(config, "churn", 0):
        assert set(network.steps) == set(np.linspace(0, 999, 7).round())
    else:
        # Churn goes up to a noisier step, which is one of the process's too.
        assert len(set(network.steps)) > 7
    # EDM's own spacing lies between the steps.
    network.steps.clear()
    sample(denoiser, HeunConfig(steps=7), noise.initial())
    assert any(step != round(step) for step in network.steps)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_dpm_solver_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    network = Asked()
    denoiser = VPDenoiser(network, LINEAR, variance="fixed-small")
    noise = ImageNoise(range(3), denoiser.shape).initial()
    for steps in (5, 10, 25, 100):
        result = sample(denoiser, DPMSolverConfig(steps=steps), noise)
        scheduler = diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            algorithm_type="dpmsolver++",
            solver_order=2,
            final_sigmas_type="zero",
        )
        timesteps = [int(step) for step in np.linspace(0, 999, steps).round()[::-1]]
        scheduler.set_timesteps(timesteps=timesteps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.float().expand(len(x))), t, x).prev_sample
        torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "calls"),
    [
        (DDPMConfig(steps="250"), 250),
        (DDIMConfig(steps="ddim50"), 50),
        (HeunConfig(steps=18), 35),
        (HeunConfig(steps=18, second_order=False), 18),
        (HeunConfig(steps=18, levels="grid"), 35),
        (DPMSolverConfig(steps=20), 20),
    ],
)
def test_evaluations_are_counted_as_they_are_made(config, calls):
    network = Asked()
    denoiser = VPDenoiser(network, LINEAR, variance="fixed-small")
    assert evaluations(config, denoiser) == (calls, calls)
    noise = ImageNoise(range(1), denoiser.shape)
    sample(denoiser, config, noise.initial(), noise=noise)
    assert len(network.steps) == calls


def test_inversion_undoes_sampling():
    start = ImageNoise(range(4), (2, 4, 4)).initial()
    config = DDIMConfig(steps="500")
    denoiser = Shrink(1.0)
    back = invert(denoiser, config, sample(denoiser, config, start))
    torch.testing.assert_close(back, start, rtol=0.02, atol=0.01)
    with pytest.raises(DitlabError, match="expected eta 0"):
        invert(denoiser, DDIMConfig(eta=0.5), start)


def test_bad_input_is_one_sentence():
    start = torch.zeros(2, 2, 4, 4)
    with pytest.raises(DitlabError, match="expected a source of noise"):
        sample(Shrink(1.0), DDPMConfig(steps="5"), start)
    with pytest.raises(DitlabError, match="expected images 2x4x4, found 3x4x4"):
        sample(Shrink(1.0), DDIMConfig(steps="5"), torch.zeros(2, 3, 4, 4))
    with pytest.raises(DitlabError, match="expected no label"):
        sample(Shrink(1.0), DDIMConfig(steps="5"), start, label=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DitlabError, match="found 'ddim5'"):
        sample(Shrink(1.0), DDIMConfig(steps="ddim5"), start)
    claims = Shrink(1.0)
    claims.variance = "learned-range"
    with pytest.raises(DitlabError, match="expected a learned variance v"):
        sample(claims, DDPMConfig(steps="5"), start, noise=lambda k: start)
    for make, says in (
        (lambda: DDIMConfig(eta=2.0), "expected eta in"),
        (lambda: HeunConfig(steps=0), "expected steps >= 1"),
        (lambda: HeunConfig(churn=-1.0), "expected churn >= 0"),
        (lambda: HeunConfig(alpha=0.0), r"expected alpha in \(0, 1\], found 0"),
        (lambda: HeunConfig(alpha=0.5, levels="grid"), "on levels 'grid' steps are corrected from the next level"),
        (lambda: DPMSolverConfig(steps=0), "expected steps of at least 1, found 0"),
        (lambda: DPMSolverConfig(sigma_max=3.0), "levels 'grid' are the denoiser's own"),
        (lambda: DPMSolverConfig(levels="edm", sigma_min=3.0, sigma_max=1.0), "0 < lowest < highest"),
    ):
        with pytest.raises(DitlabError, match=says):
            make()
    latent = Shrink(1.0)
    latent.pixel_space = False
    with pytest.raises(DitlabError, match="sampler 'ddim' with clip: latents have no bounds"):
        sample(latent, DDIMConfig(steps="5", clip=True), start)
    with pytest.raises(DitlabError, match="DDIM inversion with clip: latents have no bounds"):
        invert(latent, DDIMConfig(steps="5", clip=True), start)
    with pytest.raises(DitlabError, match="expected at most 1000 steps in section 0, found 1001"):
        sample(VPDenoiser(Asked(), LINEAR, variance="fixed-small"), DPMSolverConfig(steps=1001), start)


@pytest.mark.parametrize("config", ALL)
def test_configs_go_through_json(config):
    adapter = pydantic.TypeAdapter(SamplerConfig)
    assert adapter.validate_json(adapter.dump_json(config)) == config


@pytest.mark.parametrize(
    ("kind", "form"), [(DDPMConfig, str), (DDIMConfig, str), (HeunConfig, int), (DPMSolverConfig, int)]
)
def test_steps_are_a_number_or_text_and_stored_in_one_form(kind, form):
    adapter = pydantic.TypeAdapter(kind)
    for steps in (12, "12"):
        config = kind(steps=steps)
        assert config == kind(steps=form(12))
        assert type(config.steps) is form
        assert adapter.dump_python(config, mode="json")["steps"] == form(12)
        assert adapter.validate_python({"steps": steps}) == config
    with pytest.raises(DitlabError, match=r"expected (steps as a count|counts of at least 1)"):
        kind(steps="twelve")
    for steps in (12.0, True, None):
        config = kind()
        object.__setattr__(config, "steps", steps)  # the tests' type checks would refuse it before the config does
        with pytest.raises(DitlabError, match="expected steps as a count"):
            config.__post_init__()


def test_a_respacing_is_checked_when_it_is_set():
    assert DDIMConfig(steps="10,15,20").steps == "10,15,20"
    for steps in ("ddim10,5", "ddim", "10,", 0):
        with pytest.raises(DitlabError, match="expected counts of at least 1 such as 250, ddim50 or 10,15,20"):
            DDIMConfig(steps=steps)
