"""The sections on closed-form references and on disjoint training sets, made of what those verbs left.

As in `ditlab.reporting.sections`, each function lays out what it is given and computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditlab.analyses.agreement.result import AgreementResult
from ditlab.analyses.two_subsets.measure import TwoSubsetsResult
from ditlab.pages.page import Section, Table, ThemedFigure

NAMES = r"agreement(-images)?-\d+|two-subsets(-pairs)?-\d+"
"""The names of these figures, as a regular expression."""


def agreement_section(results: Sequence[AgreementResult], pictures: Sequence[ThemedFigure] = ()) -> Section:
    """What runs draw beside what closed-form references draw from the same noise: a row a run and reference."""
    rows = [
        (
            result.about.group,
            result.about.n,
            one.word,
            float(np.median(one.correlation)),
            float(np.median(one.control)) if result.config.images > 1 else None,  # of one image there is no other noise
            *(float(np.median(values)) for values in (one.r2, one.mse)),
        )
        for result in results
        for one in result.references
    ]
    columns = ("run", "N", "reference", "correlation", "with other noise", "R²", "MSE")
    note = (
        "References are made of the training images alone. Correlation: cosine of the final images about their means; "
        "with other noise: of the run's image with the reference's images of other seeds. R²: 1 - |x - y|² / "
        "(n Var y), y the run's image. Medians over images."
    )
    notes = dict.fromkeys(words for result in results for words in result.notes)
    return Section(
        "agreement",
        "Beside closed-form denoisers",
        points=[sentence for result in results for sentence in result.sentences()],
        tables=[Table(columns, rows)] if rows else (),
        notes=[note, *notes] if rows else (),
        pictures=pictures,
        data={f"{result.about.name}-agreement.json": result.to_json() for result in results},
    )


def two_subsets_section(results: Sequence[TwoSubsetsResult], pictures: Sequence[ThemedFigure] = ()) -> Section:
    """What runs on disjoint training sets draw from equal noise: a row a pair of runs."""
    rows = [
        (
            " and ".join(facts.name for facts in result.about),
            result.about[0].n,
            len(result.pair),
            *(float(values.mean()) for values in (result.pair, result.nearest_cosine)),
            result.difference,
            float(result.control.mean()),
        )
        for result in results
    ]
    columns = ("runs", "N", "pairs", "pair", "closest training image", "difference", "control")
    caption = "Mean cosine of images" + (" about their means" if all(r.mean_removed for r in results) else "")
    return Section(
        "two-subsets",
        "Two runs that share no training image",
        points=[sentence for result in results for sentence in result.sentences()],
        tables=[Table(columns, rows, caption)] if rows else (),
        pictures=pictures,
        data={f"two-subsets-{number}.json": result.to_json() for number, result in enumerate(results, 1)},
    )
