"""`ditlab report`: what is on the page, what is measured only once, and what stays hidden."""

from __future__ import annotations

import base64
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditlab.analysis.attention_maps import AttentionConfig
from ditlab.analysis.psnr import PSNRConfig
from ditlab.cli import looking, report, reporting
from ditlab.cli.report import write_report
from ditlab.report import page as page_module
from ditlab.report import sample_figures
from ditlab.report.page import PAGE_BYTES, Picture
from ditlab.report.style import LIGHT
from ditlab.run import Run

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


@pytest.fixture
def quick(monkeypatch):
    """Measured in a moment."""
    few = partial(write_report, settings=PSNRConfig(images=10, points=3), attention=AttentionConfig(images=4))
    monkeypatch.setattr(report, "write_report", few)


def unrendered(drawing, alt: str, caption: str, **_) -> Picture:
    """Puts a figure together but does not render it, which takes most of a report's time."""
    drawing(LIGHT)
    return Picture(PIXEL, PIXEL, alt, caption)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(Picture, "draw", unrendered)


@pytest.fixture
def runs(place) -> list[Path]:
    """Two kinds at two N, copied, for a report writes into their folders."""
    made = [place.trained("plain"), place.trained("local", "--network.attention", "3,3")]
    made += [place.trained("ten", "--n", "10"), place.trained("ten-local", "--network.attention", "3,3", "--n", "10")]
    return [place.copy(run) for run in made]


def pickers(page: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)]


def picture(picker: dict[str, Any]) -> np.ndarray:
    """The picker's image, uint8 [H, W, 3]."""
    return np.frombuffer(base64.b64decode(picker["image"]), np.uint8).reshape(*picker["size"], 3)


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)">', page)


@pytest.mark.slow
def test_everything_is_on_the_page_and_measured_once(ditlab, runs, quick, tmp_path, monkeypatch):
    out = tmp_path / "page" / "report.html"
    done = ditlab("report", *runs, "--samples", 3, "--out", out, "--json")
    assert done.status == 0, done.err
    page = out.read_text(encoding="utf-8")
    assert out.stat().st_size < PAGE_BYTES
    top = ["settings", "samples", "psnr", "gap", "training", "matched", "matched-0", "matched-1", "attention"]
    assert sections(page) == [*top, "locality", "commands", "environment"]
    found = pickers(page)
    assert [[run["label"] for run in one["runs"]] for one in found] == [["global", "3,3"]] * 2
    first = Run.open(runs[0]).pictures("test", 1)[0]
    held_out = np.rint((first[0, 0].numpy() + 1) * 127.5).astype(np.uint8)
    for one in found:
        assert (picture(one) == held_out[..., None]).all()
        assert len(one["levels"]) == 3
        assert [layer["pattern"] for layer in one["runs"][1]["layers"]] == ["window 3", "window 3"]
        assert len(one["runs"][0]["maps"]) == 3 * 2 * (2 + 1)
    figures = {p.name for p in (tmp_path / "page" / "figures").iterdir()}
    along = {f"{name}-n{n}.png" for name in ("gap-along-training", "matched-psnr", "losses") for n in (10, 20)}
    attention = {"attention-maps.png", "attention-locality-1.png", "attention-locality-by-n-1.png"}
    assert figures == {"samples.png", "psnr-curves.png", "gap-bars.png", *along, *attention}
    links = dict(re.findall(r'download="([^"]+)" href="data:application/json;base64,([^"]+)"', page))
    kinds = {json.loads(base64.b64decode(content)).get("kind") for name, content in links.items() if "log" not in name}
    assert kinds == {
        *("nearest", "psnr-gap", "psnr-comparison", "matched-comparison", "attention-locality", "locality-comparison")
    }
    assert {"global-n20-log.json", "3,3-n10-log.json"} <= set(links)
    assert all(f"train {run.name}" in page for run in runs)
    assert "this page" in page
    assert all("N = " in sentence for sentence in json.loads(done.out)["sentences"])
    kept = [run / "analysis" / name for run in runs for name in ("psnr-gap.json", "attention.json")]
    before = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(Picture, "draw", unrendered)
    assert ditlab("report", *runs, "--samples", 0, "--out", out).status == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert "samples" not in sections(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_attention_of_other_images_or_weights_is_measured_again(ditlab, runs, quick, undrawn, tmp_path):
    out = tmp_path / "report.html"
    words = ["report", runs[0], "--samples", 0, "--out", out]
    assert ditlab(*words).status == 0
    kept = runs[0] / "analysis" / "attention.json"
    right = json.loads(kept.read_text())
    for change in ({"step": 4}, {"settings": {"images_from": "train"}}):
        record = {**right, "about": {**right["about"], **change}}
        record["values"] = {**right["values"], "distance": (2 * np.array(right["values"]["distance"])).tolist()}
        kept.write_text(json.dumps(record))
        assert ditlab(*words).status == 0
        assert json.loads(kept.read_text())["values"] == right["values"], change


@pytest.mark.slow
def test_no_real_image_is_shown_where_it_may_not_be(ditlab, runs, quick, undrawn, tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a picture of a training image was asked for")

    monkeypatch.setattr(reporting.Drawn, "pictures", property(forbidden))
    out = tmp_path / "report.html"
    done = ditlab("report", *runs[:2], "--samples", 3, "--hide-training-images", "--out", out)
    assert done.status == 0, done.err
    page = out.read_text(encoding="utf-8")
    (one,) = pickers(page)
    images = Run.open(runs[0]).images.array
    assert not (images[:, 0] == picture(one)[..., 0]).all((1, 2)).any()
    assert "the first held-out image" not in page
    assert "a sample drawn by" in page
    assert "no real image is shown" in page


@pytest.mark.slow
def test_copies_of_training_images_are_hidden_too(ditlab, runs, quick, undrawn, tmp_path, monkeypatch):
    """A run that memorized draws its training images: its samples are real images."""
    run = Run.open(runs[0])
    replayed = run.images.take(run.split.train[:3])
    monkeypatch.setattr(report, "draw", lambda *_, **__: replayed)
    shown = []
    drawing = sample_figures.samples_with_nearest
    monkeypatch.setattr(
        sample_figures, "samples_with_nearest", lambda rows, **k: shown.extend(rows) or drawing(rows, **k)
    )
    out = tmp_path / "report.html"
    done = ditlab("report", runs[0], "--samples", 3, "--hide-training-images", "--out", out)
    assert done.status == 0, done.err
    assert shown
    assert all((row.samples == 127).all() for row in shown)
    page = out.read_text(encoding="utf-8")
    assert pickers(page) == []
    assert "No image may be shown here" in page
    assert "attention" in sections(page)
    assert "3 of 3 are copies" in base64.b64decode(re.findall(r'nearest.json" href="[^,]+,([^"]+)"', page)[0]).decode()


def test_near_copies_are_hidden_too(runs):
    """A training image with some noise on it shows that image, also where a duplicate hides it from the ratio."""
    run = Run.open(runs[0])
    train = run.images.take(run.split.train)
    rng = np.random.default_rng(0)
    noisy = np.clip(train[:2] + rng.normal(0, 8, train[:2].shape), 0, 255).astype(np.uint8)
    far = rng.integers(0, 256, (2, *train.shape[1:]), np.uint8)
    drawn = reporting.Drawn.of(run, "a", np.concatenate([train[:2], noisy, far]))
    assert drawn.telling.tolist() == [True] * 4 + [False] * 2
    drawn.nearest.samples.second[2:4] = drawn.nearest.samples.first[2:4] * 1.5  # as with a duplicate
    assert not drawn.nearest.samples.copied[2:4].any()
    assert drawn.telling.tolist() == [True] * 4 + [False] * 2


@pytest.mark.slow
def test_a_run_without_attention_has_no_such_sections(ditlab, runs, quick, undrawn, tmp_path, monkeypatch):
    monkeypatch.setattr(looking, "attention_modules", lambda network: [])
    out = tmp_path / "report.html"
    done = ditlab("report", runs[0], "--samples", 0, "--out", out)
    assert done.status == 0, done.err
    assert not {"attention", "locality"} & set(sections(out.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_a_page_that_would_be_too_large_leaves_files_and_maps_out(ditlab, runs, quick, undrawn, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    assert ditlab("report", runs[0], "--samples", 0, "--out", out).status == 0
    whole = out.read_text(encoding="utf-8")
    assert "the folders of the runs" not in whole
    monkeypatch.setattr(page_module, "PAGE_BYTES", 30_000)
    assert ditlab("report", runs[0], "--samples", 0, "--out", out).status == 0
    small = out.read_text(encoding="utf-8")
    assert len(small) < len(whole)
    assert "they lie in the folders of the runs" in small
    assert sum(len(one["runs"][0]["maps"]) for one in pickers(small)) == 1


def test_too_many_samples(refused, plain):
    assert "expected at most 64, found 65" in refused("report", plain, "--samples", 65)
