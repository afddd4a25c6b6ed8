"""What all figures must hold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


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
