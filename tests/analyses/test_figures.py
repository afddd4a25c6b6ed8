"""Figures draw what the results say, in the run's colour, with no text over other text."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from ditlab.analyses.psnr_gap.comparison import compare
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.figures import gap_bars, gap_differences, overview_curves, psnr_curves
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.analyses.trajectory.comparison import Trajectory, compare_trajectories
from ditlab.analyses.trajectory.figures import gap_along_training, loss_curves, matched_psnr
from ditlab.errors import DitlabError
from ditlab.pages.grids import sample_grid
from ditlab.pages.theme import DARK, LIGHT, assign, png, save
from ditlab.provenance import Provenance

LEVELS = tuple(np.geomspace(0.01, 150, 20).tolist())
STEPS = tuple(range(0, 1000, 50))


def result(label: str, gap_db: float, seed: int = 0, n: int | None = 50, **changes) -> PSNRResult:
    mse = np.minimum(np.square(LEVELS), 0.3)[:, None, None] * np.ones((1, 4, 1))
    fields = {
        "about": Provenance(f"{label}-{n}-{seed}", label, n, seed, 9, True, f"f{seed}", f"h{seed}{n}"),
        "config": PSNRConfig(images=4),
        "levels": LEVELS,
        "timesteps": STEPS,
        "peak": 2.0,
        "train_mse": mse / 10 ** (gap_db / 10),
        "test_mse": mse,
    }
    return PSNRResult(**(fields | changes))


def comparison(seeds=(0, 1), counts=(50, 1000)):
    return compare(
        [result(k, g + s / 9, s, n) for k, g in (("global", 3.0), ("local", 2.0)) for s in seeds for n in counts]
    )


def trajectories(seeds=(0, 1)):
    steps = np.arange(250, 3001, 250)
    found = []
    for seed in seeds:
        for label, speed in (("global", 1.0), ("local", 0.7)):
            train = 25 - 12 * np.exp(-steps * speed / 1500) + seed / 5
            test = 20 - 7 * np.exp(-steps * speed / 500) - (steps * speed / 3000) ** 2
            columns = (tuple(values.tolist()) for values in (steps, train, test, train - test))
            found.append(Trajectory(label, seed, *columns, n=50))
    return found


def log():
    lines = [{"step": s, "loss": 0.5 / s**0.5} for s in range(50, 1001, 50)]
    return [*lines, {"step": 1000, "train_loss": 0.02, "test_loss": 0.03}]


def matched():
    runs = trajectories()
    return compare_trajectories([t for t in runs if t.label == "global"], [t for t in runs if t.label == "local"])


FIGURES = {
    "curves by step": lambda theme: psnr_curves(comparison(), [result("Wiener", 0.5)], theme=theme),
    "curves by level": lambda theme: psnr_curves(
        compare([result("global", 3.0, timesteps=None), result("local", 2.0)]), theme=theme
    ),
    "bars": lambda theme: gap_bars(comparison(), theme=theme),
    "bars of one run": lambda theme: gap_bars(comparison((0,), (50,)), theme=theme),
    "gap along training": lambda theme: gap_along_training(trajectories(), theme=theme),
    "matched": lambda theme: matched_psnr(trajectories(), matched(), theme=theme),
    "loss": lambda theme: loss_curves({"global": log(), "local": log()}, theme=theme),
    "first screen": lambda theme: overview_curves(comparison(), theme=theme),
    "forest": lambda theme: gap_differences(comparison(), theme=theme),
    "samples": lambda theme: sample_grid([("some", np.zeros((12, 3, 8, 8), np.uint8))] * 2, columns=6, theme=theme),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_over_other_text_or_outside_the_figure(name, texts_apart):
    texts_apart(FIGURES[name](LIGHT))


@pytest.mark.parametrize("name", FIGURES)
def test_axes_say_their_quantity_and_unit(name):
    figure = FIGURES[name](LIGHT)
    for axes in figure.axes:
        if not axes.axison:
            continue
        label = axes.get_ylabel()
        assert not label or "(dB)" in label or "loss" in label


def test_themes_differ_and_the_same_figure_has_the_same_bytes(tmp_path):
    light, dark = png(FIGURES["bars"](LIGHT)), png(FIGURES["bars"](DARK))
    assert light != dark
    assert light == png(FIGURES["bars"](LIGHT))
    assert save(FIGURES["bars"](LIGHT), tmp_path / "new" / "bars.png").read_bytes() == light


@pytest.mark.parametrize("latents", [False, True])
def test_figures_along_training_say_whose_psnr(latents):
    """On every axis and title that names one."""
    psnr = "PSNR of latents" if latents else "PSNR"
    gap = gap_along_training(trajectories(), latents=latents)
    assert gap.axes[0].get_ylabel() == ("average gap of PSNR of latents (dB)" if latents else "average PSNR gap (dB)")
    assert gap.axes[1].get_ylabel() == f"test {psnr} (dB)"
    assert gap.axes[1].get_title(loc="left") == f"Test {psnr} (star: best)"
    (axes,) = matched_psnr(trajectories(), latents=latents).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"train {psnr} (dB), rising along training", f"test {psnr} (dB)")
    assert axes.get_title(loc="left") == f"Test against train {psnr} (star: best test PSNR)"


def test_a_run_keeps_its_colour():
    slots = assign(["other", "global", "local"])
    expected = LIGHT.run(slots["local"])
    bars = gap_bars(comparison((0,), (50,)), slots=slots)
    assert to_hex(bars.axes[0].patches[-1].get_facecolor()) == expected
    curves = psnr_curves(comparison((0,), (50,)), slots=slots)
    assert expected in {to_hex(line.get_color()) for line in curves.axes[0].lines}
    training = gap_along_training(trajectories((0,)), slots=slots)
    assert expected in {to_hex(line.get_color()) for line in training.axes[0].lines}


def test_the_legend_holds_the_averages():
    figure = psnr_curves(comparison((0,), (50,)), [result("Wiener", 0.5)])
    text = " | ".join(t.get_text() for t in figure.axes[2].get_legend().get_texts())
    group = comparison((0,), (50,)).groups[0]
    assert f"global: {group.mean('train'):.2f} / {group.mean('test'):.2f}, gap 3.00" in text
    assert "Wiener-50-0: " in text
    assert "noisy input" in text


def test_bars_carry_their_values():
    figure = gap_bars(comparison((0,), (50,)))
    assert {"3.00", "2.00"} <= {t.get_text() for t in figure.axes[0].texts}


def test_references_of_another_n_stay_out_of_a_column():
    figure = psnr_curves(comparison((0,)), [result("Wiener", 0.5, n=1000)])
    counts = [len(axes.lines) for axes in figure.axes[:2]]
    assert counts[1] == counts[0] + 2


def test_a_reference_that_leaves_the_axis_is_drawn_at_its_edge():
    """As empirical Bayes does: its PSNR on training images has no bound, and on others it is far below a network's."""
    exact = result("empirical Bayes", 70.0)
    figure = psnr_curves(comparison((0,), (50,)), [exact])
    low, high = figure.axes[0].get_ylim()
    for line in figure.axes[0].get_lines()[1:]:
        values = np.asarray(line.get_ydata())
        assert (values >= low).all()
        assert (values <= high).all()
    words = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert "A reference beyond the axis is drawn at its edge." in words
    inside = psnr_curves(comparison((0,), (50,)), [result("Wiener", 0.5)])
    assert not any("edge" in text.get_text() for text in inside.axes[2].get_legend().get_texts())


def test_the_forest_fills_differences_whose_interval_leaves_zero_out():
    kinds = (("global", (3.0, 3.1, 3.2)), ("local", (2.0, 2.1, 2.2)), ("other", (1.0, 3.0, 5.0)))
    results = [result(kind, gap, seed) for kind, gaps in kinds for seed, gap in enumerate(gaps)]
    figure = gap_differences(compare(results))
    (axes,) = figure.axes
    marks = [c for c in axes.collections if len(c.get_offsets()) == 1]
    filled = {round(float(c.get_offsets()[0][0]), 3): to_hex(c.get_facecolor()[0]) == LIGHT.run(0) for c in marks}
    assert filled == {-1.0: True, -0.1: False, 0.9: False}
    assert [t.get_text().split(",")[0] for t in axes.get_yticklabels()][-1] == "local minus global"
    with pytest.raises(DitlabError, match="expected at least two kinds"):
        gap_differences(compare([result("global", 1.0)]))


def test_what_cannot_be_drawn():
    with pytest.raises(DitlabError, match="other noise levels"):
        psnr_curves(comparison(), [result("Wiener", 1.0, levels=tuple(v * 1.1 for v in LEVELS))])
    with pytest.raises(DitlabError, match="found none"):
        gap_along_training([])
    with pytest.raises(DitlabError, match="found none"):
        loss_curves({"global": [{"step": 1}]})
    with pytest.raises(DitlabError, match="expected uint8"):
        sample_grid([("x", np.zeros((2, 3, 4, 4), np.float32))])
    with pytest.raises(DitlabError, match="found none"):
        sample_grid([])


def test_without_steps_the_axis_is_the_noise_level():
    figure = psnr_curves(compare([result("global", 1.0, timesteps=None)]))
    assert figure.axes[0].get_xscale() == "log"


def test_one_level_is_drawn_as_points():
    one = result("global", 3.0)
    alone = result(
        "one", 3.0, levels=LEVELS[:1], timesteps=None, train_mse=one.train_mse[:1], test_mse=one.test_mse[:1]
    )
    lines = [line for axes in psnr_curves(compare([alone])).axes for line in axes.get_lines() if len(line.get_xdata())]
    assert {line.get_marker() for line in lines if len(line.get_xdata()) == 1} == {"o"}
    rings = {line.get_markerfacecolor() for line in lines}
    assert "none" in rings
    assert len(rings) > 1


def test_the_axis_says_whose_psnr_it_is():
    about = Provenance("run", ema=True, settings={"space": "latents"})
    for found, says in ((result("a", 1.0), "PSNR (dB)"), (result("a", 1.0, about=about), "PSNR of latents (dB)")):
        figure = psnr_curves(compare([found]))
        assert figure.axes[0].get_ylabel() == says
