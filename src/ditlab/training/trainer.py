"""The training loop, for any network and objective, on one process or many.

Every random number is a function of (seed, step) (DESIGN 3.4). So a run that is stopped at any moment and resumed ends
with the same weights and the same log as one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ditlab.diffusion.objectives import Objective
from ditlab.errors import Damaged, DitlabError, InvalidConfig
from ditlab.progress import SILENT, Interrupted, Reporter, StopFlag
from ditlab.rng import key
from ditlab.training.batches import Batch, Batches, Images
from ditlab.training.checkpoint import Checkpoint, CheckpointStore, load_network, load_optimizer, optimizer_state
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext, no_sync, replicate
from ditlab.training.ema import EMA
from ditlab.training.log import LogLength, TrainingLog, read_log
from ditlab.training.sharding import Gathered, shard_network

__all__ = ["Trainer", "TrainingInterrupted", "autocast", "check_batch", "make_optimizer", "peak_memory"]

_ALONE = DistributedContext(0, 1, torch.device("cpu"))


class TrainingInterrupted(Interrupted):
    """Training ended before its last step; a checkpoint of `step` was saved."""

    def __init__(self, step: int, *, minutes: float | None = None) -> None:
        """Keeps the steps done and the time limit that was reached, None where somebody asked to stop."""
        limit = "" if minutes is None else f", for the {minutes:g} minutes are over"
        super().__init__(f"stopped and saved after step {step}{limit}")
        self.step, self.minutes = step, minutes
        self.status = 130 if minutes is None else 0


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Returns AdamW as DiT uses it, without weight decay by default; the trainer sets each step's rate."""
    return torch.optim.AdamW(
        network.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context of forward passes: bfloat16 for the precision "bf16", else plain float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def check_batch(config: TrainingConfig, context: DistributedContext) -> None:
    """Raises InvalidConfig unless a step's batch can be cut into equal parts for all processes and micro-batches."""
    if config.batch_size % (config.accumulate * context.world):
        raise InvalidConfig(
            f"training: batch_size {config.batch_size} must be a multiple of accumulate x processes = "
            f"{config.accumulate * context.world}"
        )


@dataclass(eq=False, repr=False)
class Trainer:
    """Trains a network on images until the last step of its config.

    `fit` does all of it. The parts can be called on their own: `resume`, then `train_step` with the batch of a step,
    `log_step`, `save`. With several processes every rank calls them together. Making a trainer moves the network to its
    device and shards it where the config says so; a batch that processes cannot share raises InvalidConfig.
    """

    network: nn.Module
    """With its initial weights; trained in place."""
    objective: Objective
    """The loss to minimize."""
    images: Images
    """The image set."""
    train_indices: np.ndarray
    """The train images in it."""
    config: TrainingConfig
    """How long and how."""
    _: KW_ONLY
    checkpoints: CheckpointStore
    """The run's checkpoints; rank 0 writes them."""
    log: TrainingLog
    """The run's log; rank 0 writes it."""
    context: DistributedContext = _ALONE
    """The processes of the job; one process on the CPU where not given."""
    measure: Callable[[int], dict[str, float]] | None = None
    """Measures the network after so many steps, while it holds the averaged weights. Called on rank 0; with sharding on
    every rank, since the forward pass is collective."""
    reporter: Reporter = SILENT
    """Rank 0 notes to it, and shows a bar with loss, rate, test PSNR and gap."""
    title: str = "training"
    """Title of the bar."""
    stop: StopFlag | None = None
    """When set, the trainer saves after the current step and raises."""
    minutes: float | None = None
    """After this time `fit` saves after the current step and raises. It changes no weight, so the config lacks it."""

    def __post_init__(self) -> None:
        """Makes the optimizer and the average."""
        network, config = self.network, self.config
        check_batch(config, self.context)
        if self.minutes is not None and not self.minutes > 0:
            raise InvalidConfig(f"`minutes`: expected a positive number, found {self.minutes}")
        if not self.context.is_main:
            self.reporter = SILENT
        self.step = 0
        self.shown: dict[str, float | str] = {}
        """What the bar shows beside the steps."""
        self.sharded = config.shard and self.context.world > 1
        if self.sharded:
            shard_network(network, self.context, config.precision)
        elif config.shard:
            self.reporter.note("there is one process, so nothing is sharded; start several with torchrun")
        self._runner = network if self.sharded else replicate(network, self.context)
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules())
        self.optimizer = make_optimizer(network, config)
        self.ema = EMA(network, config.ema)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.context.device)
        self._loss_count = 0
        self._clock, self._clock_images = time.perf_counter(), 0

    def fit(self) -> None:
        """Trains until `config.steps`, from the newest whole checkpoint if there is one.

        On return the network holds the averaged weights, each rank its part of them where it is sharded.

        Raises:
            TrainingInterrupted: after a save, when `stop` was set or the time is up.
            DitlabError: no checkpoint can be read or written, or the loss is no longer finite.
        """
        config, start = self.config, time.monotonic()
        self.resume()
        batches = Batches(self.images, self.train_indices, self.objective, config, self.context)
        try:
            with self.reporter.bar(self.title, config.steps) as bar:
                if self.step == 0:
                    self.log_step()
                self._clock, self._clock_images = time.perf_counter(), 0
                while self.step < config.steps:
                    self.train_step(batches(self.step))
                    self.log_step()
                    bar(self.step, config.steps, **self.shown)
                    time_is_up = self.minutes is not None and time.monotonic() - start >= 60 * self.minutes
                    # Agreed on by several processes at intervals, because each time costs a round of communication.
                    asked = self.context.world == 1 or self.step % 10 == 0
                    stopped = self.stop is not None and self.stop.set
                    ends = asked and self.context.any(stopped or time_is_up)
                    if self.step % config.save_every == 0 or self.step == config.steps or ends:
                        self.save()
                    if ends and self.step < config.steps:
                        raise TrainingInterrupted(self.step, minutes=self.minutes if time_is_up else None)
        finally:
            batches.close()
        averaged = {name: value.to(self.context.device) for name, value in self.ema.weights.items()}
        self.network.load_state_dict(averaged)
        self.network.eval()

    def resume(self) -> None:
        """Loads the newest whole checkpoint, if there is one, and cuts the log back to it; as `fit` does first."""
        checkpoint = self.checkpoints.newest(self.reporter.note)
        if checkpoint is not None:
            load_network(self.network, checkpoint.model, checkpoint.path)
            self.ema.load(checkpoint.ema)
            self._load_state(checkpoint)
        if self.context.is_main:
            length = self.log.cut(self.step)
            if checkpoint is not None and checkpoint.log not in (None, length):
                self._note_lost_lines(checkpoint.log, length)
        self.context.wait()  # no rank trains on while rank 0 still reads what a save may remove
        self.network.train()

    def _load_state(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        try:
            load_optimizer(self.network, self.optimizer, checkpoint.optimizer)
            self.objective.load_state_dict(state["objective"])
            self._loss_sum.fill_(state["loss_sum"])
            self._loss_count = int(state["loss_count"])
        except DitlabError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(
                f"{checkpoint.path / 'state.json'}: expected the state of a training run, found another ({error!r})"
            ) from None
        self.step = checkpoint.step

    def _note_lost_lines(self, expected: LogLength, length: LogLength) -> None:
        present = {line["step"] for line in read_log(self.log.path)}
        lost = [step for step in range(self.step + 1) if self._is_logged(step) and step not in present]
        steps = ", ".join(map(str, lost[:10])) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        self.reporter.note(
            f"{self.log.path}: expected {expected.lines} lines ({expected.bytes} bytes) up to step {self.step}, found "
            f"{length.lines} ({length.bytes} bytes); "
            + (f"the lines of these steps are lost: {steps}" if lost else "its lines were changed")
        )

    def train_step(self, batch: Batch) -> None:
        """Makes one optimizer step on this rank's part of the batch of that step (`Batches`); updates the average."""
        config, objective = self.config, self.objective
        size = len(batch.images) // config.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        history: dict[str, list[Tensor]] = {name: [] for name in objective.history_keys}
        step_loss = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for micro in range(config.accumulate):
            part = slice(micro * size, (micro + 1) * size)
            if self._has_dropout:
                torch.manual_seed(key(config.seed, "dropout", self.step, micro, self.context.rank))
            with no_sync(self._runner, micro < config.accumulate - 1):
                with autocast(self.context.device, config.precision):
                    draws = {name: value[part] for name, value in batch.draws.items()}
                    label = None if batch.label is None else batch.label[part]
                    losses = objective.losses(self._runner, batch.images[part], label, draws)
                    loss = losses["loss"].mean() / config.accumulate
                loss.backward()
            step_loss += loss.detach().double()
            for name, values in history.items():
                values.append((losses[name] if name in losses else draws[name]).detach())
        if history:
            objective.update({name: self.context.gathered(torch.cat(parts)) for name, parts in history.items()})
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.network, self.step)
        self._loss_sum += step_loss
        self._loss_count += 1
        self._clock_images += config.batch_size

    def _has_loss(self, step: int) -> bool:
        return step > 0 and (step % self.config.log_every == 0 or step == self.config.steps)

    def _is_measured(self, step: int) -> bool:
        every = self.config.eval_every
        return self.measure is not None and every > 0 and (step % every == 0 or step == self.config.steps)

    def _is_logged(self, step: int) -> bool:
        return self._has_loss(step) or self._is_measured(step)

    def evaluate(self) -> dict[str, float]:
        """Returns what `measure` gives for the averaged weights; nothing on ranks that do not measure."""
        values: dict[str, float] = {}
        if self.measure is not None and (self.context.is_main or self.sharded):
            self.network.eval()
            # The blocks of a sharded network are gathered in the precision of autocast.
            precision = self.config.precision if self.sharded else "float32"
            with self.ema.applied(self.network), autocast(self.context.device, precision):
                values = self.measure(self.step)
            self.network.train()
        self.context.wait()
        return values

    def log_step(self) -> None:
        """Writes the log line of the present step, where one is due: loss and rate, measurements, or both."""
        step, config = self.step, self.config
        line: dict[str, float] = {}
        machine: dict[str, float] = {}
        if self._has_loss(step):
            loss = (self.context.mean(self._loss_sum) / self._loss_count).item()
            if not math.isfinite(loss):
                raise DitlabError(
                    f"training: the loss is {loss} at step {step}; expected a finite number "
                    "(a lower lr, or float32 instead of bf16, may help); the last checkpoint is kept"
                )
            rate = self._clock_images / (time.perf_counter() - self._clock)
            line = {"loss": loss, "lr": config.rate(step - 1)}
            machine = {"images_per_second": round(rate, 2)}
            self.shown |= {"loss": loss, "rate": f"{rate:,.0f} images/s"}
        measured = self.evaluate() if self._is_measured(step) else {}
        line |= measured
        in_bar = {"test_psnr": "test_psnr", "gap": "psnr_gap"}
        self.shown |= {name: measured[key] for name, key in in_bar.items() if key in measured}
        if machine:
            machine["memory_bytes"] = peak_memory(self.context.device)
            self._loss_sum.zero_()
            self._loss_count = 0
            self._clock, self._clock_images = time.perf_counter(), 0
        if line and self.context.is_main:
            self.log.write({"step": step, "images": step * config.batch_size, **line}, machine)

    def save(self) -> None:
        """Writes a checkpoint of the present step; rank 0 gathers and writes, the others take part."""
        loss_sum = self.context.mean(self._loss_sum)
        parts = {
            "model": Gathered(self.network.state_dict(), self.context),
            "ema": Gathered(self.ema.weights, self.context),
            "optimizer": Gathered(optimizer_state(self.network, self.optimizer), self.context),
        }
        if self.context.is_main:
            state = {
                "images": self.step * self.config.batch_size,
                "loss_sum": loss_sum.item(),
                "loss_count": self._loss_count,
                "objective": self.objective.state_dict(),
            }
            self.checkpoints.save(self.step, **parts, state=state, log=self.log.flush())
        for part in parts.values():
            part.drain()
        self.context.wait()


def peak_memory(device: torch.device) -> int:
    """Returns peak memory in bytes: of the device's allocator on CUDA, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
