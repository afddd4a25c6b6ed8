"""Agreement: closed forms agree with themselves, calibration finds the window that was used, results are saved."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ditlab.analyses.agreement.config import BASELINES, AgreementConfig, BaselineName
from ditlab.analyses.agreement.measure import calibrate, check_agreement, make_baseline, make_sampler, measure_agreement
from ditlab.analyses.agreement.result import AgreementResult
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.local_scores import WindowSchedule
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.samplers import DDIMConfig, HeunConfig, ImageNoise, sample
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.metrics.similarity import cosines, r_squared
from ditlab.provenance import Provenance
from ditlab.rng import torch_generator

ABOUT = Provenance("net", "global", 6, 1, 500, True, "family", "hash", {"preset": "x"})
SMALL = AgreementConfig(images=3, sampler_steps=5, trajectories=2, candidates=(1, 3, 5))


def images(count: int = 6, shape=(2, 6, 7)) -> torch.Tensor:
    # Smooth enough that patches have something to say.
    coarse = torch.rand(count, shape[0], 3, 3, generator=torch_generator(count, "images")) * 2 - 1
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear")


def stepped(name: BaselineName, window=None) -> Denoiser:
    """A baseline on the steps of DDPM's process, as if it were a network."""
    denoiser = make_baseline(name, images(), window)
    denoiser.levels = DiscreteLevels(make_schedule("linear", 1000).sigmas)
    return denoiser


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_agrees_with_itself(name):
    windows = WindowSchedule((0.2, 10.0), (3, 5))
    network = stepped(name, windows)
    seen = []
    result = measure_agreement(network, images(), SMALL, about=ABOUT, bar=lambda *done: seen.append(done))
    baseline = next(baseline for baseline in result.baselines if baseline.name == name)
    np.testing.assert_allclose(baseline.correlation, 1, atol=1e-5)
    np.testing.assert_allclose(baseline.r2, 1, atol=1e-4)
    np.testing.assert_allclose(baseline.mse, 0, atol=1e-5)
    np.testing.assert_allclose(baseline.one_step, 1, atol=1e-5)
    assert np.median(result.best.correlation) > 1 - 1e-5
    others = {other.name: np.median(other.correlation) for other in result.baselines}
    assert min(others.values()) < 0.999
    assert seen[0] == (0, 5 * (3 * 2 + 3 * 4))
    assert seen[-1] == (seen[0][1], seen[0][1])


@pytest.mark.parametrize("name", ["ls", "els", "bbels"])
def test_calibration_finds_the_windows_that_were_used(name):
    windows = WindowSchedule((0.2, 10.0), (3, 5))
    result = measure_agreement(stepped(name, windows), images(), replace(SMALL, baselines=(name,)), about=ABOUT)
    [baseline] = result.baselines
    assert baseline.windows is not None
    assert baseline.calibration is not None
    assert baseline.calibration.shape == (5, 3, 2)
    # Where the noise is small, every side's estimate may be the same.
    for level, scores in zip(result.levels, baseline.calibration, strict=True):
        if np.ptp(scores, axis=0).max() > 1e-9:
            assert baseline.windows.at(level) == windows.at(level)
    assert baseline.windows.levels == tuple(sorted(result.levels))


def test_what_is_compared_are_images_from_the_same_noise():
    network = stepped("wiener")
    result = measure_agreement(network, images(), replace(SMALL, baselines=("empirical-bayes",)), about=ABOUT)
    noise = ImageNoise(range(3), (2, 6, 7)).initial()
    mine, theirs = (sample(d, DDIMConfig(steps="5"), noise).numpy() for d in (network, stepped("empirical-bayes")))
    [baseline] = result.baselines
    np.testing.assert_allclose(baseline.correlation, cosines(theirs, mine), atol=1e-6)
    np.testing.assert_allclose(baseline.r2, r_squared(theirs, mine), atol=1e-6)
    np.testing.assert_array_equal(result.images, mine)
    pairs = np.array([[cosines(theirs[j : j + 1], mine[i : i + 1])[0] for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(baseline.control, (pairs.sum(1) - pairs.diagonal()) / 2, atol=1e-6)
    assert (baseline.windows, baseline.calibration, result.notes) == (None, None, ())


def test_calibration_takes_the_median():
    scores = np.zeros((2, 3, 4))
    for path, best in enumerate((2, 0, 1, 2)):
        scores[0, best, path] = 1
    scores[1, 0] = 1
    schedule = calibrate([5.0, 0.5], (3, 5, 7), scores)
    assert (schedule.levels, schedule.sizes) == ((0.5, 5.0), (3, 5))


def test_samplers_and_given_windows():
    assert make_sampler(SMALL) == DDIMConfig(steps="5")
    assert make_sampler(replace(SMALL, sampler="euler")) == HeunConfig(steps=5, levels="grid", second_order=False)
    config = replace(SMALL, sampler="heun", window=3, baselines=("ls", "els"), images=1)
    result = measure_agreement(stepped("ls", 3), images(), config, about=replace(ABOUT, n=None))
    assert [baseline.windows for baseline in result.baselines] == [
        WindowSchedule(tuple(sorted(result.levels)), (3,) * 5)
    ] * 2
    assert [baseline.calibration for baseline in result.baselines] == [None, None]
    np.testing.assert_allclose(result.baselines[0].correlation, 1, atol=1e-5)
    assert (result.baselines[0].control == 0).all()
    assert "(of 1 image)" in result.sentences()[0]


def test_fewer_training_images_latents_and_classes_are_noted():
    network = stepped("wiener")
    network.pixel_space, network.num_classes = False, 3
    config = replace(SMALL, baselines=("wiener",), training_images=4)
    result = measure_agreement(network, images(), config, about=ABOUT)
    assert (result.training_images, len(result.notes)) == (4, 3)
    assert "the first 4 of 6 training images" in result.notes[0]
    network.null_class = False
    with pytest.raises(DitlabError, match="expected an unconditional denoiser"):
        check_agreement(network, config)


def test_mirrored_images_count_where_training_mirrored_them():
    known = images()
    config = replace(SMALL, baselines=("empirical-bayes",), training_images=4)
    both = torch.cat([known[:4], known[:4].flip(3)])
    network = make_baseline("empirical-bayes", both)
    network.levels = DiscreteLevels(make_schedule("linear", 1000).sigmas)
    result = measure_agreement(network, known, config, about=ABOUT, mirrored=known.flip(3))
    np.testing.assert_allclose(result.baselines[0].mse, 0, atol=1e-5)
    assert (result.training_images, len(result.notes)) == (4, 2)
    assert "its mirror image" in result.notes[1]
    alone = measure_agreement(network, known, config, about=ABOUT)
    assert alone.baselines[0].mse.max() > 1e-2


def test_results_are_saved_and_loaded(tmp_path):
    result = measure_agreement(stepped("ls", 3), images(), SMALL, about=ABOUT)
    path = result.save(tmp_path)
    again = AgreementResult.load(path)
    assert again.to_json() == result.to_json() == json.loads(path.read_text())
    np.testing.assert_array_equal(again.images, result.images)
    for baseline, other in zip(again.baselines, result.baselines, strict=True):
        np.testing.assert_array_equal(baseline.images, other.images)
        assert baseline.windows == other.windows
    (tmp_path / "agreement.npz").unlink()
    assert AgreementResult.load(path).images is None
    path.write_text(path.read_text().replace('"levels"', '"stages"'))
    with pytest.raises(DitlabError, match="a field is missing or unknown"):
        AgreementResult.load(path)


def test_refused_settings_and_denoisers():
    for change, says in (
        ({"baselines": ()}, "`baselines` must be different ones"),
        ({"baselines": ("ls", "ls")}, "`baselines` must be different ones"),
        ({"images": 0}, "`images` must be at least 1"),
        ({"training_images": 0}, "`training_images` must be at least 1"),
        ({"candidates": (5, 3)}, "ascending"),
        ({"candidates": (2, 3)}, "`candidates` must be odd"),
        ({"window": 4}, "`window` must be odd"),
    ):
        with pytest.raises(DitlabError, match=says):
            replace(SMALL, **change)
    network = stepped("wiener")
    for change, says in (
        ({"window": 7}, "`window` must be at most 6, the images' side in pixels, found 7"),
        ({"candidates": (7, 9)}, "`candidates` must have one of at most 6"),
        ({"sampler_steps": 2000}, "2000"),
    ):
        with pytest.raises(DitlabError, match=says):
            check_agreement(network, replace(SMALL, **change))
    with pytest.raises(DitlabError, match="expected images"):
        measure_agreement(network, images(shape=(2, 6, 6)), SMALL, about=ABOUT)
    broken = Denoiser.wrap(lambda y, sigma, label: y * float("nan"), (2, 6, 7))
    with pytest.raises(DitlabError, match="the denoiser's images are not finite"):
        measure_agreement(broken, images(), SMALL, about=ABOUT)
    with pytest.raises(DitlabError, match="expected the side of its windows"):
        make_baseline("ls", images())
