"""Every preset's network goes through the same tests, as a twin of depth 2 and width 64 on tiny images."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditlab.config import PRESETS
from ditlab.networks.bias_free import BFCNN, BFCNNConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.networks.registry import NETWORKS, build_network
from ditlab.training.checkpoint import load_network, read_tensors, write_tensors
from ditlab.training.compiling import compile_blocks

NAMES = sorted(PRESETS)


def twin(name: str, **changes) -> DiTConfig:
    network = PRESETS[name].network
    assert isinstance(network, DiTConfig)
    small = {"depth": 2, "width": 64, "heads": 2, "image_size": (6, 4), "attention": "3,g", "num_classes": 3}
    return replace(network, **{**small, **changes})


def losses(name: str, network: torch.nn.Module, count: int = 4) -> torch.Tensor:
    """The preset's own loss on random images with random labels."""
    objective = PRESETS[name].objective.build()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 6, 4, generator=generator) * 2 - 1
    draws = objective.draw(generator, count, (3, 6, 4))
    return objective.losses(network, images, torch.arange(count) % 3, draws)["loss"]


def stirred(network: torch.nn.Module) -> torch.nn.Module:
    """With weights that are not zero anywhere, so that every path counts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def count(config: DiTConfig) -> int:
    """Parameters of a DiT, from its description (Peebles & Xie, section 3.2)."""
    d, hidden = config.width, int(config.width * config.mlp_ratio)
    patch = config.patch * config.patch * config.channels

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    block = linear(d, 3 * d) + linear(d, d) + linear(d, hidden) + linear(hidden, d) + linear(d, 6 * d)
    ends = linear(patch, d) + linear(256, d) + linear(d, d)
    final = linear(d, 2 * d) + linear(d, patch * (2 if config.learn_sigma else 1))
    labels = (config.num_classes + config.null_class) * d if config.num_classes else 0
    return ends + config.depth * block + final + labels


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name):
    config = twin(name)
    network = stirred(build_network(config))
    out = network(torch.zeros(2, 3, 6, 4), torch.tensor([3.0, 500.0]), torch.tensor([0, 3]))
    assert out.shape == (2, 6 if config.learn_sigma else 3, 6, 4)
    assert out.isfinite().all()
    loss = losses(name, network)
    assert loss.shape == (4,)
    loss.mean().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, tmp_path):
    network = stirred(build_network(twin(name))).eval()
    write_tensors(tmp_path / "model.safetensors", network.state_dict())
    other = build_network(twin(name), seed=1).eval()
    load_network(other, read_tensors(tmp_path / "model.safetensors"), tmp_path)
    x, t = torch.randn(2, 3, 6, 4), torch.tensor([3.0, 500.0])
    assert torch.equal(other(x, t), network(x, t))


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_at_full_size(name):
    config = PRESETS[name].network
    assert isinstance(config, DiTConfig)
    for changed in (config, replace(config, num_classes=10), replace(config, attention="3*" + str(config.depth))):
        with torch.device("meta"):
            network = DiT(changed)
        assert sum(p.numel() for p in network.parameters()) == count(changed)


COMPILED = """
import sys
sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
from test_registry import build_network, compile_blocks, losses, stirred, twin
plain, compiled = (stirred(build_network(twin("dit-nano/1"))) for _ in range(2))
assert compile_blocks(compiled, "on", device=torch.device("cpu"), steps=1)
assert list(compiled.state_dict()) == list(plain.state_dict())
for network in (plain, compiled):
    losses("dit-nano/1", network).mean().backward()
for (key, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=key)
"""


@pytest.mark.slow
def test_compiled_computes_the_same():
    # In a process of its own: the shape checks of these tests are Python that the compiler cannot look through.
    code = COMPILED.format(here=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_compile_auto_and_off():
    network = build_network(twin("dit-nano/1"))
    cpu = torch.device("cpu")
    assert not compile_blocks(network, "off", device=cpu, steps=10**6)
    assert not compile_blocks(network, "auto", device=cpu, steps=10**6)  # too narrow to gain
    assert not compile_blocks(network, "auto", device=cpu, steps=10)


def test_initial_weights_follow_the_seed_alone():
    config = twin("dit-nano/1")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_network(config, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = build_network(config, seed=3), build_network(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_every_kind_has_a_network():
    assert {DiTConfig: DiT, BFCNNConfig: BFCNN} == NETWORKS
    assert isinstance(build_network(BFCNNConfig()), BFCNN)
