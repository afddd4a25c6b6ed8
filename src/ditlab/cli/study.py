"""`ditlab study list|run|status|report`: declared grids of trials, trained and measured one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ditlab.cli.console import Output, command_line
from ditlab.cli.jobs_display import jobs_display
from ditlab.cli.options import keywords
from ditlab.errors import DitlabError, InvalidConfig

if TYPE_CHECKING:
    from ditlab.studies.study import StudyResult


@dataclass(frozen=True)
class List:
    """Show the studies: their questions, scales, numbers of trials, and costs."""

    def run(self, output: Output) -> dict[str, Any]:
        """Prints a table."""
        from ditlab.pages.page import Table
        from ditlab.studies import study_list

        records = study_list()
        rows, before = [], ""
        for r in records:
            about = (r["study"], r["question"]) if r["study"] != before else ("", "")
            before = r["study"]
            rows.append((*about, r["scale"], r["cells"], r["cost"]))
        output.table(Table(("study", "question", "scale", "trials", "cost"), rows))
        return {"studies": records}


@dataclass(frozen=True)
class Run:
    """Train and measure every trial of a study that is not yet on record, as many at a time as fit.

    If it is interrupted or killed, the same command resumes. A trial that fails does not stop the others.
    """

    study: tyro.conf.Positional[str]
    """Its name, e.g. an2024/fig6."""
    scale: str = "small"
    """smoke (minutes), small (two CPU cores), or paper (the paper's own settings)."""
    data: tuple[str, ...] | None = None
    """Sources of images or image sets, instead of the scale's own."""
    size: int | None = None
    """Side of the images in pixels, instead of the scale's own."""
    network: tuple[str, ...] | None = None
    """Presets, instead of the scale's own."""
    attention: tuple[str, ...] | None = None
    """Names of the scale's attention plans, or plans, instead of all of the scale's own."""
    n: Annotated[tuple[int, ...] | None, tyro.conf.arg(aliases=["-n"])] = None
    """Numbers of training images, instead of the scale's own."""
    seeds: tuple[int, ...] | None = None
    """Seeds of split and training, instead of the scale's own."""
    steps: int | None = None
    """Training steps of each trial, instead of the scale's own."""
    set: tuple[str, ...] = ()
    """Other settings of all trials as NAME=VALUE, e.g. training.lr=1e-3 network.width=96."""
    out: Path = Path("studies")
    """The folder of trials, runs and pages; studies in one folder share their trials."""
    parallel: int | None = None
    """Processes at a time; as many as cores, free memory and GPUs allow if not given."""
    plan: bool = False
    """Only check everything and show the table; plan.json is written if there is none yet."""
    device: str | None = None
    """cpu, cuda (all GPUs) or cuda:N; CUDA if there is one."""

    def run(self, output: Output) -> dict[str, Any]:
        """Checks, plans, trains and measures."""
        from ditlab import api

        flags = keywords(self)
        name, settings = flags.pop("study"), dict(_setting(text) for text in flags.pop("set"))
        command = command_line("study run").replace(" --plan", "")
        with jobs_display(output) as show:
            result = api.study(name, **flags, settings=settings, command=command, show=show, reporter=output.reporter)
        printed = _print_status(result, output)
        if result.failed:
            first = result.failed[0]
            raise DitlabError(
                f"study {result.study.name}: {len(result.failed)} of {len(result.plan.trials)} trials failed (first: "
                f"{first.name}: {first.reason}); the same command tries them again"
            )
        return printed


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidConfig(f"study run: expected `set` with NAME=VALUE, found '{text}'")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _print_status(result: StudyResult, output: Output) -> dict[str, Any]:
    """Prints the table of the trials and why some failed; returns the status as JSON values."""
    output.table(result.table())
    status = result.to_json()
    for trial in status["cells"]:
        if "command" in trial:
            output.line(f"{trial['hash'][:8]} failed: {trial['note']}")
            if trial["command"]:
                output.line(f"  to repeat it: {trial['command']}")
    return status


@dataclass(frozen=True)
class Status:
    """Show how far each trial of a study is."""

    study: tyro.conf.Positional[str]
    """Its name, e.g. an2024/fig6."""
    scale: str = "small"
    """smoke, small or paper."""
    out: Path = Path("studies")
    """The folder of trials, runs and pages."""

    def run(self, output: Output) -> dict[str, Any]:
        """Prints a table."""
        from ditlab.studies import open_study

        return _print_status(open_study(self.study, self.scale, out=self.out), output)
