"""What a run's log and evaluations say about scaling."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ditlab.analyses.scaling.points import (
    ScalingPoint,
    along_training,
    by_sampling,
    measured,
    read_evaluations,
    scaling_points,
)
from ditlab.errors import DitlabError

ABOUT = ScalingPoint("run", "small", parameters=1000, gmacs=0.5, batch_size=8, step=0)


def evaluation(step: int, nfe: int | None, **metrics: float) -> dict:
    return {"step": step, "sampler_steps": nfe, "nfe": nfe, "metrics": metrics}


def test_points_of_a_log():
    log = [{"step": step, "loss": 1 / step} for step in range(10, 1001, 10)]
    log += [{"step": 0, "test_loss": 9.0}, {"step": 500, "test_loss": 0.5, "test_psnr": 20.0, "train_loss": 0.4}]
    points = scaling_points(ABOUT, log)
    losses = [p for p in points if "loss" in p.metrics]
    assert len(losses) == 20  # twentieths of the training, the last one as far as the last step
    assert (losses[0].step, losses[-1].step) == (50, 1000)
    assert losses[0].metrics["loss"] == pytest.approx(np.mean([1 / step for step in (10, 20, 30, 40, 50)]))
    (tested,) = [p for p in points if "test_loss" in p.metrics]
    assert (tested.step, dict(tested.metrics)) == (500, {"test_loss": 0.5, "test_psnr": 20.0})
    assert measured(points) == ("loss", "test_loss", "test_psnr")
    assert {(p.run, p.label, p.parameters, p.gmacs, p.batch_size) for p in points} == {("run", "small", 1000, 0.5, 8)}


def test_short_logs():
    assert scaling_points(ABOUT, []) == []
    (one,) = scaling_points(ABOUT, [{"step": 3, "loss": 0.25}])
    assert (one.step, one.metrics["loss"]) == (3, 0.25)
    assert scaling_points(ABOUT, [{"step": 3, "loss": float("nan")}]) == []


def test_compute():
    point = ScalingPoint("run", "small", 1000, gmacs=0.5, batch_size=8, step=100, nfe=35)
    assert point.training_gmacs == 0.5 * 8 * 100 * 3
    assert point.sampling_gmacs == 0.5 * 35
    assert ABOUT.sampling_gmacs is None
    record = json.loads(json.dumps(point.to_json()))
    assert (record["training_gmacs"], record["sampling_gmacs"], record["metrics"]) == (1200.0, 17.5, {})


def test_evaluations_by_step_and_by_network_calls():
    found = scaling_points(
        ABOUT,
        [],
        [evaluation(10, 50, fid=9.0), evaluation(20, 10, fid=8.0), evaluation(20, 250, fid=3.0, precision=0.5)],
    )
    along = along_training(found, "fid")["run"]
    assert [(p.step, p.nfe, p.metrics["fid"]) for p in along] == [(10, 50, 9.0), (20, 250, 3.0)]
    sampled = by_sampling(found, "fid")["run"]
    assert [(p.nfe, p.metrics["fid"]) for p in sampled] == [(10, 8.0), (250, 3.0)]
    assert [p.nfe for p in by_sampling(found, "precision")["run"]] == [250]
    assert by_sampling(found, "recall") == along_training(found, "recall") == {}
    assert measured(found) == ("fid", "precision")
    assert by_sampling(scaling_points(ABOUT, [{"step": 5, "test_loss": 1.0}]), "test_loss") == {}


def test_evaluations_are_read(tmp_path):
    assert read_evaluations(tmp_path / "none") == []
    (tmp_path / "b.json").write_text(json.dumps(evaluation(2, 10, fid=4.0, other=1.0)))
    (tmp_path / "a.json").write_text(json.dumps({"step": 1, "metrics": {}}))
    records = read_evaluations(tmp_path)
    assert [record["step"] for record in records] == [1, 2]
    (point,) = scaling_points(ABOUT, [], records)
    assert dict(point.metrics) == {"fid": 4.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1", "expected an evaluation as JSON"),
        ("[1]", "a step and metrics"),
        ('{"metrics": {}}', "a step and metrics"),
        ('{"step": 1, "metrics": {"fid": "4"}}', "numbers by name"),
        ('{"step": 1, "metrics": {"fid": NaN}}', "numbers by name"),
        ('{"step": 1, "nfe": 2.5, "metrics": {}}', "expected nfe to be a whole number, found 2.5"),
    ],
)
def test_evaluations_that_cannot_be_read(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DitlabError, match=says) as raised:
        read_evaluations(tmp_path)
    assert str(raised.value).startswith(str(tmp_path / "a.json"))
