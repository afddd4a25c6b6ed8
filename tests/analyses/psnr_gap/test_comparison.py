"""Results side by side: what may be compared, means and spreads over seeds, and claims that respect their interval."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ditlab.analyses.psnr_gap.comparison import compare
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.errors import DitlabError
from ditlab.metrics.paired import paired_difference
from ditlab.provenance import Provenance


def result(label: str, gap_db: float, seed: int = 0, n: int = 50, **facts) -> PSNRResult:
    """A result whose average gap is `gap_db` dB."""
    about = {"split_family": f"family{seed}", "split_hash": f"hash{seed}-{n}"} | facts
    mse = np.full((3, 4, 1), 0.1)
    return PSNRResult(
        Provenance(f"{label}-{n}-{seed}", label, n, seed, 100, True, **about),
        PSNRConfig(images=4),
        (0.1, 0.5, 2.0),
        None,
        2.0,
        mse / 10 ** (gap_db / 10),
        mse,
    )


def test_means_and_spread_over_seeds():
    found = compare([result("global", g, s) for s, g in enumerate((2.0, 3.0, 4.0))])
    (group,) = found.groups
    assert group.seeds == (0, 1, 2)
    assert group.mean() == pytest.approx(3.0)
    assert group.std() == pytest.approx(1.0)
    np.testing.assert_allclose(group.curve("gap"), 3.0)
    assert found.differences == ()
    assert "std 1.00 over 3 seeds" in found.sentences()[0]


def test_groups_by_label_and_n_with_differences_at_each_n():
    runs = [
        result(lab, g + 0.1 * s, s, n) for lab, g in (("global", 3), ("local", 2)) for s in (0, 1, 2) for n in (200, 50)
    ]
    found = compare(runs)
    assert found.labels == ("global", "local")
    assert found.counts == (50, 200)
    assert [(g.label, g.n) for g in found.groups] == [("global", 50), ("global", 200), ("local", 50), ("local", 200)]
    assert [n for n, _ in found.differences] == [50, 200]
    for _, difference in found.differences:
        assert difference.mean == pytest.approx(-1.0)
        assert difference.seen
    record = found.to_json()
    assert record["groups"][0]["by_seed"]["gap"]["2"] == pytest.approx(3.2)


def test_one_seed_makes_no_claim():
    (_, difference), *_ = compare([result("global", 3.0), result("local", 1.0)]).differences
    assert not difference.seen
    assert difference.low is None
    assert "one seed" in difference.sentence("gap")
    assert "lower (" not in difference.sentence("gap")


def test_an_interval_that_holds_zero_makes_no_claim():
    difference = paired_difference("a", "b", {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.5, 1: 1.6, 2: 3.4})
    # t(0.975, 2) = 4.302653: mean 1/6, sd of (0.5, -0.4, 0.4) = 0.493288
    assert difference.mean == pytest.approx(1 / 6)
    assert difference.high == pytest.approx(1 / 6 + 4.302653 * 0.493288 / np.sqrt(3), rel=1e-5)
    assert not difference.seen
    assert "no difference seen" in difference.sentence("gap")
    claim = paired_difference("a", "b", {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 3.1, 2: 3.9})
    assert claim.seen
    assert "b is higher (b minus a: +1.00 dB, 95% interval" in claim.sentence("gap")


def test_small_differences_do_not_print_as_zero():
    difference = paired_difference("a", "b", {0: 0.0, 1: 0.0}, {0: -0.001, 1: -0.002})
    assert "-0.0015 dB" in difference.sentence("gap")


def test_different_splits_are_refused():
    with pytest.raises(DitlabError, match="'global-50-0' and 'local-50-0' have different splits"):
        compare([result("global", 1.0), result("local", 1.0, split_family="other")])
    with pytest.raises(DitlabError, match="different training images at equal N"):
        compare([result("global", 1.0), result("local", 1.0, split_hash="other")])
    with pytest.raises(DitlabError, match=r"have different splits \(seeds \[0\] and \[1\]\)"):
        compare([result("global", 1.0, 0), result("local", 1.0, 1)])


def test_nested_training_sets_are_comparable():
    assert compare([result("global", 3.0, n=50), result("global", 1.0, n=200)]).counts == (50, 200)


def test_different_measurements_are_refused():
    one, two = result("global", 1.0), result("local", 1.0)
    with pytest.raises(DitlabError, match="different noise levels"):
        compare([one, dataclasses.replace(two, levels=(0.1, 0.5, 3.0))])
    with pytest.raises(DitlabError, match="different reduction"):
        compare([one, dataclasses.replace(two, config=PSNRConfig(images=4, reduction="psnr_mean"))])
    with pytest.raises(DitlabError, match="different noise_seed"):
        compare([one, dataclasses.replace(two, config=PSNRConfig(images=4, noise_seed=1))])
    with pytest.raises(DitlabError, match="are both 'global'"):
        compare([one, one])
    with pytest.raises(DitlabError, match="found none"):
        compare([])
