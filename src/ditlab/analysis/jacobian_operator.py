"""Products with a denoiser's Jacobian at one noisy image, and the whole matrix made of them.

J^T u is one backward pass through a graph of the estimate that is built once. J v is one backward pass as well: J^T u
is linear in u, so its derivative by u, applied to v, is J v (the double backward trick). The graph of J^T u is built
once, too, so that J v costs about as much as J^T u, where forward mode would run the network again each time (measured
in benchmarks/jacobian.py). It needs a second derivative of every operation, which the fused attention kernels lack:
that graph is built with plain attention.

Source: Townsend, "A new trick for calculating Jacobian vector products" (2017).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditlab.analysis.jacobian_result import Mode, Target
from ditlab.analysis.lean_layers import lean_layers
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.nn.attention import attention_kernel
from ditlab.randomness import torch_generator

Pass = Literal["forward", "reverse"]

_UNSEEN = (
    "jacobian: expected a differentiable denoiser, found one whose estimate does not depend on the image as far as "
    "torch can see (computed outside torch, detached, or without gradients)"
)


_EQUAL = 1e-3
"""By how much of its length an estimate may differ from the same one made again."""


class JacobianOperator:
    """The Jacobian of a denoiser's target at one noisy image y, D x D with D = C H W, as products with vectors.

    With a = 1 / (sigma * scale(sigma)) and J_D = dD/dy the targets are J_D ("x0"), a (I - J_D) ("eps", by x_t) and
    I - a (I - J_D) ("I-eps"). The estimate that the target speaks of is differentiated itself.

    Neither the network's weights nor their requires_grad, gradients, buffers or mode change. It works under
    `torch.no_grad` and `torch.inference_mode`. Compiled networks run uncompiled, for compiled ones have no second
    derivative.

    Args:
        denoiser: one in evaluation mode.
        y: the noisy image [1, C, H, W], float32 or float64; products have its dtype.
        sigma: noise level.
        label: class of the image, int64 [1], or None.
        target: whose Jacobian.

    Raises:
        DitlabError: an image, a level or a label that the denoiser does not know, a network in training mode, an
            estimate that is not finite or not differentiable.

    Example:
        >>> half = Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(1, 2, 2))
        >>> JacobianOperator(half, torch.zeros(1, 1, 2, 2), 0.3).matrix().diagonal()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        y: Float[Tensor, "1 c h w"],
        sigma: float,
        label: Int64[Tensor, " 1"] | None = None,
        target: Target = "x0",
    ) -> None:
        self.denoiser, self.sigma, self.label, self.target = denoiser, float(sigma), label, target
        module = denoiser.module
        if module is not None and any(part.training for part in module.modules()):
            raise DitlabError("jacobian: expected a network in evaluation mode (network.eval()), found training mode")
        with _gradients():
            # Made anew, for y may come out of inference mode, whose tensors autograd does not take.
            self.y = y.detach().to(denoiser.device).clone()
        denoiser.check(self.y, self.sigma, label)
        self.size = self.y.numel()
        self.scale = float(denoiser.scale(self.sigma))
        self.products = 0
        """How many products were computed so far."""
        self._graphs: dict[Pass, tuple[Tensor, Tensor]] = {}
        # A GPU gains from many at once, as single ones leave it idle; a CPU only where networks are tiny (0.6 to 1.2
        # times as fast where an image takes milliseconds or more).
        self._at_once = self.y.is_cuda

    def forward(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """J v for each of the rows v; on the device and in the dtype of y.

        Raises:
            DitlabError: an operation of the network has no second derivative.
        """
        return self._affine(self._products("forward", vectors), vectors)

    def reverse(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """J^T u for each of the rows u; on the device and in the dtype of y."""
        return self._affine(self._products("reverse", vectors), vectors)

    def function(self, y: Float[Tensor, "1 c h w"]) -> Float[Tensor, " d"]:
        """The target itself at another noisy image, what J is the derivative of: D(y), the estimated noise, or x_t less
        that noise."""
        with torch.no_grad():
            found = self._estimate(y).reshape(-1)
            return found if self.target != "I-eps" else y.reshape(-1) * self.scale - found

    def check(self) -> None:
        """Raises DitlabError where there is no Jacobian: the estimate is not finite or differentiable, or it is another
        one each time; not for all that can be wrong with single entries."""
        self._products("reverse", torch.ones(1, self.size))
        first = self._graphs["reverse"][0].detach()
        with _gradients():
            second = self._reverse_graph()[0].detach()
        # Equal but for the order of sums on a GPU.
        if float((first - second).norm()) > _EQUAL * float(first.norm()):
            raise DitlabError(
                "jacobian: expected a denoiser that estimates the same of the same image, found one that is random "
                "(dropout of a network in training mode?)"
            )

    def fastest(self, chunk: int = 16) -> Pass:
        """The cheaper of the two passes, as a few vectors show; reverse where there is no forward one."""
        count = min(chunk, self.size) if self._at_once else 2
        some = torch.eye(count, self.size, dtype=self.y.dtype, device=self.y.device)
        taken: dict[Pass, float] = {}
        for which in ("reverse", "forward"):
            try:
                self._products(which, some[:1])
                start = _now(self.y.device)
                self._products(which, some)
                taken[which] = _now(self.y.device) - start
            except DitlabError:
                if which == "reverse":
                    raise
        # Reverse where there is little between them: it needs less memory.
        best: Pass = "forward" if taken.get("forward", float("inf")) < 0.9 * taken["reverse"] else "reverse"
        self._graphs = {best: self._graphs[best]}
        return best

    def matrix(
        self, chunk: int = 16, mode: Mode = "auto", progress: Callable[[int], object] | None = None
    ) -> Float[Tensor, "d d"]:
        """The whole Jacobian on the CPU, rows output values, columns input values, in the dtype of y.

        Args:
            chunk: rows or columns at once.
            mode: "forward" for columns, "reverse" for rows, "auto" for the faster one.
            progress: called with the number of rows or columns that are done.

        Raises:
            DitlabError: an entry that is not finite.
        """
        which: Pass = self.fastest(chunk) if mode == "auto" else mode
        product = self.forward if which == "forward" else self.reverse
        result = torch.empty(self.size, self.size, dtype=self.y.dtype)
        for start in range(0, self.size, chunk):
            stop = min(start + chunk, self.size)
            some = torch.zeros(stop - start, self.size, dtype=self.y.dtype, device=self.y.device)
            some[torch.arange(stop - start), torch.arange(start, stop)] = 1
            result[start:stop] = product(some).cpu()
            if progress is not None:
                progress(stop)
        if not torch.isfinite(result).all():
            raise self.not_finite()
        return result.T if which == "forward" else result

    def not_finite(self) -> DitlabError:
        """What is raised where a product has entries that are not finite."""
        return DitlabError(f"jacobian: the derivative at noise level {self.sigma:.4g} is not finite")

    def _estimate(self, y: Tensor) -> Tensor:
        found = self.denoiser.estimate(y, self.sigma, self.label)
        return found.x0 if self.target == "x0" else found.eps

    def _affine(self, products: Tensor, vectors: Tensor) -> Tensor:
        """Products with the estimate's derivative by y as products with the target's Jacobian."""
        if self.target == "x0":
            return products
        products = products / self.scale
        return products if self.target == "eps" else vectors.to(products) - products

    def _products(self, which: Pass, vectors: Tensor) -> Tensor:
        try:
            return self._differentiate(which, vectors)
        except torch.OutOfMemoryError as error:
            raise DitlabError(
                f"jacobian: the memory of {self.y.device} does not hold the network's graph and {len(vectors)} vectors "
                "at once; a smaller --chunk needs less"
            ) from error

    def _differentiate(self, which: Pass, vectors: Tensor) -> Tensor:
        with _gradients():
            if which not in self._graphs:
                self._graphs[which] = self._reverse_graph() if which == "reverse" else self._forward_graph()
            output, by = self._graphs[which]
            shaped = vectors.detach().to(output).clone().reshape(len(vectors), *output.shape)
            self.products += len(shaped)
            try:
                if self._at_once:
                    (found,) = torch.autograd.grad(output, by, shaped, retain_graph=True, is_grads_batched=True)
                else:
                    found = torch.stack([torch.autograd.grad(output, by, v, retain_graph=True)[0] for v in shaped])
            except (RuntimeError, NotImplementedError) as error:
                raise self._no_derivative(which, error) from error
            return found.detach().reshape(len(vectors), self.size)

    def _reverse_graph(self) -> tuple[Tensor, Tensor]:
        """The estimate and its input."""
        with plain_attention() if self._at_once else _eager():
            return self._run()

    def _forward_graph(self) -> tuple[Tensor, Tensor]:
        """J^T u and its u, whose value matters for one check alone."""
        generator = torch_generator(0, "jacobian", "adjoint")
        first, second = (torch.randn(self.y.shape, generator=generator).to(self.y) for _ in range(2))
        with plain_attention():
            with lean_layers():
                output, y = self._run()
            u = first.requires_grad_()
            try:
                (product,) = torch.autograd.grad(output, y, u, create_graph=True)
            except (RuntimeError, NotImplementedError) as error:
                raise self._no_derivative("reverse", error) from error
            try:
                (other,) = torch.autograd.grad(product, u, second, retain_graph=True)
            except (RuntimeError, NotImplementedError) as error:
                raise self._no_derivative("forward", error) from error
        # <J v, u> = <v, J^T u>. An operation whose backward pass torch does not see would drop out of J v in silence.
        with torch.no_grad():
            apart = abs(float((other * u).sum() - (second * product).sum()))
            lengths = float(torch.maximum(other.norm(), product.norm()) * u.norm())
        if apart > 1e-3 * lengths:
            raise self._no_derivative("forward", "products with J and with its transpose do not agree")
        return product, u

    def _run(self) -> tuple[Tensor, Tensor]:
        y = self.y.clone().requires_grad_()
        try:
            output = self._estimate(y)
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise DitlabError(
                "jacobian: expected a denoiser whose tensors were made outside torch.inference_mode, found others"
            ) from error
        if not torch.isfinite(output).all():
            raise DitlabError(f"jacobian: the denoiser's estimate at noise level {self.sigma:.4g} is not finite")
        if not output.requires_grad:
            raise DitlabError(_UNSEEN)
        return output, y

    def _no_derivative(self, which: Pass, error: object) -> Exception:
        if isinstance(error, torch.OutOfMemoryError):
            return error
        if which == "reverse" and "not have been used" in str(error):
            return DitlabError(_UNSEEN)
        order = "first" if which == "reverse" else "second"
        instead = "" if which == "reverse" else "; the whole matrix in reverse mode needs none"
        return DitlabError(
            f"jacobian: expected a denoiser whose operations all have a {order} derivative, found one without "
            f"({str(error).splitlines()[0]}){instead}"
        )


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within it attention is computed by operations that can be differentiated twice, in ditlab's layers and in those
    that call torch's `scaled_dot_product_attention`; compiled modules run uncompiled."""
    with attention_kernel("math"), sdpa_kernel(SDPBackend.MATH), _eager():
        yield


@contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _gradients() -> Iterator[None]:
    """Gradients on whatever the caller has switched off, and no word of torch's on what it does one by one."""
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
