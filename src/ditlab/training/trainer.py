"""One training loop, for any network and objective, on one process or many.

Everything it needs is handed in: the network, the objective, the images, where checkpoints and log lines go, what to
evaluate. Every random number is a function of (seed, step) (DESIGN 3.3), so a run that is stopped at any moment and
started again gives the same weights and the same log as one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.rng import key, numpy_generator, torch_generator
from ditlab.training.checkpoint import CheckpointStore, load_network, load_optimizer, optimizer_state
from ditlab.training.distributed import Processes, holding, replicate
from ditlab.training.ema import EMA
from ditlab.training.log import TrainingLog
from ditlab.training.sharding import Gathered, shard_network


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how a network is trained."""

    steps: int = 400_000
    """Optimizer steps (An et al. 400,000)."""
    batch_size: int = 64
    """Images a step, over all processes and micro-batches (An et al.'s is unknown; 64 is a default of ditlab's)."""
    accumulate: int = 1
    """Micro-batches that a step's batch is cut into, to save memory."""
    lr: float = 1e-4
    """AdamW's learning rate (DiT's), constant unless one of the next two says otherwise."""
    lr_halve_every: int = 0
    """Steps after which the learning rate is halved, again and again (Kadkhodaie et al.); 0 for never."""
    lr_anneal: bool = False
    """Let the learning rate fall linearly, to 0 at the last step (improved-diffusion's option)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    ema: float = 0.9999
    """Limit of the decay of the averaged weights; the decay rises as (1 + step) / (10 + step) until it gets there."""
    flip: bool = False
    """Whether each image is mirrored left to right with probability 1/2."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the forward and backward pass; weights, averages and the optimizer stay in float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network's blocks; auto: on CUDA, and on the CPU for wide networks in long runs."""
    shard: bool = False
    """Keep one part of the weights, gradients, averages and optimizer state in each process (FSDP2), to save memory."""
    checkpoint_activations: bool = False
    """Compute each block a second time in the backward pass instead of keeping its activations, to save memory."""
    seed: int = 0
    """Seed of the initial weights, the order of images, noise, flips and dropout."""
    log_every: int = 100
    """Steps between lines of the log."""
    eval_every: int = 1000
    """Steps between measurements of the averaged weights; 0 for none."""
    save_every: int = 1000
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps stay for good; 0 for none."""

    def __post_init__(self) -> None:
        """Refuses settings that cannot be trained with, with a sentence."""
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise DitlabError(f"training: {name} must be at least 1, found {getattr(self, name)}")
        for name in ("eval_every", "keep_every", "weight_decay", "lr_halve_every"):
            if getattr(self, name) < 0:
                raise DitlabError(f"training: {name} must not be negative, found {getattr(self, name)}")
        if self.keep < 1:
            raise DitlabError(f"training: keep must be at least 1 (the last checkpoint is the run), found {self.keep}")
        if not 0 < self.lr < math.inf:
            raise DitlabError(f"training: lr must be positive, found {self.lr}")
        if self.lr_halve_every and self.lr_anneal:
            raise DitlabError(
                f"training: expected lr_halve_every 0 or no lr_anneal, found lr_halve_every {self.lr_halve_every} and "
                "lr_anneal"
            )
        if not 0 <= self.ema < 1:
            raise DitlabError(f"training: ema must be in [0, 1), found {self.ema}")
        if self.batch_size % self.accumulate:
            raise DitlabError(
                f"training: batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of the step that is made after `step` steps."""
        if self.lr_halve_every:
            return self.lr * 0.5 ** (step // self.lr_halve_every)
        return self.lr * (1 - step / self.steps) if self.lr_anneal else self.lr


@runtime_checkable
class Objective(Protocol):
    """What the loop asks of an objective (ditlab.diffusion.objectives)."""

    @property
    def history_keys(self) -> tuple[str, ...]:
        """Names of the draws and losses `[B]` of a step that `update` takes; none for most."""
        ...

    def update(self, seen: Mapping[str, Tensor]) -> None:
        """Takes them after each step, for all images of the global batch."""
        ...

    def draw(self, generator: torch.Generator, count: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Every random number of `count` images, on the CPU, first dimension `count`."""
        ...

    def losses(
        self, network: nn.Module, images: Tensor, label: Tensor | None, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Per-image losses `[B]`; "loss" is the one to descend."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the objective's history, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...


@runtime_checkable
class Images(Protocol):
    """What the loop asks of an image set (ditlab.data.imageset)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def sampled(self) -> bool:
        """Whether each use of an image is a new draw (of the latents' posterior), so that `batch` takes noise."""
        ...

    def batch(self, indices: np.ndarray, noise: Tensor | None = None, mirrored: Tensor | None = None) -> Tensor:
        """Images `[B, C, H, W]` as the network sees them; those whose `mirrored` is True mirrored left to right."""
        ...

    def batch_labels(self, indices: np.ndarray) -> Tensor | None:
        """Labels `[B]`, or None."""
        ...


class Interrupted(Exception):
    """The user asked to stop; a checkpoint of `step` was written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class StopFlag:
    """Set by a signal handler; read by the loop between two steps."""

    def __init__(self) -> None:
        self.set = False


def image_order(seed: int, step: int, batch: int, train: np.ndarray) -> np.ndarray:
    """The indices of the images of one step: seeded permutations of the train images, epoch after epoch.

    Args:
        seed: the run's seed.
        step: steps done before this one.
        batch: images in the global batch.
        train: indices of the train images in the image set.

    Returns:
        `[batch]` indices, a pure function of the arguments.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // len(train)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order = numpy_generator(seed, "order", int(epoch)).permutation(len(train))
        chosen[here] = train[order[positions[here] % len(train)]]
    return chosen


@dataclass(frozen=True)
class Batch:
    """One process's part of a step's batch, on its device."""

    images: Tensor
    label: Tensor | None
    draws: dict[str, Tensor]


class Batches:
    """Makes the batch of any step; on CUDA the next one is made while the device computes.

    Not so where the objective learns from a step what it draws for the next.
    """

    def __init__(
        self, images: Images, train: np.ndarray, objective: Objective, config: TrainingConfig, processes: Processes
    ) -> None:
        self._images, self._train, self._objective = images, train, objective
        self._config, self._processes = config, processes
        ahead = processes.device.type == "cuda" and not objective.history_keys
        self._worker = ThreadPoolExecutor(1) if ahead else None
        self._ahead: tuple[int, Any] | None = None
        self._permutation: tuple[int, np.ndarray] | None = None

    def _make(self, step: int) -> Batch:
        config, share, device = self._config, self._processes.share(self._config.batch_size), self._processes.device
        indices = image_order(config.seed, step, config.batch_size, self._train)[share]
        coins, noise = None, None
        if config.flip:
            coins = torch.rand(config.batch_size, generator=torch_generator(config.seed, "flip", step)) < 0.5
        if self._images.sampled:
            noise = torch.randn(
                config.batch_size, *self._images.shape, generator=torch_generator(config.seed, "posterior", step)
            )
        images = self._images.batch(
            indices,
            noise=None if noise is None else noise[share],
            mirrored=None if coins is None else coins[share],
        )
        label = self._images.batch_labels(indices)
        draws = self._objective.draw(
            torch_generator(config.seed, "objective", step), config.batch_size, self._images.shape
        )

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return Batch(
            move(images),
            None if label is None else move(label),
            {name: move(value[share].contiguous()) for name, value in draws.items()},
        )

    def __call__(self, step: int) -> Batch:
        """The batch of the step after `step` steps."""
        if self._worker is None:
            return self._make(step)
        ready = self._ahead[1].result() if self._ahead is not None and self._ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._worker.submit(self._make, step + 1))
        return ready

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW as DiT has it, without weight decay by default; the loop sets each step's rate."""
    return torch.optim.AdamW(
        network.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward passes run: bf16 where asked for, else plain float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def check_batch(config: TrainingConfig, processes: Processes) -> None:
    """Raises a DitlabError where a step's batch cannot be cut into equal parts for all processes and micro-batches."""
    if config.batch_size % (config.accumulate * processes.world):
        raise DitlabError(
            f"training: batch_size {config.batch_size} must be a multiple of accumulate x processes = "
            f"{config.accumulate * processes.world}"
        )


def train(
    *,
    network: nn.Module,
    objective: Objective,
    images: Images,
    train: np.ndarray,
    config: TrainingConfig,
    processes: Processes,
    checkpoints: CheckpointStore,
    log: TrainingLog,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    say: Callable[[str], None] = lambda sentence: None,
    stop: StopFlag | None = None,
) -> None:
    """Trains until `config.steps`, from the newest whole checkpoint if there is one.

    On return the network holds the averaged weights, each process its part of them where it is sharded.

    Args:
        network: with its initial weights, on the CPU or its device; moved there and trained in place.
        objective: what is minimized.
        images: the image set.
        train: indices of the train images in it.
        config: how long and how.
        processes: this process and the others.
        checkpoints: where checkpoints lie; written by the first process alone.
        log: where log lines go; written by the first process alone.
        evaluate: measures the network, which holds the averaged weights while it runs; called by the first process, or
            by all, with the same work, where the network is sharded: only all together can run it.
        progress: called after each step with the steps done and the last known loss.
        say: called with a sentence that the user should see (a damaged checkpoint, say).
        stop: when set, the loop saves and raises.

    Raises:
        Interrupted: after a save, when `stop` was set.
        DitlabError: when no checkpoint can be read or written, or the loss is no longer finite.
    """
    check_batch(config, processes)
    stop = stop or StopFlag()
    sharded = config.shard and processes.world > 1
    if config.shard and not sharded:
        say("there is one process, so nothing is sharded; start several with torchrun")
    if sharded:
        shard_network(network, processes, config.precision)
    runner = network if sharded else replicate(network, processes)
    optimizer = make_optimizer(network, config)
    ema = EMA(network, config.ema)
    loss_sum = torch.zeros((), dtype=torch.float64, device=processes.device)
    loss_count = 0
    step = 0

    found = checkpoints.newest(say if processes.first else None)
    if found is not None:
        load_network(network, found.model, found.path)
        ema.load(found.ema)
        load_optimizer(network, optimizer, found.optimizer)
        objective.load_state_dict(found.state["objective"])
        loss_sum += found.state["loss_sum"]
        loss_count = found.state["loss_count"]
        step = found.step
    if processes.first:
        log.cut(step)
    processes.wait()  # nobody trains on while the first process still reads what a save may remove

    def save() -> None:
        mean = processes.mean(loss_sum)
        parts = {
            "model": Gathered(network.state_dict(), processes),
            "ema": Gathered(ema.weights, processes),
            "optimizer": Gathered(optimizer_state(network, optimizer), processes),
        }
        if processes.first:
            checkpoints.save(
                step,
                **parts,
                state={
                    "images": step * config.batch_size,
                    "loss_sum": mean.item(),
                    "loss_count": loss_count,
                    "objective": objective.state_dict(),
                },
            )
        for part in parts.values():
            part.drain()
        processes.wait()

    def measured(at: int) -> dict[str, float]:
        if evaluate is None or not config.eval_every:
            return {}
        if at % config.eval_every and at != config.steps:
            return {}
        values: dict[str, float] = {}
        if processes.first or sharded:
            network.eval()
            # The blocks of a sharded network take what autocast gives them.
            with ema.applied(network), autocast(processes.device, config.precision if sharded else "float32"):
                values = evaluate(at)
            network.train()
        processes.wait()
        return values

    batches = Batches(images, train, objective, config, processes)
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules())
    network.train()
    if step == 0 and config.eval_every:
        first = measured(0)
        if first and processes.first:
            log.write({"step": 0, "images": 0, **first}, {})
    try:
        since, images_since = time.perf_counter(), 0
        while step < config.steps:
            batch = batches(step)
            size = len(batch.images) // config.accumulate
            optimizer.zero_grad(set_to_none=True)
            step_loss = torch.zeros((), dtype=torch.float64, device=processes.device)
            seen: dict[str, list[Tensor]] = {name: [] for name in objective.history_keys}
            for micro in range(config.accumulate):
                part = slice(micro * size, (micro + 1) * size)
                if has_dropout:
                    torch.manual_seed(key(config.seed, "dropout", step, micro, processes.rank))
                with holding(runner, micro < config.accumulate - 1):
                    with autocast(processes.device, config.precision):
                        draws = {name: value[part] for name, value in batch.draws.items()}
                        label = None if batch.label is None else batch.label[part]
                        losses = objective.losses(runner, batch.images[part], label, draws)
                        loss = losses["loss"].mean() / config.accumulate
                    loss.backward()
                step_loss += loss.detach().double()
                for name, values in seen.items():
                    values.append((losses[name] if name in losses else draws[name]).detach())
            if seen:
                objective.update({name: processes.gathered(torch.cat(parts)) for name, parts in seen.items()})
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            optimizer.step()
            step += 1
            ema.update(network, step)
            loss_sum += step_loss
            loss_count += 1
            images_since += config.batch_size

            if step % config.log_every == 0 or step == config.steps:
                mean = (processes.mean(loss_sum) / loss_count).item()
                if not math.isfinite(mean):
                    raise DitlabError(
                        f"training: the loss is {mean} at step {step}; expected a finite number "
                        "(a lower lr, or float32 instead of bf16, may help); the last checkpoint is kept"
                    )
                rate = images_since / (time.perf_counter() - since)
                line = {"step": step, "images": step * config.batch_size, "loss": mean, "lr": config.rate(step - 1)}
                line |= measured(step)
                if processes.first:
                    log.write(
                        line, {"images_per_second": round(rate, 2), "memory_bytes": peak_memory(processes.device)}
                    )
                loss_sum.zero_()
                loss_count = 0
                since, images_since = time.perf_counter(), 0
                progress(step, mean)
            else:
                values = measured(step)
                if values and processes.first:
                    log.write({"step": step, "images": step * config.batch_size, **values}, {})
                progress(step, math.nan)
            # With several processes the flag is agreed on at intervals: asking costs a round over the network.
            asked = processes.any(stop.set) if processes.world == 1 or step % 10 == 0 else False
            if step % config.save_every == 0 or step == config.steps or asked:
                save()
            if asked and step < config.steps:
                raise Interrupted(step)
    finally:
        batches.close()
    network.load_state_dict({name: value.to(processes.device) for name, value in ema.weights.items()})
    network.eval()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the device's allocator on CUDA, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
