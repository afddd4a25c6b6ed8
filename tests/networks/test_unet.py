"""improved-diffusion's UNet against outputs and sizes of the original; its options; what it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.interop.improved_diffusion import UNetFacts, from_original, infer_config
from ditlab.metrics.complexity import complexity
from ditlab.networks.registry import build_network
from ditlab.networks.unet import UNet
from ditlab.networks.unet_blocks import Downsample, ResidualBlock, Stage
from ditlab.networks.unet_config import UNetConfig
from ditlab.nn.attention import adapted_layers, attention_kernel
from ditlab.nn.embeddings import sinusoid
from ditlab.presets import PRESETS
from ditlab.training.sharding import checkpoint_activations

TINY = UNetConfig(image_size=(8, 12), width=8, groups=2, res_blocks=1, multipliers=(1, 2), attention_at=(4,), heads=2)


pytestmark = pytest.mark.goldens("03_iddpm_unet_?")


@pytest.fixture
def fixture(golden, golden_name):
    return golden(golden_name)


def imported(fixture) -> UNet:
    facts = UNetFacts(**{key: fixture.config[key] for key in ("num_heads", "num_heads_upsample", "image_size")})
    weights = fixture.weights()
    return from_original(weights, infer_config(weights, facts, "golden")).eval()


def stirred(network: UNet) -> UNet:
    """With weights that are zero nowhere, so that every path counts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def unet(config: UNetConfig) -> UNet:
    network = build_network(config)
    assert isinstance(network, UNet)
    return stirred(network).eval()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@torch.no_grad()
def test_outputs_of_the_original(fixture, use_frequencies):
    use_frequencies(fixture)
    network, tolerance, wide = imported(fixture), fixture.tolerance("out.*"), fixture.tolerance("out64.y")
    x, t, label = fixture["in.x"], fixture["in.t"], fixture.tensors.get("in.y")
    close(sinusoid(t, network.config.width), fixture["out.t_freq"], tolerance)
    close(network.time(t), fixture["out.t_emb"], tolerance)
    close(network(x, t, label), fixture["out.y"], tolerance)
    close(network(x, fixture["in.t_float"], label), fixture["out.y_tfloat"], tolerance)
    network.double()
    close(network(x.double(), t, label), fixture["out64.y"], wide)
    close(network(x.double(), fixture["in.t_float"].double(), label), fixture["out64.y_tfloat"], wide)


@torch.no_grad()
def test_feature_maps_of_the_original(fixture, use_frequencies):
    use_frequencies(fixture)
    network, tolerance = imported(fixture), fixture.tolerance("out.*")
    maps: dict[int, torch.Tensor] = {}
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(lambda module, args, output, number=number: maps.__setitem__(number, output))
    network(fixture["in.x"], fixture["in.t"], fixture.tensors.get("in.y"))
    for name, number in (("down1", 0), ("middle", network.skips + 1), ("up0", network.skips + 2)):
        expected = fixture[f"out.{name}"]
        close(maps[number][: len(expected)], expected, tolerance)


def parameters(config: UNetConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())


LEVELS = {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
"""Image size -> multipliers of the levels, in the scripts of the original."""
CLASSES = 1000
"""Of the original's conditional networks."""


def test_sizes_of_the_original(golden):
    for name, expected in golden("03_iddpm_counts").values.items():
        flags = expected["create_model_args"]
        config = UNetConfig(
            image_size=(flags["image_size"],) * 2,
            width=flags["num_channels"],
            res_blocks=flags["num_res_blocks"],
            multipliers=LEVELS[flags["image_size"]],
            attention_at=tuple(int(side) for side in flags["attention_resolutions"].split(",")),
            heads=flags["num_heads"],
            heads_up=None if flags["num_heads_upsample"] == -1 else flags["num_heads_upsample"],
            dropout=flags["dropout"],
            scale_shift=flags["use_scale_shift_norm"],
            learn_sigma=flags["learn_sigma"],
            num_classes=CLASSES if flags["class_cond"] else 0,
        )
        assert parameters(config) == expected["params"], name
        with torch.device("meta"):
            assert len(UNet(config).state_dict()) == expected["state_dict_entries"], name
        if name == "cifar10_uncond":
            assert PRESETS["unet-cifar10"].network == config


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("unet-an2024", 109.5541), ("unet-cifar10", 52.55), ("unet-imagenet64", 121.06), ("unet-imagenet64-cond", 273.05)],
)
def test_published_sizes(preset, millions):
    network = PRESETS[preset].network
    assert isinstance(network, UNetConfig)
    digits = len(str(millions).partition(".")[2])
    assert round(parameters(network) / 1e6, digits) == millions


def test_the_unet_of_an_et_al_costs_what_their_figure_says():
    network = PRESETS["unet-an2024"].network
    assert isinstance(network, UNetConfig)
    # With a learned variance it would have 109.5575 M, which is not what they print.
    assert round(parameters(replace(network, learn_sigma=True)) / 1e6, 4) == 109.5575
    with torch.device("meta"):
        cost = complexity(UNet(network), (3, 32, 32), labelled=False, memory=False)
    # Their 303.17 are 32 times the multiply-accumulates of an image without attention matrices, with one operation for
    # each bias that a convolution adds (an attention's projections are such in the original) and two for each element
    # of a norm. Inferred: no paper says how they counted.
    more: list[int] = []

    def count(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        more.append(output.numel() * (2 if isinstance(module, torch.nn.GroupNorm) else 1))

    with torch.device("meta"):
        counted = UNet(network)
        middle = [layer for module, _ in adapted_layers(counted) for layer in (module.qkv, module.proj)]
        for module in counted.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm) or module in middle:
                module.register_forward_hook(count)
        counted(torch.empty(1, 3, 32, 32), torch.empty(1))
    assert round(32 * cost.gmacs_without_attention, 2) == 302.73
    assert round(32 * (cost.gmacs_without_attention + sum(more) / 1e9), 2) == 303.17


def convolution(inputs: int, outputs: int, kernel: int = 3) -> int:
    return inputs * outputs * kernel**2


def test_operations_are_those_of_a_closed_form():
    # One level of 8 channels at 8x12, one of 16 at 4x6, one block each; attention at 4x6 and in the middle.
    big, small = 8 * 12, 4 * 6

    def block(inputs: int, outputs: int, pixels: int) -> int:
        skip = convolution(inputs, outputs, 1) if inputs != outputs else 0
        return pixels * (convolution(inputs, outputs) + convolution(outputs, outputs) + skip) + 32 * 2 * outputs

    blocks = block(8, 8, big) + block(8, 16, small) + 2 * block(16, 16, small)
    blocks += block(32, 16, small) + block(24, 16, small) + block(24, 8, big) + block(16, 8, big)
    resampling = small * convolution(8, 8) + big * convolution(16, 16)
    ends = big * (convolution(3, 8) + convolution(8, 3)) + 8 * 32 + 32 * 32
    layers = 4  # the encoder's, the middle's and the decoder's two
    attention = layers * 2 * small**2 * 16
    cost = complexity(build_network(TINY), (3, 8, 12), labelled=False, memory=False)
    assert cost.attention_macs == attention
    assert cost.macs == blocks + resampling + ends + layers * small * 4 * 16 * 16 + attention


OPTIONS = [
    {},
    {"scale_shift": False},
    {"conv_resample": False},
    {"heads_up": 4},
    {"attention_at": ()},
    {"attention_at": (8, 4)},
    {"learn_sigma": True, "num_classes": 3},
    {"num_classes": 3, "null_class": True},
    {"res_blocks": 2, "multipliers": (1, 1, 2)},
    {"multipliers": (2,)},
    {"time_frequencies": "diffusers"},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_every_option_trains(changes):
    config = replace(TINY, **changes)
    network = unet(config)
    x, label = torch.randn(2, 3, 8, 12), torch.tensor([0, 2]) if config.num_classes else None
    out = network(x, torch.tensor([3.0, 500.0]), label)
    assert out.shape == (2, 6 if config.learn_sigma else 3, 8, 12)
    out.square().mean().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    plain = sum(p.numel() for p in UNet(TINY).parameters())
    same = changes in ({}, {"heads_up": 4}, {"time_frequencies": "diffusers"})
    assert (sum(p.numel() for p in network.parameters()) == plain) == same


def test_a_fresh_network_puts_out_zero_and_its_branches_nothing():
    network = build_network(TINY)
    assert isinstance(network, UNet)
    x = torch.randn(2, 3, 8, 12)
    assert not network(x, torch.tensor([3.0, 500.0])).any()
    for block in network.blocks:
        if isinstance(block, Stage):
            assert not block.residual.out_conv.weight.any()
            h = torch.randn(2, block.residual.norm.num_channels, 4, 6)
            assert torch.equal(block.residual(h, torch.randn(2, 32)), block.residual.skip(h))
    # What torch's own initial values leave is not touched.
    torch.manual_seed(3)
    fresh = torch.nn.Conv2d(3, 8, 3, padding=1)
    torch.manual_seed(3)
    network.stem.reset_parameters()
    assert torch.equal(network.stem.weight, fresh.weight)


def test_the_condition_is_time_plus_label():
    network = unet(replace(TINY, num_classes=3))
    t, label = torch.tensor([1.0, 7.0]), torch.tensor([2, 0])
    assert network.label is not None
    torch.testing.assert_close(network.condition(t, label), network.time(t) + network.label.table.weight[label])
    with pytest.raises(DitlabError, match="no null class, so every image needs a label"):
        network(torch.zeros(2, 3, 8, 12), t)
    free = unet(replace(TINY, num_classes=3, null_class=True))
    assert torch.equal(free.condition(t), free.condition(t, torch.tensor([3, 3])))


def test_dropout_is_a_module_that_the_loop_finds():
    network = unet(replace(TINY, dropout=0.5)).train()
    dropouts = [m for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) == sum(isinstance(m, ResidualBlock) for m in network.modules())
    x, t = torch.randn(2, 3, 8, 12), torch.zeros(2)
    assert not torch.equal(network(x, t), network(x, t))
    assert torch.equal(network.eval()(x, t), network(x, t))


def test_where_attention_is():
    config = UNetConfig(width=32, res_blocks=2)
    with torch.device("meta"):
        grids = [view.grid for _, view in adapted_layers(UNet(config))]
    # Encoder 16 and 8, the middle at 4, decoder 8 and 16 with one block more.
    assert grids == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] + [(8, 8)] * 3 + [(16, 16)] * 3
    # Resolutions follow the image size as the original's flags do: 64 pixels, divided by 64 // 16 and 64 // 8.
    bigger = replace(config, image_size=(64, 64))
    assert [level for level in range(4) if bigger.attends(level)] == [2, 3]
    heads = [m.heads for m, _ in adapted_layers(UNet(replace(TINY, heads_up=4)))]
    assert heads == [2, 2, 4, 4]


def test_the_math_kernel_has_a_forward_derivative():
    network = unet(TINY)
    x, v, t = torch.randn(1, 3, 8, 12), torch.randn(1, 3, 8, 12), torch.tensor([5.0])
    with attention_kernel("math"):
        _, along = torch.func.jvp(lambda y: network(y, t), (x,), (v,))
        _, pull = torch.func.vjp(lambda y: network(y, t), x)
        u = torch.randn(1, 3, 8, 12)
        torch.testing.assert_close((u * along).sum(), (pull(u)[0] * v).sum(), rtol=1e-4, atol=1e-5)


def test_activations_computed_twice_give_the_same_gradients():
    plain = unet(replace(TINY, dropout=0.3)).train()
    again = copy.deepcopy(plain)
    assert checkpoint_activations(again)
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([3.0, 500.0])
    for network in (plain, again):
        torch.manual_seed(4)
        network(x, t).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name


COMPILED = """
import sys
sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
from test_unet import TINY, unet
plain, compiled = unet(TINY), unet(TINY)
compiled.blocks[3].compile()  # with attention, and behind a stage with attention
x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
for network in (plain, compiled):
    network(x, torch.tensor([3.0, 500.0])).square().mean().backward()
for (key, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=key)
"""


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    # In a process of its own: the shape checks of these tests are Python that the compiler cannot look through.
    code = COMPILED.format(here=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_blocks_hold_all_but_the_ends():
    network = build_network(TINY)
    assert isinstance(network, UNet)
    kinds = [type(block) for block in network.blocks]
    assert kinds == [Stage, Downsample, Stage, Stage, Stage, Stage, Stage, Stage, Stage]
    outside = {name.partition(".")[0] for name, _ in network.named_parameters()} - {"blocks"}
    assert outside == {"time", "stem", "norm", "out"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 33, "groups": 1}, "width must be even and a multiple of the 1 groups, found 33"),
        ({"width": 48}, "width must be even and a multiple of the 32 groups, found 48"),
        ({"width": 0}, "width must be at least 1, found 0"),
        ({"res_blocks": 0}, "res_blocks must be at least 1"),
        ({"multipliers": ()}, "expected multipliers of at least 1, one a level"),
        ({"multipliers": (1, 0)}, "expected multipliers of at least 1"),
        ({"image_size": (28, 28)}, r"with 4 levels image_size must be multiples of 8, found \(28, 28\)"),
        ({"attention_at": (0,)}, "attention_at must be heights of at least 1"),
        ({"heads": 3}, "expected heads that divide the 256 channels of the attention in the middle, found 3"),
        ({"heads_up": 3}, "in the decoder, found 3"),
        ({"heads_up": 0}, "heads_up must be at least 1"),
        ({"dropout": 1.0}, r"expected dropout in \[0, 1\), found 1.0"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_what_cannot_be_built(changes, says):
    with pytest.raises(DitlabError, match=says):
        UNetConfig(**changes)


def test_what_it_cannot_be_given():
    with pytest.raises(DitlabError, match="which means not known yet"):
        UNet(UNetConfig(image_size=(0, 0)))
    network = unet(TINY)
    with pytest.raises(DitlabError, match=r"expected images of shape \(3, 8, 12\), found \(3, 8, 8\)"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(DitlabError, match="augmentation labels"):
        network(torch.zeros(1, 3, 8, 12), torch.zeros(1), augment=torch.zeros(1))


def test_recipes():
    cifar, an2024 = PRESETS["unet-cifar10"], PRESETS["unet-an2024"]
    assert (cifar.training.steps, cifar.training.batch_size, cifar.training.flip) == (500_000, 128, False)
    assert isinstance(cifar.objective, VPObjectiveConfig)
    assert (cifar.objective.schedule, cifar.objective.steps, cifar.objective.loss) == ("cosine", 4000, "rescaled-mse")
    for name in ("unet-cifar10", "unet-imagenet64"):
        hybrid, bound = PRESETS[name], PRESETS[f"{name}-vlb"]
        assert isinstance(bound.objective, VPObjectiveConfig)
        assert (bound.objective.loss, bound.objective.time_sampling) == ("kl", "loss-second-moment")
        same = replace(bound.objective, loss="rescaled-mse", time_sampling="uniform")
        assert (bound.network, bound.training, same) == (hybrid.network, hybrid.training, hybrid.objective)
    assert an2024.training == PRESETS["dit-xs/1"].training
    assert isinstance(an2024.objective, VPObjectiveConfig)
    assert (an2024.objective.variance, an2024.objective.steps) == ("fixed-large", 1000)


def test_sizes_for_a_cpu_cost_what_the_dits_of_their_name_cost():
    for size in ("nano", "micro"):
        costs = []
        for name in (f"unet-{size}", f"dit-{size}/2"):
            with torch.device("meta"):
                network = build_network(PRESETS[name].network)
            costs.append(complexity(network, (3, 32, 32), labelled=False, memory=False).macs)
        assert 0.9 < costs[0] / costs[1] < 1.1
