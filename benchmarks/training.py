"""How fast is a training step of `dit-xs/1` (and `dit-s/1`), ours against float32 eager of the same network?

    python benchmarks/training.py                   # dit-xs/1; on the CPU with one thread and a batch of 8
    python benchmarks/training.py --preset dit-s/1 --batch 256 --device cuda

"Ours" is what `ditlab train --training.precision bf16 --training.compile on` runs: bf16 autocast, compiled blocks, the
attention kernel that `auto` picks, with global attention and with the Local windows of An et al. The peer is the same
network with global attention in float32, not compiled, with torch's own attention. Every variant makes the same step:
losses with learned variance, backward, fused AdamW, averaged weights. Variants are interleaved in one process, so that
a change of the machine's speed hits all of them; the figure is the median of the ratios within a round.

Also printed: the share of the machine's bf16 matrix rate, measured here with large products, that each variant's
arithmetic (closed form, pairs outside a window not counted) makes use of.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from clocks import clock
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.models.creating import environment
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.nn.attention import attention_kernel
from ditlab.presets import preset
from ditlab.training.compiling import compile_blocks
from ditlab.training.config import TrainingConfig
from ditlab.training.ema import EMA
from ditlab.training.trainer import autocast, make_optimizer


def forward_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of one image's forward pass, from the shapes; attention counts the pairs that are seen."""
    d, tokens = config.width, config.grid[0] * config.grid[1]
    outputs = config.channels * (2 if config.learn_sigma else 1)
    blocks = config.depth * (tokens * (4 * d * d + 2 * d * int(d * config.mlp_ratio)) + 6 * d * d)
    ends = tokens * config.patch**2 * d * (config.channels + outputs) + 2 * d * d
    pairs = sum(int(pattern.mask(config.grid).sum()) for pattern in config.patterns)
    return blocks + ends + 256 * d + d * d + 2 * pairs * d


@dataclass(frozen=True)
class Variant:
    """One way to make the step."""

    name: str
    attention: str
    precision: str
    compiled: bool
    kernel: str


VARIANTS = (
    Variant("float32 eager, global (peer)", "global", "float32", False, "sdpa"),
    Variant("bf16, global", "global", "bf16", False, "auto"),
    Variant("bf16 compiled, global", "global", "bf16", True, "auto"),
    Variant("bf16 compiled, local", "local", "bf16", True, "auto"),
    Variant("float32 compiled, global", "global", "float32", True, "auto"),
)

ON_CUDA = (Variant("bf16 compiled, local, dense mask", "local", "bf16", True, "sdpa"),)
"""There the kernel of local attention is FlexAttention; its alternative stands beside it."""


def make_step(variant: Variant, base: DiTConfig, batch: int, device: torch.device) -> Callable[[], None]:
    """A function that makes one whole training step."""
    torch.manual_seed(0)
    network = DiT(replace(base, attention=variant.attention)).to(device).train()
    if variant.compiled:
        compile_blocks(network, "on", device=device, steps=1)
    objective = VPObjectiveConfig().build()
    optimizer = make_optimizer(network, TrainingConfig())
    ema = EMA(network, 0.9999)
    images = torch.rand(batch, *network.in_shape, device=device) * 2 - 1
    draws = {k: v.to(device) for k, v in objective.draw(torch.Generator(), batch, network.in_shape).items()}
    count = 0

    def step() -> None:
        nonlocal count
        with attention_kernel(variant.kernel):
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, variant.precision):
                loss = objective.losses(network, images, None, draws)["loss"].mean()
            loss.backward()
        optimizer.step()
        count += 1
        ema.update(network, count)

    return step


def matrix_rate(dtype: torch.dtype, device: torch.device, now: Callable[[], float]) -> float:
    """FLOP a second of a large matrix product: the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = now()
        for _ in range(3):
            a @ b
        best = max(best, 3 * 2 * n**3 / (now() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dit-xs/1")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    batch = args.batch or (256 if device.type == "cuda" else 8)
    base = preset(args.preset).network
    assert isinstance(base, DiTConfig)
    now = clock(device)
    rate = matrix_rate(torch.bfloat16, device, now)
    rate32 = matrix_rate(torch.float32, device, now)

    variants = VARIANTS + (ON_CUDA if device.type == "cuda" else ())
    steps = {variant.name: make_step(variant, base, batch, device) for variant in variants}
    compiling = {}
    for name, step in steps.items():
        start = time.perf_counter()
        for _ in range(3 if device.type == "cuda" else 2):
            step()
        compiling[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = now()
            step()
            seconds[name].append(now() - start)

    peer = VARIANTS[0].name
    rows = []
    for variant in variants:
        took = seconds[variant.name]
        ratios = [b / a for a, b in zip(took, seconds[peer], strict=True)]
        images = batch / statistics.median(took)
        flop = 3 * 2 * forward_macs(replace(base, attention=variant.attention))
        rows.append(
            {
                "variant": variant.name,
                "images_per_second": round(images, 3),
                "speedup": round(statistics.median(ratios), 3),
                "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "share_of_bf16_matrix_rate": round(images * flop / rate, 3),
                "first_steps_seconds": round(compiling[variant.name], 1),
            }
        )
    result = {
        "benchmark": "training step",
        "preset": args.preset,
        "batch": batch,
        "rounds": args.rounds,
        "threads": args.threads,
        "bf16_matrix_gflops": round(rate / 1e9, 1),
        "float32_matrix_gflops": round(rate32 / 1e9, 1),
        "environment": {**environment(device), "python": platform.python_version()},
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(", ".join(f"{k} {v}" for k, v in result["environment"].items()))
    print(
        f"{args.preset}, batch {batch}: matrix rate {rate / 1e9:.0f} GFLOP/s in bf16, {rate32 / 1e9:.0f} in float32\n"
    )
    print(f"{'variant':32} {'images/s':>9} {'speedup':>8} {'range':>14} {'of matrix rate':>15} {'first steps':>12}")
    for row in rows:
        low, high = row["speedup_range"]
        print(
            f"{row['variant']:32} {row['images_per_second']:9.2f} {row['speedup']:7.2f}x {f'{low:.2f}-{high:.2f}':>14} "
            f"{row['share_of_bf16_matrix_rate']:15.0%} {row['first_steps_seconds']:10.0f} s"
        )


if __name__ == "__main__":
    main()
