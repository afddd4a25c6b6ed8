"""`ditlab complexity`: what networks cost, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditlab.analyses.complexity.config import ComplexityConfig
from ditlab.cli.console import Output
from ditlab.cli.options import keywords


@dataclass(frozen=True)
class ComplexityOf:
    """Show what networks cost: parameters, operations, memory for the backward pass, training compute.

    Only shapes are computed, so the largest network takes seconds on any machine. GMACs are 10^9 multiply-accumulates
    of a forward pass for one image; Peebles & Xie call them Gflops. Training compute is GMACs x batch size x steps x 3.
    """

    presets: tyro.conf.Positional[tuple[str, ...]]
    """One or several presets, e.g. dit-s/2 dit-xl/2."""
    settings: Annotated[ComplexityConfig, tyro.conf.arg(name="")] = field(default_factory=ComplexityConfig)
    """Images, and changes of the networks."""
    out: Path | None = None
    """A folder for complexity.json and complexity.png; nothing is written if not given."""

    def run(self, output: Output) -> dict[str, Any]:
        """Counts, prints a table, and writes it if asked to."""
        from ditlab import api

        costs = api.complexity(**keywords(self))
        output.table(costs.table())
        for line in (costs.legend(), *costs.sentences()):
            output.line(line)
        output.wrote(costs.files)
        files = {"files": [str(path) for path in costs.files]} if costs.files else {}
        return {**costs.to_json(), **files}
