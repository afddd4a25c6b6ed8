"""Analyses: one folder for each question asked of models.

`ROOMS` is the only list of them; nothing else in ditlab knows their names. Packages of others add rooms through the
entry-point group `ditlab.analyses`, each entry `name = "package.module:Class"` of a subclass of
`ditlab.analyses.base.Analysis`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

from ditlab.errors import unknown_name

__all__ = ["ROOMS", "analysis", "analysis_names", "unusable_analyses"]

ROOMS: dict[str, str] = {
    "samples": "ditlab.analyses.samples:Samples",
    "psnr-gap": "ditlab.analyses.psnr_gap:PSNRGap",
    "swap-gap": "ditlab.analyses.swap_gap:SwapGap",
    "trajectory": "ditlab.analyses.trajectory:AlongTraining",
    "scaling": "ditlab.analyses.scaling:Scaling",
    "attention": "ditlab.analyses.attention:Attention",
    "jacobian": "ditlab.analyses.jacobian:Jacobian",
    "agreement": "ditlab.analyses.agreement:Agreement",
    "two-subsets": "ditlab.analyses.two_subsets:TwoSubsets",
}
"""Name -> its class, in the order of a report's sections."""

TAKEN = frozenset({"quickstart", "data", "train", "sample", "complexity", "convert", "report", "study", "help"})
"""Words of the command line that no analysis of another package may have as its name."""


@cache
def _places() -> tuple[dict[str, str], tuple[str, ...]]:
    """Name -> where its class is, those of other packages after ditlab's own; and why some cannot be used."""
    places, unusable = dict(ROOMS), []
    for point in sorted(entry_points(group="ditlab.analyses"), key=lambda point: point.name):
        where = f"analysis '{point.name}' of {point.value} is not used"
        if point.name in places or point.name in TAKEN:
            unusable.append(f"{where}: ditlab or another package has this name")
            continue
        try:
            point.load()()
        except Exception as error:  # code of others, which must not keep ditlab from working
            unusable.append(f"{where}: {type(error).__name__}: {error}")
            continue
        places[point.name] = point.value
    return places, tuple(unusable)


def analysis_names() -> tuple[str, ...]:
    """Returns the names of all analyses, in the order of a report's sections."""
    return tuple(_places()[0])


def unusable_analyses() -> tuple[str, ...]:
    """Returns a sentence for each analysis of another package that cannot be used."""
    return _places()[1]


def analysis(name: str) -> Any:
    """Returns the analysis of this name, an `Analysis`; raises NotFound for an unknown one."""
    places, _ = _places()
    if name not in places:
        raise unknown_name("analysis", name, places)
    return resolve_name(places[name])()
