"""Families of contrasts: Holm's adjustment, intervals, the floor, power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ditlab.errors import InvalidConfig
from ditlab.metrics.families import contrasts, half_width, holm, power, seeds_for


def test_holm_on_a_case_by_hand():
    # 4 x 0.01, 3 x 0.013, then 2 x 0.03 and 1 x 0.04, never descending.
    assert holm([0.04, 0.01, 0.03, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_holm_keeps_the_error_of_a_family():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(4000, 5))
    false = np.mean([(holm(row) < 0.05).any() for row in p])
    assert false == pytest.approx(0.05, abs=0.012)


def test_one_contrast_is_the_paired_t_test():
    values = [0.31, 0.18, 0.44, 0.27]
    (contrast,) = contrasts({"a": values}, sd_floor=0.0).values()
    expected = stats.ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(0.95)
    assert contrast.p == pytest.approx(expected.pvalue)
    assert contrast.p_adjusted == contrast.p
    assert (contrast.low, contrast.high) == pytest.approx((interval.low, interval.high))
    assert contrast.verdict == "higher"


def test_the_interval_leaves_zero_out_where_holm_rejects():
    rng = np.random.default_rng(1)
    for _ in range(300):
        family = {str(i): (rng.normal(size=6) + rng.choice([0.0, 1.0])).tolist() for i in range(4)}
        for contrast in contrasts(family, sd_floor=0.0).values():
            assert contrast.low is not None
            assert contrast.high is not None
            assert (contrast.p_adjusted < 0.05) == (contrast.low > 0 or contrast.high < 0)


def test_three_seeds_that_agree_by_chance_are_no_difference():
    """The accident of a page: -0.007 dB from three seeds, the most significant of its numbers."""
    values = [-0.0068, -0.0070, -0.0073]
    assert stats.ttest_1samp(values, 0.0).pvalue < 0.001
    (contrast,) = contrasts({"N = 300": values}).values()
    assert contrast.sd == 0.05
    assert contrast.p > 0.5
    assert contrast.verdict == "not resolved"  # the floor is too wide for three seeds to show that nothing is there
    (eight,) = contrasts({"N = 300": [-0.007] * 8}).values()
    assert eight.verdict == "similar"


def test_a_difference_below_the_smallest_effect_is_none():
    (contrast,) = contrasts({"a": [0.06, 0.07, 0.06, 0.08, 0.07, 0.09]}, sd_floor=0.01).values()
    assert contrast.p < 1e-3
    assert contrast.verdict == "similar"


def test_one_seed_says_nothing_and_does_not_count():
    results = contrasts({"a": [1.0], "b": [1.0, 1.2, 0.9]})
    assert (results["a"].verdict, results["a"].p, results["a"].low) == ("one seed", None, None)
    assert results["b"].family == 1
    assert results["b"].p_adjusted == results["b"].p


@pytest.mark.parametrize(
    ("values", "settings"),
    [({"a": []}, {}), ({"a": [1.0, 2.0]}, {"confidence": 1.0}), ({"a": [1.0, 2.0]}, {"smallest_effect": 0.0})],
)
def test_families_that_cannot_be_tested(values, settings):
    with pytest.raises(InvalidConfig, match="contrasts: expected"):
        contrasts(values, **settings)


def test_the_half_width_in_standard_deviations():
    # Factors that the plan of a study is made from.
    assert half_width(1.0, 3) == pytest.approx(2.48, abs=0.01)
    assert half_width(1.0, 6) == pytest.approx(1.05, abs=0.01)
    assert half_width(1.0, 8) == pytest.approx(0.84, abs=0.01)


def test_power_against_published_numbers():
    # Cohen (1988), tables of the paired t test as G*Power gives them: d = 0.5 needs 34 pairs, d = 0.8 needs 15.
    assert seeds_for(0.5, 1.0) == 34
    assert seeds_for(0.8, 1.0) == 15
    assert power(0.0, 1.0, 6) == pytest.approx(0.05)
    assert seeds_for(0.001, 1.0, most=50) is None


def test_power_against_simulation():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.12, 0.1, (20_000, 6))
    share = np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05)
    assert power(0.12, 0.1, 6) == pytest.approx(share, abs=0.01)


def test_power_that_cannot_be_computed():
    with pytest.raises(InvalidConfig, match="power: expected a standard deviation above 0"):
        power(0.1, 0.0, 6)
