"""Analyses: one folder for each question asked of models.

`ROOMS` is the only list of them; nothing else in ditlab knows their names. Packages of others add rooms through the
entry-point group `ditlab.analyses`, each entry `name = "package.module:Class"` of a subclass of
`ditlab.analyses.base.Analysis`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from ditlab.errors import InvalidConfig, unknown_name

__all__ = ["ROOMS", "analysis", "analysis_names"]

ROOMS: dict[str, str] = {
    "samples": "ditlab.analyses.samples:Samples",
    "psnr-gap": "ditlab.analyses.psnr_gap:PSNRGap",
    "trajectory": "ditlab.analyses.trajectory:AlongTraining",
    "scaling": "ditlab.analyses.scaling:Scaling",
    "attention": "ditlab.analyses.attention:Attention",
    "jacobian": "ditlab.analyses.jacobian:Jacobian",
    "agreement": "ditlab.analyses.agreement:Agreement",
    "two-subsets": "ditlab.analyses.two_subsets:TwoSubsets",
}
"""Name -> its class, in the order of a report's sections."""


@cache
def _places() -> dict[str, str]:
    """Name -> where its class is, those of other packages after ditlab's own."""
    others = {point.name: point.value for point in entry_points(group="ditlab.analyses")}
    for name in others:
        if name in ROOMS:
            raise InvalidConfig(f"analysis '{name}' of {others[name]}: ditlab has an analysis of this name")
    return ROOMS | dict(sorted(others.items()))


def analysis_names() -> tuple[str, ...]:
    """Returns the names of all analyses, in the order of a report's sections."""
    return tuple(_places())


def analysis(name: str) -> Any:
    """Returns the analysis of this name, an `Analysis`.

    Raises:
        NotFound: there is none.
    """
    places = _places()
    if name not in places:
        raise unknown_name("analysis", name, places)
    module, _, attribute = places[name].partition(":")
    return getattr(import_module(module), attribute)()
