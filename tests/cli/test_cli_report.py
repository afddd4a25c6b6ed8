"""`ditlab report`: what is on the page, what is measured only once, and what stays hidden."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ditlab.cli.drawing import draw, sampler_config
from PIL import Image
from rich.console import Console

from ditlab.analyses.attention import map_figures as attention_figures
from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.samples import figures as sample_figures
from ditlab.cli import looking, report, reporting
from ditlab.cli.report import write_report
from ditlab.data.pixels import to_float
from ditlab.models.run import Run
from ditlab.pages import page as page_module
from ditlab.pages import token_picker as picker_module
from ditlab.pages.page import PAGE_BYTES, ThemedFigure
from ditlab.pages.theme import LIGHT

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


@pytest.fixture
def quick(monkeypatch):
    """Measured in a moment."""
    few = partial(write_report, settings=PSNRConfig(images=10, points=3), attention=AttentionConfig(images=4))
    monkeypatch.setattr(report, "write_report", few)


def unrendered(drawing, alt: str, caption: str, **_) -> ThemedFigure:
    """Puts a figure together but does not render it, which takes most of a report's time."""
    drawing(LIGHT)
    return ThemedFigure(PIXEL, PIXEL, alt, caption)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(ThemedFigure, "draw", unrendered)


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
    assert all(re.fullmatch(reporting.FIGURES, name.removesuffix(".png")) for name in figures)
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
    monkeypatch.setattr(ThemedFigure, "draw", unrendered)
    assert ditlab("report", *runs, "--samples", 0, "--out", out).status == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert "samples" not in sections(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_what_was_measured_otherwise_is_measured_beside_it(ditlab, runs, quick, undrawn, tmp_path):
    """Other weights, images or settings: not used, and not overwritten, for a user has measured them on purpose."""
    out, folder = tmp_path / "report.html", runs[0] / "analysis"
    words = ["report", runs[0], "--samples", 0, "--out", out]
    assert ditlab(*words).status == 0
    assert {p.name for p in folder.glob("*.json")} == {"psnr-gap.json", "attention.json"}
    ways = {
        "attention": [{"about": {"step": 4}}, {"about": {"settings": {"images_from": "train"}}}],
        "psnr-gap": [{"about": {"ema": False}}, {"config": {"images": 5}}],
    }
    for name, changes in ways.items():
        kept, own = folder / f"{name}.json", folder / f"report-{name}.json"
        right = json.loads(kept.read_text())
        for change in changes:
            record = {**right, **{part: {**right[part], **values} for part, values in change.items()}}
            kept.write_text(json.dumps(record))
            beside = {p.name: p.read_bytes() for p in folder.glob(f"{name}*")}
            assert ditlab(*words).status == 0
            assert {p.name: p.read_bytes() for p in folder.glob(f"{name}*")} == beside, change
            again = json.loads(own.read_text())
            assert again == right, change
            before = own.stat().st_mtime_ns
            assert ditlab(*words).status == 0
            assert own.stat().st_mtime_ns == before, change
            own.unlink()


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
    replayed = run.images.batch(run.split.train[:3])
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
    drawn = reporting.Drawn.of(run, "a", to_float(torch.from_numpy(np.concatenate([train[:2], noisy, far]))))
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


def noise_picture(side: int) -> ThemedFigure:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return ThemedFigure(buffer.getvalue(), buffer.getvalue(), "a", "b")


@pytest.mark.slow
def test_a_page_that_would_be_too_large_is_made_smaller(ditlab, runs, quick, tmp_path, monkeypatch):
    """With figures of real size: first files go, then figures lose colours and resolution, then pickers."""
    monkeypatch.setattr(ThemedFigure, "draw", lambda *_, **__: noise_picture(300))
    out = tmp_path / "report.html"
    words = ("report", runs[0], "--samples", 0, "--out", out)
    assert ditlab(*words).status == 0
    whole = out.read_text(encoding="utf-8")
    assert "they lie beside the results" not in whole
    assert len(pickers(whole)) == 1
    monkeypatch.setattr(reporting, "ROOM", 60_000)
    for limit, budget, kept in ((500_000, 100_000, 1), (130_000, 10_000, 0)):
        monkeypatch.setattr(page_module, "PAGE_BYTES", limit)
        monkeypatch.setattr(picker_module, "BUDGET", budget)
        done = ditlab(*words)
        assert done.status == 0, done.err
        small = out.read_text(encoding="utf-8")
        assert out.stat().st_size <= limit
        assert "they lie beside the results" in small
        assert len(pickers(small)) == kept, limit
        assert ("leaves no room for a token picker" in small) == (not kept)
    monkeypatch.setattr(page_module, "PAGE_BYTES", 20_000)
    done = ditlab(*words)
    assert done.status == 2
    assert "expected a page of at most 20,000 bytes" in done.err
    assert out.read_text(encoding="utf-8") == small


@pytest.mark.slow
def test_figures_of_an_earlier_report_do_not_stay(ditlab, runs, quick, undrawn, tmp_path):
    """They may show real images, which a report that hides them must not leave beside it."""
    out, folder = tmp_path / "report.html", tmp_path / "figures"
    assert ditlab("report", *runs[:2], "--samples", 2, "--out", out).status == 0
    assert (folder / "samples.png").is_file()
    (folder / "mine.png").write_bytes(PIXEL)
    (folder / "losses-n300.png").write_bytes(PIXEL)
    words = ("report", runs[0], "--samples", 0, "--hide-training-images", "--out", out)
    assert ditlab(*words).status == 0
    left = {path.name for path in folder.iterdir()}
    assert left == {
        *("mine.png", "psnr-curves.png", "gap-bars.png", "gap-along-training.png", "matched-psnr.png", "losses.png"),
        "attention-locality-1.png",
    }


@pytest.mark.slow
def test_runs_whose_folders_have_one_name_stay_apart(ditlab, place, quick, undrawn, tmp_path):
    made = [place.trained("plain"), place.trained("local", "--network.attention", "3,3")]
    images = Run.open(made[0]).images.path
    folders = [shutil.copytree(run, tmp_path / f"seed{i}" / "run") for i, run in enumerate(made)]
    out = tmp_path / "report.html"
    words = ("--data", images, "--samples", 3, "--hide-training-images", "--out", out)
    done = ditlab("report", *folders, *words)
    assert done.status == 0, done.err
    page = out.read_text(encoding="utf-8")
    names = re.findall(r'download="([^"]+)"', page)
    for kind in ("nearest", "psnr-gap", "attention"):
        assert {f"seed0-run-{kind}.json", f"seed1-run-{kind}.json"} <= set(names)
    assert all(f"train seed{i}-run" in page for i in (0, 1))
    links = dict(re.findall(r'download="([^"]+)" href="data:application/json;base64,([^"]+)"', page))
    plans = [
        json.loads(base64.b64decode(links[f"seed{i}-run-attention.json"]))["about"]["settings"]["attention"]
        for i in (0, 1)
    ]
    assert plans[0] != plans[1]
    assert "a sample drawn by seed0-run" in page
    # The picture is the first run's own sample.
    run = Run.open(folders[0], images)
    shown = reporting.Drawn.of(run, "a", draw(run.denoiser(), sampler_config(run), range(3)))
    (one,) = pickers(page)
    assert (picture(one) == shown.images[~shown.telling][0].transpose(1, 2, 0)).all()


def asked_labels(monkeypatch) -> list[Any]:
    asked, seen = [], looking.attention_maps

    def maps(*given, **named):
        asked.append(named["label"])
        return seen(*given, **named)

    monkeypatch.setattr(looking, "attention_maps", maps)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("hide", [False, True])
def test_a_run_without_a_null_class_sees_the_images_own_class(
    ditlab, place, quick, undrawn, tmp_path, monkeypatch, hide
):
    conditional = ("--network.num-classes", 10, "--network.no-null-class", "--objective.label-dropout", 0)
    path = place.copy(place.trained("all-classes", *conditional))
    asked, drawn = asked_labels(monkeypatch), []
    making = reporting.Drawn.of
    monkeypatch.setattr(reporting.Drawn, "of", lambda *a, **k: drawn.append(making(*a, **k)) or drawn[-1])
    words = ("--samples", 12, *(["--hide-training-images"] if hide else []))
    done = ditlab("report", path, *words, "--out", tmp_path / "report.html")
    assert done.status == 0, done.err
    run = Run.open(path)
    assert drawn[0].classes.tolist() == [i % 10 for i in range(12)]
    assert run.images.labels is not None
    right = drawn[0].classes[~drawn[0].telling][0] if hide else run.images.labels[run.split.test[0]]
    assert asked
    assert {int(label) for label in asked} == {int(right)}


def test_maps_are_made_only_of_what_the_figure_shows(runs, monkeypatch):
    """Of at most `ROWS` runs, and of those layers alone."""
    console = Console(quiet=True)
    opened = [Run.open(path) for path in runs]
    looks = looking.look_at(opened, ["a", "b"] * 2, AttentionConfig(images=2), console)
    asked, seen = [], looking.attention_maps

    def maps(denoiser, *given, layers, **named):
        asked.append(list(layers))
        return seen(denoiser, *given, layers=layers, **named)

    monkeypatch.setattr(looking, "attention_maps", maps)
    monkeypatch.setattr(looking, "ROWS", 3)
    monkeypatch.setattr(attention_figures, "layers_shown", lambda layers: layers[-1:])
    rows = looking.map_rows(looks, {}, hide_real_images=False)
    assert rows is not None
    assert asked == [[2]] * 3
    assert [sorted(seen.maps) for _, seen in rows.maps] == [[2]] * 3
    assert rows.layers == [2]


def test_pickers_keep_to_their_room_with_their_images(runs):
    opened = [Run.open(path) for path in runs]
    looks = looking.look_at(opened, ["a", "b"] * 2, AttentionConfig(images=2), Console(quiet=True))

    def made(budget: int) -> tuple[list[Any], int]:
        found = looking.pickers(looks, {}, budget, hide_real_images=False)
        return found, sum(len(json.dumps(one.payload({}), separators=(",", ":"))) for one in found)

    whole, size = made(4_000_000)
    assert len(whole) == 2
    assert not any(one.notes for one in whole)
    for budget in (size // 2, size // 4, 25_000, 5_000, 0):
        found, taken = made(budget)
        assert taken <= budget
        assert len(found) == (2 if budget > 60_000 else len(found))
    one, _ = made(20_000)
    assert len(one) == 1
    assert one[0].notes == ["1 more picker found no room on the page."]


def test_too_many_samples(refused, plain):
    assert "expected at most 64, found 65" in refused("report", plain, "--samples", 65)


@pytest.mark.slow
def test_runs_of_several_sizes_have_a_section_about_scaling(ditlab, place, quick, undrawn, tmp_path):
    small, large = place.trained("plain"), place.trained("deep", "--network.depth", "3")
    runs = [place.copy(run) for run in (small, large)]
    out = tmp_path / "report.html"
    done = ditlab("report", *runs, "--samples", 0, "--out", out)
    assert done.status == 0, done.err
    page = out.read_text(encoding="utf-8")
    assert "scaling" in sections(page)
    assert "GMACs" in page
    assert (tmp_path / "figures" / "scaling.png").exists()
    assert not (tmp_path / "figures" / "sampling-compute.png").exists()  # no samples were evaluated
    (runs[0] / "evaluation").mkdir()
    evaluation = {"step": 6, "sampler_steps": 10, "nfe": 10, "metrics": {"fid": 321.5}}
    (runs[0] / "evaluation" / "ddim-10.json").write_text(json.dumps(evaluation))
    assert ditlab("report", *runs, "--samples", 0, "--out", out).status == 0
    assert "321.5" in out.read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "sampling-compute.png").exists()
    assert ditlab("report", runs[0], "--samples", 0, "--out", out).status == 0
    assert "scaling" not in sections(out.read_text(encoding="utf-8"))
    assert not list((tmp_path / "figures").glob("scaling*"))
    (runs[0] / "evaluation" / "ddim-10.json").write_text("[1")
    done = ditlab("report", *runs, "--samples", 0, "--out", out)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "expected an evaluation as JSON" in done.err
