"""The first screen of a report: a verdict, a table with a row for each kind of model, a figure, small images.

Each analysis says what it puts there (`Analysis.overview`); nothing here knows which analyses there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ditlab.analyses.base import Comparison, Overview
from ditlab.errors import DitlabError
from ditlab.models.comparing import ModelSet
from ditlab.pages.page import Table, ThemedFigure

__all__ = ["FirstScreen", "title_of"]

_NO_VERDICT = "Nothing was measured that tells whether {title} generalizes or memorizes; the notes below say why."


@dataclass(frozen=True)
class FirstScreen:
    """What a reader sees before scrolling."""

    sentences: Sequence[str]
    """The verdict, and what else an analysis found that matters as much."""
    table: Table
    pictures: Sequence[ThemedFigure]
    notes: Sequence[str]

    @classmethod
    def of(cls, models: ModelSet, comparisons: Sequence[Comparison], title: str) -> FirstScreen:
        """Puts together what the analyses say."""
        overviews = [comparison.analysis.overview(comparison) for comparison in comparisons]
        # What has a figure of its own is the answer; the rest stands after it.
        overviews.sort(key=lambda overview: overview.figure is None)
        verdicts = [overview.verdict for overview in overviews if overview.verdict]
        drawings = [next((o.figure for o in overviews if o.figure), None)]
        drawings.append(next((o.images for o in overviews if o.images), None))
        return cls(
            verdicts or [_NO_VERDICT.format(title=title)],
            _table(models, overviews),
            [ThemedFigure.draw(d.draw, d.alt, d.caption, exact=d.exact) for d in drawings if d is not None],
            [overview.note for overview in overviews if overview.note],
        )


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


def _table(models: ModelSet, overviews: Sequence[Overview]) -> Table:
    """A row for each kind at each N."""
    keys = list(dict.fromkeys((kind, _count(model)) for kind, model in zip(models.kinds, models, strict=True)))
    columns = list(dict.fromkeys(name for o in overviews for cells in o.cells.values() for name in cells))
    rows: list[tuple[Any, ...]] = []
    for key in keys:
        cells = {name: cell for o in overviews for name, cell in o.cells.get(key, {}).items()}
        rows.append((*key, *(cells.get(name) for name in columns)))
    return Table(("model", "N", *columns), rows)


def _count(model: Any) -> int | None:
    try:
        return model.split_record.train
    except DitlabError:
        return None
