"""Small training runs for test_statistics.py, which starts this file in two processes, or kills it: FOLDER SCENE..."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_trainer
import torch

from ditlab.diffusion.objective_configs import BlindObjectiveConfig, EDMObjectiveConfig, VPObjectiveConfig
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet import BFUNet
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.training.distributed import DistributedContext, init_distributed


def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return BFUNet(BFUNetConfig(image_size=(4, 4), width=6, blocks=1))


def cnn() -> torch.nn.Module:
    torch.manual_seed(0)
    return BFCNN(BFCNNConfig(image_size=(4, 4), width=6, depth=4))


def bias_free(folder: Path, here: DistributedContext, **changes: Any) -> None:
    settings = {"network": unet(), "objective": BlindObjectiveConfig().build(), "ema": 0.9, **changes}
    test_trainer.run(folder, 8, context=here, log_every=1, save_every=4, eval_every=0, **settings)


def importance(folder: Path, here: DistributedContext, kill_at: int | None = None, **changes: Any) -> None:
    """Four noise levels, so that each has its ten losses after a few steps."""
    config = VPObjectiveConfig(schedule="cosine", steps=4, label_dropout=0.0, time_sampling="loss-second-moment")

    def evaluate(step: int) -> dict[str, float]:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    settings = {"log_every": 1, "save_every": 7, "eval_every": 1, "evaluate": evaluate, **changes}
    test_trainer.run(folder, 20, context=here, objective=config.build(), **settings)


SCENES: dict[str, Callable[[Path, DistributedContext], None]] = {
    "unet": bias_free,
    "cnn": lambda folder, here: bias_free(folder, here, network=cnn()),
    "shard": lambda folder, here: bias_free(folder, here, shard=here.world > 1),
    "edm": lambda folder, here: bias_free(folder, here, objective=EDMObjectiveConfig().build()),
    "importance": importance,
    "importance-accumulate": lambda folder, here: importance(folder, here, accumulate=2),
    "killed": lambda folder, here: importance(folder, here, kill_at=17),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_distributed("cpu") as this:
        for scene in sys.argv[2:]:
            SCENES[scene](Path(sys.argv[1]) / scene, this)
