"""A measurement is found again by the hashes of weights and images and by its settings; others are kept beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ditlab
from ditlab.analyses import base
from ditlab.analyses.cache import find_current
from ditlab.analyses.jacobian import Jacobian
from ditlab.analyses.psnr_gap import PSNRConfig, PSNRGap, measure
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.analyses.samples.measure import SampleSet
from ditlab.analyses.trajectory.comparison import Course
from ditlab.data import ImageSet, prepare
from ditlab.errors import Incompatible, InvalidConfig
from ditlab.models.comparing import open_models
from ditlab.models.memorization import BLANK
from ditlab.models.run import Run
from ditlab.progress import Reporter
from ditlab.provenance import Provenance
from ditlab.reporting.hub_export import export_run
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store
from ditlab.studies.trial import Trial

QUICK = {"images": 4, "points": 2, "baselines": False, "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    folder = tmp_path_factory.mktemp("images")
    np.save(folder / "pixels.npy", np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8))
    return prepare(f"array:{folder / 'pixels.npy'}", folder / "set", size=4)


@pytest.fixture
def run(images, tmp_path) -> Run:
    """A run with checkpoints of steps 2 and 4."""
    settings = {"n": 10, "test": 8, "width": 16, "depth": 1, "heads": 2, "batch_size": 4, "steps": 4, "save_every": 2}
    trained = ditlab.train(
        "dit-nano/1", images, out=tmp_path / "run", device="cpu", eval_every=0, log_every=2, **settings
    )
    assert trained is not None
    return trained


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Names of what was measured, in order."""
    names: list[str] = []
    inner = measure.measure_model

    def recorded(opened, config, reporter):
        names.append(opened.name)
        return inner(opened, config, reporter)

    monkeypatch.setattr(measure, "measure_model", recorded)
    return names


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "analysis").glob("psnr-gap*.json"))


def test_the_same_measurement_is_not_made_again(run, measured):
    first = ditlab.psnr_gap(run.path, **QUICK)
    again = ditlab.psnr_gap(run.path, **QUICK, batch_size=3)
    assert measured == ["run"]
    np.testing.assert_array_equal(first.results[0].train_mse, again.results[0].train_mse)
    assert files(run.path) == ["psnr-gap.json"]
    # Other bands show the same measurement otherwise.
    banded = ditlab.psnr_gap(run.path, **QUICK, bands=(0.5, 5.0))
    assert measured == ["run"]
    assert banded.results[0].config.bands == (0.5, 5.0)
    assert files(run.path) == ["psnr-gap.json"]
    # Names and labels are those of this call, and the same weights in another folder are the same measurement.
    named = ditlab.psnr_gap(run.path, **QUICK, names=("mine",))
    assert named.results[0].about.label == "mine"
    assert measured == ["run"]


def test_other_weights_settings_or_images_are_measured_and_the_earlier_result_is_kept(run, images, measured, tmp_path):
    first = ditlab.psnr_gap(run.path, **QUICK).results[0]
    ditlab.psnr_gap(run.path, **QUICK, checkpoint=2)
    assert len(measured) == 2
    assert len(files(run.path)) == 2
    newest = PSNRResult.load(run.path / "analysis" / "psnr-gap.json")
    assert newest.about.step == 2
    (kept,) = (run.path / "analysis").glob("psnr-gap.????????.json")
    assert PSNRResult.load(kept).to_json() == first.to_json()
    assert kept.with_suffix(".csv").is_file()
    ditlab.psnr_gap(run.path, **QUICK, raw=True)
    ditlab.psnr_gap(run.path, **QUICK | {"points": 3})
    ditlab.psnr_gap(run.path, **QUICK, noise_seed=1)
    np.save(tmp_path / "other.npy", np.random.default_rng(5).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8))
    other = prepare(f"array:{tmp_path / 'other.npy'}", tmp_path / "other", size=4)
    ditlab.psnr_gap(run.path, **QUICK, held_out=other)
    assert len(measured) == 6
    assert len(files(run.path)) == 6
    # Each of them is still there: the settings of the first call find its numbers, and nothing is lost by asking.
    again = ditlab.psnr_gap(run.path, **QUICK).results[0]
    assert len(measured) == 6
    assert again.about.step == first.about.step
    np.testing.assert_array_equal(again.train_mse, first.train_mse)
    assert len(files(run.path)) == 6  # none is there twice


def test_more_training_is_measured_again(run, images, measured):
    ditlab.psnr_gap(run.path, **QUICK)
    ditlab.train(
        "dit-nano/1",
        images,
        out=run.path,
        device="cpu",
        n=10,
        test=8,
        width=16,
        depth=1,
        heads=2,
        batch_size=4,
        steps=6,
        save_every=2,
        eval_every=0,
        log_every=2,
    )
    assert ditlab.psnr_gap(run.path, **QUICK).results[0].about.step == 6
    assert measured == ["run", "run"]


def network_model(images: ImageSet, out: Path, weight: float) -> ditlab.Model:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))

        def forward(self, y, sigma, label):
            return self.weight * y

    denoiser = ditlab.Denoiser.wrap(Net(), shape=(3, 4, 4))
    return ditlab.Model(denoiser, images, n=10, test=8, name="net", out=out)


def test_a_users_network_is_cached_by_its_weights(images, measured, tmp_path):
    for weight in (0.5, 0.5, 0.25):
        ditlab.psnr_gap(network_model(images, tmp_path / "net", weight), **QUICK)
    assert measured == ["net", "net"]
    assert len(files(tmp_path / "net")) == 2


def test_a_function_without_weights_is_never_cached(images, measured, tmp_path):
    def model(factor: float) -> ditlab.Model:
        denoiser = ditlab.Denoiser.wrap(lambda y, sigma, label: factor * y, shape=(3, 4, 4))
        return ditlab.Model(denoiser, images, n=10, test=8, name="mine", out=tmp_path / "mine")

    errors = [ditlab.psnr_gap(model(factor), **QUICK).results[0].train_mse for factor in (0.5, 0.9, 0.5)]
    assert measured == ["mine"] * 3
    assert not np.array_equal(errors[0], errors[1])
    np.testing.assert_array_equal(errors[0], errors[2])


def test_latents_are_cached_too(images, measured, tmp_path):
    model = network_model(images, tmp_path / "net", 0.5)
    model.source_denoiser.pixel_space = False
    for _ in range(2):
        assert ditlab.psnr_gap(model, **QUICK).results[0].latents
    assert measured == ["net"]


def test_a_damaged_result_is_measured_again_and_kept(run, measured):
    notes: list[str] = []

    class Notes(Reporter):
        def note(self, sentence: str) -> None:
            notes.append(sentence)

    ditlab.psnr_gap(run.path, **QUICK)
    (run.path / "analysis" / "psnr-gap.npz").write_bytes(b"PK")
    ditlab.psnr_gap(run.path, **QUICK, reporter=Notes())
    assert measured == ["run", "run"]
    assert any(note.startswith("not used: ") and "expected the arrays" in note for note in notes)


def test_the_models_of_an_analysis_are_counted():
    class Two(base.Analysis):
        name, models = "two", (2, 2)

    with pytest.raises(InvalidConfig, match="two: expected 2 models, found 1"):
        Two().check_count(1)
    Two().check_count(2)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda a: a, True),
        (lambda a: replace(a, name="other", label="kind"), True),
        (lambda a: replace(a, settings={"preset": "a"}), True),
        (lambda a: replace(a, settings={"preset": "a", "shuffled": True}), False),
        (lambda a: replace(a, weights="v"), False),
        (lambda a: replace(a, split_hash="other"), False),
        (lambda a: replace(a, split_family="other"), False),
        (lambda a: replace(a, settings={"preset": "b"}), False),
    ],
)
def test_what_is_the_same_measurement(change: Callable[[Provenance], Provenance], same: bool):
    about = Provenance("run", "label", 6, 3, 500, True, "family", "hash", {"preset": "a", "space": "latents"}, "w")
    assert about.same_measurement(change(about)) is same
    assert not replace(about, weights="").same_measurement(replace(change(about), weights=""))


def test_a_result_without_the_hash_of_its_weights_is_told_by_its_step():
    about = Provenance("run", "", 6, 3, 500, True, "family", "hash", {}, "w")
    earlier = replace(about, weights="")
    assert earlier.same_model(about)
    for other in (replace(about, step=400), replace(about, ema=False), replace(about, split_family="other")):
        assert not earlier.same_model(other)
    assert not replace(earlier, step=None).same_model(replace(about, step=None))


@pytest.fixture
def other_images(tmp_path) -> ImageSet:
    np.save(tmp_path / "other.npy", np.random.default_rng(5).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8))
    return prepare(f"array:{tmp_path / 'other.npy'}", tmp_path / "other", size=4)


def current(run: Run) -> PSNRResult | None:
    return find_current(PSNRGap(), run, run.denoiser_and_provenance()[1])


def test_the_current_result_is_of_the_own_test_images_and_the_newest(run, other_images):
    ditlab.psnr_gap(run, **QUICK, held_out=other_images)
    assert run.held_out is None  # the caller's model stays as it was
    assert current(run) is None
    for points in (2, 3, 4, 5):
        ditlab.psnr_gap(run, **QUICK | {"points": points})
    ditlab.psnr_gap(run, **QUICK, held_out=other_images)
    kept = list((run.path / "analysis").glob("psnr-gap.????????.json"))
    assert len(kept) == 4
    for seconds, path in enumerate(kept, 2_000_000_000):
        os.utime(path, (seconds, seconds))
        result = current(run)
        assert result is not None
        assert result.about.split_family == run.test_hash
        assert result.to_json() == PSNRResult.load(path).to_json()


def test_what_a_report_measures_leaves_the_last_result_where_it_is(run, measured):
    ditlab.psnr_gap(run, **QUICK)
    before = (run.path / "analysis" / "psnr-gap.json").read_bytes()
    analysis, models = PSNRGap(), open_models([run])
    for _ in range(2):
        analysis.for_report(models, base.ReportContext(configs={"psnr-gap": PSNRConfig(images=3, points=2)}))
    assert len(measured) == 2
    assert (run.path / "analysis" / "psnr-gap.json").read_bytes() == before
    assert len(files(run.path)) == 2
    assert len(list((run.path / "analysis").glob("psnr-gap.*.csv"))) == 1
    ditlab.psnr_gap(run, **QUICK | {"images": 3})
    assert len(measured) == 2
    assert (run.path / "analysis" / "psnr-gap.json").read_bytes() != before
    assert len(files(run.path)) == 2


def test_training_on_a_page_with_other_held_out_images_says_so(run, other_images):
    assert Course.of(open_models([run])).notes == ()
    (note,) = Course.of(open_models([run], held_out=other_images)).notes
    assert "own test images" in note


def test_samples_are_hidden_where_the_training_images_are_unknown(images, tmp_path):
    for own_split in (False, True):
        denoiser = ditlab.Denoiser.wrap(lambda y, sigma, label: 0 * y, shape=(3, 4, 4))
        model = ditlab.Model(denoiser, images, n=10, test=8, own_split=own_split, out=tmp_path / "mine")
        context = base.ReportContext(hide_training_images=True, samples=2)
        drawn = SampleSet.draw(open_models([model]), context)
        shown = drawn.rows()[0].samples
        assert (shown == BLANK).all() == (not own_split)
        assert len(drawn.shown()["model"][0]) == (2 if own_split else 0)


def test_a_study_records_results_on_the_runs_own_test_images_only(run, images, other_images, tmp_path):
    store = Store(tmp_path / "store")
    trial = Trial("ab", run.config, "", "digits", "nano", "global", 10, 0)
    plan = Plan("tiny", "smoke", {}, {}, {}, {}, {"psnr-gap": {}}, ())
    ditlab.psnr_gap(run, **QUICK)
    shutil.copytree(run.path, store.run("ab"))
    store.record_analysis(trial, plan, "psnr-gap", None)
    assert (store.trial("ab") / "psnr-gap.json").is_file()
    for other in ({"held_out": other_images}, {"checkpoint": 2}):
        ditlab.psnr_gap(store.run("ab"), data=images, **QUICK, **other)
        with pytest.raises(Incompatible, match="averaged weights of step 4 on the run's own split"):
            store.record_analysis(trial, plan, "psnr-gap", None)


def test_a_hub_card_has_results_on_the_runs_own_test_images_only(run, other_images, tmp_path):
    ditlab.psnr_gap(run, **QUICK, held_out=other_images)
    export_run(run, tmp_path / "without", "me/mine")
    assert not (tmp_path / "without" / "analysis").exists()
    ditlab.psnr_gap(run, **QUICK)
    ditlab.psnr_gap(run, **QUICK, held_out=other_images)
    export_run(run, tmp_path / "with", "me/mine")
    exported = PSNRResult.load(tmp_path / "with" / "analysis" / "psnr-gap.json")
    assert exported.about.split_family == run.test_hash


def test_a_report_shows_no_jacobian_of_other_test_images_and_takes_those_of_earlier_versions(run, other_images):
    quick = {"sigmas": (1.0,), "images": (0,), "device": "cpu"}
    ditlab.jacobian(run, **quick, held_out=other_images)
    analysis, models, context = Jacobian(), open_models([run]), base.ReportContext()
    assert analysis.for_report(models, context) == []
    ditlab.jacobian(run, **quick)
    path = run.path / "analysis" / "jacobian.json"
    path.write_text(path.read_text().replace(run.denoiser_and_provenance()[1].weights, ""))
    assert len(analysis.for_report(models, context)) == 1


def test_shuffled_images_are_not_taken_for_others(run):
    quick = {"sigmas": (1.0,), "images": (0,), "device": "cpu"}
    shuffled = ditlab.jacobian(run, **quick, shuffled=True).results[0]
    plain = ditlab.jacobian(run, **quick).results[0]
    assert "shuffled" not in plain.about.settings
    assert not np.array_equal(shuffled.points[0].clean, plain.points[0].clean)
