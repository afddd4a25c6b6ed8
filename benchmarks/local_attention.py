"""Is local attention faster than full attention, and by how much?

Prints the time of `auto` and of its alternatives as a fraction of torch's full `scaled_dot_product_attention` of the
same shape, dtype and head dim, measured in the same process: rounds in which each candidate runs once, their medians.
On one CPU thread the time is the thread's own CPU time, so that other processes disturb less; otherwise wall time.
Freed memory stays with the process, as it mostly does in training: else a result of some megabytes comes from the
system page by page in every call, which at 64 x 64 tokens is 13 % of the time and no part of the question.

    python benchmarks/local_attention.py                # windows, scaling, global attention, small grids: 10 minutes
    python benchmarks/local_attention.py --parts windows --dtypes bfloat16 --ways plain:8:8 flash:4:32
    python benchmarks/local_attention.py --json

`target` is what other measurements, on an Intel Sapphire Rapids with AMX, one thread, batch 8, found for the best of
several implementations at head dim 64, as the same ratio.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditlab.nn.attention import Global, Grid, Window, attention
from ditlab.nn.kernel_choice import processor
from ditlab.nn.kernels_cpu import TilePass, Tiling, tiled_attention

WINDOWS = (3, 5, 7, 9, 11, 13)
TARGETS = {
    ("float32", False): dict(zip(WINDOWS, (0.33, 0.40, 0.48, 0.62, 0.69, 0.73), strict=True)),
    ("bfloat16", False): dict(zip(WINDOWS, (0.36, 0.50, 0.49, 0.66, 0.75, 0.84), strict=True)),
    ("float32", True): {3: 0.34, 7: 0.52, 13: 0.79},
    ("bfloat16", True): dict(zip(WINDOWS, (0.28, 0.42, 0.47, 0.68, 1.04, 0.98), strict=True)),
}


class Case(NamedTuple):
    """One shape; `full` is measured on it too."""

    dtype: torch.dtype
    images: int
    heads: int
    grid: Grid
    head_dim: int
    pattern: Global | Window
    backward: bool


@dataclass(frozen=True)
class Row:
    """A case's times, as fractions of full SDPA of the same dtype and head dim."""

    part: str
    dtype: str
    shape: str
    pattern: str
    passes: str
    full_ms: float
    ratios: dict[str, float]
    target: float | None = None


class Timer:
    """Medians of interleaved rounds."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self.rounds = rounds
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if alone else time.perf_counter
        self.what = "CPU time of the thread" if alone else "wall time"

    def __call__(self, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds a call of each."""
        first = {name: (self._once(run, 1), self._once(run, 1))[1] for name, run in runs.items()}
        calls = {name: max(1, round(0.03 / max(seconds, 1e-6))) for name, seconds in first.items()}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                found[name].append(self._once(run, calls[name]))
        return {name: statistics.median(times) for name, times in found.items()}

    def _once(self, run: Callable[[], object], calls: int) -> float:
        self._wait()
        start = self.clock()
        for _ in range(calls):
            run()
        self._wait()
        return (self.clock() - start) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and a gradient, laid out as `SelfAttention` has them."""
    tokens = case.grid[0] * case.grid[1]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(case.images, tokens, 3, case.heads, case.head_dim, generator=generator)
    q, k, v = packed.to(device, case.dtype).permute(2, 0, 3, 1, 4).unbind(0)
    grad = torch.randn(case.images, tokens, case.heads, case.head_dim, generator=generator)
    return q, k, v, grad.to(device, case.dtype).transpose(1, 2)


def candidates(case: Case, ways: list[str], device: torch.device) -> dict[str, Callable[[], object]]:
    """Full attention, ours, and what else was asked for."""
    q, k, v, grad = inputs(case, device)
    leaves = [x.detach().requires_grad_(case.backward) for x in (q, k, v)]
    pattern, grid = case.pattern, case.grid

    def passes(forward: Callable[..., Tensor]) -> Callable[[], object]:
        if case.backward:
            return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)
        return lambda: forward(*leaves)

    runs = {
        "full": passes(F.scaled_dot_product_attention),
        "auto": passes(lambda q, k, v: attention(q, k, v, pattern, grid, kernel="auto")),
    }
    if isinstance(pattern, Window):
        runs["masked"] = passes(lambda q, k, v: attention(q, k, v, pattern, grid, kernel="sdpa"))
    for way in ways:
        engine, rows, columns = way.split(":")
        tile_pass = TilePass("flash" if engine == "flash" else "plain", (int(rows), int(columns)))
        tiling = Tiling(pattern, grid, tile_pass, tile_pass).encode()
        runs[way] = passes(lambda q, k, v, tiling=tiling: tiled_attention(q, k, v, tiling)[0])
    return runs


def measure(part: str, case: Case, ways: list[str], timer: Timer) -> Row:
    """The times of one case."""
    times = timer(candidates(case, ways, timer.device))
    name = str(case.dtype).removeprefix("torch.")
    known = part == "windows" and case.head_dim == 64 and isinstance(case.pattern, Window)
    target = TARGETS[name, case.backward].get(case.pattern.size) if known and isinstance(case.pattern, Window) else None
    shape = f"{case.images}x{case.heads} {case.grid[0]}x{case.grid[1]} d{case.head_dim}"
    ratios = {key: seconds / times["full"] for key, seconds in times.items() if key != "full"}
    passes = "forward+backward" if case.backward else "forward"
    return Row(part, name, shape, case.pattern.name, passes, times["full"] * 1e3, ratios, target)


def cases(part: str, dtypes: list[torch.dtype], batch: int) -> list[Case]:
    """What a part measures."""
    both = (False, True)
    if part == "windows":
        return [
            Case(dtype, batch, 6 if d == 64 else 4, (32, 32), d, Window(size), backward)
            for dtype in dtypes
            for d in (64, 63)
            for backward in both
            for size in WINDOWS
        ]
    if part == "global":
        shapes = [
            (32, 4, 8, 16),
            (32, 4, 8, 32),
            (32, 4, 12, 16),
            (32, 4, 16, 32),
            (batch, 6, 32, 64),
            (batch, 4, 32, 63),
        ]
        return [
            Case(dtype, images, heads, (n, n), d, Global(), backward)
            for dtype in dtypes
            for backward in both
            for images, heads, n, d in shapes
        ]
    small = [(8, 3), (8, 5), (12, 3), (12, 5), (16, 3), (16, 5), (16, 9)]
    return [
        Case(dtype, 32, 4, (n, n), 32, Window(size), backward)
        for dtype in dtypes
        for backward in both
        for n, size in small
    ]


def scaling(dtypes: list[torch.dtype], batch: int, timer: Timer) -> list[Row]:
    """time(64x64 tokens) / time(32x32 tokens) at window 7, in interleaved rounds."""
    rows = []
    for dtype in dtypes:
        for backward in (False, True):
            sizes = {n: Case(dtype, batch, 6, (n, n), 64, Window(7), backward) for n in (32, 64)}
            runs = {f"{n}": candidates(case, [], timer.device)["auto"] for n, case in sizes.items()}
            times = timer(runs | {"full": candidates(sizes[32], [], timer.device)["full"]})
            name = str(dtype).removeprefix("torch.")
            passes = "forward+backward" if backward else "forward"
            ratios = {"64x64 / 32x32": times["64"] / times["32"]}
            rows.append(Row("scaling", name, f"{batch}x6 d64", "window 7", passes, times["full"] * 1e3, ratios, 4.5))
    return rows


def keep_memory() -> bool:
    """Tells the C library to give no freed memory back to the system; whether it could be told."""
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    library = ctypes.CDLL(None)
    return all(library.mallopt(option, 1 << 30) for option in (trim_threshold, mmap_threshold))


def show(row: Row) -> None:
    """One line."""
    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row.ratios.items())
    target = "" if row.target is None else f"  (target {row.target:.2f})"
    passes = "fwd" if row.passes == "forward" else "f+b"
    print(
        f"{row.dtype:9} {passes} {row.shape:16} {row.pattern:9} full {row.full_ms:8.2f} ms   {ratios}{target}",
        flush=True,
    )


def main() -> None:
    """Measures the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("windows", "scaling", "global", "small")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="*", default=[], help="engine:rows:columns of tiles to measure besides")
    parser.add_argument("--batch", type=int, default=2, help="images of 32 x 32 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    timer = Timer(device, asked.rounds)
    machine = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else torch.cpu.get_capabilities()["cpu_name"],
        "class": device.type if device.type == "cuda" else processor(),
        "threads": asked.threads,
        "freed memory": "kept" if keep_memory() else "given back",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clock": f"{timer.what}, medians of {asked.rounds} interleaved rounds",
        "command": " ".join(["python", "benchmarks/local_attention.py", *sys.argv[1:]]),
    }
    if not asked.json:
        print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    dtypes = [getattr(torch, name) for name in asked.dtypes]
    rows: list[Row] = []
    for part in asked.parts:
        if not asked.json:
            print(f"\n{part}: " + ("growth of auto" if part == "scaling" else "time / full SDPA of the same dtype"))
        if part == "scaling":
            found = scaling(dtypes, asked.batch, timer)
        else:
            found = (measure(part, case, asked.ways, timer) for case in cases(part, dtypes, asked.batch))
        for row in found:
            rows.append(row)
            if not asked.json:
                show(row)
    if asked.json:
        print(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
