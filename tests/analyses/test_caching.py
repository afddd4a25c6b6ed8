"""A measurement is found again by the hashes of weights and images and by its settings; others are kept beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ditlab
from ditlab.analyses import base
from ditlab.analyses.psnr_gap import measure
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.data import ImageSet, prepare
from ditlab.errors import InvalidConfig
from ditlab.models.run import Run
from ditlab.progress import Reporter
from ditlab.provenance import Provenance

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
        (lambda a: replace(a, settings={}), True),
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
