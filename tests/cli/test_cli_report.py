"""`ditlab report`: its flags, what it prints, and what it refuses. tests/reporting has the page itself."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest

from ditlab import api
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.reporting import report


@pytest.fixture
def quick(monkeypatch):
    """Measured in a moment; the other analyses have tests of their own."""
    few = {"psnr-gap": PSNRConfig(images=10, points=3)}
    monkeypatch.setattr(api, "report", partial(api.report, configs=few))
    monkeypatch.setattr(report, "analysis_names", lambda: ("samples", "psnr-gap", "trajectory"))


@pytest.mark.slow
def test_the_page_stands_where_it_was_asked_for(ditlab, place, quick, tmp_path):
    run = place.copy(place.trained("plain"))
    out = tmp_path / "page" / "report.html"
    words = ("--samples", 2, "--title", "My run", "--names", "mine", "--out", out, "--threads", 1)
    done = ditlab("report", run, *words, "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert record["report"] == str(out)
    page = out.read_text(encoding="utf-8")
    assert "<h1>My run</h1>" in page
    assert "this page" in page
    assert "--title &#39;My run&#39;" in page
    assert record["sentences"][0].startswith("mine")
    assert {"samples.png", "psnr-curves.png"} <= {path.name for path in (out.parent / "figures").iterdir()}


@pytest.mark.slow
def test_without_flags_it_stands_beside_the_first_run(ditlab, place, quick):
    run = place.copy(place.trained("plain"))
    done = ditlab("report", run, "--samples", 0, "--hide-training-images")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[-1] == f"wrote {run / 'report.html'}"
    assert "dB" in lines[-2]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="([^"]+)">', page)[0] == "psnr"


def test_too_many_samples(refused, plain):
    assert "report: --samples must be from 0 to 64, found 65" in refused("report", plain, "--samples", 65)


def test_a_run_that_is_not_there(refused, tmp_path):
    assert "expected" in refused("report", tmp_path / "nowhere")
