"""What all figures must hold, and tiny trained runs that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import ditlab
from ditlab.models.run import Run


@pytest.fixture
def texts_apart(monkeypatch) -> Callable[[Figure], None]:
    """`texts_apart(figure)` checks that no text lies over other text or outside the figure."""

    def check(figure: Figure) -> None:
        boxes: dict[int, tuple[str, Any]] = {}
        draw = Text.draw

        def recorded(text, renderer, *args, **kwargs):
            if text.get_visible() and text.get_text().strip():
                boxes[id(text)] = (text.get_text(), text.get_window_extent(renderer))
            return draw(text, renderer, *args, **kwargs)

        monkeypatch.setattr(Text, "draw", recorded)
        FigureCanvasAgg(figure).draw()
        assert boxes
        for text, box in boxes.values():
            assert min(box.x0, box.y0) >= -1, text
            assert box.x1 <= figure.bbox.x1 + 1, text
            assert box.y1 <= figure.bbox.y1 + 1, text
        for (one, a), (two, b) in combinations(boxes.values(), 2):
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(overlap) <= 1.0, (one, two)

    return check


TINY: dict[str, Any] = {
    "n": 20,
    "test": 20,
    "steps": 6,
    "width": 16,
    "heads": 2,
    "depth": 2,
    "batch_size": 8,
    "log_every": 2,
    "eval_every": 3,
    "save_every": 2,
    "evaluation.images": 4,
    "evaluation.levels": 2,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[..., Run]:
    """`trained("name", skip=20)` is a run of six steps on 20 digits of 8x8 pixels; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("trained")
    images = ditlab.prepare("digits", size=8, out=folder / "digits")
    asked: dict[str, dict[str, Any]] = {}

    def train(name: str, *, preset: str = "dit-nano/1", **settings: Any) -> Run:
        wanted = {"preset": preset, **settings}
        assert asked.setdefault(name, wanted) == wanted, f"two kinds of runs are called {name}"
        run = ditlab.train(preset, images, out=folder / "runs" / name, **TINY | settings)
        assert run is not None
        return run

    return train


@pytest.fixture
def opened(tmp_path) -> Callable[[Run], Run]:
    """`opened(run)` is the run again, with a results folder of the test's own."""

    def reopen(run: Run) -> Run:
        return Run.open(run.home, results=tmp_path / "results" / run.home.name)

    return reopen
