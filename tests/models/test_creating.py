"""Training through the library's call: resuming, stopping in time, one process at a time, errors by kind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import ditlab
from ditlab.errors import AlreadyExists, Damaged, DitlabError, Incompatible, InvalidConfig, NotFound
from ditlab.models import creating
from ditlab.models.comparing import open_models
from ditlab.models.creating import run_lock
from ditlab.models.run import Run
from ditlab.progress import StopFlag
from ditlab.training.distributed import DistributedContext
from ditlab.training.trainer import TrainingInterrupted


def test_the_command_is_that_of_the_settings(train, tmp_path):
    first = train(tmp_path / "run").record.command
    assert first.startswith("ditlab.train('dit-nano/1', '")
    assert "n=10, test=8, width=16" in first
    assert "steps=4" in first
    again = train(tmp_path / "run")
    assert again.record.command == first
    longer = train(tmp_path / "run", steps=6)
    assert "steps=6" in longer.record.command
    assert "steps=4" not in longer.record.command
    assert Run.open(tmp_path / "run").record.command == longer.record.command
    assert (longer.newest_step, longer.finished) == (6, True)


def test_a_limit_of_minutes_saves_and_the_same_call_resumes(train, tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", minutes=1e-9)
    stopped = Run.open(tmp_path / "run")
    assert not stopped.finished
    assert stopped.newest_step is not None
    assert stopped.newest_step < 4
    resumed = train(tmp_path / "run", minutes=10.0)
    assert resumed.finished
    assert resumed.checkpoint().weights_hash(True) == whole.checkpoint().weights_hash(True)


def test_a_stop_flag_saves(train, tmp_path):
    flag = StopFlag()
    flag.set = True
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", stop=flag)
    assert Run.open(tmp_path / "run").checkpoints.steps()


def test_one_caller_at_a_time_trains_a_run(train, tmp_path, monkeypatch):
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", minutes=1e-9)
    monkeypatch.setattr(creating, "run_lock", partial(run_lock, wait=0.0))
    before = Run.open(tmp_path / "run").checkpoints.steps()
    with run_lock(tmp_path / "run"):
        with pytest.raises(Incompatible, match=r"run .*: another process is training it"):
            train(tmp_path / "run")
        assert Run.open(tmp_path / "run").checkpoints.steps() == before
    assert train(tmp_path / "run").finished


def test_a_second_caller_changes_nothing(train, tmp_path, monkeypatch):
    """More steps that are asked for while a run trains are not written into its settings."""
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", minutes=1e-9)
    monkeypatch.setattr(creating, "run_lock", partial(run_lock, wait=0.0))
    record = (tmp_path / "run" / "config.json").read_text()
    with run_lock(tmp_path / "run"), pytest.raises(Incompatible, match="another process is training it"):
        train(tmp_path / "run", steps=9)
    assert (tmp_path / "run" / "config.json").read_text() == record


def test_errors_by_kind(train, images, make_images, tmp_path):
    run = train(tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("something else")
    half = ditlab.Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(3, 4, 4))

    def model(**split: int) -> ditlab.Model:
        return ditlab.Model(half, images, name="mine", **split)

    calls = [
        (NotFound, lambda: ditlab.open(tmp_path / "nothing")),
        (NotFound, lambda: ditlab.load(tmp_path / "run", step=3)),
        (NotFound, lambda: ditlab.analyze("psnr-gop", run)),
        (NotFound, lambda: ditlab.train("dit-nono/1", images)),
        (NotFound, lambda: ditlab.psnr_gap(run, imagse=3)),
        (InvalidConfig, lambda: ditlab.psnr_gap(run, images=0)),
        (InvalidConfig, lambda: train(tmp_path / "zero", n=0)),
        (InvalidConfig, lambda: open_models([])),
        (InvalidConfig, lambda: open_models([run], names=("a", "b"))),
        (Incompatible, lambda: open_models([run, run])),
        (Incompatible, lambda: open_models([run, model(n=10, test=5)])),
        (Incompatible, lambda: open_models([run, ditlab.Model(half, make_images(30, 1), n=10, test=8)])),
        (Incompatible, lambda: train(tmp_path / "run", batch_size=5)),
        (Incompatible, lambda: train(tmp_path / "run", steps=2)),
        (AlreadyExists, lambda: train(tmp_path / "file")),
        (AlreadyExists, lambda: train(tmp_path / "other")),
        (AlreadyExists, lambda: open_models([run], out=tmp_path / "file" / "deeper")),
    ]
    for kind, call in calls:
        with pytest.raises(DitlabError) as raised:
            call()
        assert type(raised.value) is kind, raised.value
        assert "--" not in str(raised.value)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(Damaged, match="expected JSON"):
        ditlab.open(tmp_path / "run")
    assert not Path("external").exists()


def test_the_recorded_call_is_python_with_every_setting(train, tmp_path):
    command = train(tmp_path / "run", seed=0, ema=0.0, **{"evaluation.images": 4}).record.command
    call = ast.parse(command, mode="eval").body
    assert isinstance(call, ast.Call)
    values = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert (values["ema"], values["eval_every"]) == (0.0, 0)
    assert values[None] == {"evaluation.images": 4}


def test_settings_that_another_caller_wrote_before_the_lock_are_not_trained(train, tmp_path, monkeypatch):
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", minutes=1e-9)
    file = tmp_path / "run" / "config.json"

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        file.write_text(re.sub(r'"steps": 4\b', '"steps": 9', file.read_text(), count=1))
        yield

    monkeypatch.setattr(creating, "run_lock", late)
    with pytest.raises(Incompatible, match=r"run .*: another process changed its settings"):
        train(tmp_path / "run")


def test_a_run_that_is_locked_is_refused_before_other_processes_train(train, tmp_path, monkeypatch):
    """The other ranks hear of the refusal where all wait for rank 0, before any of them computes."""
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "run", minutes=1e-9)
    refusals = []

    def raise_together(self: DistributedContext, error: DitlabError | None) -> bool:
        refusals.append(error)
        return False

    monkeypatch.setattr(creating, "run_lock", partial(run_lock, wait=0.0))
    monkeypatch.setattr(DistributedContext, "raise_together", raise_together)
    with run_lock(tmp_path / "run"), pytest.raises(AssertionError):  # of the fixture, which expects a run
        train(tmp_path / "run")
    assert [type(error) for error in refusals] == [Incompatible]
