"""The figures of a report as PNG files beside its page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ditlab.files import write_bytes, write_json
from ditlab.pages.page import ThemedFigure

__all__ = ["LIST", "save_figures"]

LIST = "figures.json"
"""The names of the figures that the last report wrote."""
_EARLIER = re.compile(
    r"samples|psnr-curves|gap-bars|(gap-along-training|matched-psnr|losses|scaling|sampling-compute)(-n\w+)?"
    r"|attention-maps|attention-locality(-by-n)?-\d+|agreement(-images)?-\d+|two-subsets(-pairs)?-\d+"
    r"|jacobian-(denoised|spectra|vectors|right-vectors|measures|shrinkage|sensitivity)[\w.+-]*"
)
"""The names that reports of earlier versions, which kept no list, gave their figures."""


def save_figures(figures: Mapping[str, ThemedFigure], folder: Path) -> list[Path]:
    """Writes each figure as NAME.png, as it is on a light page; returns the paths.

    An earlier report's figures that this one lacks are deleted: they may show images that this one hides.
    """
    for name in _written_before(folder) - figures.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    paths = [write_bytes(folder / f"{name}.png", figure.light) for name, figure in figures.items()]
    write_json(folder / LIST, {"kind": "report-figures", "version": 1, "names": sorted(figures)})
    return paths


def _written_before(folder: Path) -> set[str]:
    """The names of figures that an earlier report wrote."""
    names = {file.stem for file in folder.glob("*.png")}
    try:
        listed = json.loads((folder / LIST).read_text(encoding="utf-8"))["names"]
    except (OSError, ValueError, KeyError, TypeError):
        return {name for name in names if _EARLIER.fullmatch(name)}
    return names & set(listed)
