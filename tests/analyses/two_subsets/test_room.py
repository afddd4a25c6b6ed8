"""The room of the two-subset test: which runs it takes, the cache, the pictures that are shown, the section."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ditlab
from ditlab.analyses import analysis
from ditlab.analyses.base import ReportContext
from ditlab.analyses.two_subsets.figures import closest_pictures, mask_near_copies
from ditlab.analyses.two_subsets.measure import closest
from ditlab.analyses.two_subsets.result import TwoSubsetsResult
from ditlab.models.comparing import open_models
from ditlab.models.memorization import BLANK

QUICK = {"seeds": "3-7,20", "sampler_steps": 3, "device": "cpu"}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures are put together but not rendered."""
    monkeypatch.setattr("ditlab.pages.drawing.save_drawings", lambda drawings, out: [out / name for name in drawings])


@pytest.fixture
def plain(trained, opened):
    return opened(trained("plain"))


@pytest.fixture
def twin(trained, opened):
    """The plain run's twin: the next 20 images."""
    return opened(trained("twin", skip=20))


def test_skipping_gives_a_disjoint_set(plain, twin):
    assert (plain.split_record.skip, twin.split_record.skip, twin.config.data.skip) == (0, 20, 20)
    assert not np.intersect1d(plain.split.train, twin.split.train).size
    assert (plain.split.test == twin.split.test).all()
    assert plain.split.test_hash == twin.split.test_hash


def test_two_runs(plain, twin, tmp_path):
    out = tmp_path / "out"
    comparison = ditlab.two_subsets(plain, twin, **QUICK, out=out)
    [result] = comparison.results
    assert comparison.to_json() == TwoSubsetsResult.load(out / "two-subsets.json").to_json()
    assert (result.seeds, result.mean_removed) == ((3, 4, 5, 6, 7, 20), True)
    assert [about.n for about in result.about] == [20, 20]
    assert [path.name for path in comparison.files] == ["two-subsets.json", "two-subsets", "two-subsets-pairs"]
    assert not (plain.path / "analysis").exists()
    assert comparison.table().rows[0][:3] == ("plain and twin", 20, 6)
    assert comparison.notes == []
    # The batch does not matter, and each run's samples are those that others draw of these seeds.
    [again] = ditlab.two_subsets(plain, twin, **QUICK, batch=2, keep_mean=True).results
    assert not again.mean_removed
    np.testing.assert_array_equal(again.pictures, result.pictures)
    assert TwoSubsetsResult.load(plain.path / "analysis" / "two-subsets.json").to_json() == again.to_json()
    [swapped] = ditlab.two_subsets(twin, plain, **{**QUICK, "seeds": [3, 4, 5, 6, 7, 20]}).results
    assert swapped.settings == result.settings
    np.testing.assert_array_equal(swapped.pictures, result.pictures[::-1])


def test_the_cache_goes_by_weights_and_settings(plain, twin, monkeypatch):
    [first] = ditlab.two_subsets(plain, twin, **QUICK).results
    calls = []
    monkeypatch.setattr(
        "ditlab.analyses.two_subsets.measure.measure_runs", lambda *_: calls.append("measured") or first
    )
    [again] = ditlab.two_subsets(plain, twin, **QUICK, batch=5).results
    assert (calls, again.to_json()) == ([], first.to_json())
    for change in ({"keep_mean": True}, {"seeds": "3-7"}, {"sampler": "euler"}, {"checkpoint": 4}, {"raw": True}):
        ditlab.two_subsets(plain, twin, **{**QUICK, **change})
    assert calls == ["measured"] * 5


def test_runs_that_replay_are_told_from_the_control(plain, twin, monkeypatch):
    """If each run draws its own training images, they are the closest ones, and not the other run's."""
    images = [run.images.batch(run.split.train[5:11]) for run in (plain, twin)]
    monkeypatch.setattr("ditlab.analyses.two_subsets.measure.draw", lambda *_, **__: images.pop(0))
    [result] = ditlab.two_subsets(plain, twin, **QUICK).results
    assert [side.index.tolist() for side in result.nearest] == [list(range(5, 11))] * 2
    np.testing.assert_allclose(result.nearest_cosine, 1)
    assert result.difference < 0
    assert len(result.control) == 20
    assert result.control.max() < 1
    pictures = closest_pictures([plain, twin], result)
    np.testing.assert_array_equal(np.stack(pictures), result.pictures)


def test_what_else_differs_is_noted(plain, trained, opened):
    other = opened(trained("quick", skip=20, steps=4, **{"training.lr": 0.01, "training.seed": 3}))
    comparison = ditlab.two_subsets(plain, other, **QUICK)
    assert comparison.notes == [  # the seed of training may differ
        "training.lr is 0.001 in plain and 0.01 in quick.",
        "plain was trained for 6 steps, quick for 4.",
    ]
    assert ditlab.two_subsets(plain, other, **QUICK, checkpoint=4).notes == comparison.notes[:1]


def test_conditional_runs_draw_the_same_classes(trained, opened, monkeypatch):
    pair = [opened(trained("conditional", conditional=True)), opened(trained("classes", conditional=True, skip=20))]
    labels = []

    def draw(denoiser, config, seeds, *, label, **_):
        labels.append(label.tolist())
        return pair[0].images.batch(range(len(seeds)))

    monkeypatch.setattr("ditlab.analyses.two_subsets.measure.draw", draw)
    ditlab.two_subsets(*pair, **QUICK)
    assert labels == [[3, 4, 5, 6, 7, 0]] * 2


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        (
            "again",
            {"training.seed": 7},
            "expected disjoint training sets, found 20 of plain's 20 images in again's too",
        ),
        ("half", {"skip": 10}, "found 10 of plain's 20 images in half's too; train one of them with `skip` = 20"),
        ("window", {"attention": "3,3", "skip": 20}, "found network.attention = global in plain and 3,3 in window"),
        ("edm", {"preset": "dit-nano/1-edm", "skip": 20}, "found objective.kind = vp in plain and edm in edm"),
        ("fewer", {"n": 10, "skip": 20}, "expected training sets of one size"),
        ("seed1", {"seed": 1}, "expected runs of one image set, seed and test images"),
        ("held", {"test": 10, "skip": 20}, "have different splits"),
    ],
)
def test_runs_that_differ_otherwise_are_refused(plain, trained, name, settings, text):
    # Two steps: nothing here is drawn.
    other = trained(name, **{"steps": 2, **settings})
    with pytest.raises(ditlab.DitlabError, match=text):
        ditlab.two_subsets(plain, other, **QUICK)


def test_models_that_are_no_runs_are_refused(plain, tmp_path):
    with pytest.raises(ditlab.DitlabError, match="named twice"):
        ditlab.two_subsets(plain, plain, **QUICK)
    network = ditlab.Denoiser.wrap(lambda y, sigma, label: y, shape=(3, 8, 8))
    mine = ditlab.Model(network, plain.images, n=20, test=20, name="mine", out=tmp_path / "mine")
    with pytest.raises(ditlab.DitlabError, match="expected runs, found the model mine"):
        ditlab.two_subsets(plain, mine, **QUICK)


def test_samples_that_are_nearly_a_training_image_are_masked(plain, twin):
    comparison = ditlab.two_subsets(plain, twin, **QUICK, hide_training_images=True)
    [result] = comparison.results
    copies = plain.originals(plain.split.train[:6])
    near = closest(copies, [(copies, None)])
    replayed = replace(result, pictures=np.stack([copies, result.pictures[1]]), nearest=(near, result.nearest[1]))
    shown = mask_near_copies(replayed).pictures
    assert shown is not None
    assert (shown[0] == BLANK).all()
    assert (shown[1] == result.pictures[1]).all()


def test_the_section_shows_what_is_saved_of_the_first_run(plain, twin):
    ditlab.two_subsets(plain, twin, **QUICK)
    room, models = analysis("two-subsets"), open_models([plain])
    [comparison] = room.for_report(models, ReportContext())  # its partner is not on the page
    assert list(comparison.drawings()) == ["two-subsets-1", "two-subsets-pairs-1"]
    section = comparison.section({})
    assert (section.id, list(section.data)) == ("two-subsets", ["two-subsets-1.json"])
    assert section.tables[0].rows[0][0] == "plain and twin"
    assert "plain and twin, N = 20 each" in section.points[0]
    assert room.for_report(open_models([twin]), ReportContext()) == []
    path = plain.path / "analysis" / "two-subsets.json"
    record = json.loads(path.read_text())
    record["about"][0]["weights"] = "0" * 64
    path.write_text(json.dumps(record))
    assert room.for_report(models, ReportContext()) == []
    path.write_text("{}")
    assert room.for_report(models, ReportContext()) == []


def test_committed_results_load():
    for kind in ("two-subsets", "agreement"):
        paths = sorted((Path(__file__).parents[3] / "results" / "jacobian" / kind).glob("*.json"))
        assert paths
        for path in paths:
            record = json.loads(path.read_text())
            loaded = json.loads(json.dumps(analysis(kind).result_class().load(path).to_json()))
            assert record.keys() == loaded.keys()
            assert {key for key in record if record[key] != loaded[key]} <= {"about", "sentences"}
