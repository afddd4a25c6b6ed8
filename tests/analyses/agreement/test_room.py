"""The room of the agreement: what models it takes, the cache, the images that are shown, the section."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import ditlab
from ditlab.analyses import analysis
from ditlab.analyses.agreement.config import BASELINES
from ditlab.analyses.agreement.figures import images_to_show
from ditlab.analyses.agreement.result import AgreementResult
from ditlab.analyses.base import ReportContext
from ditlab.models.comparing import open_models
from ditlab.models.memorization import BLANK

QUICK = {"images": 3, "sampler_steps": 4, "trajectories": 2, "device": "cpu"}
SHORT = {"baselines": ["empirical-bayes", "ls"], "window": 3, "images": 2, "sampler_steps": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures are put together but not rendered."""
    monkeypatch.setattr("ditlab.pages.drawing.save_drawings", lambda drawings, out: [out / name for name in drawings])


def test_all_baselines_know_the_training_images(trained, opened):
    run = opened(trained("plain"))
    comparison = ditlab.agreement(run, **QUICK)
    [result] = comparison.results
    assert [baseline.name for baseline in result.baselines] == list(BASELINES)
    assert (result.about.n, result.about.step, result.about.ema, result.training_images) == (20, 6, True, 20)
    train, memory = run.images.batch(run.split.train).numpy(), result.baselines[0].images
    assert min(np.abs(train - image).max((1, 2, 3)).min() for image in memory) < 1e-3
    assert list(comparison.drawings()) == ["agreement-images", "agreement"]
    assert [path.name for path in comparison.files] == ["agreement.json", "agreement-images", "agreement"]
    assert comparison.to_json() == AgreementResult.load(run.path / "analysis" / "agreement.json").to_json()
    assert [row[2] for row in comparison.table().rows] == [baseline.title for baseline in result.baselines]
    assert comparison.sentences()[0].startswith("plain, N = 20: the samples agree most with those of ")


def test_the_cache_goes_by_weights_and_settings(trained, opened, monkeypatch):
    run = opened(trained("plain"))
    first = ditlab.agreement(run, **SHORT).results[0]
    calls = []
    monkeypatch.setattr("ditlab.analyses.agreement.measure.measure_model", lambda *_: calls.append("measured") or first)
    again = ditlab.agreement(run, **SHORT).results[0]
    assert (calls, again.to_json()) == ([], first.to_json())
    ditlab.agreement(run, **SHORT, checkpoint=4)
    ditlab.agreement(run, **{**SHORT, "window": 5})
    assert calls == ["measured"] * 2


def test_a_fixed_window_raw_weights_and_few_images(trained, opened):
    run = opened(trained("plain"))
    some = {"baselines": ["ls", "wiener"], "window": 3, "raw": True, "checkpoint": 4, "training_images": 5}
    comparison = ditlab.agreement(run, **QUICK, **some, names=["mine"])
    [result] = comparison.results
    assert [baseline.name for baseline in result.baselines] == ["ls", "wiener"]
    assert (result.about.step, result.about.ema, result.training_images) == (4, False, 5)
    assert set(result.baselines[0].windows.sizes) == {3}
    assert comparison.notes == ["plain: Baselines were made of the first 5 of 20 training images."]
    assert comparison.sentences()[0].startswith("mine, N = 20")


def test_a_conditional_model_gets_no_class(trained, opened):
    comparison = ditlab.agreement(opened(trained("conditional", conditional=True)), **QUICK, baselines=["wiener"])
    assert "The denoiser got the label 'no class'; baselines take no class." in comparison.notes[0]


def test_a_model_that_mirrors_is_compared_with_both_sides(trained, opened):
    run = opened(trained("mirroring", flip=True))
    comparison = ditlab.agreement(run, **QUICK, baselines=["empirical-bayes"])
    [result] = comparison.results
    assert "baselines use each training image and its mirror image" in comparison.notes[0]
    train, memory = run.images.batch(run.split.train).numpy(), result.baselines[0].images
    both = np.concatenate([train, train[..., ::-1]])
    assert max(np.abs(both - image).max((1, 2, 3)).min() for image in memory) < 1e-2
    assert result.training_images == 20


def test_a_models_own_denoiser_and_refusals(trained, opened, tmp_path):
    run = trained("plain")
    network = ditlab.Denoiser.wrap(lambda y, sigma, label: y / (1 + sigma.view(-1, 1, 1, 1) ** 2), shape=(3, 8, 8))
    mine = ditlab.Model(network, run.images, n=10, test=20, name="mine", out=tmp_path / "mine")
    [result] = ditlab.agreement(mine, **SHORT, sampler="euler").results
    assert (result.about.name, result.training_images) == ("mine", 10)
    for settings, text in (
        ({"window": 9}, "`window` must be at most 8"),
        ({"candidates": (9, 11), "window": None}, "`candidates` must have one of at most 8"),
        ({"sampler_steps": 5000}, "5000"),
        ({"checkpoint": 5}, "no checkpoint of step 5"),
    ):
        with pytest.raises(ditlab.DitlabError, match=text):
            ditlab.agreement(opened(run), **{**SHORT, **settings})
    with pytest.raises(ditlab.DitlabError, match="agreement: expected 1 model, found 2"):
        ditlab.agreement([run, run], **SHORT)  # pyright: ignore[reportArgumentType]


def test_hidden_training_images(trained, opened):
    """A network that replays its images draws training images, whatever else is hidden."""
    run = opened(trained("plain"))
    [result] = ditlab.agreement(run, **SHORT).results
    replayed = replace(result, images=run.images.batch(run.split.train[:2]).numpy())
    hidden = images_to_show(run, replayed, hide_training_images=True)
    assert "empirical-bayes" not in hidden
    assert (hidden["network"] == BLANK).all()
    assert np.ptp(hidden["noise"]) > 0
    assert (images_to_show(run, replayed)["network"] != BLANK).any()
    assert np.ptp(images_to_show(run, result, hide_training_images=True)["network"]) > 0  # two noisy images


def test_the_section_shows_what_is_saved_of_the_same_weights(trained, opened):
    run, other = opened(trained("plain")), opened(trained("local", attention="3,3"))
    ditlab.agreement(run, **SHORT)
    models, room = open_models([run, other]), analysis("agreement")
    [comparison] = room.for_report(models, ReportContext(hide_training_images=True))
    assert list(comparison.drawings()) == ["agreement-images-1", "agreement-1"]
    section = comparison.section({})
    assert (section.id, list(section.data)) == ("agreement", ["plain-agreement.json"])
    assert {row[0] for row in section.tables[0].rows} == {models.kinds[0]}
    ditlab.agreement(other, **SHORT)
    [comparison] = room.for_report(models, ReportContext())
    assert list(comparison.drawings()) == ["agreement-images-1", "agreement-1", "agreement-images-2", "agreement-2"]
    path = run.path / "analysis" / "agreement.json"
    record = json.loads(path.read_text())
    record["about"]["weights"] = "0" * 64
    path.write_text(json.dumps(record))
    (other.path / "analysis" / "agreement.json").write_text("{}")
    assert room.for_report(models, ReportContext()) == []
