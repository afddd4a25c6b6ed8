"""How many minutes of one CPU core the presets of CPU size train, by a few of their steps.

    python benchmarks/preset_minutes.py --out results/preset-minutes.json

Times are the thread's own, so that other processes disturb little. Measurements during training and checkpoints are not
counted; they add a few per cent.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from ditlab.config import fit_to_images
from ditlab.models.creating import environment
from ditlab.networks.registry import build_network
from ditlab.presets import preset
from ditlab.training.batches import Batches
from ditlab.training.checkpoint import CheckpointStore
from ditlab.training.log import TrainingLog
from ditlab.training.trainer import Trainer

SMALL = ("dit-nano/1", "dit-nano/2", "dit-nano/4", "dit-micro/2", "dit-micro/4", "unet-nano", "unet-micro")
SMALL += ("bf-unet-nano", "bf-cnn-nano")


class Images:
    """Random images, in the place of an image set."""

    stochastic = False

    def __init__(self, size: int) -> None:
        self.shape = (3, size, size)

    def batch(self, indices: np.ndarray, noise: torch.Tensor | None = None, mirrored: torch.Tensor | None = None):
        """Returns random images."""
        return torch.rand(len(indices), *self.shape) * 2 - 1

    def batch_labels(self, indices: np.ndarray) -> None:
        """Returns None."""


def seconds_per_step(name: str, size: int, steps: int) -> float:
    """The median over some steps after two."""
    config = fit_to_images(preset(name), (3, size, size), 0)
    training = replace(config.training, steps=steps, compile="off")
    objective, network = config.objective.build(), build_network(config.network)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        trainer = Trainer(
            network,
            objective,
            Images(size),
            np.arange(100),
            training,
            checkpoints=CheckpointStore(place / "checkpoints"),
            log=TrainingLog(place / "log.jsonl"),
        )
        batches = Batches(trainer.images, trainer.train_indices, objective, training, trainer.context)
        times = []
        for step in range(steps):
            begun = time.thread_time()
            trainer.train_step(batches(step))
            times.append(time.thread_time() - begun)
        batches.close()
    return median(times[2:])


def main() -> None:
    """Prints a table, and writes it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=SMALL)
    parser.add_argument("--sizes", nargs="+", type=int, default=(16, 32))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.presets:
        for size in options.sizes:
            each, steps = seconds_per_step(name, size, options.steps), preset(name).training.steps
            row = {"preset": name, "size": size, "seconds_per_step": round(each, 4), "steps": steps}
            rows.append({**row, "minutes": round(each * steps / 60, 1)})
            print(
                f"{name:14} {size:3} pixels  {each:7.3f} s a step  {steps:6,} steps  {each * steps / 60:8.1f} minutes",
                flush=True,
            )
    if options.out:
        record = {
            "command": "python benchmarks/preset_minutes.py --out results/preset-minutes.json",
            "date": date.today().isoformat(),
            "machine": environment(torch.device("cpu")),
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
