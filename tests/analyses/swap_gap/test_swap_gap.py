"""The swap gap on denoisers whose answer is known, and on two runs."""

from __future__ import annotations

import numpy as np
import pytest

import ditlab
from ditlab.analyses.base import Comparison
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.swap_gap import SwapGap
from ditlab.analyses.swap_gap.result import SwapResult
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import Damaged, Incompatible
from ditlab.metrics.denoising_errors import denoising_errors
from ditlab.provenance import Provenance

SIGMAS = (0.3, 1.0, 3.0, 8.0)
ABOUT = (Provenance("a", n=60), Provenance("b", n=60))
SETTINGS = {"preset": "dit-nano/2", "n": 20, "test": 20, "steps": 3, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> ditlab.ImageSet:
    return ditlab.prepare("digits", size=8, out=tmp_path_factory.mktemp("swap") / "digits")


def swapped(denoisers: list[Denoiser], sides: list) -> SwapResult:
    """The swap of two denoisers on two sets of images."""
    errors = [[denoising_errors(d, images, SIGMAS, draws=2) for images in sides] for d in denoisers]
    own, other = np.stack([errors[0][0], errors[1][1]]), np.stack([errors[1][0], errors[0][1]])
    return SwapResult(ABOUT, PSNRConfig(images=len(sides[0])), SIGMAS, 2.0, own, other)


def test_denoisers_that_saw_neither_side_have_none(digits):
    """Zero within the interval, also of few images, whose plain gap would be their difference in difficulty."""
    places = np.random.default_rng(0).permutation(len(digits))
    others = [WienerDenoiser(digits.batch(places[start : start + 600])) for start in (400, 1100)]
    for count in (10, 200):
        sides = [digits.batch(places[:count]), digits.batch(places[200 : 200 + count])]
        result = swapped(others, sides)
        low, high = result.interval
        assert low < 0 < high
        assert abs(result.average) < 0.1
    same = swapped([others[0], others[0]], sides)
    assert same.average == 0.0


def test_memorizers_have_one(digits):
    places = np.random.default_rng(0).permutation(len(digits))
    sides = [digits.batch(places[:60]), digits.batch(places[60:120])]
    result = swapped([EmpiricalBayesDenoiser(images) for images in sides], sides)
    low, _ = result.interval
    assert low > 3
    assert "images are denoised better by the model that was trained on them" in result.sentences()[0]
    by_band = {band.name: inside.average for band, inside in result.by_band().items()}
    assert by_band["low"] > by_band["middle"] > by_band["high"]


def test_the_difficulty_of_images_cancels():
    """Own PSNR is 1 dB higher on every image, whose errors span a factor of 100: the interval knows it."""
    rng = np.random.default_rng(0)
    hard = 10 ** rng.uniform(-4, -2, (2, 4, 30, 1))
    own = hard * 10**-0.1
    result = SwapResult(ABOUT, PSNRConfig(images=30), SIGMAS, 2.0, own, hard)
    assert result.average == pytest.approx(1.0)
    assert result.interval == pytest.approx((1.0, 1.0))


def test_saved_and_loaded_again(tmp_path):
    rng = np.random.default_rng(0)
    own, other = rng.uniform(0.01, 0.02, (2, 2, 4, 5, 1))
    result = SwapResult(ABOUT, PSNRConfig(images=5), SIGMAS, 2.0, own, other)
    again = SwapResult.load(result.save(tmp_path))
    assert (again.about, again.config, again.levels) == (result.about, result.config, result.levels)
    assert again.to_json() == result.to_json()
    with pytest.raises(
        Damaged, match=r"swap-gap result: expected own_mse of shape \(2, 4, 5, 1\), found \(2, 4, 4, 1\)"
    ):
        SwapResult.from_json(result.to_json(), {"own_mse": own[:, :, :4], "other_mse": other[:, :, :4]})


def test_two_runs(digits, tmp_path, monkeypatch):
    """Errors on own images are those of the PSNR gap; figure, table and files are there."""
    monkeypatch.chdir(tmp_path)
    preset = SETTINGS["preset"]
    rest = {name: value for name, value in SETTINGS.items() if name != "preset"}
    first = ditlab.train(preset, digits, out="runs/first", **rest)
    second = ditlab.train(preset, digits, out="runs/second", skip=20, **rest)
    swap = ditlab.swap_gap(first, second, images=20, sigmas=SIGMAS, out="swap", device="cpu")
    (result,) = swap.results
    gap = ditlab.psnr_gap([first], images=20, sigmas=SIGMAS, baselines=False, device="cpu").results[0]
    assert np.array_equal(result.own_mse[0], gap.train_mse)
    assert result.names == "first and second"
    assert {path.name for path in (tmp_path / "swap").iterdir()} >= {"swap-gap.json", "swap-gap.npz", "swap-gap.png"}
    assert [row[2] for row in swap.table().rows] == ["all", "low, 0.1-1.5", "middle, 1.5-6", "high, above 6"]
    with pytest.raises(Incompatible, match="expected models without a training image in common, found 20 that first"):
        ditlab.swap_gap(first, ditlab.train(preset, digits, out="runs/third", seed=0, attention="3*4", **rest))
    ditlab.swap_gap(first, second, images=20, sigmas=SIGMAS, device="cpu")
    again = ditlab.swap_gap(first, second, images=20, sigmas=SIGMAS, bands=(1.0,), device="cpu").results[0]
    assert np.array_equal(again.own_mse, result.own_mse)
    assert again.config.bands == (1.0,)
    ditlab.report(first, out="report.html", samples=0, device="cpu")
    assert 'id="swap-gap"' in (tmp_path / "report.html").read_text()


def test_models_of_different_sets(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ditlab.prepare("digits", size=4, out="small")
    models = []
    for name, images in (("a", digits), ("b", small)):
        half = ditlab.Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=images.shape)
        models.append(ditlab.Model(half, images, n=10, test=10, name=name, own_split=True))
    with pytest.raises(ditlab.DitlabError, match="different"):
        ditlab.swap_gap(*models)


def test_unknown_training_images_and_other_steps(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = ditlab.Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(3, 8, 8))
    models = [ditlab.Model(half, digits, n=10, test=10, name=name) for name in "ab"]
    with pytest.raises(
        Incompatible, match="expected models whose training images are known, found a; `own_split` says"
    ):
        ditlab.swap_gap(*models)
    errors = np.full((2, 4, 3, 1), 0.01)
    result = SwapResult((Provenance("a", step=3), Provenance("b", step=9)), PSNRConfig(), SIGMAS, 2.0, errors, errors)
    notes = SwapGap().notes(Comparison(SwapGap(), result, [result]))
    assert notes == ["a was trained for 3 steps, b for 9."]
