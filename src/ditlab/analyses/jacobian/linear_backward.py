"""Layers whose backward pass is a linear map of the gradient, and is differentiated as one.

At one image the backward pass of any layer is linear in the gradient. torch's own layers, differentiated twice, also
compute what the derivatives by the weight or by the layer's input would need, whether or not anybody asks for them,
which up to doubles the cost of products with a Jacobian (the double backward trick of `operator`). Within
`lean_layers()` the common ones are linear maps of the gradient alone:

- two-dimensional convolutions whose weights are not computed from the image; nothing of the image is saved;
- layer and group normalization: d xhat = P dx with P symmetric, so that both directions are the same kernel;
- SiLU and GELU: f(x0) + f'(x0) (x - x0), with x0 the layer's input itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Rest = tuple[list[int], list[int], list[int], bool, list[int], int]
"""Stride, padding, dilation, whether it is transposed, output padding, groups: as `torch.convolution` has them."""


@contextmanager
def lean_layers() -> Iterator[None]:
    """Makes layers differentiate by their input alone, and their derivatives by the gradient alone."""
    with _Lean():
        yield


class _Lean(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        lean = _LEAN.get(func) if torch.is_grad_enabled() else None
        output = None if lean is None else lean(func, args, named)
        return func(*args, **named) if output is None else output


def _is_constant(weight: Tensor | None) -> bool:
    """Returns whether a weight cannot depend on the image."""
    return weight is None or weight.is_leaf


def _convolved(func: Callable[..., Tensor], args: Any, named: Any) -> Tensor | None:
    """Returns None if torch must do it: computed weights, padding by name, single images."""
    bound = dict(zip(_ARGUMENTS[func], args, strict=False)) | named
    image, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    by_name = any(isinstance(value, str) for value in bound.values())
    if by_name or image.ndim != 4 or not (_is_constant(weight) and _is_constant(bias)):
        return None
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    stride, padding, dilation, rest = (_two(bound.get(name, default)) for name, default in defaults.items())
    settings: Rest = (stride, padding, dilation, func is torch.conv_transpose2d, rest, bound.get("groups", 1))
    return _Convolution.apply(image, weight.detach(), None if bias is None else bias.detach(), settings)  # pyright: ignore[reportReturnType]


def _two(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, tuple | list | torch.Size) else [int(value)] * 2


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor, weight: Tensor, bias: Tensor | None, rest: Rest) -> Tensor:
        return torch.convolution(image, weight, bias, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        image, weight, _, ctx.rest = inputs
        ctx.shape = image.shape
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Backward.apply(grads[0], *ctx.saved_tensors, ctx.shape, ctx.rest), None, None, None


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, shape: torch.Size, rest: Rest) -> Tensor:
        # Without a gradient of the weight only the shape of the image is read.
        image = grad.new_empty(1).expand(shape)
        return torch.ops.aten.convolution_backward(grad, image, weight, None, *rest, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, weight, _, ctx.rest = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return torch.convolution(grads[0], weight, None, *ctx.rest), None, None, None


def _normed(func: Callable[..., Tensor], args: Any, named: Any) -> Tensor | None:
    """Returns None if torch must do it: computed weights, or weights of another dtype."""
    bound = dict(zip(("input", "groups", "weight", "bias", "eps"), args, strict=False)) | named
    x, weight, bias = bound["input"], bound.get("weight"), bound.get("bias")
    if not all(_is_constant(part) and (part is None or part.dtype == x.dtype) for part in (weight, bias)):
        return None
    weight, bias = (None if part is None else part.detach() for part in (weight, bias))
    at, eps = x.detach().contiguous(), bound.get("eps", 1e-5)
    if func is F.group_norm:
        groups = bound.get("groups", bound.get("num_groups"))
        sizes = (len(at), at.shape[1], at[0, 0].numel(), groups)
        value, mean, spread = torch.native_group_norm(at, weight, bias, *sizes, eps)
        weight = None if weight is None else weight.reshape(-1, *[1] * (at.ndim - 2))
    else:
        sizes = tuple(bound.get("groups", bound.get("normalized_shape")))
        value, mean, spread = torch.native_layer_norm(at, sizes, weight, bias, eps)
    return _Norm.apply(x, value, weight, at, mean, spread, func is F.group_norm, sizes)  # pyright: ignore[reportReturnType]


def _project(grad: Tensor, at: Tensor, mean: Tensor, spread: Tensor, grouped: bool, sizes: Any) -> Tensor:
    """P grad, P = (I - 1 1^T / n - xhat xhat^T / n) / std within each group."""
    wanted = [True, False, False]
    if grouped:
        return torch.ops.aten.native_group_norm_backward(grad.contiguous(), at, mean, spread, None, *sizes, wanted)[0]
    return torch.ops.aten.native_layer_norm_backward(grad.contiguous(), at, sizes, mean, spread, None, None, wanted)[0]


class _Norm(torch.autograd.Function):
    """Returns a known value, with the derivative of a normalization."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, value: Tensor, weight: Tensor | None, at: Tensor, mean: Tensor, spread: Tensor, *rest: Any
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.weight, at, mean, spread, *ctx.rest = inputs
        ctx.save_for_backward(at, mean, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scaled = grads[0] if ctx.weight is None else grads[0] * ctx.weight
        return _Projected.apply(scaled, *ctx.saved_tensors, *ctx.rest), *[None] * 7


class _Projected(torch.autograd.Function):
    """P as a linear map, its own transpose."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, at: Tensor, mean: Tensor, spread: Tensor, *rest: Any) -> Tensor:
        return _project(grad, at, mean, spread, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, at, mean, spread, *ctx.rest = inputs
        ctx.save_for_backward(at, mean, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _project(grads[0], *ctx.saved_tensors, *ctx.rest), *[None] * 5


def _activated(func: Callable[..., Tensor], args: Any, named: Any) -> Tensor | None:
    """Returns None if torch must do it: in place, or no function of the image."""
    x, *rest = (named["input"], *args) if "input" in named else args
    if named.get("inplace") or True in rest or not x.requires_grad:
        return None
    named = {name: value for name, value in named.items() if name != "input"}
    at = x.detach().requires_grad_()
    value = func(at, *rest, **named)
    (slope,) = torch.autograd.grad(value.sum(), at)
    # x - at is zero: the value is that of the function.
    return value.detach() + slope * (x - at.detach())


_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv_transpose2d: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_LEAN: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys(_ARGUMENTS, _convolved),
    **dict.fromkeys((F.layer_norm, F.group_norm), _normed),
    **dict.fromkeys((F.silu, F.gelu), _activated),
}
