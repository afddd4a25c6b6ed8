"""Pins of small runs: config.json, the log, results, figures, sections of the report, and what --json prints."""

from __future__ import annotations

import json
import re

import pytest

RUNS = ("global", "local", "other", "classes")
RESULTS = (
    "runs/global/analysis/psnr-gap.json",
    "runs/local/analysis/psnr-gap.json",
    "runs/global/analysis/attention.json",
    "runs/local/analysis/attention.json",
    "runs/global/analysis/jacobian.json",
    "runs/local/analysis/jacobian.json",
    "runs/global/analysis/agreement.json",
    "runs/global/analysis/two-subsets.json",
    "gaps/comparison.json",
    "gaps/wiener-n20.json",
    "gaps/empirical-bayes-n20.json",
    "maps/attention-comparison.json",
    "directions/jacobian-comparison.json",
    "costs/complexity.json",
)

pytestmark = pytest.mark.slow


def test_configs(small, pins):
    records = {run: json.loads((small.folder / "runs" / run / "config.json").read_text()) for run in RUNS}
    pins.check("configs", {run: pins.shape(record) for run, record in records.items()})


@pytest.mark.parametrize("run", RUNS)
def test_log(small, pins, run):
    lines = [json.loads(line) for line in (small.folder / "runs" / run / "log.jsonl").read_text().splitlines()]
    pins.check("log", [{"step": line["step"], "keys": sorted(line)} for line in lines])


def test_results(small, pins):
    records = {path: json.loads((small.folder / path).read_text()) for path in RESULTS}
    assert all({"kind", "version"} <= record.keys() for path, record in records.items() if path != RESULTS[-1])
    pins.check("results", {path: pins.shape(record) for path, record in records.items()})


@pytest.mark.parametrize("path", [path for path in RESULTS if "/analysis/" in path])
def test_result_loads(small, pins, path):
    record = json.loads((small.folder / path).read_text())
    assert pins.load_result(small.folder / path) == record


def test_arrays(small, pins):
    paths = sorted(small.folder.rglob("*.npz"))
    names = [pins.set_aside(path.relative_to(small.folder).as_posix()) for path in paths]
    pins.check("arrays", {name: pins.arrays(path) for name, path in zip(names, paths, strict=True)})


def test_table(small, pins):
    head, *lines = (small.folder / "runs/global/analysis/psnr-gap.csv").read_text().splitlines()
    pins.check("table", {"head": head, "lines": len(lines)})


def test_samples(small, pins):
    paths = [*small.folder.glob("runs/global/samples/*/samples.json"), small.folder / "sweep" / "samples.json"]
    records = {path.parent.relative_to(small.folder).as_posix(): json.loads(path.read_text()) for path in paths}
    pins.check("samples", {folder: pins.shape(record) for folder, record in records.items()})


def test_files(small, pins):
    """Every file that the verbs leave, figures among them."""
    pins.check("files", pins.files(small.folder))


@pytest.mark.parametrize("page", ["two", "one"])
def test_report(small, pins, page):
    text = (small.folder / page / "report.html").read_text(encoding="utf-8")
    figures = pins.files(small.folder / page / "figures")
    downloads = sorted(set(re.findall(r'download="([^"]+)"', text)))
    sections = re.findall(r'<section id="([^"]+)"', text)
    pins.check(f"report-{page}", {"sections": sections, "figures": figures, "downloads": downloads})


def test_printed(small, pins):
    """What --json prints, verb by verb."""
    shapes = {name: pins.shape(value) for name, value in small.printed.items()}
    assert len(shapes["data-encode"].pop("hash")[0]) == 64  # of latents, which the machine's floats decide
    pins.check("printed", shapes)
