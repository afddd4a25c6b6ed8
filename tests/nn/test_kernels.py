import logging
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditlab.errors import DitlabError
from ditlab.nn import kernels
from ditlab.nn.kernels import attention, attention_kernel, attention_weights
from ditlab.nn.kernels_cpu import TilePass, Tiling, tiled_attention
from ditlab.nn.patterns import Global, Partition, Window

KERNELS = ("auto", "sdpa", "tiles")
# Largest error allowed, relative to the largest value: a few units in the last place of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}

patterns = st.one_of(
    st.just(Global()),
    st.builds(Window, st.integers(0, 5).map(lambda r: 2 * r + 1), st.sampled_from(["clip", "shift"])),
    st.builds(Partition, st.integers(1, 4)),
)
grids = st.tuples(st.integers(1, 9), st.integers(1, 19))


def tensors(grid, dtype, *, extra=0, images=2, heads=2, width=8, seed=0):
    """q, k, v and a gradient, strided as the layer's are."""
    tokens = grid[0] * grid[1] + extra
    packed = torch.randn(images, tokens, 4, heads, width, generator=torch.Generator().manual_seed(seed))
    return packed.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def output_and_gradients(q, k, v, grad, pattern, grid, kernel, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, pattern, grid, kernel=kernel, **options)
    assert out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def in_float64(q, k, v, grad, pattern, grid, **options):
    """The reference's."""
    return output_and_gradients(q.double(), k.double(), v.double(), grad.double(), pattern, grid, "math", **options)


def assert_close(found, expected, dtype):
    for ours, reference in zip(found, expected, strict=True):
        scale = max(1.0, reference.abs().max().item())
        assert (ours.double() - reference.double()).abs().max() <= TOLERANCE[dtype] * scale


def assert_equals_math(pattern, grid, kernel, dtype, **options):
    extra = options.get("extra", 0)
    q, k, v, grad = tensors(grid, dtype, extra=extra, width=options.pop("width", 8))
    expected = in_float64(q, k, v, grad, pattern, grid, **options)
    assert_close(output_and_gradients(q, k, v, grad, pattern, grid, kernel, **options), expected, dtype)
    with torch.no_grad():
        forward = attention(q, k, v, pattern, grid, kernel=kernel, **options)
    assert_close([forward], expected[:1], dtype)


@settings(max_examples=60, deadline=None)
@given(
    patterns,
    grids,
    st.sampled_from(KERNELS),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0, 3]),
    st.sampled_from([7, 8]),
)
def test_every_kernel_equals_math(pattern, grid, kernel, dtype, extra, width):
    assert_equals_math(pattern, grid, kernel, dtype, extra=extra, width=width)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.just(Global()), st.builds(Window, st.sampled_from([3, 5, 9]), st.sampled_from(["clip", "shift"]))),
    st.tuples(st.integers(3, 9), st.integers(3, 9)),
    st.sampled_from(
        [("flash", (2, 3)), ("flash", (4, 99)), ("plain", (2, 3)), ("plain", (4, 99)), ("plain", (99, 99))]
    ),
    st.sampled_from([("flash", (2, 3)), ("plain", (3, 4))]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0, 2]),
)
def test_every_way_of_tiling_equals_math(pattern, grid, forward, backward, dtype, extra):
    if forward[0] == "plain":
        backward = "plain", backward[1]
    q, k, v, grad = tensors(grid, dtype, extra=extra, width=7)
    expected = in_float64(q, k, v, grad, pattern, grid, extra=extra)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    tiling = Tiling(pattern, grid, TilePass(*forward), TilePass(*backward))
    assert Tiling.decode(tiling.encode()) == tiling
    out = tiled_attention(q, k, v, tiling.encode())[0]
    assert_close([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)], expected, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [63, 64])
def test_the_sizes_of_xs_and_s_equal_math(kernel, dtype, width):
    assert_equals_math(Window(7), (20, 20), kernel, dtype, width=width)
    assert_equals_math(Global(), (16, 16), kernel, dtype, width=width)


BORDERS = {"clipped": "clip", "natten": "shift"}
"""The golden's word -> ours."""


def recorded_case(fixture, key):
    """The pattern and the grid of a key such as "out64.clipped.w3"."""
    border, size = re.search(r"(clipped|natten)\w*\.w(\d+)", key).groups()
    return Window(int(size), BORDERS[border]), (fixture.config["H"], fixture.config["W"])


@pytest.mark.parametrize("kernel", ["math", *KERNELS])
@pytest.mark.golden_keys("08_local_attention", r"out64\.(clipped|natten)\.w\d+")
def test_outputs_equal_the_golden_ones(golden, golden_key, kernel):
    fixture = golden("08_local_attention")
    pattern, grid = recorded_case(fixture, golden_key)
    q, k, v = (fixture[f"in.{name}"] for name in "qkv")
    out = attention(q, k, v, pattern, grid, kernel=kernel)
    assert (out - fixture[golden_key]).abs().max() < fixture.tolerance("out64", 1)
    if kernel == "math":
        wide = attention(q.double(), k.double(), v.double(), pattern, grid, kernel=kernel)
        assert (wide - fixture[golden_key]).abs().max() < fixture.tolerance("out64")


@pytest.mark.parametrize("kernel", ["math", *KERNELS])
@pytest.mark.golden_keys("08_local_attention", r"out\.(clipped|natten)\.w\d+\.grad_[qkv]")
def test_gradients_equal_the_golden_ones(golden, golden_key, kernel):
    fixture = golden("08_local_attention")
    pattern, grid = recorded_case(fixture, golden_key)
    q, k, v, r = (fixture[f"in.{name}"] for name in "qkvr")
    place = 1 + "qkv".index(golden_key[-1])
    gradient = output_and_gradients(q, k, v, r, pattern, grid, kernel)[place]
    expected = fixture[golden_key]
    # In float32 as outputs are; the golden's own tolerance is that of a float64 gradient kept in float32.
    assert (gradient - expected).abs().max() < fixture.tolerance("out64", 1)
    wide = in_float64(q, k, v, r, pattern, grid)[place]
    assert (wide - expected).abs().max() < fixture.tolerance("grads")


@pytest.mark.parametrize("kernel", ["math", *KERNELS])
def test_full_attention_equals_the_golden_one(golden, kernel):
    fixture = golden("08_local_attention")
    q, k, v = (fixture[f"in.{name}"] for name in "qkv")
    out = attention(q, k, v, Global(), (fixture.config["H"], fixture.config["W"]), kernel=kernel)
    assert (out - fixture["out64.full"]).abs().max() < fixture.tolerance("out64", 1)


@pytest.mark.golden_keys("08_local_attention", r"out\.natten_weights\.w\d+")
def test_weights_equal_nattens(golden, golden_key):
    fixture = golden("08_local_attention")
    pattern, grid = recorded_case(fixture, golden_key)
    weights = attention_weights(fixture["in.q"], fixture["in.k"], pattern, grid)[0, 0]
    expected, mask = fixture[golden_key], fixture[f"mask.natten.w{pattern.size}"]
    assert (weights[mask].view(expected.shape) - expected).abs().max() < 1e-6
    assert (weights[~mask] == 0).all()


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "tiles"])
@pytest.mark.parametrize("pattern", [Global(), Window(3), Partition(2)])
def test_bias_is_added_and_gets_its_gradient(kernel, pattern):
    grid, extra = (4, 6), 2
    q, k, v, grad = tensors(grid, torch.float32, extra=extra)
    bias = torch.randn(2, 26, 26, generator=torch.Generator().manual_seed(1))
    found = []
    for name in ("math", kernel):
        leaf = bias.clone().requires_grad_()
        out = attention(q, k, v, pattern, grid, bias=leaf, extra=extra, kernel=name)
        found.append([out.detach(), torch.autograd.grad(out, leaf, grad)[0]])
    assert_close(found[1], found[0], torch.float32)


def test_math_is_differentiable_twice_and_forward():
    grid = (2, 3)
    q, k, v, _ = (x.double().requires_grad_() for x in tensors(grid, torch.float64, images=1, heads=1, width=2))

    def run(q, k, v):
        return attention(q, k, v, Window(3), grid, kernel="math")

    assert torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_math_takes_functional_transforms():
    grid = (3, 4)
    q, k, v, tangent = tensors(grid, torch.float64, images=1)

    def run(q):
        return attention(q, k, v, Window(3), grid, kernel="math")

    step = 1e-6
    by_difference = (run(q + step * tangent) - run(q - step * tangent)) / (2 * step)
    assert (torch.func.jvp(run, (q,), (tangent,))[1] - by_difference).abs().max() < 1e-8
    pulled = torch.func.vmap(torch.func.vjp(run, q)[1])(torch.stack([tangent, 2 * tangent]))[0]
    assert (pulled[1] - 2 * pulled[0]).abs().max() < 1e-12


@pytest.mark.parametrize("engine", ["plain", "flash"])
def test_the_operator_is_well_registered(engine):
    way = TilePass(engine, (2, 3))
    q, k, v = (x.detach().requires_grad_() for x in tensors((4, 5), torch.float32)[:3])
    torch.library.opcheck(
        tiled_attention,
        (q, k, v, Tiling(Window(3), (4, 5), way, way).encode()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_merging_the_heads_copies_nothing():
    q, k, v, _ = tensors((6, 6), torch.float32)
    out = attention(q, k, v, Window(3), (6, 6), kernel="tiles")
    assert out.transpose(1, 2).is_contiguous()


def test_mixed_dtypes_follow_the_queries():
    q, k, v, _ = tensors((4, 4), torch.float32)
    for kernel in ("math", *KERNELS):
        assert attention(q.bfloat16(), k, v, Window(3), (4, 4), kernel=kernel).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_work(dtype):
    q, k, v, _ = (x.to(dtype) for x in tensors((5, 5), torch.float64))
    out = attention(q, k, v, Window(3), (5, 5))
    assert (
        out.double() - attention(q.double(), k.double(), v.double(), Window(3), (5, 5), kernel="math")
    ).abs().max() < 5e-3


def test_the_context_sets_and_restores_the_kernel(monkeypatch):
    q, k, v, _ = tensors((4, 4), torch.float32)
    calls = []
    monkeypatch.setattr(kernels, "math_attention", lambda *a, **o: calls.append("math") or a[0])
    with attention_kernel("math"):
        attention(q, k, v, Window(3), (4, 4))
        with attention_kernel("sdpa"):
            attention(q, k, v, Window(3), (4, 4))
    attention(q, k, v, Window(3), (4, 4))
    assert calls == ["math"]


def test_unknown_kernels_name_the_near_ones():
    q, k, v, _ = tensors((2, 2), torch.float32)
    with pytest.raises(DitlabError, match="nearest: tiles"):
        attention(q, k, v, Global(), (2, 2), kernel="tile")
    with pytest.raises(DitlabError, match="unknown attention kernel"), attention_kernel("x"):
        pass


def test_a_wrong_number_of_tokens_is_said():
    q, k, v, _ = tensors((2, 3), torch.float32)
    with pytest.raises(DitlabError, match=r"expected 2x3 \+ 1 = 7 tokens, found 6"):
        attention(q, k, v, Global(), (2, 3), extra=1)


def test_a_fallback_warns_once(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_warned", set())
    q, k, v, _ = (x.requires_grad_() for x in tensors((4, 4), torch.float32))
    with caplog.at_level(logging.WARNING, "ditlab"):
        for _ in range(2):
            attention(q, k, v, Window(3), (4, 4), kernel="tiles", bias=torch.zeros(2, 16, 16))
            attention(q, k, v, Window(3), (4, 4), kernel="flex")
    assert len(caplog.messages) == 2
    assert all("sdpa" in message for message in caplog.messages)
