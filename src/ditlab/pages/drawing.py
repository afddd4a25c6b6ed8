"""A figure that can be drawn in any theme, with what it shows in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditlab.files import write_bytes
from ditlab.pages.theme import LIGHT, Theme, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Drawing", "save_drawings"]


@dataclass(frozen=True)
class Drawing:
    """A figure, drawn when it is needed."""

    draw: Callable[[Theme], Figure]
    """The figure in a theme."""
    alt: str
    """What it shows, for a reader who does not see it."""
    caption: str = ""
    exact: bool = False
    """Whether it shows photographs, whose colours are kept."""

    def figure(self, theme: Theme = LIGHT) -> Figure:
        """Draws it."""
        return self.draw(theme)


def save_drawings(drawings: Mapping[str, Drawing], folder: Path) -> list[Path]:
    """Writes each drawing as NAME.png, as it looks on a light page, and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_bytes(folder / f"{name}.png", png(drawing.figure())) for name, drawing in drawings.items()]
