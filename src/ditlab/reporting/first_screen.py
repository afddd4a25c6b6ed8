"""The first screen of a page: a verdict, a table with a row for each kind of model at each N, a figure, small images.

Each analysis says what it puts there (`Analysis.overview`); nothing here knows which analyses there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditlab.analyses.base import Overview
from ditlab.errors import DitlabError
from ditlab.models.comparing import ModelSet
from ditlab.models.model import Model
from ditlab.pages.page import Table, ThemedFigure

__all__ = ["FirstScreen", "rows_of", "title_of"]


@dataclass(frozen=True)
class FirstScreen:
    """What a reader sees before scrolling."""

    sentences: Sequence[str]
    """The verdict, and what else an analysis found that matters as much."""
    table: Table
    pictures: Sequence[ThemedFigure]
    notes: Sequence[str]

    @classmethod
    def of(cls, rows: Sequence[tuple[str, int | None]], overviews: Sequence[Overview], otherwise: str) -> FirstScreen:
        """Puts together what the analyses say of each (kind, N); `otherwise` stands in place of a verdict."""
        # What has a figure of its own is the answer; the rest stands after it.
        overviews = sorted(overviews, key=lambda overview: overview.figure is None)
        verdicts = [overview.verdict for overview in overviews if overview.verdict]
        drawings = [next((o.figure for o in overviews if o.figure), None)]
        drawings.append(next((o.images for o in overviews if o.images), None))
        columns = list(dict.fromkeys(name for o in overviews for cells in o.cells.values() for name in cells))
        cells = {row: {name: cell for o in overviews for name, cell in o.cells.get(row, {}).items()} for row in rows}
        return cls(
            verdicts or [otherwise],
            Table(("model", "N", *columns), [(*row, *map(cells[row].get, columns)) for row in rows]),
            [ThemedFigure.of(drawing) for drawing in drawings if drawing is not None],
            [overview.note for overview in overviews if overview.note],
        )


def rows_of(models: ModelSet) -> list[tuple[str, int | None]]:
    """Returns each kind of model at each N, once."""
    return list(dict.fromkeys((kind, _count(model)) for kind, model in zip(models.kinds, models, strict=True)))


def title_of(models: ModelSet) -> str:
    """Returns the name of a single model, or the names of the kinds of several."""
    if len(models) == 1:
        return models.names[0]
    kinds = list(dict.fromkeys(models.kinds))
    if len(kinds) == 1:
        return f"{kinds[0]}: {', '.join(models.names)}"
    if any(", " in kind for kind in kinds):
        return " · ".join(kinds)
    return f"{', '.join(kinds[:-1])} and {kinds[-1]}"


def _count(model: Model) -> int | None:
    try:
        return model.split_record.train
    except DitlabError:
        return None
