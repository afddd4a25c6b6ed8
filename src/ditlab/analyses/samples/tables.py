"""Tables and sentences about samples and their nearest training images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditlab.analyses.samples.measure import SampleSet
from ditlab.metrics.nearest import Nearest, NearestResult
from ditlab.pages.page import Table

__all__ = ["ABOUT_LATENTS", "copies_cell", "copies_sentence", "distances_table", "nearest_table"]

ABOUT_LATENTS = (
    "Models of latents: both sides are decoded. The distance is that of the pictures which the autoencoder makes of "
    "the latents, not of the original pictures."
)
_CAPTION = (
    "Median distance to the nearest training image: root mean square difference of pixels, in grey levels (0 to 255). "
    "A copy is less than a third as far from its nearest training image as from the second nearest (d1/d2 < 1/3). "
    "Held-out images show the distance without copying."
)


def distances_table(results: Sequence[NearestResult]) -> Table:
    """Returns a row for each kind at each N: distances of its samples and of held-out images, and copies."""
    rows = []
    for r in results:
        held_out = None if r.held_out is None else float(np.median(r.held_out.first))
        distances = (len(r.samples.first), float(np.median(r.samples.first)), held_out)
        rows.append((r.about.group, r.about.n, r.about.seed, *distances, copies_cell(r.samples)))
    columns = ("model", "N", "seed", "samples", "distance of samples", "distance of held-out images", "copies")
    return Table(columns, rows, _CAPTION, digits=1)


def nearest_table(samples: SampleSet) -> Table | None:
    """Returns the file of the training image nearest to each sample, folded; None where the image set has no names."""
    rows = []
    for kind in () if samples.hide else samples.kinds:
        if kind.nearest is not None and any(kind.sources):
            found = zip(kind.sources, kind.nearest.samples.first, strict=True)
            rows += [(kind.caption, seed, name, float(distance)) for seed, (name, distance) in enumerate(found)]
    columns = ("model", "sample's seed", "nearest training image", "distance")
    folded = "Files of the nearest training images"
    return Table(columns, rows, digits=1, folded=folded) if rows else None


def copies_cell(nearest: Nearest) -> str | None:
    """Returns "1 of 16" with the 95 % interval of the share (Wilson) on a second line; None where it is unknown."""
    from scipy.stats import binomtest

    if nearest.copies is None:
        return None
    count = len(nearest.first)
    interval = binomtest(nearest.copies, count).proportion_ci(method="wilson")
    return f"{nearest.copies} of {count}\n{100 * interval.low:.0f}–{100 * interval.high:.0f} %"


def copies_sentence(results: Sequence[NearestResult]) -> str:
    """Returns how many samples are copies of training images, in one sentence; "" where that is unknown."""
    known = [r for r in results if r.samples.copies is not None]
    copied = [r for r in known if r.samples.copies]
    if not copied:
        count = sum(len(r.samples.first) for r in known)
        return f"None of {count} samples is a copy of a training image." if known else ""
    parts = []
    for r in copied:
        at = "" if r.about.n is None else f" (N = {r.about.n:,})"
        parts.append(f"{r.samples.copies} of {len(r.samples.first)} of {r.about.group}{at}")
    return f"Some samples are copies of training images: {', '.join(parts)}."
