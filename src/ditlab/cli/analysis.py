"""The verbs of analyses, each made from the settings and options of its room."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditlab.cli.console import Output
from ditlab.cli.options import ComputeFlags, ComputeOptions, ModelFlags, ModelOptions, Models, keywords


def verb_of(analysis: Any) -> type[Any]:
    """Returns the dataclass of an analysis's verb: models, settings, options, and the flags that all verbs share."""

    def run(self: Any, output: Output) -> dict[str, Any]:
        from ditlab import api

        comparison = api.analyze(analysis.name, **keywords(self), reporter=output.reporter)
        for table in comparison.tables():
            output.table(table)
        if legend := analysis.legend(comparison):
            output.line(legend)
        for sentence in comparison.sentences():
            output.line(sentence)
        for note in comparison.notes:
            output.note(note)
        output.wrote(comparison.files)
        return {**comparison.to_json(), "files": [str(file) for file in comparison.files]}

    settings = Annotated[analysis.Config, tyro.conf.arg(name="")]
    options = Annotated[analysis.Options, tyro.conf.arg(name="")]
    out_help = (
        "The folder for figures and the comparison; the first model's analysis folder if not given. Results of models "
        "without a folder of their own also go there, each under its name."
    )
    made = make_dataclass(
        "Verb",
        [
            ("models", Models),
            ("settings", settings, field(default_factory=analysis.Config)),
            ("options", options, field(default_factory=analysis.Options)),
            ("out", Annotated[Path | None, tyro.conf.arg(help=out_help)], field(default=None)),
            ("model", ModelOptions, field(default_factory=ModelFlags)),
            ("compute", ComputeOptions, field(default_factory=ComputeFlags)),
        ],
        frozen=True,
        namespace={"run": run},
    )
    made.__doc__ = type(analysis).__doc__
    return made
