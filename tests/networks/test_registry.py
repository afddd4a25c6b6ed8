"""Every preset's network goes through the same tests, as a twin of depth 2 and width 64 on tiny images, with each kind of
block. Parameters at full size: test_dit_counts.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet import BFUNet
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import BlockKind, DiTConfig
from ditlab.networks.registry import NETWORKS, build_network, network_class
from ditlab.networks.unet import UNet
from ditlab.networks.unet_config import UNetConfig
from ditlab.presets import PRESETS
from ditlab.training.checkpoint import load_network, read_tensors, write_tensors
from ditlab.training.compiling import compile_blocks

KINDS = get_args(BlockKind)


def twin(name: str, **changes) -> DiTConfig:
    """The preset's network, small; of 3x2 tokens, or of 6x4 with patch 1."""
    network = PRESETS[name].network
    assert isinstance(network, DiTConfig)
    side = max(network.patch, 2)
    small = {"depth": 2, "width": 64, "heads": 2, "image_size": (3 * side, 2 * side), "attention": "3,g"}
    return replace(network, **{**small, "num_classes": 3, **changes})


# Presets that differ in size and recipe alone have the same twin; each twin is tested once, with every kind of block.
DITS = [name for name, config in PRESETS.items() if isinstance(config.network, DiTConfig)]
TWINS = {(twin(name), PRESETS[name].objective): name for name in sorted(DITS, reverse=True)}
CASES = [pytest.param(name, kind, id=f"{name} {kind}") for name in sorted(TWINS.values()) for kind in KINDS]


SMALL = {
    BFCNNConfig: {"image_size": (4, 8), "width": 6, "depth": 3},
    BFUNetConfig: {"image_size": (4, 8), "width": 6, "blocks": 2},
    UNetConfig: {
        "image_size": (8, 8),
        "width": 8,
        "groups": 4,
        "res_blocks": 1,
        "multipliers": (1, 2),
        "attention_at": (4,),
        "heads": 2,
        "num_classes": 3,
    },
}
"""What makes the networks of other kinds small."""
OTHERS = [name for name, config in PRESETS.items() if type(config.network) in SMALL]


def other_twin(name: str):
    network = PRESETS[name].network
    return replace(network, **SMALL[type(network)])


def losses(name: str, network: torch.nn.Module, count: int = 4) -> torch.Tensor:
    """The preset's own loss on random images with random labels."""
    objective = PRESETS[name].objective.build()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, *network.in_shape, generator=generator) * 2 - 1
    draws = objective.draw(generator, count, network.in_shape)
    return objective.losses(network, images, torch.arange(count) % 3, draws)["loss"]


def stirred(network: torch.nn.Module) -> torch.nn.Module:
    """With weights that are not zero anywhere, so that every path counts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def test_every_preset_has_a_twin_here():
    assert {*DITS, *OTHERS} == set(PRESETS)
    for name in DITS:
        assert TWINS[twin(name), PRESETS[name].objective] in TWINS.values()
    assert {config.block for config, _ in TWINS} == {"adaln-zero"}  # the other kinds are set in the cases


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_forward_and_backward(name, kind):
    config = twin(name, block=kind)
    network = stirred(build_network(config))
    rows, columns = config.image_size
    out = network(torch.zeros(2, 3, rows, columns), torch.tensor([3.0, 500.0]), torch.tensor([0, 3]))
    assert out.shape == (2, 6 if config.learn_sigma else 3, rows, columns)
    assert out.isfinite().all()
    loss = losses(name, network)
    assert loss.shape == (4,)
    loss.mean().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_save_and_load(name, kind, tmp_path):
    config = twin(name, block=kind)
    network = stirred(build_network(config)).eval()
    write_tensors(tmp_path / "model.safetensors", network.state_dict())
    other = build_network(config, seed=1).eval()
    load_network(other, read_tensors(tmp_path / "model.safetensors"), tmp_path)
    x, t = torch.randn(2, 3, *config.image_size), torch.tensor([3.0, 500.0])
    assert torch.equal(other(x, t), network(x, t))


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kinds(name, tmp_path):
    config = other_twin(name)
    network = stirred(build_network(config))
    loss = losses(name, network)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    write_tensors(tmp_path / "model.safetensors", network.state_dict())
    again = build_network(config, seed=1).eval()
    load_network(again, read_tensors(tmp_path / "model.safetensors"), tmp_path)
    x, t, label = torch.randn(2, *network.in_shape), torch.tensor([3.0, 500.0]), torch.tensor([0, 2])
    out = network.eval()(x, t, label)
    assert out.shape == (2, PRESETS[name].objective.build().network_outputs(3), *config.image_size)
    assert torch.equal(again(x, t, label), out)


COMPILED = """
import sys
sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
from test_registry import build_network, compile_blocks, losses, other_twin, stirred, twin
for kind in {kinds!r}:
    # One block of a kind is enough; two of adaLN-Zero show that a window and global attention go together.
    changes = {{}} if kind == "adaln-zero" else {{"depth": 1, "attention": "3"}}
    config = twin("dit-nano/1", block=kind, **changes)
    plain, compiled = (stirred(build_network(config)) for _ in range(2))
    assert compile_blocks(compiled, "on", device=torch.device("cpu"), steps=1)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for network in (plain, compiled):
        losses("dit-nano/1", network).mean().backward()
    for (key, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=key)
for name in {others!r}:
    plain, compiled = (stirred(build_network(other_twin(name))).train() for _ in range(2))
    assert compile_blocks(compiled, "on", device=torch.device("cpu"), steps=1)
    for network in (plain, compiled):
        losses(name, network).mean().backward()
    for (key, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3, msg=f"{{name}} {{key}}")
    for (key, a), b in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=f"{{name}} {{key}}")
"""


@pytest.mark.slow
def test_compiled_computes_the_same():
    # In a process of its own: the shape checks of these tests are Python that the compiler cannot look through.
    others = ["bf-unet-nano", "bf-cnn-nano"]
    code = COMPILED.format(here=str(Path(__file__).parent), kinds=KINDS, others=others)
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
    kinds = {config.kind: network_class(config) for config in NETWORKS}
    assert kinds == {"dit": DiT, "unet": UNet, "bf-cnn": BFCNN, "bf-unet": BFUNet}
    assert isinstance(build_network(BFCNNConfig()), BFCNN)
