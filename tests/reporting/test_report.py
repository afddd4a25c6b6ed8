"""The report: what is on the page, what is measured only once, what stays hidden, and what is a note instead."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ditlab
from ditlab.analyses.base import Analysis, Comparison, NoOptions
from ditlab.analyses.samples import figures as sample_figures
from ditlab.analyses.samples import measure as sampling
from ditlab.errors import DitlabError, Incompatible, InvalidConfig
from ditlab.models.model import Model
from ditlab.models.run import Run
from ditlab.models.split_config import SplitConfig
from ditlab.pages import page as page_module
from ditlab.pages import token_picker
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import PAGE_BYTES, Section, ThemedFigure
from ditlab.pages.theme import canvas
from ditlab.reporting import report
from ditlab.reporting.report import LIST

PIXEL = b"not looked at"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)">', page)


def downloads(page: str) -> dict[str, Any]:
    links = re.findall(r'download="([^"]+)" href="data:application/json;base64,([^"]+)"', page)
    return {name: json.loads(base64.b64decode(content)) for name, content in links}


def figures(folder: Path) -> set[str]:
    return {path.name for path in (folder / "figures").glob("*.png")}


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]))


@pytest.mark.slow
def test_everything_is_on_the_page_and_measured_once(runs, write, tmp_path, monkeypatch):
    result = write(runs, samples=3)
    page = read(result.path)
    assert len(page.encode()) < PAGE_BYTES
    training = ["training", "matched", "matched-0", "matched-1"]
    assert sections(page) == ["samples", "psnr", "gap", *training, "settings", "commands", "environment"]
    along = {f"{name}-n{n}.png" for name in ("gap-along-training", "matched-psnr", "losses") for n in (10, 20)}
    assert figures(tmp_path) == {"samples.png", "psnr-curves.png", "gap-bars.png", *along}
    files = downloads(page)
    kinds = {record.get("kind") for name, record in files.items() if "log" not in name}
    assert kinds == {"nearest", "psnr-gap", "psnr-comparison", "matched-comparison"}
    baselines = {f"{name}-n{n}-psnr-gap.json" for name in ("wiener", "empirical-bayes") for n in (10, 20)}
    assert {"comparison.json", "global-nearest.json", "global-n20-log.json", "matched-1.json", *baselines} <= set(files)
    assert all(f"train {run.name}" in page for run in runs)
    table = page[page.index("Files of the nearest training images") :]
    run = Run.open(runs[0])
    nearest = run.split.train[files["global-nearest.json"]["samples"]["index"]]
    assert all(run.images.source_of(int(index)) in table for index in nearest)
    assert all("N = " in sentence or sentence.startswith("The average") for sentence in result.sentences)
    results = [run / "analysis" / "psnr-gap.json" for run in runs]
    before = [path.stat().st_mtime_ns for path in results]
    monkeypatch.setattr(ThemedFigure, "draw", lambda *_, **__: noise_picture(2))
    assert "samples" not in sections(read(write(runs).path))
    assert [path.stat().st_mtime_ns for path in results] == before


@pytest.mark.slow
def test_the_first_screen_answers_the_question(runs, write, undrawn):
    result = write(runs[:2], samples=3, foreword=["Two small networks."])
    page = read(result.path)
    head = page[page.index("<h1>") : page.index("<nav")]
    assert "<h1>global and 3,3</h1>" in head
    assert f"<p>{result.sentences[0]}</p>\n<p>Two small networks.</p>" in head
    assert re.findall(r"<th scope=\"col\".*?>(.*?)</th>", head) == [
        *("model", "N", "train, dB", "test, dB", "gap, dB", "copies")
    ]
    rows = re.findall(r"<tr>(.*?)</tr>", head, re.DOTALL)[1:]
    assert len(rows) == 2
    (group, _) = next(c for c in result.comparisons if c.analysis.name == "psnr-gap").detail.groups
    low, high = group.interval("gap")
    assert f"{group.mean('gap'):.2f}<br><small>{low:.2f}–{high:.2f}</small>" in rows[0]
    assert "0 of 3" in rows[0]
    assert head.count("<figure") == 2
    assert "8 of 20 training images" in head
    assert head.index("<table>") < head.index("<figure")


def test_the_title_is_the_name_of_a_single_run(runs, write, undrawn):
    page = read(write(runs[:1]).path)
    assert "<h1>global</h1>" in page
    assert "<summary>All settings (" in page
    assert "also compared" not in page
    assert sections(page)[-3:] == ["settings", "commands", "environment"]
    assert "<h1>Mine</h1>" in read(write(runs[:1], title="Mine").path)


@pytest.mark.slow
def test_no_real_image_is_shown_where_it_may_not_be(runs, write, undrawn, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a picture of a training image was asked for")

    monkeypatch.setattr(Model, "originals", forbidden)
    result = write(runs[:2], samples=3, hide_training_images=True)
    page = read(result.path)
    assert "no real image is shown" in page
    assert "training images:" not in page
    assert "Files of the nearest" not in page
    samples = result.comparisons[0].context.shared["samples"]
    assert {name: images.shape[1:] for name, (images, _) in samples.items()} == dict.fromkeys(
        ("global", "local"), (3, 8, 8)
    )


@pytest.mark.slow
def test_copies_of_training_images_are_hidden_too(runs, write, undrawn, monkeypatch):
    """A run that memorized draws its training images: its samples are real images."""
    run = Run.open(runs[0])
    replayed = run.images.batch(run.split.train[:3])
    monkeypatch.setattr(sampling, "draw", lambda *_, **__: replayed)
    shown, drawing = [], sample_figures.samples_with_nearest
    monkeypatch.setattr(
        sample_figures, "samples_with_nearest", lambda rows, **k: shown.extend(rows) or drawing(rows, **k)
    )
    result = write(runs[:1], samples=3, hide_training_images=True)
    assert shown
    assert all((row.samples == 127).all() for row in shown)
    context = result.comparisons[0].context
    assert len(context.shared["samples"]["global"][0]) == 0
    assert "Some samples are copies of training images: 3 of 3 of dit-nano/1 (N = 20)." in result.sentences[:2]
    shown.clear()
    write(runs[:1], samples=3)
    assert (shown[0].samples == run.originals(run.split.train[:3])).all()


def noise_picture(side: int) -> ThemedFigure:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return ThemedFigure(buffer.getvalue(), buffer.getvalue(), "a", "b")


@pytest.mark.slow
def test_a_page_that_would_be_too_large_is_made_smaller(runs, write, monkeypatch):
    """With figures of real size: first files go, then figures lose colours and resolution."""
    monkeypatch.setattr(ThemedFigure, "draw", lambda *_, **__: noise_picture(300))
    whole = read(write(runs[:1]).path)
    assert "they are stored next to the results" not in whole
    monkeypatch.setattr(page_module, "PAGE_BYTES", 250_000)
    result = write(runs[:1])
    small = read(result.path)
    assert result.path.stat().st_size <= 250_000
    assert "they are stored next to the results" in small
    monkeypatch.setattr(page_module, "PAGE_BYTES", 20_000)
    with pytest.raises(DitlabError, match="expected a page of at most 20,000 bytes"):
        write(runs[:1])
    assert read(result.path) == small


def test_figures_of_an_earlier_report_do_not_stay(runs, write, undrawn, tmp_path):
    """They may show real images, which a report that hides them must not leave beside it."""
    write(runs[:2], samples=2)
    folder = tmp_path / "figures"
    assert (folder / "samples.png").is_file()
    (folder / "mine.png").write_bytes(PIXEL)
    (folder / "losses-n300.png").write_bytes(PIXEL)  # not of the report: its list does not have it
    write(runs[:1], hide_training_images=True)
    kept = {"gap-along-training.png", "matched-psnr.png", "losses.png", "psnr-curves.png", "gap-bars.png"}
    assert figures(tmp_path) == {"mine.png", "losses-n300.png", *kept}


def test_figures_of_reports_that_kept_no_list_do_not_stay_either(runs, write, undrawn, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    earlier = ("samples", "losses-n300", "attention-maps", "agreement-images-1", "jacobian-vectors-image3-2")
    for name in (*earlier, "mine"):
        (folder / f"{name}.png").write_bytes(PIXEL)
    write(runs[:1])
    assert figures(tmp_path) & {f"{name}.png" for name in (*earlier, "mine")} == {"mine.png"}
    assert "losses" in json.loads((folder / LIST).read_text())["names"]


@pytest.mark.slow
def test_runs_whose_folders_have_one_name_stay_apart(trained, copied, write, undrawn):
    made = [trained("global"), trained("local", attention="3,3")]
    folders = [copied(run) for run in made]
    folders = [folder.rename(folder.with_name("run")) for folder in folders]
    page = read(write(folders, samples=3).path)
    names = set(downloads(page))
    for kind in ("nearest", "psnr-gap"):
        assert {f"{folder.parent.name}-run-{kind}.json" for folder in folders} <= names
    assert all(f"train {folder.parent.name}-run" in page for folder in folders)


def shrink(y, sigma, label):
    return y / (1 + 3 * sigma.view(-1, 1, 1, 1) ** 2)


@pytest.mark.slow
def test_a_model_of_ones_own_stands_beside_runs(runs, images, write, undrawn, tmp_path):
    denoiser = ditlab.Denoiser.wrap(shrink, shape=(3, 8, 8))
    mine = ditlab.Model(denoiser, images, n=20, test=20, name="shrink", out=tmp_path / "mine")
    result = write([runs[0], mine], samples=2)
    page = read(result.path)
    gap = next(c for c in result.comparisons if c.analysis.name == "psnr-gap")
    assert [g.label for g in gap.groups][1] == "shrink"
    first, second = (g.results[0] for g in gap.groups)
    assert first.levels == pytest.approx(second.levels)  # a range of levels is measured at those of the first model
    assert {"global-nearest.json", "shrink-nearest.json", "shrink-psnr-gap.json"} <= set(downloads(page))
    assert "The training images of this model are unknown" in page


def test_a_model_of_diffusers_has_a_page(images, diffusers_folder, write, undrawn, tmp_path):
    """A checkpoint without a log, whose training images nobody knows."""
    source = f"diffusers:{diffusers_folder('unet', 'theirs')}"
    result = write([source], data=images.path, split=SplitConfig(20, 10))
    page = read(result.path)
    assert "The training images of this model are unknown" in page
    assert "Along training" not in page
    assert {"psnr", "gap"} <= set(sections(page))


def test_a_model_without_images_has_a_page(write, tmp_path):
    denoiser = ditlab.Denoiser.wrap(shrink, shape=(3, 8, 8))
    result = write([ditlab.Model(denoiser, name="bare", out=tmp_path / "bare")], samples=2)
    page = read(result.path)
    assert "Nothing was measured that tells whether bare generalizes" in result.sentences[0]
    assert "bare: no psnr-gap (model bare: training images unknown" in text_of(page)
    assert sections(page)[0] == "samples"
    assert figures(tmp_path) == {"samples.png"}


def test_a_model_that_cannot_be_sampled_has_a_note(runs, write, undrawn, monkeypatch):
    def refused(*_, **__):
        raise DitlabError("sampler: what was drawn is not finite")

    monkeypatch.setattr(sampling, "draw", refused)
    page = read(write(runs[:1], samples=2).path)
    assert "global: no samples (sampler: what was drawn is not finite)." in page
    assert "samples" not in sections(page)
    assert "psnr" in sections(page)
    assert "8 of 20 training images" in page


@pytest.mark.parametrize("samples", [-1, 65])
def test_too_many_samples_are_refused(runs, write, samples):
    with pytest.raises(InvalidConfig, match=f"`samples` must be from 0 to 64, found {samples}"):
        write(runs[:1], samples=samples)


@pytest.mark.slow
def test_runs_of_several_sizes_have_a_section_about_scaling(trained, copied, write, undrawn, tmp_path):
    sizes = [copied(run) for run in (trained("global"), trained("deep", depth=3, attention="g*3"))]
    page = read(write(sizes).path)
    assert "scaling" in sections(page)
    assert "GMACs" in page
    assert "scaling.png" in figures(tmp_path)
    assert "sampling-compute.png" not in figures(tmp_path)  # no samples were evaluated
    (sizes[0] / "evaluation").mkdir()
    evaluation = {"step": 6, "sampler_steps": 10, "nfe": 10, "metrics": {"fid": 321.5}}
    (sizes[0] / "evaluation" / "ddim-10.json").write_text(json.dumps(evaluation))
    page = read(write(sizes).path)
    assert "321.5" in page
    assert "has the lowest FID of 1 runs" in page
    assert "sampling-compute.png" in figures(tmp_path)
    assert "scaling" not in sections(read(write(sizes[:1]).path))
    assert not {name for name in figures(tmp_path) if name.startswith("scaling")}
    (sizes[0] / "evaluation" / "ddim-10.json").write_text("[1")
    page = read(write(sizes).path)
    assert "scaling" not in sections(page)
    assert "expected an evaluation as JSON" in page


@pytest.mark.slow
def test_a_conditional_model_draws_each_class_in_turn(trained, copied, write, undrawn):
    run = copied(trained("classes", conditional=True))
    context = write([run], samples=12).comparisons[0].context
    _, classes = context.shared["samples"]["classes"]
    assert classes.tolist() == [i % 10 for i in range(12)]


class Toy(Analysis[NoOptions, NoOptions]):
    """An analysis of another package: two comparisons, each with a figure."""

    name, question, Config, pickers = "toy", "Is it a toy?", NoOptions, True
    budgets: list[int]

    def for_report(self, models, context, reporter=None):
        self.budgets = []
        return [Comparison(self, None, [], models, context=context) for _ in range(2)]

    def figures(self, comparison):
        def draw(theme):
            with canvas(1.0, 1.0, theme) as figure:
                figure.text(0, 0, f"{comparison.number} of {comparison.count}")
            return figure

        return {"toy": Drawing(draw, "A toy", f"Toy {comparison.number}.")}

    def sentences(self, comparison):
        return ["It is a toy."]

    def section(self, comparison, figures, number=1):
        self.budgets.append(comparison.context.picker_bytes)
        paragraphs = [f"{comparison.context.picker_bytes} bytes"]
        return Section(f"toy-{number}", "Toys", paragraphs, pictures=list(figures.values()))


class Broken(Analysis[NoOptions, NoOptions]):
    """An analysis that cannot show anything."""

    name = "broken"

    def for_report(self, models, context, reporter=None):
        raise DitlabError("it is broken")


def test_any_analysis_has_a_section_and_none_keeps_the_page_from_being_made(runs, write, tmp_path, monkeypatch):
    rooms = {"broken": Broken(), "toy": Toy()}
    monkeypatch.setattr(report, "analysis_names", lambda: tuple(rooms))
    monkeypatch.setattr(report, "analysis", rooms.__getitem__)
    result = write(runs[:1])
    page = read(result.path)
    assert sections(page)[:2] == ["toy-1", "toy-2"]
    assert "No section on broken: it is broken." in page
    assert figures(tmp_path) == {"toy-1.png", "toy-2.png"}
    assert result.sentences[-1] == "It is a toy."
    # Sections are made again when it is known how much room pickers have.
    assert rooms["toy"].budgets == [0, 0, token_picker.BUDGET, token_picker.BUDGET]
    assert f"{token_picker.BUDGET} bytes" in page


def test_the_call_writes_beside_the_first_run(runs, monkeypatch, undrawn):
    monkeypatch.setattr(report, "analysis_names", lambda: ("trajectory",))
    result = ditlab.report([str(runs[0])], device="cpu", threads=1)
    assert result.path == runs[0] / "report.html"
    assert result.path.resolve().as_uri() in result._repr_html_()
    assert [c.analysis.name for c in result.comparisons] == ["trajectory"]
    assert ditlab.report(runs[0], out=runs[0] / "again.html").path.is_file()  # the name stays a function


def test_models_that_cannot_be_compared_are_refused_before_anything_is_measured(images, tmp_path):
    denoiser = ditlab.Denoiser.wrap(shrink, shape=(3, 8, 8))
    models = [ditlab.Model(denoiser, images, n=20, test=20, name=n, out=tmp_path / n) for n in ("a", "b")]
    with pytest.raises(Incompatible, match="report: 'a' and 'b' are both 'same' with N = 20 and seed 0; give them"):
        ditlab.report(models, names=("same", "same"), out=tmp_path / "report.html")
    assert not any(tmp_path.iterdir())


def test_settings_of_analyses_are_checked(tmp_path):
    with pytest.raises(DitlabError, match="unknown analysis 'psnr_gapp'"):
        ditlab.report("run", configs={"psnr_gapp": 5})
    with pytest.raises(InvalidConfig, match=r"`configs\['psnr-gap'\]`: expected a PSNRConfig, found {'images': 3}"):
        ditlab.report("run", configs={"psnr-gap": {"images": 3}})
