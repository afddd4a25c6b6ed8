"""Small training runs for test_sharding.py, which starts this file in two processes: FOLDER SCENE..."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import test_trainer
import torch
from torch import nn

from ditlab.progress import StopFlag
from ditlab.training import checkpoint
from ditlab.training import trainer as loop
from ditlab.training.distributed import DistributedContext, init_distributed
from ditlab.training.sharding import checkpoint_activations, to_local
from ditlab.training.trainer import TrainingInterrupted


class Unblocked(nn.Module):
    """A network without blocks, and with buffers that training changes."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm, self.out = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)

    def forward(self, x, t, label=None, *, augment=None):
        return self.out(torch.relu(self.norm(self.enter(x)))) + t.reshape(-1, 1, 1, 1) / 1000


def dropping() -> nn.Module:
    network = test_trainer.small()
    for block in network.blocks:
        block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.3))
    return network


def train(
    folder: Path,
    here: DistributedContext,
    *,
    network: nn.Module | None = None,
    again: bool = False,
    steps: int = 10,
    **settings,
) -> nn.Module:
    """A run with a line each step, whose measurement is made as the analyses make theirs: in inference mode."""
    network = test_trainer.small() if network is None else network
    if again:
        assert checkpoint_activations(network)

    def evaluate(step: int) -> dict[str, float]:
        assert not network.training
        with torch.inference_mode():
            output = network(test_trainer.Noise().all[:2], torch.tensor([3.0, 500.0]), torch.tensor([0, 1]))
        return {"measured": output.float().square().mean().item()}

    settings = {"log_every": 1, "eval_every": 5, "shard": True, **settings}
    test_trainer.run(folder, steps, network=network, context=here, evaluate=evaluate, **settings)
    return network


def sizes(folder: Path, here: DistributedContext) -> None:
    """Trains, and writes down how many numbers this process held of what."""
    made: dict[str, Any] = {}

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            made[name] = function(*args)
            return made[name]

        return call

    loop.make_optimizer, loop.EMA = noting("optimizer", loop.make_optimizer), noting("ema", loop.EMA)
    network = train(folder, here)
    tensors = {
        "weights": list(network.state_dict().values()),
        "ema": list(made["ema"].weights.values()),
        "optimizer": [t for slots in made["optimizer"].state.values() for t in slots.values() if t.dim()],
    }
    held = {name: [sum(to_local(t).numel() for t in ts), sum(t.numel() for t in ts)] for name, ts in tensors.items()}
    (folder / f"held-{here.rank}.json").write_text(json.dumps(held))


def killed(folder: Path, here: DistributedContext) -> None:
    """The first process dies in the middle of its second save."""
    saves = 0

    def die(stage: str) -> None:
        nonlocal saves
        saves += stage == "before"
        if stage == "middle" and saves == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._stage = die
    train(folder, here, steps=20)


def stopped(folder: Path, here: DistributedContext) -> None:
    """The second process is asked to stop; both do, and then go on."""
    stop = StopFlag()
    stop.set = here.rank == 1
    with suppress(TrainingInterrupted):
        train(folder, here, steps=20, stop=stop)
        raise AssertionError("it was not interrupted")
    assert test_trainer.CheckpointStore(folder / "checkpoints").steps() == [5, 10]
    train(folder, here, steps=20)


def compiled(folder: Path, here: DistributedContext) -> None:
    """Compiled as far as the last stage, which takes half a minute and knows nothing of sharding."""
    from torch._dynamo.utils import counters

    network = test_trainer.small()
    checkpoint_activations(network)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in network.blocks:
        block.compile(backend="aot_eager")
    train(folder, here, network=network)
    assert counters["stats"]["unique_graphs"] >= len(network.blocks), "the compiler passed over the blocks"


SCENES: dict[str, Callable[[Path, DistributedContext], object]] = {
    "plain": sizes,
    "accumulate": lambda folder, here: train(folder, here, accumulate=2),
    "half": lambda folder, here: train(folder, here, precision="bf16"),
    "half-again": lambda folder, here: train(folder, here, precision="bf16", again=True),
    "again": lambda folder, here: train(folder, here, again=True),
    "long": lambda folder, here: train(folder, here, steps=20),
    "stopped": stopped,
    "to-five": lambda folder, here: train(folder, here, steps=5),
    "from-five": train,
    "dropout": lambda folder, here: train(folder, here, network=dropping()),
    "dropout-again": lambda folder, here: train(folder, here, network=dropping(), again=True),
    "unblocked": lambda folder, here: train(folder, here, network=Unblocked()),
    "unblocked-replicas": lambda folder, here: train(folder, here, network=Unblocked(), shard=False),
    "compiled": compiled,
    "killed": killed,
    "after-kill": lambda folder, here: train(folder, here, steps=20),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_distributed("cpu") as here:
        for scene in sys.argv[2:]:
            name, _, place = scene.partition("@")
            SCENES[name](Path(sys.argv[1]) / (place or name), here)
