"""Attention layers that are not ditlab's: their maps are those that they use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.attention.maps import attention_layers
from ditlab.analyses.attention.measure import measure_attention
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.nn.attention import Window, capture_attention, register_attention
from ditlab.nn.attention_adapters import QKBias, adapter_of

GRID = (4, 3)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kdim": 12}])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float", "a head"])
def test_maps_of_multihead_attention_are_the_weights_that_torch_returns(settings, batch_first, mask):
    layer = nn.MultiheadAttention(12, 3, batch_first=batch_first, **settings)
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(2, 12, 12) if batch_first else torch.randn(12, 2, 12)
    given = {
        None: None,
        "bool": ~Window(3).mask(GRID),
        "float": torch.randn(12, 12),
        "a head": torch.randn(6, 12, 12),
    }[mask]
    register_attention(layer, GRID)
    with capture_attention(layer) as maps:
        _, expected = layer(x, x, x, attn_mask=given, average_attn_weights=False)
    torch.testing.assert_close(maps[0][0], expected)


def encoder() -> nn.Module:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, y, sigma, label):
            tokens = self.layers(self.into(y).flatten(2).transpose(1, 2))
            return self.out(tokens.transpose(1, 2).reshape(-1, 16, *y.shape[2:]))

    return Mine().eval()


def test_torchs_own_encoder_is_measured():
    network = encoder()
    denoiser = Denoiser.wrap(network, shape=(3, 4, 4))
    with pytest.raises(DitlabError, match=r"found Mine with MultiheadAttention; give each to .*register_attention"):
        attention_layers(denoiser)
    y = torch.randn(2, 3, 4, 4)
    before = denoiser(y, 0.5)
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            register_attention(module, grid=(4, 4))
    assert [(layer.heads, layer.grid) for layer in attention_layers(denoiser)] == [(2, (4, 4))] * 2
    result = measure_attention(denoiser, torch.rand(3, 3, 4, 4), AttentionConfig(images=3, sigmas=(0.5,)))
    assert result.values("distance").shape == (1, 2, 2)
    torch.testing.assert_close(denoiser(y, 0.5), before)


class Own(nn.Module):
    """A layer of a user's own: one head, keys are the tokens themselves."""

    def forward(self, tokens, *, sharp):
        return (tokens @ tokens.transpose(1, 2) * sharp / tokens.shape[-1] ** 0.5).softmax(-1) @ tokens


def test_a_layer_of_ones_own_says_how_it_is_read():
    layer = Own()
    with pytest.raises(DitlabError, match="expected heads and read for a Own"):
        register_attention(layer, GRID)
    assert adapter_of(layer) is None
    register_attention(
        layer, GRID, heads=1, read=lambda args, named: QKBias(named["sharp"] * args[0][:, None], args[0][:, None])
    )
    tokens = torch.randn(2, 12, 5)
    with capture_attention(layer) as maps:
        out = layer(tokens, sharp=3.0)
    torch.testing.assert_close(maps[0][0][:, 0] @ tokens, out)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"key": torch.randn(2, 5, 12), "value": torch.randn(2, 5, 12)}, "tokens that see each other"),
        ({"key_padding_mask": torch.zeros(2, 12, dtype=torch.bool)}, "without key_padding_mask"),
    ],
)
def test_what_is_no_self_attention_is_refused(inputs, says):
    layer = register_attention(nn.MultiheadAttention(12, 3, batch_first=True), GRID)
    x = torch.randn(2, 12, 12)
    with pytest.raises(DitlabError, match=says), capture_attention(layer):
        layer(**{"query": x, "key": x, "value": x, **inputs})
