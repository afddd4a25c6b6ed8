"""Comparison along training: equal steps, matched train PSNR, best test PSNR."""

from __future__ import annotations

import pytest

from ditlab.analyses.trajectory.comparison import Trajectory, compare_seed, compare_trajectories
from ditlab.analyses.trajectory.tables import best_sentence, course_table, matched_differences, matched_table
from ditlab.errors import DitlabError

STEPS = (100, 200, 300, 400)


def run(label: str, train, test, seed: int = 0, steps=STEPS, **settings) -> Trajectory:
    train, test = tuple(map(float, train)), tuple(map(float, test))
    gap = tuple(a - b for a, b in zip(train, test, strict=True))
    return Trajectory(label, seed, tuple(steps), train, test, gap, **settings)


def test_equal_quality_at_different_speed_differs_at_equal_steps_only():
    # Both lie on one curve test = 20 - (train - 20)^2 / 10 + ...; the second is simply later on it.
    fast = run("global", (16, 20, 24, 28), (16, 18, 17, 14))
    slow = run("local", (14, 16, 20, 24), (15, 16, 18, 17))
    seed = compare_seed(fast, slow)
    assert seed.step == 400
    assert seed.gap_at_step == (14.0, 7.0)
    assert seed.matched_train == 24.0
    assert seed.gap_matched == (7.0, 7.0)
    assert seed.step_matched == (300.0, 400.0)
    assert seed.best_test == (18.0, 18.0)
    assert seed.best_step == (200, 300)
    assert seed.note == ""


def test_crossing_interpolates_and_takes_the_first_of_several():
    t = run("a", (10, 14, 12, 16), (8, 10, 9, 11))
    found = t.crossing(13.0)
    assert found is not None
    assert (found.step, found.test, found.gap) == pytest.approx((175.0, 9.5, 3.5))
    later = t.crossing(15.0)  # between 12 and 16, after it fell back from 14
    assert later is not None
    assert later.step == pytest.approx(375.0)
    assert t.crossing(9.0) is None
    assert t.crossing(16.5) is None
    start = t.crossing(10.0)
    assert start is not None
    assert start.step == 100.0


def test_ranges_without_overlap_are_said():
    high = run("global", (20, 22, 24, 26), (18, 18, 18, 18))
    low = run("local", (10, 12, 13, 14), (10, 11, 12, 12))
    found = compare_trajectories([high], [low])
    assert found.gap_matched is None
    assert found.seeds[0].matched_train is None
    text = " ".join(found.sentences())
    assert "do not overlap (global 20.00 to 26.00 dB, local 10.00 to 14.00 dB)" in text
    assert "cannot be compared" in text


def test_several_seeds_are_paired_and_others_named():
    first = [run("global", (16, 20, 24, 28 + s / 10), (16, 18, 17, 14), s) for s in (0, 1, 2)]
    second = [run("local", (14, 16, 20, 24 + s / 5), (15, 16, 18, 17), s) for s in (0, 1, 2, 5)]
    found = compare_trajectories(first, second)
    assert found.gap_at_step.seeds == (0, 1, 2)
    assert found.gap_at_step.mean == pytest.approx(-6.9)
    assert found.gap_at_step.seen
    assert found.unpaired == (5,)
    assert "only one side has them: seeds 5" in found.sentences()[-1]
    assert "no difference seen" in found.best_test.sentence("best")


def test_tables_say_what_the_sentences_say():
    first = [run("global", (16, 20, 24, 28 + s / 10), (16, 18, 17, 14), s) for s in (0, 1, 2)]
    second = [run("local", (14, 16, 20, 24 + s / 5), (15, 16, 18, 17), s) for s in (0, 1, 2)]
    comparison = compare_trajectories(first, second)
    table = matched_differences([comparison])
    assert [row[0] for row in table.rows] == ["gap at equal steps", "gap at matched train PSNR", "best test PSNR"]
    assert table.rows[0][2:] == ("local minus global", "-6.90", "-7.15 to -6.65", 3, "local is lower")
    assert table.rows[2][-1] == "no difference seen"
    assert len(matched_table(comparison).rows) == 6
    course = course_table([*first, *second])
    assert course.rows[0] == ("global", None, 0, 400, 28.0, 14.0, 14.0, 18.0, 200)
    assert best_sentence(first[:1]) == (
        "global was best on held-out images at step 200 of 400, and lost 4.00 dB of test PSNR afterwards."
    )
    assert best_sentence([run("a", (1, 2, 3, 4), (1, 2, 3, 4))]) == (
        "Test PSNR was still at its best at the end of training."
    )
    assert "6 of 6 runs passed their best test PSNR: global" in best_sentence([*first, *second])
    assert best_sentence([]) == ""


def test_from_a_log():
    lines = [
        {"step": 50, "loss": 0.3},
        {"step": 100, "loss": 0.2, "train_psnr": 12.0, "test_psnr": 11.0, "psnr_gap": 1.2},
        {"step": 200, "train_psnr": 14.0, "test_psnr": 12.0, "psnr_gap": 2.1},
    ]
    found = Trajectory.from_log("global", 0, lines, n=50)
    assert found.steps == (100, 200)
    assert found.gap == (1.2, 2.1)
    assert found == Trajectory("global", 0, (100, 200), (12.0, 14.0), (11.0, 12.0), (1.2, 2.1), n=50)


def test_what_cannot_be_compared():
    a = run("global", (1, 2, 3, 4), (1, 2, 3, 4), split_family="one")
    with pytest.raises(DitlabError, match="different splits"):
        compare_trajectories([a], [run("local", (1, 2, 3, 4), (1, 2, 3, 4), split_family="two")])
    with pytest.raises(DitlabError, match="different splits"):
        compare_trajectories([a], [run("local", (1, 2, 3, 4), (1, 2, 3, 4), 7, split_family="one")])
    with pytest.raises(DitlabError, match="expected a step measured in both"):
        compare_trajectories([a], [run("local", (1, 2), (1, 2), steps=(5, 6), split_family="one")])
    with pytest.raises(DitlabError, match="one number of training images"):
        compare_trajectories([a], [run("local", (1, 2, 3, 4), (1, 2, 3, 4), n=9, split_family="one")])
    with pytest.raises(DitlabError, match="runs of one label"):
        compare_trajectories([a], [])
    with pytest.raises(DitlabError, match="ascending"):
        run("a", (1, 2), (1, 2), steps=(2, 1))
    with pytest.raises(DitlabError, match="finite"):
        run("a", (1, float("nan")), (1, 2), steps=(1, 2))
    with pytest.raises(DitlabError, match="at least one"):
        Trajectory.from_log("a", 0, [{"step": 1, "loss": 2.0}])
