"""Small trained runs for reports, and a quick way to draw pages."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ditlab
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.data.imageset import ImageSet
from ditlab.models.comparing import open_models
from ditlab.pages.page import ThemedFigure
from ditlab.pages.theme import LIGHT
from ditlab.reporting import report
from ditlab.reporting.report import ReportResult, write_report

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
ROOMS = ("samples", "psnr-gap", "trajectory", "scaling")
"""The analyses that are measured here: the others have tests of their own."""


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> ImageSet:
    """Digits of 8x8 pixels."""
    return ditlab.prepare("digits", size=8, out=tmp_path_factory.mktemp("sets") / "digits")


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory) -> Callable[..., Path]:
    """`trained("local", attention="3,3")` is the folder of a run of six steps; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "n": 20,
            "test": 20,
            "width": 16,
            "heads": 2,
            "depth": 2,
            "steps": 6,
            "batch_size": 8,
            "log_every": 2,
            "eval_every": 3,
            "save_every": 6,
            "evaluation.images": 4,
            "evaluation.levels": 2,
        }
        if not (folder / name).exists():
            ditlab.train("dit-nano/1", images, out=folder / name, **{**settings, **changes})
        return folder / name

    return train


@pytest.fixture
def copied(tmp_path_factory) -> Callable[..., Path]:
    """`copied(run)` is a copy of a run, at the same distance from its image set, that a report may write into."""
    return lambda run: shutil.copytree(run, tmp_path_factory.mktemp("copies") / run.name)


@pytest.fixture
def runs(trained, copied) -> list[Path]:
    """Two kinds at two N."""
    made = [trained("global"), trained("local", attention="3,3")]
    made += [trained("ten", n=10), trained("ten-local", n=10, attention="3,3")]
    return [copied(run) for run in made]


def _unrendered(drawing, alt: str, caption: str = "", **_) -> ThemedFigure:
    """Puts a figure together but does not render it, which takes most of a report's time."""
    drawing(LIGHT)
    return ThemedFigure(PIXEL, PIXEL, alt, caption)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    monkeypatch.setattr(ThemedFigure, "draw", _unrendered)


@pytest.fixture
def write(monkeypatch, tmp_path) -> Callable[..., ReportResult]:
    """`write(runs, samples=3)` writes tmp_path/report.html, measured in a moment."""
    monkeypatch.setattr(report, "analysis_names", lambda: ROOMS)
    configs = {"psnr-gap": PSNRConfig(images=10, points=3)}

    def make(models: list[Any], *, data: Any = None, split: Any = None, **settings: Any) -> ReportResult:
        opened = open_models(models, data, split=split, out=tmp_path)
        return write_report(opened, tmp_path / "report.html", configs=configs, **{"samples": 0, **settings})

    return make
