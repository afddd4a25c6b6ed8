"""Intervals of PSNR and gap, and the verdict that they allow."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from ditlab.analyses.psnr_gap.comparison import compare
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.metrics.paired import mean_interval
from ditlab.provenance import Provenance

LEVELS = (0.1, 0.5, 2.0)


def result(train: np.ndarray, test: np.ndarray, label: str = "global", seed: int = 0, n: int = 50) -> PSNRResult:
    """A result whose images have these PSNRs in dB, [images], the same at all levels."""
    mse = [np.broadcast_to(4 / 10 ** (psnr / 10), (3, len(psnr)))[..., None].copy() for psnr in (train, test)]
    about = Provenance(f"{label}-{n}-{seed}", label, n, seed, 9, True, f"f{seed}", f"h{seed}{n}")
    config = PSNRConfig(images=len(train), reduction="psnr_mean")
    return PSNRResult(about, config, LEVELS, None, 2.0, *mse)


def flat(gap: float, label: str, seed: int = 0, n: int = 50) -> PSNRResult:
    """A result without any spread over images."""
    return result(np.full(4, 20.0 + gap), np.full(4, 20.0), label, seed, n)


def gaussian(gap: float, images: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(20 + gap, 1.5, images), rng.normal(20, 2.0, images)


def test_the_bootstrap_is_the_normal_interval_of_many_images():
    """The mean PSNR of images is a mean of independent values, so its interval has a closed form."""
    train, test = gaussian(0.6)
    measured = result(train, test)
    spread = np.sqrt(train.var() / len(train) + test.var() / len(test))
    expected = train.mean() - test.mean() + norm.ppf([0.025, 0.975]) * spread
    assert measured.interval("gap_untruncated") == pytest.approx(tuple(expected), abs=0.04)
    side = train.mean() + norm.ppf([0.025, 0.975]) * train.std() / np.sqrt(len(train))
    assert measured.interval("train") == pytest.approx(tuple(side), abs=0.02)
    narrow = measured.interval("test", confidence=0.5)
    wide = measured.interval("test")
    assert wide[0] < narrow[0] < measured.average("test") < narrow[1] < wide[1]
    assert measured.interval("gap") == measured.interval("gap")


def test_the_interval_follows_the_reduction():
    """An et al.'s PSNR of the mean error has the interval of its own average (delta method)."""
    train, test = gaussian(0.0)
    measured = result(train, test)
    errors = measured.train_mse[0, :, 0]
    spread = 10 / np.log(10) * errors.std() / errors.mean() / np.sqrt(len(errors))
    low, high = measured.interval("train", reduction="mse_mean")
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.08)
    assert low < measured.average("train", "mse_mean") < high


def test_the_truncated_gap_has_an_interval_above_zero():
    measured = result(*gaussian(-0.5))
    assert measured.interval("gap")[0] >= 0
    assert measured.interval("gap_untruncated")[1] < 0


def test_a_kind_with_several_seeds_has_the_interval_over_seeds():
    gaps = (1.0, 1.2, 1.7)
    (group,) = compare([flat(gap, "global", seed) for seed, gap in enumerate(gaps)]).groups
    assert group.interval("gap") == pytest.approx(mean_interval(gaps))
    (alone,) = compare([result(*gaussian(0.6))]).groups
    assert alone.interval("gap") == alone.results[0].interval("gap")


def test_the_mean_has_the_t_interval():
    low, high = mean_interval((1.0, 2.0, 3.0, 4.0))
    assert (low, high) == pytest.approx((2.5 - 2.0542, 2.5 + 2.0542), abs=1e-3)  # t(0.975, 3) = 3.1824, s / 2 = 0.6455
    assert mean_interval((1.0,)) is None


def test_the_verdict_claims_a_gap_only_where_its_interval_leaves_zero_out():
    seen = compare([result(*gaussian(1.0))]).verdict()
    assert seen.startswith("global denoises its 50 training images better than held-out ones (average gap ")
    unseen = compare([result(*gaussian(0.0))]).verdict()
    assert unseen.startswith("global: no difference is seen between its 50 training images and held-out ones")


def test_the_verdict_on_kinds():
    one_seed = compare([flat(gap, kind) for kind, gap in (("global", 3.0), ("local", 2.0))])
    assert one_seed.verdict() == (
        "The average PSNR gap at N = 50 is 3.00 dB for global and 2.00 dB for local; one seed of each cannot tell "
        "whether kinds differ."
    )
    paired = [flat(gap + s / 10, kind, s) for kind, gap in (("global", 3.0), ("local", 2.0)) for s in (0, 1, 2)]
    assert compare(paired).verdict().startswith("Average PSNR gap at N = 50: local is lower (local minus global: -1.00")
    rng = np.random.default_rng(0)
    noisy = [flat(3 + float(rng.normal()), kind, s, 900) for kind in ("global", "local") for s in (0, 1, 2)]
    assert compare([*paired, *noisy]).verdict() == (
        "Average PSNR gap of local against global: lower at 1 of 2 N (95 % intervals over paired seeds)."
    )
    many = compare([flat(i, f"kind {i}") for i in range(6)]).verdict()
    assert "from 0.00 dB (kind 0 at N = 50) to 5.00 dB (kind 5 at N = 50)" in many
