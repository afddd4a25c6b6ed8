"""The four kinds of blocks against torch's own transformer layers, and what sets each apart."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.attention.maps import attention_layers, attention_maps
from ditlab.analyses.attention.measure import measure_attention
from ditlab.diffusion.network_denoisers import EDMDenoiser
from ditlab.errors import DitlabError
from ditlab.networks.dit import DiT
from ditlab.networks.dit_blocks import BLOCKS, AdaLNBlock, AdaLNZeroBlock, Block, CrossAttentionBlock
from ditlab.networks.dit_config import BlockKind, DiTConfig
from ditlab.nn.attention import attention_kernel
from ditlab.nn.embeddings import frequencies
from ditlab.nn.layers import CrossAttention
from ditlab.nn.patterns import Global

KINDS: tuple[BlockKind, ...] = get_args(BlockKind)
WIDTH, HEADS, HIDDEN, GRID = 16, 2, 24, (3, 4)
TOKENS = GRID[0] * GRID[1]
gelu = partial(nn.functional.gelu, approximate="tanh")


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """With weights that are zero nowhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def block(kind: BlockKind) -> Block:
    config = DiTConfig(
        image_size=GRID, width=WIDTH, depth=1, heads=HEADS, mlp_ratio=HIDDEN / WIDTH, num_classes=3, block=kind
    )
    made = stirred(BLOCKS[kind](config, Global()).double())
    assert isinstance(made, Block)
    return made


def network(kind: BlockKind, **changes) -> DiT:
    fixed = {"image_size": (8, 8), "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}
    made = stirred(DiT(DiTConfig(block=kind, **{**fixed, "learn_sigma": False, **changes})))
    assert isinstance(made, DiT)
    return made.eval()


def tokens(count: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def set_to(layer: nn.Module, other: nn.Module, rows: Tensor | None = None) -> None:
    """Gives a layer the weight and bias of another; the rows scaled where asked for."""
    for name in ("weight", "bias"):
        value = getattr(other, name).detach()
        if rows is not None:
            value = value * (rows[:, None] if value.ndim == 2 else rows)
        getattr(layer, name).data.copy_(value)


def set_attention(layer: nn.MultiheadAttention, projections: list[nn.Linear], out: nn.Linear) -> None:
    assert layer.in_proj_weight is not None
    layer.in_proj_weight.data.copy_(torch.cat([p.weight.detach() for p in projections]))
    layer.in_proj_bias.data.copy_(torch.cat([p.bias.detach() for p in projections]))
    set_to(layer.out_proj, out)


def set_rest(layer: nn.Module, one: Block) -> None:
    """What torch's encoder and decoder layers have in common with a block."""
    set_attention(layer.self_attn, [one.attention.qkv], one.attention.proj)  # pyright: ignore[reportArgumentType]
    set_to(layer.linear1, one.mlp.hidden)  # pyright: ignore[reportArgumentType]
    set_to(layer.linear2, one.mlp.out)  # pyright: ignore[reportArgumentType]


def of_torch(kind: type[nn.Module]) -> nn.Module:
    settings = {"dropout": 0.0, "activation": gelu, "layer_norm_eps": 1e-6, "batch_first": True, "norm_first": True}
    return kind(WIDTH, HEADS, HIDDEN, **settings).double()


def test_in_context_is_a_plain_transformer_block():
    one, encoder = block("in-context"), of_torch(nn.TransformerEncoderLayer)
    set_rest(encoder, one)
    set_to(encoder.norm1, one.attention_norm)
    set_to(encoder.norm2, one.mlp_norm)
    x = tokens(TOKENS + 2)
    torch.testing.assert_close(one(x, tokens(2)), encoder(x))


def test_cross_attention_is_a_decoder_block():
    one, decoder = block("cross-attention"), of_torch(nn.TransformerDecoderLayer)
    assert isinstance(one, CrossAttentionBlock)
    set_rest(decoder, one)
    set_attention(decoder.multihead_attn, [one.cross.query, one.cross.key_value], one.cross.proj)
    for theirs, ours in (("norm1", one.attention_norm), ("norm2", one.cross_norm), ("norm3", one.mlp_norm)):
        set_to(getattr(decoder, theirs), ours)
    x, c = tokens(), tokens(2, seed=2)
    torch.testing.assert_close(one(x, c), decoder(x, c))


@pytest.mark.parametrize("kind", ["adaln", "adaln-zero"])
def test_adaptive_norms_take_gain_and_bias_from_the_condition(kind):
    """For one image: the norms of a plain block with gain 1 + scale, and its branches' outputs times the gates."""
    one, encoder = block(kind), of_torch(nn.TransformerEncoderLayer)
    assert isinstance(one, AdaLNBlock)
    x, c = tokens()[:1], tokens(2, seed=3)[:1]
    vectors = list(one.modulation(nn.functional.silu(c[0, 0] + c[0, 1])).detach().chunk(one.parts))
    gates: list[Tensor | None] = [vectors.pop(5), vectors.pop(2)][::-1] if kind == "adaln-zero" else [None, None]
    set_rest(encoder, one)
    set_to(encoder.self_attn.out_proj, one.attention.proj, gates[0])
    set_to(encoder.linear2, one.mlp.out, gates[1])
    for norm, shift, scale in zip((encoder.norm1, encoder.norm2), vectors[::2], vectors[1::2], strict=True):
        norm.weight.data.copy_(1 + scale)
        norm.bias.data.copy_(shift)
    torch.testing.assert_close(one(x, c), encoder(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_network_gives_zero_and_only_adaln_zero_starts_as_the_identity(kind):
    config = DiTConfig(image_size=(6, 8), patch=2, width=16, depth=1, heads=2, num_classes=3, block=kind)
    fresh = DiT(config)
    assert not fresh(torch.randn(2, 3, 6, 8), torch.zeros(2), torch.tensor([0, 3])).any()
    x = torch.randn(2, 12 + fresh.appended, 16)
    assert torch.equal(fresh.blocks[0](x, torch.randn(2, 2, 16)), x) == (kind == "adaln-zero")


@pytest.mark.parametrize("kind", KINDS)
def test_time_and_label_reach_every_token(kind):
    net, x = network(kind, attention="3,3"), torch.randn(1, 3, 8, 8)
    base = net(x, torch.tensor([10.0]), torch.tensor([0]))
    for t, label in ((20.0, 0), (10.0, 1), (10.0, 3)):
        assert ((net(x, torch.tensor([t]), torch.tensor([label])) - base).abs() > 1e-6).all()
    assert torch.equal(net(x, torch.tensor([10.0])), net(x, torch.tensor([10.0]), torch.tensor([3])))


@pytest.mark.parametrize("kind", KINDS)
def test_without_classes_the_time_token_stands_alone(kind):
    net, x, t = network(kind, num_classes=0), torch.randn(2, 3, 8, 8), torch.tensor([10.0, 700.0])
    assert net.label is None
    assert net.condition(t, None).shape == (2, 1, 16)
    assert net.appended == (1 if kind == "in-context" else 0)
    assert torch.equal(net(x, t), net(x, t, torch.tensor([0, 2])))
    assert not torch.equal(net(x, t), net(x, t + 50))


def test_cross_attention_to_one_token_adds_one_vector():
    layer = stirred(CrossAttention(WIDTH, HEADS).double())
    assert isinstance(layer, CrossAttention)
    x, c = tokens(), tokens(1, seed=2)
    value = nn.functional.linear(c, layer.key_value.weight[WIDTH:], layer.key_value.bias[WIDTH:])
    torch.testing.assert_close(layer(x, c), layer.proj(value).expand(2, TOKENS, WIDTH))
    with pytest.raises(DitlabError, match="expected a width that 3 heads divide, found 16"):
        CrossAttention(16, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_appended_tokens_pass_on_what_windows_hide(kind):
    """Two layers of windows of 3x3 reach two tokens far; appended tokens see all and are seen by all."""
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    for attention, reaches in (("3", False), ("3,3", kind == "in-context")):
        net = network(kind, attention=attention, depth=len(attention.split(",")))
        net(x, torch.tensor([10.0]), torch.tensor([0]))[0, :, 0, 0].sum().backward()
        assert x.grad is not None
        assert bool(x.grad[..., 6:, 6:].any()) == reaches
        x.grad = None


@pytest.mark.parametrize("kind", KINDS)
def test_every_transform_of_the_analyses(kind):
    net, t, label = network(kind, attention="3,g").double(), torch.tensor([5.0]), torch.tensor([1])
    x, direction = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return net(x, t, label)

    with attention_kernel("math"):
        _, forward = torch.func.jvp(run, (x,), (direction,))
        _, pull = torch.func.vjp(run, x)
        torch.testing.assert_close((forward * forward).sum(), (pull(forward)[0] * direction).sum())
    step = 1e-6
    torch.testing.assert_close(forward, (run(x + step * direction) - run(x - step * direction)) / (2 * step))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_of_every_kind(kind):
    """Condition tokens are left out of the maps, whose rows then sum to 1 again."""
    denoiser = EDMDenoiser(network(kind, attention="3,g").requires_grad_(False))
    images, label = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([0, 2])
    layers = attention_layers(denoiser)
    assert [layer.extra for layer in layers] == [2, 2] if kind == "in-context" else [0, 0]
    found = attention_maps(denoiser, images, 0.5, label=label)
    for layer in layers:
        maps = found.maps[layer.number]
        assert maps.shape == (2, 2, 16, 16)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 16))
        assert not maps[..., ~layer.pattern.mask((4, 4))].any()
    result = measure_attention(denoiser, images, AttentionConfig(images=2, sigmas=(0.5,)), labels=label)
    assert result.extra == (2 if kind == "in-context" else 0)
    assert result.distance.shape == (1, 2, 2)
    assert np.isfinite(result.distance).all()


def test_the_spacing_of_diffusers():
    ours = frequencies(128, spacing="diffusers")
    expected = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 127)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    assert ours[-1] == pytest.approx(1e-4)
    assert frequencies(128)[-1] > 1.05e-4
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([999.0])
    original, other = (network("adaln-zero", time_frequencies=spacing) for spacing in ("original", "diffusers"))
    assert torch.equal(original(x, t * 0), other(x, t * 0))
    assert not torch.equal(original(x, t), other(x, t))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("block", "adaln-one", r"DiT config block 'adaln-one' \(nearest: adaln"),
        ("time_frequencies", "diffuser", r"DiT config time_frequencies 'diffuser' \(nearest: diffusers"),
    ],
)
def test_names_that_are_not_known(name, value, says):
    config = copy(DiTConfig())
    object.__setattr__(config, name, value)  # the type checks of these tests would not let it be made so
    with pytest.raises(DitlabError, match=says):
        config.__post_init__()


def test_norms_with_and_without_gain():
    for kind in KINDS:
        for affine in (True, False):
            made = DiT(DiTConfig(image_size=(4, 4), width=8, depth=1, heads=1, block=kind, affine=affine))
            norms = [m for m in made.modules() if isinstance(m, nn.LayerNorm)]
            assert len(norms) == (4 if kind == "cross-attention" else 3)
            plain = not issubclass(BLOCKS[kind], AdaLNBlock)
            assert {m.elementwise_affine for m in norms} == {affine and plain}
    assert issubclass(AdaLNZeroBlock, AdaLNBlock)
