"""Studies: declared grids of trials, trained and measured one by one, beside the published numbers.

`ditlab.study(...)` runs one; `study_list`, `open_study` and `study_report` show what there is. A study of one's own is
a `Study` with its scales (`ditlab.studies.grid`).
"""

from __future__ import annotations

from typing import Any

__all__ = ["open_study", "run_study", "study_list", "study_report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ditlab.studies import study

        return getattr(study, name)
    raise AttributeError(f"module 'ditlab.studies' has no attribute '{name}'")
