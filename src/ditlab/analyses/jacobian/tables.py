"""The tables of a comparison of Jacobians, and the definition of each column that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ditlab.analyses.jacobian.comparison import BEST_OF, JacobianComparison
from ditlab.analyses.jacobian.measures import LEADING
from ditlab.pages.page import Table

__all__ = ["R_HOM_R_LIN", "definitions", "jacobian_tables"]


class Column(NamedTuple):
    """One number of each row."""

    heading: str
    value: str
    """Its name, see `comparison.measure_value`."""
    form: str
    """How it is formatted."""
    meaning: str
    """Its definition; {leading} and {best} are numbers of vectors."""


_R_LIN = "|f(x + d) - f(x) - J d| / |f(x + d) - f(x)|, the share of the change by a short step d that is not linear"
R_HOM_R_LIN = (
    Column("r_hom", "r_hom", ".2g", "|f - J x| / |f|, the share of the output f that is not J times the input x"),
    Column("r_lin", "r_lin", ".2g", _R_LIN),
)
_HALF = "side in pixels of the smallest centred square that holds half of what an output pixel depends on"
_MATRIX = (
    Column("trace", "trace", ".4g", "sum of the eigenvalues"),
    Column("squares", "sum_of_squares", ".4g", "sum of the squared singular values"),
    Column("ratio", "participation_ratio", ".4g", "(Σs)² / Σs² of the values s, how many of them count"),
    Column("asym.", "asymmetry", ".2f", "asymmetry |J - Jᵀ| / |J|, 0 for a symmetric matrix"),
    Column("50 %", "locality 0.5", ".1f", _HALF),
    Column("95 %", "locality 0.95", ".1f", "side in pixels of the square that holds 95 % of it"),
    Column("Wiener 50 %", "Wiener locality 0.5", ".1f", "the 50 % of the Wiener denoiser of the same training images"),
)
_FIRST = "the same correlation among the {leading} leading vectors"
_FREQUENCIES = (
    Column("harmonic", "harmonicity", ".2f", "rank correlation of the frequency of a vector with its index"),
    Column(f"first {LEADING}", "harmonicity_leading", ".2f", _FIRST),
    Column("shuffled", "harmonicity_shuffled", ".2f", "the same correlation with shuffled pixels, a control"),
    Column("|u.v|", "alignment_weighted", ".2f", "of paired left and right singular vectors, weighted by s²"),
)
_SPREAD = "mean share of pixels that the {leading} leading vectors cover"
_NEAREST = "largest |correlation| of one of the {best} leading vectors with the nearest other training image"
_IMAGES = (
    Column("spread", "leading participation", ".2f", _SPREAD),
    Column("edges", "leading edges", ".2f", "their energy on edges of the image, over that of an even spread"),
    Column("nearest", "best nearest", ".2f", _NEAREST),
    Column("others", "best others", ".2f", "mean |correlation| of that vector with further training images, a control"),
)
_VECTORS = {
    "svd": "left singular vectors",
    "eigh": "eigenvectors of the symmetric part",
    "eig": "left eigenvectors",
    "eig-right": "right eigenvectors",
}


def jacobian_tables(comparison: JacobianComparison) -> list[Table]:
    """Returns the tables of the matrix (if it is known) and of its vectors; r_hom and r_lin are beside every vector."""
    topics: list[tuple[str, tuple[Column, ...]]] = []
    if "trace" in comparison.measured:
        topics.append((comparison.title, _MATRIX))
    head = "Its" if topics else f"{comparison.title}:"
    vectors = f"{head} {_VECTORS[comparison.first.config.decomposition]}"
    topics.append((f"{vectors}, their frequencies", (*_FREQUENCIES, *R_HOM_R_LIN)))
    topics.append((f"{vectors}, compared with images", (*_IMAGES, *R_HOM_R_LIN)))
    return [_table(comparison, caption, _shown(comparison, columns)) for caption, columns in topics]


def definitions(comparison: JacobianComparison) -> list[str]:
    """Returns the definition of each column of the tables, in their order."""
    matrix = _MATRIX if "trace" in comparison.measured else ()
    numbers = {"leading": min(LEADING, comparison.vectors), "best": min(BEST_OF, comparison.vectors)}
    return [
        f"{column.heading}: {column.meaning.format(**numbers)}"
        for column in _shown(comparison, (*matrix, *_FREQUENCIES, *_IMAGES, *R_HOM_R_LIN))
    ]


def _shown(comparison: JacobianComparison, columns: Sequence[Column]) -> list[Column]:
    """Returns the columns that some model has a number in; r_hom and r_lin always."""
    measured = set(comparison.measured)
    if comparison.vectors <= LEADING:
        measured.discard("harmonicity_leading")  # the same as `harmonicity`
    return [column for column in columns if column.value in measured or column in R_HOM_R_LIN]


def _table(comparison: JacobianComparison, caption: str, columns: Sequence[Column]) -> Table:
    rows = []
    for group in comparison.groups:
        for level, sigma in enumerate(comparison.levels):
            cells = [_text(group.mean(column.value, level), column.form) for column in columns]
            rows.append([group.label, group.n, f"{sigma:.3g}", *cells])
    return Table(["model", "N", "σ", *(column.heading for column in columns)], rows, caption)


def _text(value: float | None, form: str) -> str | None:
    """Returns a number as text; small ones of r_hom and r_lin with one digit, so that tables fit 80 columns."""
    if value is None:
        return None
    return format(value, ".0e" if form == ".2g" and 0 < abs(value) < 1e-3 else form)
