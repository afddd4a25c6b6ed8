"""How fast do batches come from an image set?

    python benchmarks/data.py [--images 10240] [--size 32] [--batch 64]

The question: does `ImageSet` cost anything over NumPy itself, and what does the prepared set gain over reading a folder
of PNG files with Pillow? Each row is timed against its peer in interleaved rounds of one process, one thread, the same
random indices; the figures are medians and the ratio is the median of the ratios within a round, so that a busy machine
disturbs both alike. The file is in the page cache for all of them.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare


def smooth_noise(count: int, size: int) -> np.ndarray:
    """Random smooth pictures, uint8 [N, H, W, C]: like photographs, they compress to about half as PNG."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, size // 4 + 1, size // 4 + 1, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :size, :size] // 2 + np.random.default_rng(1).integers(
        0, 8, (count, size, size, 3), dtype=np.uint8
    )


def rounds(ours: Callable[[np.ndarray], object], peer: Callable[[np.ndarray], object], batches: np.ndarray, count: int):
    """Median seconds a batch of both, and the median ratio peer / ours."""
    times = {ours: [], peer: []}
    for index in range(count + 2):
        # Who goes first alternates: the second of a pair finds warmer caches.
        for read in (ours, peer) if index % 2 else (peer, ours):
            start = time.perf_counter()
            for batch in batches:
                read(batch)
            times[read].append((time.perf_counter() - start) / len(batches))
    mine, theirs = np.array(times[ours][2:]), np.array(times[peer][2:])
    return np.median(mine), np.median(theirs), np.median(theirs / mine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10_240)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, numpy {np.__version__}, torch {torch.__version__}, one thread")
    print(f"{args.images:,} images of 3x{args.size}x{args.size}, batches of {args.batch} at random indices\n")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    images = smooth_noise(args.images, args.size)
    np.save(folder / "x.npy", images)
    start = time.perf_counter()
    opened = prepare(f"array:{folder}/x.npy", folder / "set", size=args.size, near_duplicates=None)
    print(f"preparing the set from an array: {args.images / (time.perf_counter() - start):,.0f} images/s")
    in_memory = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    mapped = np.load(folder / "set" / "images.npy", mmap_mode="r")
    batches = np.random.default_rng(2).integers(0, args.images, (64, args.batch))

    def plain_batch(batch: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.take(in_memory, batch, axis=0)).to(torch.float32).div_(127.5).sub_(1.0)

    rows: list[tuple[str, Callable, Callable, np.ndarray, int]] = [
        (
            "take, against np.take of an array in memory",
            opened.take,
            lambda b: np.take(in_memory, b, axis=0),
            batches,
            0,
        ),
        ("take, against np.take of the memory map", opened.take, lambda b: mapped.take(b, axis=0), batches, 0),
        ("batch (float32), against take and convert by hand", opened.batch, plain_batch, batches, 0),
        ("take, against Pillow reading a folder of PNGs", opened.take, png_reader(folder, opened), batches[:2], 5),
    ]
    print(f"\n{'':<52}{'ours, images/s':>16}{'peer, images/s':>16}{'ours / peer':>13}")
    for name, ours, peer, indices, count in rows:
        mine, theirs, ratio = rounds(ours, peer, indices, count or args.rounds)
        print(f"{name:<52}{args.batch / mine:>16,.0f}{args.batch / theirs:>16,.0f}{ratio:>12.2f}x")


def png_reader(folder: Path, opened: ImageSet) -> Callable[[np.ndarray], np.ndarray]:
    """Writes the set as PNG files and returns a reader of batches from them."""
    for index, image in enumerate(opened.array):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index:06d}.png")

    def read(batch: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")).transpose(2, 0, 1) for i in batch])

    return read


if __name__ == "__main__":
    main()
