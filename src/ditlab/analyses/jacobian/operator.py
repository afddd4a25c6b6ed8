"""Products with a denoiser's Jacobian at one noisy image, and the whole matrix made of them.

J^T u is one backward pass through a graph of the estimate that is built once. J v is one backward pass as well: J^T u
is linear in u, so its derivative by u, applied to v, is J v (the double backward trick). The graph of J^T u is built
once, too, so that J v costs about as much as J^T u, where forward mode would run the network again each time (measured
in benchmarks/jacobian.py). It needs a second derivative of every operation, which the fused attention kernels lack:
that graph is built with plain attention.

Products with many vectors at once: the network runs on copies of the image, and one backward pass gives each copy its
own vector. This is faster than one vector at a time if a single image leaves the processor idle. It is used if a few
timed vectors are faster (CPU; on a GPU `vmap` runs over the vectors).

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

from ditlab.analyses.jacobian.config import Mode, Target
from ditlab.analyses.jacobian.linear_backward import lean_layers
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.memory import available_memory
from ditlab.nn.attention import attention_kernel
from ditlab.rng import torch_generator

Pass = Literal["forward", "reverse"]

_UNSEEN = (
    "jacobian: expected a differentiable denoiser, found one whose estimate does not depend on the image as far as "
    "torch can see (computed outside torch, detached, or without gradients)"
)

_EQUAL = 1e-3
"""The relative difference that an estimate, or a product, may have from the same one computed again."""
_COPIES = 8
"""Copies of the image in a graph. More copies gained little (measured: 2.0 and 2.1 times as fast as one at a time for 8
and 16 on a small UNet, 1.6 and 1.7 on a DiT with local attention)."""
_GAIN = 0.95
"""Copies are used if they take at most this share of the time of one vector at a time."""
_UNKNOWN_ROOM = 2 << 30
"""Bytes assumed to be free where the system does not report them."""


class JacobianOperator:
    """The Jacobian of a denoiser's target at one noisy image y, D x D with D = C H W, as products with vectors.

    With a = 1 / (sigma * scale(sigma)) and J_D = dD/dy the targets are J_D ("x0"), a (I - J_D) ("eps", by x_t) and
    I - a (I - J_D) ("I-eps"). The estimate of the target is differentiated directly.

    Products have the dtype of y, float32 or float64, and are on its device. The network's weights, their requires_grad,
    gradients, buffers and mode do not change. It works under `torch.no_grad` and `torch.inference_mode`. Compiled
    networks run uncompiled, because compiled ones have no second derivative.

    Raises:
        DitlabError: an image, a level or a label that the denoiser does not take, a network in training mode, an
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
            # A copy, because autograd does not take tensors that were made in inference mode.
            self.y = y.detach().to(denoiser.device).clone()
        denoiser.check(self.y, self.sigma, label)
        self.size = self.y.numel()
        self.scale = float(denoiser.scale(self.sigma))
        self.products = 0
        """The number of products so far."""
        # By pass and number of copies of the image.
        self._graphs: dict[tuple[Pass, int], tuple[Tensor, Tensor]] = {}
        # The number of copies that is used; absent before it was tried.
        self._copies: dict[Pass, int] = {}
        self._vmap = self.y.is_cuda

    def forward(self, vectors: Float[Tensor, "k d"], *, together: bool = False) -> Float[Tensor, "k d"]:
        """Returns J v for each of the rows v.

        `together`: several at once if that is faster, timed on the first rows. Results then differ from call to call by
        float rounding.
        """
        return self._affine(self._products("forward", vectors, together), vectors)

    def reverse(self, vectors: Float[Tensor, "k d"], *, together: bool = False) -> Float[Tensor, "k d"]:
        """Returns J^T u for each of the rows u; `together` as in `forward`."""
        return self._affine(self._products("reverse", vectors, together), vectors)

    def function(self, y: Float[Tensor, "1 c h w"]) -> Float[Tensor, " d"]:
        """Returns the target itself at another noisy image, of which J is the derivative: D(y), the estimated noise, or
        x_t minus that noise."""
        with torch.no_grad():
            estimate = self._estimate(y).reshape(-1)
            return estimate if self.target != "I-eps" else y.reshape(-1) * self.scale - estimate

    def check(self) -> None:
        """Raises DitlabError if the estimate is not finite, not differentiable, or random; does not check every entry
        of the Jacobian."""
        self._products("reverse", torch.ones(1, self.size))
        first = self._graphs["reverse", 1][0].detach()
        with _gradients():
            second = self._reverse_graph()[0].detach()
        # Equal but for the order of sums on a GPU.
        if float((first - second).norm()) > _EQUAL * float(first.norm()):
            raise DitlabError(
                "jacobian: expected a denoiser that gives equal estimates of equal images, found one that is random "
                "(dropout of a network in training mode?)"
            )

    def fastest(self, chunk: int = 16) -> Pass:
        """Returns the faster of the two passes, timed on a few vectors; reverse if the forward pass is not possible."""
        some = torch.eye(min(chunk, self.size), self.size, dtype=self.y.dtype, device=self.y.device)
        taken: dict[Pass, float] = {}
        for which in ("reverse", "forward"):
            try:
                # The first call determines the number of copies.
                self._products(which, some[:1] if self._vmap else some, together=True)
                few = some if self._vmap else some[: max(2, self._copies.get(which, 1))]
                start = _now(self.y.device)
                self._products(which, few, together=True)
                taken[which] = (_now(self.y.device) - start) / len(few)
            except DitlabError:
                if which == "reverse":
                    raise
        # Reverse where the difference is small: it needs less memory.
        best: Pass = "forward" if taken.get("forward", float("inf")) < 0.9 * taken["reverse"] else "reverse"
        self._graphs = {(which, copies): graph for (which, copies), graph in self._graphs.items() if which == best}
        return best

    def matrix(
        self, chunk: int = 16, mode: Mode = "auto", progress: Callable[[int], object] | None = None
    ) -> Float[Tensor, "d d"]:
        """Returns the whole Jacobian on the CPU, rows output values, columns input values.

        It is made of at most `chunk` columns ("forward") or rows ("reverse") at once; `progress` is called with the
        number that is done.
        """
        which: Pass = self.fastest(chunk) if mode == "auto" else mode
        product = self.forward if which == "forward" else self.reverse
        result = torch.empty(self.size, self.size, dtype=self.y.dtype)
        for start in range(0, self.size, chunk):
            stop = min(start + chunk, self.size)
            some = torch.zeros(stop - start, self.size, dtype=self.y.dtype, device=self.y.device)
            some[torch.arange(stop - start), torch.arange(start, stop)] = 1
            result[start:stop] = product(some, together=True).cpu()
            if progress is not None:
                progress(stop)
        if not torch.isfinite(result).all():
            raise self.not_finite()
        return result.T if which == "forward" else result

    def not_finite(self) -> DitlabError:
        """Returns the error for a product with entries that are not finite."""
        return DitlabError(f"jacobian: the derivative at noise level {self.sigma:.4g} is not finite")

    def _estimate(self, y: Tensor) -> Tensor:
        label = self.label if self.label is None else self.label.expand(len(y))
        estimate = self.denoiser.estimate(y, self.sigma, label)
        return estimate.x0 if self.target == "x0" else estimate.eps

    def _affine(self, products: Tensor, vectors: Tensor) -> Tensor:
        """Products with the estimate's derivative by y as products with the target's Jacobian."""
        if self.target == "x0":
            return products
        products = products / self.scale
        return products if self.target == "eps" else vectors.to(products) - products

    def _products(self, which: Pass, vectors: Tensor, together: bool = False) -> Tensor:
        """Returns products of rows with the estimate's derivative by y."""
        try:
            with _gradients():
                output, by = self._graph(which)
                vectors = vectors.detach().to(output).clone()
                self.products += len(vectors)
                with self._explained(which):
                    if not self._vmap:
                        return self._one_by_one(which, vectors, together)
                    shaped = vectors.reshape(len(vectors), *output.shape)
                    (batch,) = torch.autograd.grad(output, by, shaped, retain_graph=True, is_grads_batched=True)
                    return batch.detach().reshape(len(vectors), self.size)
        except torch.OutOfMemoryError as error:
            raise DitlabError(
                f"jacobian: the memory of {self.y.device} does not hold the network's graph and {len(vectors)} vectors "
                "at once; a smaller `chunk` needs less"
            ) from error

    def _one_by_one(self, which: Pass, vectors: Tensor, together: bool) -> Tensor:
        """Returns the products of one vector after the other, or of several on copies of the image."""
        products = []
        if together and which not in self._copies:
            products = [self._try_copies(which, vectors)]
        copies = self._copies.get(which, 1) if together else 1
        done = sum(map(len, products))
        while done < len(vectors):
            # A graph for the remaining vectors would cost more than it saves.
            count = copies if done + copies <= len(vectors) else 1
            products.append(self._pass(which, vectors[done : done + count]))
            done += count
        return torch.cat(products)

    def _graph(self, which: Pass, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Returns an output and its input; products are the output's gradients by it."""
        if (which, copies) not in self._graphs:
            make = self._reverse_graph if which == "reverse" else self._forward_graph
            self._graphs[which, copies] = make(copies)
        return self._graphs[which, copies]

    def _pass(self, which: Pass, vectors: Tensor) -> Tensor:
        """One backward pass through a graph with as many copies of the image as there are vectors."""
        output, by = self._graph(which, len(vectors))
        (products,) = torch.autograd.grad(output, by, vectors.reshape(output.shape), retain_graph=True)
        return products.detach().reshape(vectors.shape)

    def _try_copies(self, which: Pass, vectors: Tensor) -> Tensor:
        """Decides how many copies of the image this pass uses; returns products with the first few vectors."""
        copies = min(_COPIES, len(vectors) // 2)
        if copies < 2:
            return vectors[:0]
        self._copies[which] = 1
        first = self._pass(which, vectors[:1])
        start = _now(self.y.device)
        singles = torch.cat([first, self._pass(which, vectors[1:2])])
        single = _now(self.y.device) - start
        free = available_memory()
        try:
            # Of a derivative of a derivative the graph is about three times as large.
            needed = copies * self._graph_bytes(which) * (1 if which == "reverse" else 3)
            if needed > (_UNKNOWN_ROOM if free is None else free) / 2:
                return singles
            several = self._pass(which, vectors[:copies])
            # The first pass through a graph is slower, for its memory is new.
            start = _now(self.y.device)
            more = self._pass(which, vectors[copies : 2 * copies])
            taken = _now(self.y.device) - start
        except Exception:
            # The denoiser takes one image only, or its graph cannot be inspected, or memory ran out after all. One
            # image at a time has just worked.
            self._graphs.pop((which, copies), None)
            return singles
        # Unequal where images of a batch see each other.
        equal = float((several[:2] - singles).norm()) <= _EQUAL * float(singles.norm())
        if equal and taken < _GAIN * single * copies:
            self._copies[which] = copies
            return torch.cat([several, more])
        del self._graphs[which, copies]
        return singles

    def _graph_bytes(self, which: Pass) -> int:
        """Returns the bytes that one run of the network saves for its backward pass, without its weights, with the
        attention of this pass's graph."""
        module = self.denoiser.module
        weights = {value.untyped_storage().data_ptr() for value in module.parameters()} if module is not None else set()
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        attention = _eager() if which == "reverse" else plain_attention()
        with attention, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._run()
        return sum(size for place, size in saved.items() if place not in weights)

    def _reverse_graph(self, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Returns the estimate and its input."""
        with plain_attention() if self._vmap else _eager():
            return self._run(copies)

    def _forward_graph(self, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Returns J^T u and its u, whose value only matters for the check."""
        generator = torch_generator(0, "jacobian", "adjoint")
        shape = (copies, *self.y.shape[1:])
        first, second = (torch.randn(shape, generator=generator).to(self.y) for _ in range(2))
        with plain_attention():
            with lean_layers():
                output, y = self._run(copies)
            u = first.requires_grad_()
            with self._explained("reverse"):
                (product,) = torch.autograd.grad(output, y, u, create_graph=True)
            with self._explained("forward"):
                (other,) = torch.autograd.grad(product, u, second, retain_graph=True)
        # <J v, u> = <v, J^T u>. An operation whose backward pass torch does not see would drop out of J v in silence.
        with torch.no_grad():
            apart = abs(float((other * u).sum() - (second * product).sum()))
            lengths = float(torch.maximum(other.norm(), product.norm()) * u.norm())
        if apart > 1e-3 * lengths:
            raise _no_derivative("forward", "products with J and with its transpose do not agree")
        return product, u

    def _run(self, copies: int = 1) -> tuple[Tensor, Tensor]:
        y = self.y.repeat(copies, 1, 1, 1).requires_grad_()
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

    @contextmanager
    def _explained(self, which: Pass) -> Iterator[None]:
        """Turns torch's error about a derivative of this pass into a sentence."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            unused = which == "reverse" and "not have been used" in str(error)
            raise DitlabError(_UNSEEN) if unused else _no_derivative(which, str(error)) from error


def _no_derivative(which: Pass, error: str) -> DitlabError:
    order, instead = (
        ("first", "") if which == "reverse" else ("second", "; the whole matrix in reverse mode needs none")
    )
    return DitlabError(
        f"jacobian: expected a denoiser whose operations all have a {order} derivative, found one without "
        f"({error.splitlines()[0]}){instead}"
    )


@contextmanager
def plain_attention() -> Iterator[None]:
    """Computes attention by operations that can be differentiated twice, in ditlab's layers and in those that call
    torch's `scaled_dot_product_attention`; compiled modules run uncompiled."""
    with attention_kernel("math"), sdpa_kernel(SDPBackend.MATH), _eager():
        yield


@contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _gradients() -> Iterator[None]:
    """Turns gradients on, whatever the caller turned off, and torch's warning about missing batching rules off."""
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
