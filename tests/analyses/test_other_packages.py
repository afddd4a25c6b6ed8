"""Packages of others add analyses by the entry-point group `ditlab.analyses`: help, verb, JSON, cache, section."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import ditlab
from ditlab import analyses
from ditlab.cli.main import _AFTER, _BEFORE, _help

ROOM = '''
"""How bright are a model's training images?"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from ditlab.analyses.base import Analysis
from ditlab.files import read_json, write_json
from ditlab.provenance import Provenance


@dataclass(frozen=True)
class BrightnessConfig:
    images: int = 10
    """How many of the first training images."""


@dataclass(frozen=True)
class BrightnessResult:
    about: Provenance
    config: BrightnessConfig
    mean: float
    kind: ClassVar[str] = "brightness"
    version: ClassVar[int] = 1

    def to_json(self):
        return {"kind": self.kind, "version": self.version, **asdict(self)}

    def save(self, folder, name):
        return write_json(Path(folder) / f"{name}.json", self.to_json())

    @classmethod
    def load(cls, path):
        record = read_json(path, cls.kind, cls.version)
        return cls(Provenance(**record["about"]), BrightnessConfig(**record["config"]), record["mean"])


class Brightness(Analysis[BrightnessConfig, object]):
    """Measures the mean of a model's training images."""

    name = "brightness"
    question = "How bright are the training images?"
    Config = BrightnessConfig
    Result = "toy_brightness:BrightnessResult"
    report = "measure"

    def measure(self, models, config, options, reporter=None):
        def one(opened):
            images, _ = opened.model.batch("train", config.images)
            return BrightnessResult(opened.provenance, config, float(images.mean()))

        return [self.cached(opened, config, lambda opened=opened: one(opened)) for opened in models.open()]

    def compare(self, results):
        return list(results)

    def sentences(self, comparison):
        return [f"{r.about.name} has a mean of {r.mean:.3f}." for r in comparison.results]

    def tables(self, comparison):
        from ditlab.pages.page import Table

        return [Table(("model", "mean"), [(r.about.name, r.mean) for r in comparison.results])]

    def to_json(self, comparison):
        return {"means": [r.mean for r in comparison.results]}
'''


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder with the toy package, installed by pip from a wheel."""
    wheel, site = tmp_path / "toy_brightness-1.0-py3-none-any.whl", tmp_path / "site"
    info = "toy_brightness-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("toy_brightness.py", ROOM)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-brightness\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/entry_points.txt", "[ditlab.analyses]\nbrightness = toy_brightness:Brightness\n")
        file.writestr(f"{info}/RECORD", "")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True, capture_output=True, timeout=120)
    return site


@pytest.mark.slow
def test_an_analysis_of_another_package(installed, tmp_path, monkeypatch, in_process):
    """In a process of its own for the help texts, then in this one, with the package on its path."""
    paths = [str(installed), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def help_of(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ditlab", *words, "--help"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.split())

    assert "brightness" in help_of()
    assert "How many of the first training images." in help_of("brightness")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(installed))
    analyses._places.cache_clear()
    try:
        images = ditlab.prepare("photos", size=8, out="sets/photos")
        ditlab.train("dit-nano/2", images, n=20, test=20, steps=2, out="runs/a")
        printed = in_process("brightness", "runs/a", "--images", 5, "--json")
        assert printed.status == 0, printed.err
        (mean,) = json.loads(printed.out)["means"]
        record = json.loads((tmp_path / "runs/a/analysis/brightness.json").read_text())
        assert record["mean"] == mean
        assert record["config"] == {"images": 5}
        ditlab.report("runs/a", samples=0)
    finally:
        analyses._places.cache_clear()
    page = (tmp_path / "runs/a/report.html").read_text()
    assert 'id="brightness"' in page
    assert "How bright are the training images?" in page
    assert "a has a mean of" in page


def test_analyses_of_others_that_cannot_be_used_are_named(monkeypatch):
    """One lacks a package, two have names that are taken; help and reports work as if they were not there."""
    points = [
        EntryPoint("broken", "no_such_module:Room", "ditlab.analyses"),
        EntryPoint("psnr-gap", "toy:Room", "ditlab.analyses"),
        EntryPoint("train", "toy:Room", "ditlab.analyses"),
    ]
    monkeypatch.setattr(analyses, "entry_points", lambda group: points)
    analyses._places.cache_clear()
    try:
        assert analyses.analysis_names() == tuple(analyses.ROOMS)
        page = " ".join(_help().split())
        assert "note: analysis 'broken' of no_such_module:Room is not used: ModuleNotFoundError: No module" in page
        assert "note: analysis 'psnr-gap' of toy:Room is not used: ditlab or another package has this name" in page
        assert "note: analysis 'train' of toy:Room is not used" in page
    finally:
        analyses._places.cache_clear()


def test_the_words_of_the_command_line_are_taken():
    assert {verb.split()[0] for verb in _BEFORE | _AFTER} | {"help"} == analyses.TAKEN
