"""Figures of cost and of scaling draw what they are given, with no text over other text."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from ditlab.analyses.complexity.figures import complexity_figure
from ditlab.analyses.scaling.figures import sampling_figure, scaling_figure
from ditlab.analyses.scaling.points import ScalingPoint, best_sentence, scaling_points, sizes_table
from ditlab.errors import DitlabError
from ditlab.metrics.complexity import Complexity
from ditlab.pages.theme import DARK, LIGHT, assign, plain_log, png
from ditlab.studies.published import published

SIZES = {"s": (33, 6.06), "b": (130, 23.0), "l": (458, 80.7), "xl": (675, 118.6)}


def twelve() -> list[tuple[str, Complexity]]:
    """The twelve networks of Peebles & Xie, roughly."""
    return [
        (f"dit-{size}/{patch}", Complexity(millions * 10**6, int(gmacs * 4e9 / patch**2), 0, int(gmacs * 1e7 / patch)))
        for size, (millions, gmacs) in SIZES.items()
        for patch in (8, 4, 2)
    ]


def fid() -> dict[str, float]:
    paper = published("dit/table4")
    assert paper is not None
    return {value["network"]: value["value"] for value in paper.values if value["quantity"] == "fid"}


def points(kinds=("nano", "micro")) -> list[ScalingPoint]:
    found = []
    for i, kind in enumerate(kinds, 1):
        log = [{"step": step, "loss": 1 / i / step**0.5} for step in range(50, 5001, 50)]
        log += [{"step": step, "test_loss": 1 / step**0.5, "test_psnr": 20.0 + i} for step in (1000, 5000)]
        evaluations = [
            {"step": 5000, "nfe": nfe, "metrics": {"fid": 100 / i + 300 / nfe, "precision": 0.5}} for nfe in (10, 100)
        ]
        found += scaling_points(ScalingPoint(kind, kind, 1000 * i, 0.1 * 7**i, 32, 0), log, evaluations)
    return found


FIGURES = {
    "twelve": lambda theme: complexity_figure(twelve(), published=fid(), theme=theme),
    "one": lambda theme: complexity_figure(twelve()[:1], theme=theme),
    "long names": lambda theme: complexity_figure(
        [("dit-xs/1", twelve()[0][1]), ("dit-xs/1, width 284, attention local", twelve()[2][1])], theme=theme
    ),
    "scaling": lambda theme: scaling_figure(points(), theme=theme),
    "long labels": lambda theme: sampling_figure(
        points(("patch 1, width 64, depth 12", "patch 2, width 64, depth 12", "patch 1, width 96, depth 12")),
        theme=theme,
    ),
    "sampling": lambda theme: sampling_figure(points(), theme=theme),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_over_other_text_or_outside_the_figure(name, texts_apart):
    texts_apart(FIGURES[name](LIGHT))


def test_themes_differ():
    assert png(FIGURES["one"](LIGHT)) != png(FIGURES["one"](DARK))


def test_bubbles_lie_where_the_costs_are():
    figure = complexity_figure(twelve(), published=fid())
    costs, published_fid = figure.axes
    where = np.array([c.get_offsets()[0] for c in costs.collections])
    assert where == pytest.approx(np.array([(cost.gmacs, cost.parameters / 1e6) for _, cost in twelve()]))
    areas = [c.get_sizes()[0] for c in costs.collections]
    kept = [cost.activation_bytes for _, cost in twelve()]
    assert int(np.argmax(areas)) == int(np.argmax(kept))
    assert len({to_hex(c.get_facecolor()[0]) for c in costs.collections}) == 4  # one colour a size
    assert [c.get_offsets()[0][1] for c in published_fid.collections] == pytest.approx(list(fid().values()))
    assert {t.get_text() for t in published_fid.texts} == {name for name, _ in twelve()}
    assert len(complexity_figure(twelve()).axes) == 1
    with pytest.raises(DitlabError, match="expected at least one network, found none"):
        complexity_figure([])


def test_what_is_drawn_of_scaling():
    figure = scaling_figure(points(), slots=assign(["other", "nano", "micro"]))
    panels = np.array(figure.axes).reshape(5, 3)  # loss, test loss, test PSNR, FID, precision
    assert [axes.get_ylabel() for axes in panels[:, 0]][3] == "FID"
    first, along, compute = panels[0]
    assert [line.get_xdata()[0] for line in first.lines] == pytest.approx([0.7, 4.9])
    assert len(along.lines[0].get_xdata()) == 20
    assert compute.lines[0].get_xdata()[-1] == pytest.approx(0.7 * 32 * 5000 * 3)
    assert to_hex(along.lines[0].get_color()) == LIGHT.run(1)
    assert [axes.get_xscale() for axes in panels[0]] == ["log"] * 3
    assert [axes.get_yscale() for axes in panels[:, 0]] == ["log", "log", "linear", "log", "linear"]
    # Of two evaluations at a step, the one with more network calls.
    assert panels[3][0].lines[0].get_ydata()[0] == pytest.approx(103.0)
    with pytest.raises(DitlabError, match="found none"):
        scaling_figure([])


def test_what_is_drawn_of_sampling():
    figure = sampling_figure(points())
    fid_axes, precision, *_ = figure.axes
    assert fid_axes.lines[1].get_xdata() == pytest.approx([49.0, 490.0])
    assert fid_axes.lines[1].get_ydata() == pytest.approx([80.0, 53.0])
    assert precision.get_ylabel() == "precision"
    with pytest.raises(DitlabError, match="expected evaluations with a number of network calls, found none"):
        sampling_figure(scaling_points(ScalingPoint("a", "a", 1, 1.0, 1, 0), [{"step": 1, "loss": 1.0}]))


def test_the_table_has_the_last_values():
    table = sizes_table(points())
    assert table.columns[:6] == ("run", "kind", "parameters, M", "GMACs", "steps", "training, GMACs")
    assert [row[0] for row in table.rows] == ["nano", "micro"]
    assert table.rows[0][4:6] == (5000, f"{0.7 * 32 * 5000 * 3:.2e}")
    assert table.rows[0][table.columns.index("FID")] == pytest.approx(103.0)
    assert best_sentence(points()) == "micro (4.9 GMACs) has the lowest FID of 2 runs at the end: 53.00."
    assert best_sentence([]) == ""


def test_readable_numbers_on_logarithmic_axes():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.set_xlim(1e-5, 1e9)
    plain_log(axes.xaxis, (1e-5, 1e9))
    words = axes.xaxis.get_major_formatter()
    assert [words(value) for value in (1e-5, 0.02, 50.0, 20e3, 1e6, 2e8)] == [
        *("$10^{-5}$", "0.02", "50", "20,000", "$10^{6}$", r"$2\cdot 10^{8}$")
    ]
