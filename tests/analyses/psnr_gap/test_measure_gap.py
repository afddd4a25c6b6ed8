"""The PSNR-gap protocol of An et al. (spec 1.4) on denoisers whose answers are known in closed form."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.measure import measure_gap as psnr_gap
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.noise_levels import DiscreteLevels, LevelRange
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.metrics.denoising_errors import denoising_errors, grid_levels, level_noise
from ditlab.metrics.psnr import psnr_of, psnr_point
from ditlab.progress import Bar
from ditlab.provenance import Provenance

SHAPE = (1, 4, 4)
DDPM = DiscreteLevels(make_schedule("linear", 1000).sigmas)
FEW = (0.05, 0.3, 1.0, 5.0)


def wrap(function, levels=DDPM, **settings):
    return Denoiser.wrap(function, SHAPE, levels=levels, **settings)


def images(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def remembering(train: torch.Tensor, strength: float):
    """Between Wiener and empirical Bayes: remembers as much as `strength` says."""
    bayes, wiener = EmpiricalBayesDenoiser(train), WienerDenoiser(train)
    return wrap(lambda y, sigma, label: strength * bayes(y, sigma) + (1 - strength) * wiener(y, sigma))


def test_default_grid_is_the_50_point_respacing_of_the_denoisers_own_steps():
    result = psnr_gap(wrap(lambda y, s, _: y), images(0, 2), images(1, 2), PSNRConfig(images=2))
    assert result.timesteps is not None
    assert result.timesteps[:5] == (0, 20, 41, 61, 82)
    assert result.timesteps[-2:] == (979, 999)
    assert len(result.levels) == 50
    assert result.levels[0] == pytest.approx(0.01, rel=1e-4)


def test_a_range_takes_the_ddpm_levels_inside_it():
    levels = grid_levels(wrap(lambda y, s, _: y, levels=LevelRange(0.02, 80.0)))
    assert set(levels) < set(grid_levels(wrap(lambda y, s, _: y)))
    assert levels[0] >= 0.02
    assert levels[-1] <= 80.0


def test_a_list_of_levels_has_no_steps():
    result = psnr_gap(wrap(lambda y, s, _: y), images(0, 3), images(1, 3), PSNRConfig(images=3, sigmas=FEW))
    assert result.levels == FEW
    assert result.timesteps is None


def test_black_denoiser_has_the_psnr_of_the_images_power():
    x = images(0, 40)
    errors = denoising_errors(wrap(lambda y, s, _: torch.zeros_like(y)), x, FEW)
    assert psnr_of(errors, 2.0).mean() == pytest.approx(10 * np.log10(4 / x.double().square().mean().item()), abs=1e-9)


def test_identity_has_the_input_psnr():
    result = psnr_gap(wrap(lambda y, s, _: y), images(0, 200), images(1, 200), PSNRConfig(images=200, sigmas=FEW))
    np.testing.assert_allclose(result.curve("train"), result.input_psnr, atol=0.3)
    np.testing.assert_allclose(result.input_psnr, 10 * np.log10(4 / np.square(FEW)), atol=1e-9)


def test_mean_of_errors_lies_below_mean_of_psnr_and_both_are_recomputed_from_kept_errors():
    x, test = images(0, 30), images(1, 30)
    result = psnr_gap(remembering(x, 0.5), x, test, PSNRConfig(images=30, sigmas=FEW))
    assert (result.curve("test", "mse_mean") <= result.curve("test", "psnr_mean") + 1e-9).all()
    mse = result.test_mse
    np.testing.assert_allclose(result.curve("test", "mse_mean"), 10 * np.log10(4 / mse.mean((1, 2))))
    np.testing.assert_allclose(result.curve("test", "psnr_mean"), (10 * np.log10(4 / mse)).mean((1, 2)))


def test_gap_is_truncated_at_each_level_before_it_is_averaged():
    # Better on train images at low levels, on test images at high ones: the truncated mean keeps only the first.
    train_mse = np.array([0.1, 0.4])[:, None, None]
    test_mse = np.array([0.2, 0.1])[:, None, None]
    result = PSNRResult(Provenance("x"), PSNRConfig(images=1), (0.1, 1.0), None, 2.0, train_mse, test_mse)
    step = 10 * np.log10(2)
    np.testing.assert_allclose(result.gap(), [step, 0.0])
    assert result.average_gap == pytest.approx(step / 2)
    assert result.average("gap_untruncated") == pytest.approx((step - 2 * step) / 2)
    assert result.average_gap >= result.average("train") - result.average("test")


def test_noise_is_a_function_of_seed_level_image_and_draw():
    one = level_noise(0, 0.3, [0, 1, 2], [0, 0, 1], SHAPE)
    again = level_noise(0, 0.3, [2, 1], [1, 0], SHAPE)
    torch.testing.assert_close(one[[2, 1]], again, rtol=0, atol=0)
    for other in (level_noise(1, 0.3, [0], [0], SHAPE), level_noise(0, 0.31, [0], [0], SHAPE)):
        assert not torch.equal(other[0], one[0])
    assert not torch.equal(*level_noise(0, 0.3, [0, 0], [0, 1], SHAPE))


def test_every_denoiser_sees_the_same_noise_whatever_the_batch():
    seen: list[list[torch.Tensor]] = []

    def recorder():
        mine: list[torch.Tensor] = []
        seen.append(mine)
        return wrap(lambda y, s, _: mine.append(y) or y)

    x = images(0, 7)
    for batch in (2, 7, 100):
        denoising_errors(recorder(), x, FEW, draws=3, batch_size=batch)
    whole = [torch.cat(parts) for parts in seen]
    torch.testing.assert_close(whole[0], whole[1], rtol=0, atol=0)
    torch.testing.assert_close(whole[0], whole[2], rtol=0, atol=0)


def test_batch_size_does_not_change_the_result():
    x, test = images(0, 9), images(1, 9)
    small, large = (
        psnr_gap(remembering(x, 0.3), x, test, PSNRConfig(images=9, sigmas=FEW, batch_size=b)) for b in (2, 100)
    )
    np.testing.assert_allclose(small.train_mse, large.train_mse, rtol=1e-5)


def test_few_training_images_are_all_used_with_repeated_draws_and_it_is_said():
    x = images(0, 7)
    result = psnr_gap(remembering(x, 0.5), x, images(1, 50), PSNRConfig(images=20, sigmas=FEW))
    assert result.train_mse.shape == (4, 7, 3)  # 3 draws are the fewest that give 20 estimates
    assert result.test_mse.shape == (4, 20, 1)
    assert any("Only 7 training images" in note and "3 noise draws" in note for note in result.notes)
    assert not any("test images" in note for note in result.notes)
    assert len(np.unique(result.train_mse[0, 0])) == 3


def test_empirical_bayes_is_the_limit_of_memorization():
    x, test = images(0, 20), images(1, 20)
    config = PSNRConfig(images=20, sigmas=FEW)
    bayes, wiener = (psnr_gap(d(x), x, test, config) for d in (EmpiricalBayesDenoiser, WienerDenoiser))
    assert bayes.bounded
    assert bayes.curve("train")[0] == 100.0  # returns the stored image
    assert any("100 dB" in note for note in bayes.notes)
    assert not wiener.bounded
    assert wiener.average_gap < bayes.average_gap
    assert np.isfinite(bayes.average_gap)


def test_clip_and_labels_reach_the_denoiser():
    labels = torch.arange(6) % 3
    got = []
    denoiser = wrap(lambda y, s, label: got.append(label) or 3 * torch.ones_like(y), num_classes=3)
    x = torch.ones(6, *SHAPE)
    result = psnr_gap(
        denoiser,
        x,
        x,
        PSNRConfig(images=6, sigmas=(0.5,), clip=True, batch_size=4),
        train_labels=labels,
        test_labels=labels,
    )
    assert result.train_mse.max() == 0.0
    assert torch.cat(got[:2]).tolist() == labels.tolist()
    assert "Estimates were clipped to [-1, 1]." in result.notes


def test_point_agrees_with_the_full_measure():
    x, test = images(0, 10), images(1, 10)
    denoiser = remembering(x, 0.6)
    point = psnr_point(denoiser, x, test, FEW)
    result = psnr_gap(denoiser, x, test, PSNRConfig(images=10, sigmas=FEW))
    assert (point.train, point.test, point.gap) == pytest.approx(
        (result.average("train"), result.average("test"), result.average_gap)
    )


def test_progress_counts_every_estimate():
    calls = []

    class Recorded(Bar):
        def __call__(self, done: int, total: int | None = None, **fields: object) -> None:
            calls.append((done, total))

    x = images(0, 5)
    psnr_gap(
        remembering(x, 0.1),
        x,
        images(1, 10),
        PSNRConfig(images=10, sigmas=FEW, batch_size=4),
        bar=Recorded(),
    )
    assert [d for d, _ in calls] == sorted(d for d, _ in calls)
    assert calls[-1] == (80, 80)


def test_saved_and_loaded_again(tmp_path):
    x = images(0, 6)
    about = Provenance("run", "global", 6, 3, 500, True, "family", "hash", {"preset": "dit-nano/1"})
    result = psnr_gap(remembering(x, 0.5), x, images(1, 8), PSNRConfig(images=8), about=about)
    path = result.save(tmp_path / "analysis")
    assert sorted(p.name for p in path.parent.iterdir()) == ["psnr-gap.csv", "psnr-gap.json", "psnr-gap.npz"]
    again = PSNRResult.load(path)
    assert again.about == about
    assert again.config == result.config
    assert again.to_json() == result.to_json()
    np.testing.assert_array_equal(again.train_mse, result.train_mse)
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 51
    assert lines[0].startswith("sigma,timestep,input,train_mse_mean,test_mse_mean,gap_mse_mean")
    record = json.loads(path.read_text())
    assert set(record["averages"]["psnr_mean"]) == {"train", "test", "gap", "gap_untruncated"}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: p.unlink(), "no result can be read"),
        (lambda p: p.write_text("{"), "expected a JSON result"),
        (lambda p: p.write_text('{"kind": "other", "version": 1}'), "expected a result of kind 'psnr-gap'"),
        (lambda p: p.write_text('{"kind": "psnr-gap", "version": 99}'), "expected version 1 or older, found 99"),
        (lambda p: p.write_text('{"kind": "psnr-gap", "version": 1}'), "a field is missing"),
        (lambda p: p.with_suffix(".npz").write_bytes(b"PK\x03\x04"), "expected the arrays"),
        (lambda p: p.with_suffix(".npz").unlink(), "expected the arrays"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, damage, sentence):
    path = psnr_gap(wrap(lambda y, s, _: y), images(0, 2), images(1, 2), PSNRConfig(images=2, sigmas=FEW)).save(
        tmp_path
    )
    damage(path)
    with pytest.raises(DitlabError, match=sentence):
        PSNRResult.load(path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"images": 0}, "`images` must be at least 1"),
        ({"sigmas": (1.0, 0.5)}, "ascending"),
        ({"sigmas": (-1.0,)}, "positive"),
        ({"sigmas": ()}, "at least one"),
    ],
)
def test_settings_that_cannot_be(settings, sentence):
    with pytest.raises(DitlabError, match=sentence):
        PSNRConfig(**settings)


def test_input_that_cannot_be_measured():
    good = wrap(lambda y, s, _: y)
    config = PSNRConfig(images=2, sigmas=FEW)
    with pytest.raises(DitlabError, match="expected training images, found none"):
        psnr_gap(good, images(0, 0), images(1, 2), config)
    with pytest.raises(DitlabError, match="found images"):
        psnr_gap(good, torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), config)
    with pytest.raises(DitlabError, match="not finite"):
        psnr_gap(wrap(lambda y, s, _: y * float("nan")), images(0, 2), images(1, 2), config)
    with pytest.raises(DitlabError, match="noise level"):
        psnr_gap(good, images(0, 2), images(1, 2), PSNRConfig(images=2, sigmas=(0.001,)))


def test_psnr_never_exceeds_the_bound():
    assert psnr_of(np.zeros((2, 3, 1)), 2.0).tolist() == [100.0, 100.0]
    assert psnr_of(np.zeros((2, 3, 1)), 2.0, "psnr_mean").tolist() == [100.0, 100.0]


def test_latents():
    def denoiser(pixel_space: bool) -> Denoiser:
        made = Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(4, 4, 4))
        made.pixel_space = pixel_space
        return made

    images = 3 * torch.randn(6, 4, 4, 4)
    config = PSNRConfig(images=4, sigmas=(0.3, 1.0))
    pixels, latents = (psnr_gap(denoiser(pixel_space), images, images[2:], config) for pixel_space in (True, False))
    assert np.array_equal(latents.train_mse, pixels.train_mse)
    assert (pixels.latents, latents.latents) == (False, True)
    assert not pixels.notes
    assert latents.notes[0].startswith("PSNRs are those of latents, with M = 2 by convention")
    with pytest.raises(DitlabError, match="psnr-gap: clip: latents have no bounds"):
        psnr_gap(denoiser(False), images, images, replace(config, clip=True))
    assert psnr_gap(denoiser(True), images, images, replace(config, clip=True)).notes
