"""What `import ditlab` offers: one function for each verb of the command line, with the same settings.

Functions take models or the strings that name them, return objects that show themselves in a notebook, print nothing,
and raise `DitlabError` for input that cannot be used.
"""

from __future__ import annotations

from ditlab.api.making import encode, prepare, train
from ditlab.api.measuring import (
    agreement,
    analyze,
    attention,
    complexity,
    jacobian,
    open,
    psnr_gap,
    report,
    sample,
    swap_gap,
    two_subsets,
)
from ditlab.api.studying import convert, quickstart, study

__all__ = [
    "agreement",
    "analyze",
    "attention",
    "complexity",
    "convert",
    "encode",
    "jacobian",
    "open",
    "prepare",
    "psnr_gap",
    "quickstart",
    "report",
    "sample",
    "study",
    "swap_gap",
    "train",
    "two_subsets",
]
