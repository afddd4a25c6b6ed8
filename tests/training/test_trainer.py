"""The training loop: what it computes, and that stopping it changes nothing."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ditlab.data.pixels import flip
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.progress import Bar, Reporter, StopFlag
from ditlab.training.batches import Batches, image_order
from ditlab.training.checkpoint import CheckpointStore
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext
from ditlab.training.ema import EMA, ema_decay
from ditlab.training.log import TrainingLog, read_log
from ditlab.training.trainer import Trainer, TrainingInterrupted

sys.path.insert(0, str(Path(__file__).parent))


ALONE = DistributedContext(0, 1, torch.device("cpu"))


class Noise:
    """Thirty random images in two classes, the same every time."""

    shape = (3, 4, 4)
    stochastic = False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.all = torch.rand(30, *self.shape, generator=generator) * 2 - 1

    def batch(self, indices, noise=None, mirrored=None):
        images = self.all[torch.from_numpy(indices)]
        return images if mirrored is None else flip(images, mirrored)

    def batch_labels(self, indices):
        return torch.from_numpy(indices) % 2


def small(seed: int = 0, **changes) -> DiT:
    torch.manual_seed(seed)
    settings = {"image_size": (4, 4), "width": 32, "depth": 2, "heads": 2, "attention": "3,g", "num_classes": 2}
    return DiT(DiTConfig(**{**settings, **changes}))


class Listener(Reporter):
    """Hands notes and the bar's values to functions."""

    def __init__(self, note, bar) -> None:
        self.note, self._bar = note, bar or Bar()

    @contextmanager
    def bar(self, title, total=None):
        yield self._bar


def run(
    folder: Path,
    steps: int,
    *,
    network: torch.nn.Module | None = None,
    objective=None,
    evaluate=None,
    stop=None,
    context=ALONE,
    note=print,
    bar=None,
    minutes=None,
    **settings,
):
    network = network or small()
    config = TrainingConfig(
        steps=steps,
        **{"batch_size": 8, "log_every": 3, "eval_every": 4, "save_every": 5, "lr": 1e-3, "flip": True, **settings},
    )
    Trainer(
        network,
        objective or VPObjectiveConfig().build(),
        Noise(),
        np.arange(20),
        config,
        checkpoints=CheckpointStore(folder / "checkpoints", keep=config.keep, keep_every=config.keep_every),
        log=TrainingLog(folder / "log.jsonl"),
        context=context,
        measure=evaluate,
        reporter=Listener(note, bar),
        stop=stop,
        minutes=minutes,
    ).fit()
    return network


def lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "machine"} for line in read_log(folder / "log.jsonl")]


def everything(folder: Path):
    store = CheckpointStore(folder / "checkpoints")
    loaded = store.load(store.steps()[-1])
    state = {k: v for k, v in loaded.state.items() if k != "files"}
    return loaded.model, loaded.ema, loaded.optimizer, state


def assert_equal(a: Path, b: Path) -> None:
    for left, right in zip(everything(a), everything(b), strict=True):
        assert left.keys() == right.keys()
        for name in left:
            same = (
                torch.equal(left[name], right[name])
                if isinstance(left[name], torch.Tensor)
                else left[name] == right[name]
            )
            assert same, name
    assert lines(a) == lines(b)


def test_loss_falls(tmp_path):
    run(tmp_path, 200, save_every=200, log_every=20)
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_first_step_is_adamw_on_the_mean_loss(tmp_path):
    """One step by hand, from the equations: the mean loss of the drawn batch, AdamW, the average with decay 2/11."""
    network = run(tmp_path, 1, flip=False)
    by_hand = small()
    from ditlab.rng import torch_generator

    images, objective = Noise(), VPObjectiveConfig().build()
    indices = image_order(0, 0, 8, np.arange(20))
    draws = objective.draw(torch_generator(0, "objective", 0), 8, images.shape)
    loss = objective.losses(by_hand, images.batch(indices), images.batch_labels(indices), draws)["loss"].mean()
    loss.backward()
    before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    for name, p in by_hand.named_parameters():
        # After one step Adam's bias-corrected moments are g and g^2, so the update is lr g / (|g| + eps).
        after = before[name] - 1e-3 * p.grad / (p.grad.abs() + 1e-8)
        average = before[name] + (1 - ema_decay(1, 0.9999)) * (after - before[name])
        torch.testing.assert_close(network.get_parameter(name), average, rtol=1e-5, atol=1e-7)
    assert ema_decay(1, 0.9999) == pytest.approx(2 / 11)


def test_accumulation_gives_the_same_step(tmp_path):
    whole = run(tmp_path / "a", 3)
    parts = run(tmp_path / "b", 3, accumulate=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_image_order_goes_through_all_images_epoch_by_epoch():
    train = np.array([5, 7, 9, 11, 13])
    order = np.concatenate([image_order(3, step, 4, train) for step in range(5)])
    for epoch in range(4):
        assert sorted(order[epoch * 5 : epoch * 5 + 5]) == train.tolist()
    assert not np.array_equal(order[:5], order[5:10])
    # A batch larger than the set shows images more than once, evenly.
    assert sorted(image_order(0, 0, 10, train)) == sorted(train.tolist() * 2)


def test_dropout_is_a_function_of_the_step(tmp_path):
    class Dropping(DiT):
        def __init__(self, config):
            super().__init__(config)
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x, t, label=None, *, augment=None):
            return super().forward(self.drop(x), t, label)

    def fresh():
        torch.manual_seed(0)
        return Dropping(small().config)

    run(tmp_path / "whole", 6, network=fresh(), save_every=3)
    run(tmp_path / "parts", 3, network=fresh(), save_every=3)
    torch.rand(7)
    run(tmp_path / "parts", 6, network=fresh(), save_every=3)
    a, b = everything(tmp_path / "whole")[0], everything(tmp_path / "parts")[0]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bf16_and_compiled_follow_float32(tmp_path):
    plain = run(tmp_path / "a", 6)
    half = run(tmp_path / "b", 6, precision="bf16")
    a = [line["loss"] for line in lines(tmp_path / "a") if "loss" in line]
    b = [line["loss"] for line in lines(tmp_path / "b") if "loss" in line]
    np.testing.assert_allclose(b, a, rtol=0.03)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert not torch.equal(half.final.out.weight, plain.final.out.weight)


def test_divergence_is_said(tmp_path):
    with pytest.raises(DitlabError, match=r"the loss is (nan|inf) at step 3.*the last checkpoint is kept"):
        run(tmp_path, 6, lr=1e30)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"batch_size": 6, "accumulate": 4}, "multiple of accumulate 4"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"ema": 1.0}, r"in \[0, 1\)"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"eval_every": -1}, "eval_every must not be negative"),
        ({"lr_halve_every": -1}, "lr_halve_every must not be negative"),
        ({"lr_halve_every": 5, "lr_anneal": True}, "lr_halve_every 0 or no lr_anneal, found lr_halve_every 5 and lr_"),
    ],
)
def test_settings_that_cannot_be(change, says):
    with pytest.raises(DitlabError, match=says):
        TrainingConfig(**change)


def test_rates_are_functions_of_the_step():
    assert [TrainingConfig(steps=9, lr=0.8).rate(step) for step in (0, 8)] == [0.8, 0.8]
    halved = TrainingConfig(steps=9, lr=0.8, lr_halve_every=3)
    assert [halved.rate(step) for step in range(7)] == [0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2]
    annealed = TrainingConfig(steps=4, lr=0.8, lr_anneal=True)
    assert [annealed.rate(step) for step in range(5)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize("settings", [{"lr_halve_every": 4}, {"lr_anneal": True}], ids=["halved", "annealed"])
def test_a_falling_rate_goes_on_where_it_was(tmp_path, settings):
    whole = run(tmp_path / "whole", 9, save_every=3, log_every=1, **settings)
    stop = StopFlag()

    def stop_at_four(step):
        stop.set = step == 4
        return {}

    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", 9, save_every=3, log_every=1, evaluate=stop_at_four, stop=stop, **settings)
    run(tmp_path / "parts", 9, save_every=3, log_every=1, **settings)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    config = TrainingConfig(steps=9, lr=1e-3, **settings)
    assert [line["lr"] for line in lines(tmp_path / "whole")] == [config.rate(step) for step in range(9)]
    # The log says what the optimizer did: the constant rate leads elsewhere.
    constant = run(tmp_path / "constant", 9, save_every=3, log_every=1)
    assert not torch.equal(constant.final.out.weight, whole.final.out.weight)


def test_the_rate_moves_the_weights(tmp_path):
    """Adam's first step moves each weight by the rate, whatever the gradient: twice as far where it is not halved."""
    start, ends = small().final.out.weight, []
    for name, settings in {"half": {"lr_anneal": True}, "full": {}}.items():
        run(tmp_path / name, 2, ema=0.0, flip=False, lr=1e-6, **settings)
        ends.append(everything(tmp_path / name)[0]["final.out.weight"] - start)
    far, near = ends[1].abs().median(), ends[0].abs().median()
    assert 0.6 < near / far < 0.9  # one and a half steps of two


def test_a_time_limit_saves_and_ends(tmp_path):
    with pytest.raises(TrainingInterrupted) as raised:
        run(tmp_path / "parts", 7, minutes=1e-9)
    assert (raised.value.step, raised.value.minutes) == (1, 1e-9)
    assert CheckpointStore(tmp_path / "parts" / "checkpoints").steps() == [1]
    run(tmp_path / "parts", 7, minutes=60.0)
    run(tmp_path / "whole", 7)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    # A limit that is reached with the last step interrupts nothing.
    run(tmp_path / "short", 1, minutes=1e-9)
    with pytest.raises(DitlabError, match=r"`minutes`: expected a positive number, found 0\.0"):
        run(tmp_path / "none", 1, minutes=0.0)


def test_the_bar_shows_what_is_known(tmp_path):
    shown = []

    def bar(done, total=None, **fields):
        shown.append((done, total, fields))

    def evaluate(step):
        return {"test_psnr": 20.0 + step, "psnr_gap": 0.5 * step, "test_loss": 1.0}

    run(tmp_path, 7, evaluate=evaluate, bar=bar)
    assert [(done, total) for done, total, _ in shown] == [(step, 7) for step in range(1, 8)]
    assert [fields["test_psnr"] for *_, fields in shown] == [20, 20, 20, 24, 24, 24, 27]
    assert [fields["gap"] for *_, fields in shown] == [0, 0, 0, 2, 2, 2, 3.5]
    losses = {line["step"]: line["loss"] for line in lines(tmp_path) if "loss" in line}
    known = [max((step for step in losses if step <= done), default=None) for done, *_ in shown]
    assert [fields.get("loss") for *_, fields in shown] == [losses.get(step) for step in known]
    assert all(re.fullmatch(r"[\d,]+ images/s", str(fields["rate"])) for *_, fields in shown[2:])


def test_the_parts_make_the_whole(tmp_path):
    """`resume`, `train_step`, `log_step` and `save` by hand give the checkpoint of `fit`."""
    run(tmp_path / "whole", 3)
    config = TrainingConfig(steps=3, batch_size=8, log_every=3, eval_every=4, save_every=5, lr=1e-3, flip=True)
    objective = VPObjectiveConfig().build()
    trainer = Trainer(
        small(),
        objective,
        Noise(),
        np.arange(20),
        config,
        checkpoints=CheckpointStore(tmp_path / "parts" / "checkpoints"),
        log=TrainingLog(tmp_path / "parts" / "log.jsonl"),
    )
    trainer.resume()
    batches = Batches(Noise(), np.arange(20), objective, config, ALONE)
    for step in range(3):
        trainer.train_step(batches(step))
        trainer.log_step()
    trainer.save()
    assert_equal(tmp_path / "whole", tmp_path / "parts")


def test_ema_decay_warms_up_to_its_limit():
    assert ema_decay(0, 0.9999) == pytest.approx(0.1)
    assert ema_decay(1000, 0.9999) == pytest.approx(1001 / 1010)
    assert ema_decay(200_000, 0.9999) == 0.9999


def test_ema_applied_is_undone_to_the_bit():
    network = small()
    ema = EMA(network, 0.99)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    own = {k: v.clone() for k, v in network.state_dict().items()}
    with ema.applied(network):
        assert all(torch.equal(v, ema.weights[k]) for k, v in network.state_dict().items())
    assert all(torch.equal(v, own[k]) for k, v in network.state_dict().items())
