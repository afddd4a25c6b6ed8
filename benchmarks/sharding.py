"""How much memory does a training step of a large network need, sharded over processes and not?

    python benchmarks/sharding.py                            # dit-xl/2, bf16, batch 2, two gloo processes on the CPU
    python benchmarks/sharding.py --against replicas         # the peer: as many processes, each with the whole network
    python benchmarks/sharding.py --device cuda --processes 8 --batch 256

Every variant makes the same steps through `ditlab.training.trainer.Trainer`, from the same weights on the same random
latents (32x32x4, 1000 classes): losses with learned variance, backward, fused AdamW, averaged weights. The peer is one
process with the whole network and all of the machine's threads, or replicas (DDP). Printed for each process: the peak
of its memory (of the process on the CPU, of torch's allocator on CUDA) until the last step is made; seconds of that
step, also of CPU time, which other programs lengthen less; and the ratios. Without --keep-activations both variants
compute activations a second time.

With --save a real checkpoint is written to a temporary folder after the last step (16 bytes a parameter), and the peak
and the seconds of that are printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditlab.models.creating import environment
from ditlab.networks.dit_config import DiTConfig
from ditlab.networks.registry import build_network
from ditlab.presets import preset
from ditlab.training.checkpoint import CheckpointStore
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import init_distributed
from ditlab.training.log import TrainingLog
from ditlab.training.sharding import checkpoint_activations
from ditlab.training.trainer import Trainer, peak_memory


class Latents:
    """Random latents with labels."""

    shape = (4, 32, 32)
    stochastic = False

    def batch(self, indices: np.ndarray, noise: object = None, mirrored: object = None) -> torch.Tensor:
        """Latents `[B, 4, 32, 32]`, unit normal, the same for the same indices."""
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(int(i))) for i in indices])

    def batch_labels(self, indices: np.ndarray) -> torch.Tensor:
        """One of 1000 classes each."""
        return torch.from_numpy(indices) % 1000


class Unsaved(CheckpointStore):
    """Checkpoints that are not written."""

    def save(self, step: int, **parts: Any) -> Path:
        """Nothing."""
        return self.path(step)


def work(args: argparse.Namespace, folder: Path) -> None:
    """One process's part of one variant; leaves its figures in the folder."""
    with init_distributed(args.device) as here:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here.world))
        recipe = preset(args.preset)
        assert isinstance(recipe.network, DiTConfig)
        network = build_network(replace(recipe.network, image_size=(32, 32), channels=4, num_classes=1000))
        if not args.keep_activations:
            checkpoint_activations(network)
        parameters = sum(p.numel() for p in network.parameters())
        times, busy = [time.perf_counter()], [time.process_time()]
        peaks: list[int] = []
        losses: list[float] = []

        class Timed(Trainer):
            def log_step(self) -> None:
                super().log_step()
                if self.step:
                    times.append(time.perf_counter())
                    busy.append(time.process_time())
                    peaks.append(peak_memory(here.device))
                    losses.append(float(self.shown["loss"]))

        config = TrainingConfig(
            steps=args.steps,
            batch_size=args.batch,
            precision=args.precision,
            compile="off",
            log_every=1,
            eval_every=0,
            save_every=args.steps,
            shard=args.work == "sharded",
        )
        store = (CheckpointStore if args.save else Unsaved)(folder / "checkpoints")
        Timed(
            network,
            recipe.objective.build(),
            Latents(),
            np.arange(1000),
            config,
            checkpoints=store,
            log=TrainingLog(folder / "log.jsonl"),
            context=here,
        ).fit()
        figures = {
            "parameters": parameters,
            "losses": losses,
            "seconds": times[-1] - times[-2],
            "cpu_seconds": busy[-1] - busy[-2],
            "peak_bytes": peaks[-1],
            "saving_seconds": time.perf_counter() - times[-1],
            "saving_peak_bytes": peak_memory(here.device),
        }
        (folder / f"process-{here.rank}.json").write_text(json.dumps(figures))


def measure(args: argparse.Namespace, variant: str, count: int) -> list[dict[str, Any]]:
    """Runs a variant in processes of their own, and gathers the figures of each."""
    with tempfile.TemporaryDirectory() as name:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        words = [word for word in sys.argv[1:] if word != "--json"]
        subprocess.run(
            [sys.executable, *launch, __file__, *words, "--work", variant, "--folder", name],
            check=True,
            stdout=sys.stderr,
        )
        return [json.loads((Path(name) / f"process-{rank}.json").read_text()) for rank in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dit-xl/2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against", choices=("one", "replicas", "nothing"), default="one")
    parser.add_argument("--keep-activations", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args, args.folder)
        return

    variants = {"sharded": args.processes, "one": 1, "replicas": args.processes}
    wanted = [name for name in variants if name in ("sharded", args.against)]
    figures = {name: measure(args, name, variants[name]) for name in wanted}
    peak = {name: max(process["peak_bytes"] for process in rows) for name, rows in figures.items()}
    seconds = {name: rows[0]["seconds"] for name, rows in figures.items()}
    busy = {name: sum(process["cpu_seconds"] for process in rows) for name, rows in figures.items()}
    result = {"benchmark": "sharding", "arguments": vars(args), "figures": figures}
    if args.against != "nothing":
        result["ratios"] = {
            "peak_memory_of_a_process": round(peak["sharded"] / peak[args.against], 3),
            "seconds_of_a_step": round(seconds["sharded"] / seconds[args.against], 3),
            "cpu_seconds_of_all_processes": round(busy["sharded"] / busy[args.against], 3),
        }
    result["environment"] = environment(torch.device(args.device))
    if args.json:
        print(json.dumps(result, indent=1, default=str))
        return
    print(", ".join(f"{k} {v}" for k, v in result["environment"].items()))
    again = "kept" if args.keep_activations else "computed again"
    millions = figures["sharded"][0]["parameters"] / 1e6
    print(f"{args.preset}: {millions:.2f} M parameters, {args.precision}, batch {args.batch}, activations {again}\n")
    print(f"{'variant':10} {'process':>8} {'peak memory':>12} {'last step':>10} {'CPU time':>10} {'loss':>10}")
    for name, rows in figures.items():
        for rank, row in enumerate(rows):
            peaked = f"{row['peak_bytes'] / 2**30:.2f} GiB"
            took = f"{row['seconds']:8.1f} s {row['cpu_seconds']:8.1f} s"
            print(f"{name:10} {rank:8} {peaked:>12} {took} {row['losses'][-1]:10.6f}", end="")
            saved = f", saving: peak {row['saving_peak_bytes'] / 2**30:.2f} GiB, {row['saving_seconds']:.0f} s"
            print(saved if args.save else "")
    for name, ratio in result.get("ratios", {}).items():
        print(f"\n{name.replace('_', ' ')}, sharded against {args.against}: {ratio:.2f}x", end="")
    print()


if __name__ == "__main__":
    main()
