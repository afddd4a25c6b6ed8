"""Lean layers against torch's own: values, first and second derivatives, and what they leave out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditlab.analyses.jacobian.linear_backward import lean_layers
from ditlab.rng import torch_generator

CASES = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "without bias": nn.Conv2d(4, 6, 3, bias=False),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)),
    "dilated groups": nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
    "padded by name": nn.Conv2d(4, 6, 3, padding="same"),
    "padded by reflection": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(4, 6, 2, stride=2),
    "transposed in full": nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=1, output_padding=(1, 0), groups=2),
    "transposed and dilated": nn.ConvTranspose2d(4, 6, 3, dilation=2, bias=False),
    "group norm": nn.GroupNorm(2, 4),
    "group norm without weights": nn.GroupNorm(4, 4, eps=0.1, affine=False),
    "layer norm": nn.LayerNorm((7, 6)),
    "layer norm of the last": nn.LayerNorm(6, eps=0.1),
    "layer norm without weights": nn.LayerNorm(6, elementwise_affine=False),
    "layer norm without bias": nn.LayerNorm(6, bias=False),
    "silu": nn.SiLU(),
    "silu in place": nn.Sequential(nn.GELU(), nn.SiLU(inplace=True)),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU(approximate="tanh"),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch_generator(0, "test"), dtype=torch.float64)


def derivatives(layer: nn.Module) -> list[Tensor]:
    """Its output, J^T u, J v, and J v of several at once, of a function that is not linear."""
    x = draw(2, 4, 7, 6).requires_grad_()
    output = layer(x.tanh()).sin()
    u = draw(*output.shape).requires_grad_()
    (down,) = torch.autograd.grad(output, x, u, create_graph=True)
    v = draw(3, *x.shape)
    (up,) = torch.autograd.grad(down, u, v[0], retain_graph=True)
    (many,) = torch.autograd.grad(down, u, v, is_grads_batched=True)
    return [output.detach(), down.detach(), up, many]


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_torch(name):
    layer = CASES[name].double()
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(draw(*value.shape))
    expected = derivatives(layer)
    with lean_layers():
        found = derivatives(layer)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_weights_get_no_gradient_and_outside_all_is_as_before():
    layer, x = nn.Conv2d(4, 6, 3), torch.ones(1, 4, 5, 5, requires_grad=True)
    with lean_layers():
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with lean_layers():  # nothing but two-dimensional ones is touched
        line = F.conv1d(torch.ones(1, 1, 5), torch.ones(1, 1, 3, requires_grad=True))
    assert line.grad_fn is not None


def test_without_gradients_nothing_is_differentiated():
    x = draw(1, 4, 5, 5).requires_grad_()
    for layer in (nn.SiLU(), nn.GroupNorm(2, 4).double()):
        with lean_layers(), torch.no_grad():
            assert not layer(x).requires_grad
    with lean_layers():  # of the time, say
        assert not F.silu(x.detach()).requires_grad


class Dynamic(nn.Module):
    """Its weights are computed from the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Correlates the image with a piece of itself."""
        found = F.conv2d(x, weight=x[:, :, :3, :3], bias=x[:, 0, 0, 0])
        found = F.layer_norm(found, (4,), weight=found[0, 0, 0], bias=found[1, 0, 0])
        return F.group_norm(found, 1, weight=found[0, :, 0, 0])


def test_weights_that_depend_on_the_image_keep_their_part():
    expected = derivatives(Dynamic())
    with lean_layers():
        found = derivatives(Dynamic())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_no_convolution_is_computed_for_the_weight():
    """What it is for: of the two that torch computes in each second derivative, one."""
    counts = []
    for surroundings in (lean_layers, torch.enable_grad):
        x = draw(1, 4, 7, 6).requires_grad_()
        with surroundings():
            output = CASES["plain"].double()(x.tanh())
        u = draw(*output.shape).requires_grad_()
        (down,) = torch.autograd.grad(output, x, u, create_graph=True)
        with torch.profiler.profile() as profile:
            torch.autograd.grad(down, u, draw(*x.shape))
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::_convolution"))
    assert counts == [1, 2]


@pytest.mark.parametrize("name", ["group norm", "layer norm"])
def test_a_norm_is_one_kernel_each_way(name):
    """torch's own second derivative is made of a dozen operations."""
    x = draw(1, 4, 7, 6).requires_grad_()
    with lean_layers():
        output = CASES[name].double()(x.tanh())
    u = draw(*output.shape).requires_grad_()
    (down,) = torch.autograd.grad(output, x, u, create_graph=True)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(down, u, draw(*x.shape))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"aten::native_{name.replace(' ', '_')}_backward"] == 1
    assert not {"aten::pow", "aten::sub", "aten::sum"} & set(counts)
