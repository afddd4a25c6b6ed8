"""What analyses of two models with disjoint training sets share; their result is about both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ditlab.analyses.base import Analysis, Comparison, ConfigT, OptionsT
from ditlab.analyses.cache import save_result

if TYPE_CHECKING:
    from pathlib import Path

    from ditlab.models.comparing import ModelSet, OpenedModel

__all__ = ["PairAnalysis", "same_pair"]


def same_pair(result: Any, opened: Sequence[OpenedModel]) -> bool:
    """Returns whether a result is of the weights, images and settings of these two models, in this order."""
    return all(about.same_measurement(part.provenance) for about, part in zip(result.about, opened, strict=True))


class PairAnalysis(Analysis[ConfigT, OptionsT]):
    """An analysis of two models, whose result has `about` of both and lies in the folder of the first."""

    models = (2, 2)

    def save(self, results: Sequence[Any], models: ModelSet, out: Path) -> list[Path]:
        """Writes the result, which is about both models, into `out`."""
        return [save_result(result, out, self.name) for result in results]

    def notes(self, comparison: Comparison) -> list[str]:
        """Returns a sentence for each pair that was not trained for the same number of steps."""
        return [
            f"{first.name} was trained for {first.step} steps, {second.name} for {second.step}."
            for first, second in (result.about for result in comparison.results)
            if first.step != second.step
        ]

    def data(self, comparison: Comparison) -> dict[str, Any]:
        """Returns file name -> result, for the page."""
        return {f"{self.name}-{place}.json": result.to_json() for place, result in enumerate(comparison.results, 1)}
