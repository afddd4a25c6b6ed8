"""Small layers against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from ditlab.nn.layers import tanh_gelu


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_gelu_as_it_is_compiled_equals_its_tanh_form(dtype, close, monkeypatch):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = wide * (1 + torch.tanh((2 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3))) / 2
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        found = tanh_gelu(x)
        assert found.dtype == dtype
        assert ((found.double() - expected).abs() <= close * (1 + expected.abs())).all()
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert (grad.double() - slope).abs().max() <= 2 * close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_as_it_is_compiled_takes_large_values(dtype, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    found = tanh_gelu(x)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"))
    assert torch.autograd.grad(found.sum(), x)[0].tolist() == [0, 0, 0.5, 1, 1]
