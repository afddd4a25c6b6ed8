"""What makes the whole suite faster: long files first, and figures of pages in one theme."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def light_pages() -> Iterator[Callable[..., Any]]:
    """Pages show the light figure in both themes: drawing is the longest part of most tests of pages.

    Tests of figures draw them in both themes; tests of pages that compare themes use `both_themes`. Yields what draws
    both.
    """
    from ditlab.pages import page
    from ditlab.pages.theme import LIGHT

    draw = page.ThemedFigure.draw.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def in_light(cls, drawing, *args, **keywords):
        figure = drawing(LIGHT)
        return draw(cls, lambda _: figure, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "png", lru_cache(maxsize=1)(page.png))
        patch.setattr(page.ThemedFigure, "draw", classmethod(in_light))
        yield draw


@pytest.fixture(scope="module")
def both_themes(light_pages) -> Iterator[None]:
    """Figures of pages are drawn in both themes, as they are for users."""
    from ditlab.pages import page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page.ThemedFigure, "draw", classmethod(light_pages))
        yield
