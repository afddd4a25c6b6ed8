"""One contract, and denoisers as different as they come: every test here runs on all of them, without a special case."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import guided
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.network_denoisers import BlindDenoiser, EDMDenoiser, VPDenoiser
from ditlab.diffusion.noise_levels import DiscreteLevels, LevelRange
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig, HeunConfig, ImageNoise, sample
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError, InvalidConfig
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.rng import torch_generator

SHAPE = (3, 8, 8)
NAMES = ["dit-vp", "dit-edm", "bf-cnn", "published-bf-cnn", "wiener", "empirical-bayes", "wrapped"]


def trained_looking(network: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, because a fresh DiT puts out zeros."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return network.eval().requires_grad_(False)


def dit(**changes) -> torch.nn.Module:
    return trained_looking(DiT(DiTConfig(image_size=(8, 8), patch=2, width=32, depth=2, heads=2, **changes)))


def images(count: int = 12) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch_generator(0, "images")) * 2 - 1


def bias_free() -> BFCNN:
    network = BFCNN(BFCNNConfig(image_size=(8, 8), width=8, depth=4))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch_generator(1, "weights"))
    return network.eval().requires_grad_(False)


# The published CNN was trained with noise of up to 100 of 255, which is 200 / 255 in [-1, 1].
CNN_LEVELS = LevelRange(0.0, 200 / 255)


def make(name: str, shared=None) -> Denoiser:
    if name == "dit-vp":
        return VPDenoiser(dit(num_classes=4), make_schedule("linear", 1000))
    if name == "dit-edm":
        return EDMDenoiser(dit(learn_sigma=False))
    if name == "bf-cnn":
        return BlindDenoiser(bias_free(), CNN_LEVELS)
    if name == "published-bf-cnn":
        network = BFCNN(BFCNNConfig(image_size=(8, 8)))
        network.load_state_dict(load_file(shared / "weights" / "bf_cnn_BSD300_color.safetensors"))
        return BlindDenoiser(network.eval().requires_grad_(False), CNN_LEVELS)
    if name == "wiener":
        return WienerDenoiser(images())
    if name == "empirical-bayes":
        return EmpiricalBayesDenoiser(images(), chunk=5)
    return Denoiser.wrap(lambda y, sigma, label: y / (1 + sigma.reshape(-1, 1, 1, 1) ** 2), SHAPE)


@pytest.fixture(params=NAMES)
def denoiser(request) -> Denoiser:
    shared = None
    if request.param == "published-bf-cnn":
        shared = request.getfixturevalue("shared")
        if not (shared / "weights" / "bf_cnn_BSD300_color.safetensors").is_file():
            pytest.skip("no ../shared/weights/bf_cnn_BSD300_color.safetensors beside the checkout")
    return make(request.param, shared)


def noisy(sigma: float, count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.randn(count, *SHAPE, generator=torch_generator(0, "noise"))
    return (images(count) + sigma * noise).to(dtype)


def test_it_says_what_it_is(denoiser):
    assert denoiser.shape == SHAPE
    assert isinstance(denoiser.levels, DiscreteLevels | LevelRange)
    assert 0 <= denoiser.levels.min < denoiser.levels.max
    grid = denoiser.levels.grid("7")
    assert len(grid) == 7
    assert (np.diff(grid) > 0).all()
    denoiser.check_levels(grid)
    assert denoiser.peak == 2
    assert denoiser.num_classes >= 0
    assert denoiser.variance in ("learned-range", "fixed-small", "fixed-large")
    assert denoiser.device == torch.device("cpu")
    assert 0 < float(denoiser.scale(0.3)) < 3
    time = denoiser.time(0.3)
    if time is not None:
        several = denoiser.time(torch.tensor([0.3, 0.5], dtype=torch.float64))
        assert isinstance(several, torch.Tensor)
        assert several[0].item() == pytest.approx(time)
    assert (time is None) == denoiser.blind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.7])
def test_image_and_noise_make_up_the_input(denoiser, sigma, dtype):
    y = noisy(sigma, dtype=dtype)
    x0, eps, v = denoiser.predict(y, sigma)
    assert x0.shape == eps.shape == y.shape
    assert x0.dtype == eps.dtype == dtype
    assert torch.isfinite(x0).all()
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(x0 + sigma * eps, y, rtol=limit, atol=limit)
    assert torch.equal(denoiser(y, sigma), x0)
    assert v is None or v.shape == y.shape
    assert (v is not None) == (denoiser.variance == "learned-range")


def test_sigma_may_be_a_number_or_a_tensor(denoiser):
    y = noisy(0.3)
    expected = denoiser(y, 0.3)
    for sigma in (torch.tensor(0.3), torch.tensor([0.3]), torch.full((3,), 0.3), torch.full((3,), 0.3).double()):
        torch.testing.assert_close(denoiser(y, sigma), expected, rtol=1e-4, atol=1e-5)
    each = denoiser(y, torch.tensor([0.1, 0.3, 0.6]))
    for row, sigma in enumerate((0.1, 0.3, 0.6)):
        torch.testing.assert_close(each[row : row + 1], denoiser(y[row : row + 1], sigma), rtol=1e-4, atol=1e-4)


def test_gradients_flow_to_the_input(denoiser):
    y = noisy(0.3).requires_grad_()
    denoiser(y, 0.3).square().sum().backward()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize(
    "config",
    [DDIMConfig(steps="5"), DDPMConfig(steps="5"), HeunConfig(steps=4), HeunConfig(steps=4, levels="ve", churn=1.0)],
)
def test_it_can_be_sampled(denoiser, config):
    noise = ImageNoise(range(2), SHAPE)
    label = torch.tensor([0, denoiser.num_classes]) if denoiser.num_classes else None
    result = sample(denoiser, config, noise.initial(), label=label, noise=noise)
    assert result.shape == (2, *SHAPE)
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()


def test_bad_input_is_one_sentence(denoiser):
    y = noisy(0.3)
    with pytest.raises(DitlabError, match="expected images 3x8x8, found 1x8x8"):
        denoiser(y[:, :1], 0.3)
    with pytest.raises(DitlabError, match="expected 1 or 3 noise levels, found 2"):
        denoiser(y, torch.tensor([0.1, 0.2]))
    for sigma in (0.0, -1.0, math.nan, torch.tensor([0.1, 0.2, 0.0])):
        with pytest.raises(DitlabError, match="noise level sigma"):
            denoiser(y, sigma)
    if denoiser.levels.max < math.inf:
        with pytest.raises(DitlabError, match=r"noise level sigma from .* found"):
            denoiser(y, 2 * denoiser.levels.max)
    with pytest.raises(DitlabError, match="label"):
        denoiser(y, 0.3, torch.tensor([0, 1, denoiser.num_classes + 1]))
    with pytest.raises(DitlabError, match="label"):
        denoiser.check(y, 0.3, torch.tensor([0, 0]))


# ---- what each says about itself ----


def test_a_vp_denoiser_is_told_exact_steps_on_its_grid():
    denoiser = make("dit-vp")
    assert isinstance(denoiser, VPDenoiser)
    sigmas = denoiser.schedule.sigmas
    assert [denoiser.time(float(s)) for s in sigmas] == list(range(1000))
    in_float32 = denoiser.time(torch.from_numpy(sigmas).float())
    assert isinstance(in_float32, torch.Tensor)
    assert in_float32.tolist() == list(range(1000))
    scale = np.array([denoiser.scale(float(s)) for s in sigmas])
    np.testing.assert_allclose(scale, np.sqrt(denoiser.schedule.alphas_cumprod), rtol=1e-12)


def test_steps_between_are_fractional_or_rounded():
    schedule = make_schedule("linear", 1000)
    middle = float(np.sqrt(schedule.sigmas[300] * schedule.sigmas[301]))
    network = dit()
    assert VPDenoiser(network, schedule).time(middle) == pytest.approx(300.5)
    rounded = VPDenoiser(network, schedule, between="round")
    assert rounded.time(middle * 1.0001) == 301
    assert rounded.time(middle * 0.9999) == 300


def test_epsilon_and_x0_predictions_say_the_same():
    schedule = make_schedule("cosine", 1000)
    network = dit(learn_sigma=False)

    class Image(torch.nn.Module):
        def forward(self, x, t, label=None):
            sigma = torch.from_numpy(schedule.sigmas)[t.long()].float().reshape(-1, 1, 1, 1)
            return x * (1 + sigma**2) ** 0.5 - sigma * network(x, t)

    y, sigma = noisy(0.3), float(schedule.sigmas[200])
    noise = VPDenoiser(network, schedule, "epsilon", "fixed-small")
    image = VPDenoiser(Image(), schedule, "x0", "fixed-small", shape=SHAPE)
    torch.testing.assert_close(noise.predict(y, sigma).x0, image.predict(y, sigma).x0)
    torch.testing.assert_close(noise.predict(y, sigma).eps, image.predict(y, sigma).eps, rtol=1e-4, atol=1e-4)


def test_labels_reach_the_network():
    denoiser = make("dit-vp")
    y = noisy(0.3)
    first, second = denoiser(y, 0.3, torch.tensor([1, 1, 1])), denoiser(y, 0.3, torch.tensor([2, 2, 2]))
    assert (first - second).abs().max() > 1e-4
    torch.testing.assert_close(denoiser(y, 0.3), denoiser(y, 0.3, torch.tensor([4, 4, 4])))


@pytest.mark.golden_keys("05_edm_nets", r"in\.(edm|vp|ve)\.sigma")
def test_preconditioning_equals_the_published_one(golden, golden_key):
    fixture, precond = golden("05_edm_nets"), golden_key.split(".")[1]
    y, sigma = fixture[f"in.{precond}.x"], fixture[golden_key]
    data = fixture.config["EDMPrecond"]["sigma_data"]
    inputs = {}

    class Echo(torch.nn.Module):
        def forward(self, x, t, label=None):
            inputs["x"], inputs["t"] = x, t
            return torch.ones_like(x)

    denoiser = EDMDenoiser(Echo(), precond, data, shape=tuple(y.shape[1:]))
    # The fixture also visits levels beyond the ones that this preconditioning was made for.
    each = sigma.reshape(-1, 1, 1, 1)
    result = denoiser.estimate(y, each).x0
    first = fixture[f"out.{precond}.net_input_sample0"]
    torch.testing.assert_close(inputs["x"][: len(first)], first, rtol=1e-5, atol=1e-5)
    # The original's own distance from float64, where ours is: its ln(1 + sigma^2) cancels in float32 at low VP levels.
    slack = 1.1 * max(fixture.values[f"{precond}: |c_noise - float64 c_noise|"])
    torch.testing.assert_close(inputs["t"], fixture[f"out.{precond}.c_noise"], rtol=1e-6, atol=slack)
    skip = data**2 / (each**2 + data**2) if precond == "edm" else torch.ones_like(each)
    out = {"edm": each * data / (each**2 + data**2).sqrt(), "vp": -each, "ve": each}[precond]
    torch.testing.assert_close(result, skip * y + out, rtol=1e-5, atol=1e-5)
    alone = denoiser.estimate(y, float(sigma[-1])).x0[-1]
    torch.testing.assert_close(alone, result[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("low", "high", "origin"), [(0.0, 1.0, -1.0), (-1.0, 1.0, 0.0), (-0.5, 0.5, 0.0)])
@pytest.mark.parametrize("output", ["noise", "clean"])
def test_a_bias_free_network_is_homogeneous_about_its_origin(low, high, origin, output):
    denoiser = BlindDenoiser(bias_free(), CNN_LEVELS, low=low, high=high, output=output)
    assert denoiser.blind
    assert denoiser.origin == pytest.approx(origin)
    y = noisy(0.3)
    for factor in (0.25, 3.0):
        scaled = denoiser(denoiser.origin + factor * (y - denoiser.origin), 0.3)
        torch.testing.assert_close(scaled, denoiser.origin + factor * (denoiser(y, 0.3) - denoiser.origin))
    assert torch.equal(denoiser(y, 0.3), denoiser(y, 0.1))


def test_a_users_own_noise_predictor_in_five_lines():
    mine = Denoiser.wrap(lambda y, sigma, label: torch.zeros_like(y), SHAPE, output="epsilon", num_classes=3)
    y = noisy(0.3)
    assert torch.equal(mine(y, 0.3, torch.tensor([0, 1, 3])), y)
    wrong = Denoiser.wrap(lambda y, sigma, label: y[:, :1], SHAPE)
    with pytest.raises(DitlabError, match="expected a result 3x3x8x8, found 3x1x8x8"):
        wrong(y, 0.3)


def shrink(y: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    return 0.5 * y


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("`function`: expected a function, found 5", {"function": 5}),
        ("`function`: expected a function, found tensor", {"function": torch.zeros(2)}),
        ("`shape`: expected 3 values, each a whole number, found (3, 8)", {"shape": (3, 8)}),
        ("`shape`: expected 3 values, each a whole number, found 32", {"shape": 32}),
        ("`shape`: expected 3 values, each a whole number, found (3, 8.0, 8)", {"shape": (3, 8.0, 8)}),
        ("wrapped denoiser: expected `shape` of at least 1x1x1, ", {"shape": (3, 0, 8)}),
        ("`levels`: expected a DiscreteLevels, a LevelRange or None, found [0.1, 1.0]", {"levels": [0.1, 1.0]}),
        ("`levels`: expected a DiscreteLevels, a LevelRange or None, found array", {"levels": np.ones(3)}),
        ("`output`: expected one of 'epsilon', 'x0', found 'noise'", {"output": "noise"}),
        ("`num_classes`: expected a whole number, found 'ten'", {"num_classes": "ten"}),
        ("`num_classes`: expected a whole number, found None", {"num_classes": None}),
        ("wrapped denoiser: expected ", {"num_classes": -1}),
        ("`blind`: expected True or False, found 'no'", {"blind": "no"}),
        ("`origin`: expected a number, found '0'", {"origin": "0"}),
        ("wrapped denoiser: expected ", {"origin": math.nan}),
        ("`device`: expected a device or text, found 0.5", {"device": 0.5}),
        ("`device`: expected a device such as 'cpu' or 'cuda:0', found 'gpu'", {"device": "gpu"}),
        ("`dtype`: expected a dtype or None, found 'float32'", {"dtype": "float32"}),
    ],
)
def test_arguments_of_a_wrapped_denoiser_that_cannot_be_are_one_sentence(sentence, arguments):
    with pytest.raises(InvalidConfig) as refusal:
        Denoiser.wrap(**{"function": shrink, "shape": SHAPE, **arguments})
    assert str(refusal.value).startswith(sentence)
    assert ", found " in str(refusal.value)


class Noisy(torch.nn.Module):
    """A float32 network with dropout that is linear in y, so that its Jacobian is known."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)
        self.dropout = torch.nn.Dropout(0.5)
        torch.nn.init.constant_(self.conv.bias, 0.0)

    def forward(self, y, sigma, label):
        assert y.dtype == sigma.dtype == self.conv.weight.dtype
        return self.dropout(self.conv(y)) / (1 + sigma.reshape(-1, 1, 1, 1))

    def denoise(self, y, sigma, label):
        return self(y, sigma, label)


def test_a_wrapped_float32_module_is_cast_to_and_put_into_eval_mode():
    torch.manual_seed(0)
    network = Noisy()
    for function in (network, network.train().denoise):
        mine = Denoiser.wrap(function, SHAPE)
        assert mine.module is network
        assert not network.training
        y = noisy(0.3, dtype=torch.float64)
        assert mine(y, 0.3).dtype == torch.float64
        assert torch.equal(mine(y, 0.3), mine(y, torch.tensor([0.3, 0.3, 0.3])))
        result = sample(mine, HeunConfig(steps="4"), ImageNoise(range(2), SHAPE).initial())
        assert torch.isfinite(result).all()
    network.double()
    torch.testing.assert_close(
        mine(y.float(), 0.3).double(), network(y, y.new_full((3,), 0.3), None), rtol=1e-5, atol=1e-6
    )


def test_a_wrapped_module_has_gradients_for_those_who_ask():
    network = Noisy()
    mine = Denoiser.wrap(network, SHAPE)
    y = noisy(0.5, count=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: mine(x, 0.5)[0, :, 0, 0], y)[:, 0, :, 0, 0]
    torch.testing.assert_close(jacobian, network.conv.weight[:, :, 0, 0].detach() / 1.5)
    assert all(parameter.requires_grad for parameter in network.parameters())
    mine(y, 0.5).sum().backward()
    assert network.conv.weight.grad is not None
    assert not sample(mine, DDIMConfig(steps=3), noisy(1.0)).requires_grad


def test_a_plain_function_may_name_its_dtype():
    network = Noisy().eval()
    function = lambda y, sigma, label: network(y, sigma, label)  # noqa: E731
    start = ImageNoise(range(2), SHAPE).initial()
    result = sample(Denoiser.wrap(function, SHAPE, dtype=torch.float32), HeunConfig(steps=4), start)
    torch.testing.assert_close(result, sample(Denoiser.wrap(network, SHAPE), HeunConfig(steps=4), start))


def test_a_repr_is_one_short_line(denoiser):
    y = noisy(0.3)
    label = torch.zeros(3, dtype=torch.int64)
    shown = [denoiser, denoiser.predict(y, 0.3, label if denoiser.num_classes else None), denoiser.levels]
    if denoiser.num_classes:
        shown.append(guided(denoiser, GuidanceConfig(2.0)))
    steps = []
    sample(denoiser, DDIMConfig(steps=2), y, callback=steps.append)
    for thing in [*shown, *steps, DDIMConfig(steps="ddim50"), HeunConfig(), make_schedule("linear", 100)]:
        text = repr(thing)
        assert text.startswith(type(thing).__name__.lstrip("_"))
        assert "0x" not in text
        assert "\n" not in text
        assert len(text) < 200
    assert repr(denoiser).count("3x8x8") == 1
    assert repr(HeunConfig(steps="40")) == "HeunConfig(steps=40)"


def test_a_network_with_other_channels_is_refused():
    with pytest.raises(DitlabError, match="expected 3 channels from the network, found 6"):
        EDMDenoiser(dit())(noisy(0.3), 0.3)
    with pytest.raises(DitlabError, match="low < high"):
        BlindDenoiser(bias_free(), CNN_LEVELS, low=1.0, high=0.0)


def test_identity_tells_processes_apart():
    """Equal weights, and another process, are another denoiser; the same one is the same again."""
    network, edm, plain = dit(num_classes=4), dit(learn_sigma=False), make_schedule("linear", 1000)
    blind = bias_free()

    def wrapped(**changes) -> Denoiser:
        return Denoiser.wrap(lambda y, sigma, label: y, SHAPE, **changes)

    def latent() -> Denoiser:
        result = EDMDenoiser(edm)
        result.pixel_space = False
        return result

    made = [
        lambda: VPDenoiser(network, plain),
        lambda: VPDenoiser(network, make_schedule("cosine", 1000)),
        lambda: VPDenoiser(network, make_schedule("linear", 500)),
        lambda: VPDenoiser(network, make_schedule("linear", 500), rescale_time=True),
        lambda: VPDenoiser(network, plain, "x0"),
        lambda: VPDenoiser(network, plain, between="round"),
        lambda: VPDenoiser(network, plain, variance="fixed-small"),
        lambda: VPDenoiser(network, plain, variance="fixed-large"),
        lambda: type("Other", (VPDenoiser,), {})(network, plain),
        lambda: VPDenoiser(dit(num_classes=4, attention="3*2"), plain),
        lambda: EDMDenoiser(edm),
        lambda: EDMDenoiser(edm, sigma_data=0.7),
        lambda: EDMDenoiser(edm, "vp"),
        lambda: EDMDenoiser(edm, "ve"),
        latent,
        lambda: BlindDenoiser(blind, CNN_LEVELS),
        lambda: BlindDenoiser(blind, LevelRange(0.0, 1.0)),
        lambda: BlindDenoiser(blind, CNN_LEVELS, low=-1.0),
        lambda: BlindDenoiser(blind, CNN_LEVELS, output="clean"),
        wrapped,
        lambda: wrapped(output="epsilon"),
        lambda: wrapped(levels=DiscreteLevels(plain.sigmas)),
        lambda: wrapped(levels=DiscreteLevels(plain.sigmas, np.arange(1, 1001))),
        lambda: guided(VPDenoiser(network, plain), GuidanceConfig(2.0)),
        lambda: guided(VPDenoiser(network, plain), GuidanceConfig(3.0)),
        lambda: guided(VPDenoiser(network, plain, "x0"), GuidanceConfig(3.0)),
    ]
    result = [json.dumps(make().identity, allow_nan=False) for make in made]
    assert len(set(result)) == len(made)
    assert result == [json.dumps(make().identity) for make in made]
