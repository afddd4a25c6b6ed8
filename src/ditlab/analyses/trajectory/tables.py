"""Tables and sentences about runs along training."""

from __future__ import annotations

from collections.abc import Sequence

from ditlab.analyses.groups import differences_table
from ditlab.analyses.trajectory.comparison import MatchedComparison, Trajectory
from ditlab.pages.page import Table

__all__ = ["best_sentence", "course_table", "matched_differences", "matched_table"]


def course_table(trajectories: Sequence[Trajectory]) -> Table:
    """Returns a row for each run: its last measurement, and its best one."""
    columns = (
        *("model", "N", "seed", "last step", "train PSNR, dB", "test PSNR, dB", "gap, dB"),
        *("best test PSNR, dB", "at step"),
    )
    rows = [
        (t.label, t.n, t.seed, t.steps[-1], t.train[-1], t.test[-1], t.gap[-1], t.test[t.best], t.steps[t.best])
        for t in trajectories
    ]
    return Table(columns, rows)


def best_sentence(trajectories: Sequence[Trajectory]) -> str:
    """Returns whether test PSNR fell after its best, in one sentence; "" where nothing was measured along training."""
    if not trajectories:
        return ""
    past = [t for t in trajectories if t.test[-1] < t.test[t.best]]
    if not past:
        return "Test PSNR was still at its best at the end of training" + (
            "." if len(trajectories) == 1 else " in every run."
        )
    fallen = max(past, key=lambda t: t.test[t.best] - t.test[-1])
    words = (
        f"{fallen.label} was best on held-out images at step {fallen.steps[fallen.best]:,} of {fallen.steps[-1]:,}, "
        f"and lost {fallen.test[fallen.best] - fallen.test[-1]:.2f} dB of test PSNR afterwards"
    )
    if len(trajectories) == 1:
        return f"{words}."
    return f"{len(past)} of {len(trajectories)} runs passed their best test PSNR: {words}, the most of all."


def matched_differences(matched: Sequence[MatchedComparison]) -> Table:
    """Returns the differences between each two kinds at each N: equal steps, matched fit, best test PSNR."""
    rows = []
    for m in matched:
        rows.append(("gap at equal steps", m.n, m.gap_at_step))
        if m.gap_matched is not None:
            rows.append(("gap at matched train PSNR", m.n, m.gap_matched))
        rows.append(("best test PSNR", m.n, m.best_test))
    return differences_table(rows)


def matched_table(comparison: MatchedComparison) -> Table:
    """Returns a row for each seed and side."""
    columns = (
        *("model", "seed", "gap at equal steps", "at step", "gap at matched train PSNR", "that train PSNR"),
        *("test PSNR there", "reached at step", "best test PSNR", "at step "),
    )
    rows = []
    for seed in comparison.seeds:
        for side, label in enumerate((comparison.first, comparison.second)):
            there = (None,) * 4
            if seed.matched_train is not None and seed.gap_matched and seed.test_matched and seed.step_matched:
                step = round(seed.step_matched[side])
                there = (seed.gap_matched[side], seed.matched_train, seed.test_matched[side], step)
            best = (seed.best_test[side], seed.best_step[side])
            rows.append((label, seed.seed, seed.gap_at_step[side], seed.step, *there, *best))
    return Table(columns, rows)
