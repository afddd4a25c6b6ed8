import pytest
import torch
from torch import nn

from ditlab.errors import DitlabError
from ditlab.nn import kernels
from ditlab.nn.attention import (
    Global,
    Partition,
    SelfAttention,
    Window,
    adapted_layers,
    attention,
    attention_kernel,
    capture_attention,
)
from ditlab.nn.kernels_cpu import make_tiles

# torch's own compiler imports do this.
quiet_compiler = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def layer(width=24, heads=3, grid=(6, 7), pattern=None, extra=0, seed=0):
    torch.manual_seed(seed)
    return SelfAttention(width, heads, grid, pattern or Window(3), extra=extra)


def run(module, x, kernel="auto", bfloat16=False):
    """Output and gradients."""
    x = x.detach().requires_grad_()
    with attention_kernel(kernel), torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        out = module(x).float()
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("pattern", [Global(), Window(3), Window(5, "shift"), Partition(2)])
def test_equals_torchs_multihead_attention(pattern):
    ours = layer(pattern=pattern)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 42, 24)
    expected = theirs(x, x, x, attn_mask=~pattern.mask((6, 7)), need_weights=False)[0]
    assert (ours(x) - expected).abs().max() < 1e-6


def test_number_of_parameters_does_not_depend_on_the_pattern():
    counts = {sum(p.numel() for p in layer(pattern=p).parameters()) for p in (Global(), Window(3), Partition(3))}
    assert counts == {4 * 24 * 24 + 4 * 24}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("pattern", [Global(), Window(3), Partition(4)])
def test_kernels_agree_in_the_layer(pattern, bfloat16):
    module = layer(width=36, heads=2, grid=(16, 16), pattern=pattern)
    x = torch.randn(2, 256, 36)
    expected = run(module, x, "math", bfloat16)
    for found, reference in zip(run(module, x, "auto", bfloat16), expected, strict=True):
        assert (found - reference).abs().max() <= (3e-2 if bfloat16 else 2e-5) * reference.abs().max()


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("pattern", [Global(), Window(3), Window(5, "shift"), Partition(2)])
def test_captured_maps_times_values_are_the_output(pattern, extra):
    module = layer(pattern=pattern, extra=extra)
    x = torch.randn(2, 42 + extra, 24)
    with capture_attention(module) as maps:
        out = module(x)
    (found,) = maps[0]
    assert found.shape == (2, 3, 42 + extra, 42 + extra)
    assert (found.sum(-1) - 1).abs().max() < 1e-6
    values = module.split(x)[2]
    assert (module.proj((found @ values).transpose(1, 2).flatten(2)) - out).abs().max() < 1e-6
    assert (found[..., :42, :42][..., ~pattern.mask((6, 7))] == 0).all()


def test_capture_sees_the_bias():
    module = layer(pattern=Global())
    x, bias = torch.randn(1, 42, 24), torch.randn(3, 42, 42)
    with capture_attention(module) as maps:
        module(x, bias)
        module(x, bias=bias)
        module(x)
    assert torch.equal(maps[0][0], maps[0][1])
    assert not torch.allclose(maps[0][0], maps[0][2])


def test_capture_takes_layers_by_number_and_leaves_nothing_behind():
    network = nn.Sequential(layer(seed=0), nn.Identity(), layer(seed=1), layer(seed=2))
    x = torch.randn(1, 42, 24)
    with capture_attention(network, [0, -1]) as maps:
        network(x)
        network(x)
    network(x)
    assert {number: len(found) for number, found in maps.items()} == {0: 2, 2: 2}
    assert not any(module._forward_hooks for module in network.modules())


def test_capture_hands_maps_over_instead_of_keeping_them():
    network = nn.Sequential(layer(seed=0), layer(seed=1), layer(seed=2))
    assert [module for module, _ in adapted_layers(network)] == list(network)
    x, seen = torch.randn(1, 42, 24), []
    with capture_attention(network, [1, 2]) as expected:
        network(x)
    with capture_attention(network, [1, 2], use=lambda number, found: seen.append((number, found))) as maps:
        network(x)
    assert maps == {1: [], 2: []}
    assert [number for number, _ in seen] == [1, 2]
    assert all(torch.equal(found, expected[number][0]) for number, found in seen)


def test_capture_refuses_what_is_not_there():
    with pytest.raises(DitlabError, match="SelfAttention layers, found none"), capture_attention(nn.Linear(2, 2)):
        pass
    with pytest.raises(DitlabError, match="layers below 1, found 1"), capture_attention(layer(), [1]):
        pass


def test_impossible_layers_are_refused():
    with pytest.raises(DitlabError, match="5 heads divide, found 24"):
        SelfAttention(24, 5, (4, 4))
    with pytest.raises(DitlabError, match="at most 4 on a grid of 4x4"):
        SelfAttention(24, 4, (4, 4), Window(5))


@pytest.mark.slow
@quiet_compiler
@pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
def test_flex_forward_equals_math_on_the_cpu():
    grid, extra = (5, 6), 5
    q, k, v = torch.randn(3, 1, 2, 35, 16).unbind(0)
    bias = torch.randn(2, 35, 35)
    with torch.no_grad():
        for pattern in (Window(3), Window(5, "shift"), Partition(3)):
            found = attention(q, k, v, pattern, grid, extra=extra, bias=bias, kernel="flex")
            expected = attention(q, k, v, pattern, grid, extra=extra, bias=bias, kernel="math")
            assert (found - expected).abs().max() < 1e-5


@pytest.mark.cuda
@quiet_compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("pattern", [Global(), Window(3), Window(9, "shift"), Partition(8)])
def test_kernels_agree_on_cuda(kernel, pattern):
    module = layer(width=126, heads=2, grid=(32, 32), pattern=pattern).cuda()
    x = torch.randn(2, 1024, 126, device="cuda")
    expected = run(module, x, "math", bfloat16=True)
    for found, reference in zip(run(module, x, kernel, bfloat16=True), expected, strict=True):
        assert (found - reference).abs().max() <= 3e-2 * reference.abs().max()


@pytest.mark.parametrize("kernel", ["auto", "math", "sdpa", "tiles"])
def test_masks_first_made_under_inference_mode_serve_training(kernel):
    layer = SelfAttention(width=8, heads=1, grid=(9, 7), pattern=Window(3))  # a grid of this test's own
    kernels._masks.clear()
    make_tiles.cache_clear()
    with attention_kernel(kernel):
        with torch.inference_mode():
            layer(torch.randn(2, 63, 8))
        layer(torch.randn(2, 63, 8)).sum().backward()
    assert layer.qkv.weight.grad is not None
