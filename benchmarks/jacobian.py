"""What does a denoiser's Jacobian cost, whole and in part, against one row at a time on a retained graph?

The peer is what public code does (Kadkhodaie et al.'s, An et al.'s figures): one forward pass, then one
`torch.autograd.grad` for each output value. A row of it is the unit of all ratios; above 1 is faster than the peer.

1. A row or column of the whole matrix, by ditlab's reverse and forward pass, one by one and together (on copies of the
   image where it finds them faster), by `vmap` over chunks, by forward mode.
   The graph of the networks is the one that ditlab's attention policy makes, on both sides. Beside them, how far J v
   lies from the one in float64: ours, forward mode's, and that of finite differences.
2. The 64 leading values and vectors from products alone, against the peer's whole matrix, without and with its
   decomposition, with the largest residual over the leading value, and the largest difference to the whole's values.

The peer's whole loop takes long on large networks: --rows rows of it are timed, in each of --rounds rounds in part 1,
before and after what they are compared with in part 2, and the loop is that, times D / rows. ditlab's whole matrix is
timed as it is, once, and its leading values --rounds times.

A network has been trained here for a little while on the built-in photographs, for the spectrum of a random one is flat
and nothing converges on it; --run takes the newest checkpoint of run folders instead.

    python benchmarks/jacobian.py --quick                               # tiny: a minute, to see that it runs
    python benchmarks/jacobian.py                                       # small networks, 3x16x16: three minutes
    python benchmarks/jacobian.py --size 32 --networks dit              # D = 3072
    python benchmarks/jacobian.py --published --rounds 3 --rows 2       # dit-xs/1 and unet-an2024, part 1 alone
    python benchmarks/jacobian.py --run runs/NAME runs/OTHER --device cuda
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from clocks import clock
from ditlab.analyses.jacobian.decomposition import decompose, decompose_top
from ditlab.analyses.jacobian.operator import JacobianOperator, plain_attention
from ditlab.data.sources.base import CropRule, Item
from ditlab.data.sources.photos import Photos
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.schedules import make_schedule
from ditlab.metrics.denoising_errors import level_noise
from ditlab.models.opening import load
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.networks.unet import UNet
from ditlab.networks.unet_config import UNetConfig
from ditlab.presets import preset
from ditlab.rng import torch_generator

KINDS = ("svd", "eigh", "eig", "eig-right")
SMALL = ("dit", "dit-local", "unet", "bf-cnn")
PUBLISHED = ("dit-xs/1", "unet-an2024")
STEP = 100


class Untimed(nn.Module):
    """A blind network as one that is told the time."""

    num_classes = 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.in_shape = network, network.in_shape

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Leaves it out."""
        return self.network(x, None, None)


def small(name: str, size: int) -> VPDenoiser:
    """A network that a laptop trains in a minute."""
    torch.manual_seed(0)
    grid = (size, size)
    network: nn.Module
    if name == "unet":
        network = UNet(UNetConfig(image_size=grid, width=32, res_blocks=1, multipliers=(1, 2, 2), attention_at=()))
    elif name == "bf-cnn":
        network = BFCNN(BFCNNConfig(image_size=grid, width=32, depth=10))
        with torch.no_grad():
            for gamma in network.gammas:
                gamma.fill_(1.0)
        network = Untimed(network)
    else:
        plan = "3,5,7,g" if name == "dit-local" else "global"
        network = DiT(
            DiTConfig(image_size=grid, width=64, depth=4, heads=4, patch=1, attention=plan, learn_sigma=False)
        )
    return VPDenoiser(network, make_schedule("linear", 1000), variance="fixed-small")


def train(denoiser: VPDenoiser, images: Tensor, steps: int) -> None:
    """Mean squared error of the noise, Adam."""
    optimizer = torch.optim.Adam(denoiser.network.parameters(), 1e-3)
    sigmas = torch.from_numpy(denoiser.schedule.sigmas[:400]).float()
    for step in range(steps):
        generator = torch_generator(0, "train", step)
        x0 = images[torch.randint(len(images), (16,), generator=generator)]
        sigma = sigmas[torch.randint(len(sigmas), (16,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        found = denoiser.predict(x0 + sigma[:, None, None, None] * noise, sigma).eps
        optimizer.zero_grad()
        (found - noise).square().mean().backward()
        optimizer.step()


def photographs(size: int) -> Tensor:
    """Built-in ones in [-1, 1]."""
    items = [item for item in Photos(CropRule(size)) if isinstance(item, Item)]
    return torch.stack([torch.from_numpy(item.pixels.copy()) for item in items]).float() / 127.5 - 1


def published(name: str) -> VPDenoiser:
    """A preset's network at its size, its weights stirred, for those of a fresh one are partly zero."""
    torch.manual_seed(0)
    config = preset(name).network
    network = DiT(config) if isinstance(config, DiTConfig) else UNet(config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.02 * torch.randn_like(value))
    variance = "learned-range" if config.learns_variance else "fixed-small"
    return VPDenoiser(network.eval(), make_schedule("linear", 1000), variance=variance)


def peer(denoiser: Denoiser, y: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The retained graph of the peer, whose rows are backward passes."""
    y = y.clone().requires_grad_()
    return denoiser(y, sigma), y


def rows(denoiser: Denoiser, y: Tensor, sigma: float, asked: argparse.Namespace) -> dict[str, float]:
    """Seconds a row or column of each way, as a share of the peer's, whose own seconds come first."""
    now, count = clock(y.device), asked.rows
    vectors = torch.eye(max(count, 16, *asked.chunks), y.numel(), device=y.device)
    output, by = peer(denoiser, y, sigma)
    operator = JacobianOperator(denoiser, y, sigma)

    def loop() -> None:
        for v in vectors[:count]:
            torch.autograd.grad(output, by, v.reshape(output.shape), retain_graph=True)

    with plain_attention():
        plain_output, plain_by = peer(denoiser, y, sigma)

    def by_vmap(chunk: int) -> None:
        some = vectors[:chunk].reshape(chunk, *y.shape)
        torch.autograd.grad(plain_output, plain_by, some, retain_graph=True, is_grads_batched=True)

    def forward_mode(chunk: int) -> None:
        def column(v: Tensor) -> Any:
            return jvp(lambda x: denoiser.estimate(x, sigma).x0, (y,), (v.reshape(y.shape),))[1]

        with plain_attention(), torch.no_grad():
            _ = column(vectors[0]) if chunk == 1 else vmap(column)(vectors[:chunk])

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "peer": (loop, count),
        "reverse": (lambda: operator.reverse(vectors[:count]), count),
        "forward": (lambda: operator.forward(vectors[:count]), count),
        "reverse, together": (lambda: operator.reverse(vectors[:16], together=True), 16),
        "forward, together": (lambda: operator.forward(vectors[:16], together=True), 16),
        "forward mode": (lambda: forward_mode(1), 1),
    }
    for chunk in asked.chunks:
        ways[f"vmap {chunk}"] = (lambda chunk=chunk: by_vmap(chunk), chunk)
        ways[f"forward mode {chunk}"] = (lambda chunk=chunk: forward_mode(chunk), chunk)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run, _ in ways.values():
        run()
    for _ in range(asked.rounds):
        for name, (run, number) in ways.items():
            start = now()
            run()
            times[name].append((now() - start) / number)
    found = {"peer_seconds": statistics.median(times["peer"])}
    for name in list(ways)[1:]:
        ratios = [theirs / ours for theirs, ours in zip(times["peer"], times[name], strict=True)]
        found[name] = statistics.median(ratios)
    return found


def errors(denoiser: Denoiser, y: Tensor, sigma: float) -> dict[str, float]:
    """|J v - J v in float64| / |J v| of a random v."""
    exact = copy.deepcopy(denoiser)
    module = exact.module
    assert module is not None
    module.double()
    v = torch.randn(y.shape, generator=torch_generator(0, "direction")).to(y)

    def by_forward_mode(one: Denoiser, dtype: torch.dtype) -> Tensor:
        with plain_attention(), torch.no_grad():
            return jvp(lambda x: one.estimate(x, sigma).x0, (y.to(dtype),), (v.to(dtype),))[1]

    truth = by_forward_mode(exact, torch.float64)
    step = 1e-2
    with torch.no_grad():
        differences = (denoiser(y + step * v, sigma) - denoiser(y - step * v, sigma)) / (2 * step)
    found = {
        "forward": JacobianOperator(denoiser, y, sigma).forward(v.reshape(1, -1)).reshape(y.shape),
        "forward mode": by_forward_mode(denoiser, y.dtype),
        f"finite differences of {step:g}": differences,
    }
    return {way: float((product - truth).norm() / truth.norm()) for way, product in found.items()}


def parts(denoiser: Denoiser, y: Tensor, sigma: float, asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What the whole matrix and its leading values cost, against the peer's loop."""
    now, size = clock(y.device), y.numel()
    output, by = peer(denoiser, y, sigma)
    vectors = torch.eye(asked.rows, size, device=y.device).reshape(-1, *output.shape)

    def row() -> float:
        start = now()
        for v in vectors:
            torch.autograd.grad(output, by, v, retain_graph=True)
        return (now() - start) / len(vectors)

    def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
        """What it returns, its seconds, and the peer's for all rows, as rows just before and after it have it."""
        before, start = row(), now()
        result = run()
        taken = now() - start
        return result, taken, size * (before + row()) / 2

    row()
    matrix, taken, loop = timed(
        lambda: JacobianOperator(denoiser, y, sigma).matrix(max(16, *asked.chunks)).double().numpy()
    )
    found: dict[str, dict[str, float]] = {"matrix": {"seconds": taken, "times_faster": loop / taken}}
    for kind in KINDS:
        start = now()
        whole = decompose(matrix, kind)
        decomposed = now() - start
        operator = JacobianOperator(denoiser, y, sigma)
        rounds = [
            timed(lambda operator=operator, kind=kind: decompose_top(operator, kind, asked.top))
            for _ in range(asked.rounds)
        ]
        top, largest = rounds[0][0], abs(whole.values[0])
        found[kind] = {
            "seconds": statistics.median(taken for _, taken, _ in rounds),
            "times_faster": statistics.median(loop / taken for _, taken, loop in rounds),
            "times_faster_than_matrix_and_decomposition": statistics.median(
                (loop + decomposed) / taken for _, taken, loop in rounds
            ),
            "products": operator.products // asked.rounds,
            "residual": float(top.residuals.max() / largest),
            # To the nearest one: values of equal modulus have no order.
            "difference": float(np.abs(top.values[:, None] - whole.values).min(1).max() / largest),
        }
    return found


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny images, hardly trained: shows that all of it runs")
    parser.add_argument("--networks", nargs="+", choices=SMALL, default=SMALL)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--published", action="store_true", help="dit-xs/1 and unet-an2024 instead, rows alone")
    parser.add_argument("--run", nargs="+", help="runs' folders instead")
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="rows or columns that are timed at once")
    parser.add_argument("--chunks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    asked = parser.parse_args()
    if asked.quick:
        asked.size, asked.train_steps, asked.top, asked.rounds, asked.rows = 8, 100, 16, 2, 4
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore", message="There is a performance drop")
    device = torch.device(asked.device)
    about = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else torch.cpu.get_capabilities()["cpu_name"],
        "threads": asked.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clock": f"medians of {asked.rounds} interleaved rounds"
        + ("" if asked.threads > 1 or device.type == "cuda" else ", time of the thread"),
        "peer": f"its loop over all rows is extrapolated from {asked.rows}, timed beside what they are compared with",
        "load": "other work on the machine, as its load average of a minute before: " + f"{os.getloadavg()[0]:.1f}",
        "command": " ".join(["python", "benchmarks/jacobian.py", *sys.argv[1:]]),
    }
    if not asked.json:
        print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    results = {}
    for name in asked.run if asked.run else PUBLISHED if asked.published else asked.networks:
        denoiser = _denoiser(name, asked)
        size = denoiser.shape[1]
        image = (photographs(size) if denoiser.shape[0] == 3 else torch.zeros(1, *denoiser.shape))[-1:].to(device)
        sigma = float(make_schedule("linear", 1000).sigmas[STEP])
        y = image + sigma * level_noise(0, sigma, [0], [0], denoiser.shape).to(device)
        found: dict[str, Any] = {"size": y.numel(), "rows": rows(denoiser, y, sigma, asked)}
        found["errors"] = errors(denoiser, y, sigma)
        if not asked.published:
            found["parts"] = parts(denoiser, y, sigma, asked)
        results[name] = found
        if not asked.json:
            _say(name, found, asked)
    if asked.json:
        print(json.dumps({"about": about, "results": results}))


def _denoiser(name: str, asked: argparse.Namespace) -> Denoiser:
    device = torch.device(asked.device)
    if asked.run:
        return load(name, device=device)
    denoiser = published(name) if asked.published else small(name, asked.size)
    if not asked.published:
        train(denoiser, photographs(asked.size), asked.train_steps)
    denoiser.network.eval().to(device)
    return denoiser


def _say(name: str, found: dict[str, Any], asked: argparse.Namespace) -> None:
    ways, size = dict(found["rows"]), found["size"]
    row = ways.pop("peer_seconds")
    print(
        f"\n{name}, D = {size}: a row of the peer takes {row * 1e3:.1f} ms, its loop {row * size:.0f} s (extrapolated)"
    )
    print("  times as fast a row:  " + ", ".join(f"{way} {ratio:.2f}" for way, ratio in ways.items()))
    print("  relative error of J v:  " + ", ".join(f"{way} {error:.0e}" for way, error in found["errors"].items()))
    for what, line in found.get("parts", {}).items():
        title = "whole matrix" if what == "matrix" else f"{what}, top {asked.top}"
        print(f"  {title:<14} {line['seconds']:6.1f} s, {line['times_faster']:5.1f} times as fast as the loop", end="")
        if what != "matrix":
            print(
                f", {line['times_faster_than_matrix_and_decomposition']:.1f} as the loop and {what} of the matrix; "
                f"{line['products']} products, largest residual {line['residual']:.0e} and difference "
                f"{line['difference']:.0e} of the leading value",
                end="",
            )
        print(flush=True)


if __name__ == "__main__":
    main()
