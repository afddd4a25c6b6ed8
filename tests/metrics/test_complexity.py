"""Costs of networks: operations and memory against closed forms, and against real passes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.metrics.complexity import Complexity, complexity, match_width, training_compute
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.nn import kernels
from ditlab.nn.attention import SelfAttention, attention_kernel, register_attention
from ditlab.nn.layers import MLP
from ditlab.nn.patterns import Global, Partition, Pattern, Window

SMALL = DiTConfig(image_size=(8, 8), width=32, depth=2, heads=2, num_classes=3)


class Alone(nn.Module):
    """A layer on the pixels of an image, as a network."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2))


def attention(pattern: Pattern, extra: int = 0) -> Alone:
    return Alone(SelfAttention(16, 2, (4, 6 if extra == 0 else 5), pattern, extra=extra))


@pytest.mark.parametrize("pattern", [Global(), Window(3), Window(3, "shift"), Partition(2), Partition(3)])
def test_only_pairs_that_attend_are_counted(pattern):
    found = complexity(attention(pattern), (16, 4, 6), memory=False)
    assert found.attention_macs == 2 * 16 * int(pattern.mask((4, 6)).sum())
    assert found.macs == found.attention_macs + 24 * 4 * 16 * 16
    assert found.parameters == 4 * 16 * 16 + 4 * 16
    assert found.activation_bytes is None


def test_extra_tokens_see_all():
    grid, tokens, extra = (4, 5), 20, 4  # 24 tokens in all, laid out as an image of 4x6
    found = complexity(attention(Window(3), extra), (16, 4, 6), memory=False)
    seen = int(Window(3).mask(grid).sum()) + (tokens + extra) ** 2 - tokens**2
    assert found.attention_macs == 2 * 16 * seen


def test_layers_of_others():
    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = register_attention(
                nn.MultiheadAttention(16, 2, batch_first=True), (4, 6), pattern=Window(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    found = complexity(Alone(Theirs()), (16, 4, 6))
    assert found.attention_macs == 2 * 16 * int(Window(3).mask((4, 6)).sum())
    assert found.macs - found.attention_macs == 24 * 4 * 16 * 16
    assert found.activation_bytes


def test_convolutions():
    found = complexity(BFCNN(BFCNNConfig(channels=1, width=8, depth=3)), (1, 6, 6), labelled=False)
    assert (found.macs, found.attention_macs) == (36 * 9 * (8 + 64 + 8), 0)


def test_the_memory_of_an_mlp():
    """Kept: the input, what goes into GELU and what comes out, each once; float32 and half of it."""
    found = complexity(Alone(MLP(16, 64)), (16, 4, 6))
    assert found.activation_bytes == 4 * 24 * (16 + 64 + 64)
    assert found.activation_bytes_bf16 == 2 * 24 * (16 + 64 + 64)


@pytest.mark.parametrize("plan", ["g,g", "3,g"])
def test_memory_is_what_a_real_pass_keeps(plan):
    """Images in a batch of three less those in a batch of two, on real tensors."""
    network = DiT(replace(SMALL, attention=plan, width=48))

    def kept(batch: int) -> int:
        found = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x)
        with hooks, attention_kernel("sdpa"):
            network(torch.zeros(batch, 3, 8, 8), torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())

    assert complexity(network, (3, 8, 8)).activation_bytes == kept(3) - kept(2)


def test_the_network_stays_as_it_was():
    network = DiT(replace(SMALL, attention="3,g")).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.zeros(2)
    nn.init.normal_(network.final.out.weight)
    kernels._masks.clear()
    before = network(x, t)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    masks = {key: value.clone() for key, value in kernels._masks.items()}
    kernels._masks.clear()
    on_cpu = complexity(network, (3, 8, 8))
    assert not kernels._masks  # a mask without data would be found there by the next pass
    assert [block.attention.pattern for block in network.blocks] == [Window(3), Global()]  # pyright: ignore
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(network(x, t), before)
    assert all(torch.equal(value, masks[key]) for key, value in kernels._masks.items())
    assert not network.training
    with torch.device("meta"):
        again = complexity(DiT(replace(SMALL, attention="3,g")), (3, 8, 8))
    assert again == on_cpu


def test_a_pattern_is_put_back_after_an_error():
    network = DiT(replace(SMALL, attention="3,g"))
    with pytest.raises(DitlabError, match="expected images of shape"):
        complexity(network, (3, 8, 9))
    assert network.config.patterns == tuple(block.attention.pattern for block in network.blocks)  # pyright: ignore


def test_training_compute_and_json():
    cost = Complexity(parameters=10, macs=6 * 10**9, attention_macs=10**9, activation_bytes=7, activation_bytes_bf16=4)
    assert (cost.gmacs, cost.gmacs_without_attention) == (6.0, 5.0)
    assert cost.training_compute(256, 400_000) == training_compute(6.0, 256, 400_000) == 6 * 256 * 400_000 * 3
    record = json.loads(json.dumps(cost.to_json()))
    assert record["gmacs"] == 6.0
    assert record["activation_bytes"] == 7


def test_the_width_of_equal_cost():
    def build(width: int) -> nn.Module:
        with torch.device("meta"):
            return DiT(replace(SMALL, width=width, attention="3,3"))

    with torch.device("meta"):
        wanted = complexity(DiT(SMALL), (3, 8, 8), memory=False).macs
    width = match_width(build, (3, 8, 8), wanted, 4)
    costs = {w: complexity(build(w), (3, 8, 8), memory=False).macs for w in (4, 28, 32, 36)}
    assert width == min(costs, key=lambda w: abs(costs[w] - wanted))
    assert match_width(build, (3, 8, 8), costs[4], 4) == 4
    with pytest.raises(DitlabError, match=r"expected a network that can cost 1e-06 GMACs, found .* at the smallest"):
        match_width(build, (3, 8, 8), 1000, 4)
