"""Attention from projection to projection in one tensor, against the reference and against attention of three."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ditlab.nn import kernels_cpu
from ditlab.nn.attention import Global, Partition, SelfAttention, Window, attention, attention_kernel
from ditlab.nn.kernels_cpu import TilePass, Tiling, packed_attention, tiled_attention, unpack_qkv

WAYS = (TilePass("flash", (2, 3)), TilePass("plain", (2, 3)), TilePass("plain", (99, 99)))


def leaves(grid, dtype, *, extra=0, heads=2, width=7, images=2):
    """Packed queries, keys and values, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1] + extra
    packed = torch.randn(images, tokens, 3, heads, width, generator=generator).to(dtype)
    grad = torch.randn(images, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)
    return packed.requires_grad_(), grad


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.just(Global()), st.builds(Window, st.sampled_from([3, 5]), st.sampled_from(["clip", "shift"]))),
    st.tuples(st.integers(3, 8), st.integers(3, 8)),
    st.sampled_from(WAYS),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0, 2]),
    st.sampled_from([1, 7, 8]),
)
def test_heads_padded_with_zeros_equal_math(pattern, grid, way, dtype, extra, width):
    packed, grad = leaves(grid, dtype, extra=extra, width=width)
    wide = packed.detach().double().requires_grad_()
    expected = attention(*unpack_qkv(wide), pattern, grid, extra=extra, kernel="math")
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    spare = -width % 8
    out = packed_attention(F.pad(packed, (0, spare)), width, Tiling(pattern, grid, way, way).encode())[0]
    (found,) = torch.autograd.grad(out, packed, F.pad(grad, (0, spare)))
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    assert (out[..., width:] == 0).all()
    for ours, theirs in ((out[..., :width], expected), (found, expected_grad)):
        assert (ours.double() - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_one_tensor_gives_what_three_give(way, dtype):
    packed, grad = leaves((5, 6), dtype, width=8, extra=1)
    q, k, v = (x.detach().requires_grad_() for x in unpack_qkv(packed))
    tiling = Tiling(Window(3), (5, 6), way, way).encode()
    out, expected = packed_attention(packed, 8, tiling)[0], tiled_attention(q, k, v, tiling)[0]
    assert torch.equal(out, expected)
    (found,) = torch.autograd.grad(out, packed, grad)
    for ours, theirs in zip(unpack_qkv(found), torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("room", [1, 3000, 1 << 30])
def test_the_room_for_scores_changes_nothing(way, room, monkeypatch):
    packed, grad = leaves((5, 6), torch.float32, heads=3, images=3, width=8)

    def run():
        out = packed_attention(packed, 8, Tiling(Window(3), (5, 6), way, way).encode())[0]
        return [out, *torch.autograd.grad(out, packed, grad)]

    expected = run()
    # From all images and heads together to one image and head at a time.
    monkeypatch.setattr(kernels_cpu, "_CACHE", room)
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_operator_is_well_registered(way):
    packed, _ = leaves((4, 5), torch.float32, width=8)
    torch.library.opcheck(
        packed_attention,
        (packed, 7, Tiling(Window(3), (4, 5), way, way).encode()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def run(layer, x, kernel):
    x = x.detach().requires_grad_()
    with attention_kernel(kernel):
        out = layer(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("width", [14, 16, 18])
@pytest.mark.parametrize("pattern", [Global(), Window(3), Window(5, "shift"), Partition(3)])
def test_a_layer_by_strips_equals_math(pattern, width, extra):
    torch.manual_seed(0)
    layer = SelfAttention(width, 2, (6, 6), pattern, extra=extra)
    x = torch.randn(2, 36 + extra, width)
    for found, expected in zip(run(layer, x, "tiles"), run(layer, x, "math"), strict=True):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_layer_takes_the_packed_way_where_strips_compute_it(monkeypatch):
    seen = []
    inner = SelfAttention._by_tiles
    monkeypatch.setattr(SelfAttention, "_by_tiles", lambda self, x, how: seen.append(how) or inner(self, x, how))
    layer, x = SelfAttention(16, 2, (6, 6), Window(3)), torch.randn(1, 36, 16)
    run(layer, x, "tiles")
    assert len(seen) == 1
    run(layer, x, "sdpa")
    run(layer, x, "math")
    layer(x, bias=torch.zeros(2, 36, 36))
    assert len(seen) == 1


def test_autocast_leaves_float64_to_another_kernel():
    layer, x = SelfAttention(14, 2, (6, 6), Window(3)).double(), torch.randn(1, 36, 14, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(run(layer, x, "tiles"), run(layer, x, "math"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("width", [14, 16])
def test_a_projection_without_a_bias(width):
    layer, x = SelfAttention(width, 2, (6, 6), Window(3)), torch.randn(2, 36, width)
    layer.qkv = torch.nn.Linear(width, 3 * width, bias=False)
    for found, expected in zip(run(layer, x, "tiles"), run(layer, x, "math"), strict=True):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [14, 16])
def test_no_images(width, dtype):
    layer = SelfAttention(width, 2, (6, 6), Window(3)).to(dtype)
    out, *gradients = run(layer, torch.randn(0, 36, width, dtype=dtype), "tiles")
    assert out.shape == (0, 36, width)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("projection", ["qkv", "proj"])
def test_projections_that_are_watched_or_replaced_are_called(projection):
    layer, x = SelfAttention(14, 2, (6, 6), Window(3)), torch.randn(1, 36, 14)
    seen = []
    handle = getattr(layer, projection).register_forward_hook(lambda *given: seen.append(1))
    run(layer, x, "tiles")
    assert seen == [1]
    handle.remove()
    handle = getattr(layer, projection).register_full_backward_pre_hook(lambda *given: seen.append(2))
    run(layer, x, "tiles")
    assert seen == [1, 2]
    handle.remove()

    plain = getattr(layer, projection)
    plain.forward = lambda x: 2 * F.linear(x, plain.weight, plain.bias)
    found, expected = (run(layer, x, kernel)[0] for kernel in ("tiles", "math"))
    assert (found - expected).abs().max() < 1e-5
    del plain.forward

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(plain.in_features, plain.out_features)
    doubled.load_state_dict(plain.state_dict())
    setattr(layer, projection, doubled)
    found, expected = (run(layer, x, kernel)[0] for kernel in ("tiles", "math"))
    assert (found - expected).abs().max() < 1e-5
