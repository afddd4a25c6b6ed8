"""`ditlab jacobian`: files, tables, JSON, what is used again, what a report shows, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

from ditlab.analyses.attention.maps import AttentionConfig
from ditlab.analyses.jacobian.comparison import CAUTION
from ditlab.analyses.jacobian.measure import measure_jacobian
from ditlab.analyses.jacobian.result import JacobianConfig, JacobianResult
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.cli import jacobian_points, report
from ditlab.cli.report import write_report
from ditlab.data.pixels import centre_crop, planes, to_float
from ditlab.files import write_bytes
from ditlab.models.run import Run
from ditlab.pages import theme as style
from ditlab.pages.page import ThemedFigure
from ditlab.pages.theme import LIGHT, png
from ditlab.training.checkpoint import write_manifest

QUICK = ["--show", 0, 1, 4, "--levels", 0.5]


@pytest.fixture
def runs(place, plain):
    return [place.copy(plain), place.copy(place.trained("local", "--network.attention", "3,3"))]


@pytest.fixture
def counted(monkeypatch):
    """The (images, levels) of each measurement."""
    asked = []
    measure = measure_jacobian

    def measured(denoiser, images, config, **more):
        asked.append((config.images, config.levels))
        return measure(denoiser, images, config, **more)

    monkeypatch.setattr(jacobian_points, "measure_jacobian", measured)
    return asked


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are put together but not rendered, which takes most of a command's time here."""
    dot = png(Figure(figsize=(0.1, 0.1)))
    monkeypatch.setattr(style, "save", lambda figure, path: write_bytes(path, dot))
    monkeypatch.setattr(
        ThemedFigure, "draw", lambda drawing, alt, caption, **_: drawing(LIGHT) and ThemedFigure(dot, dot, alt, caption)
    )


def kept(run) -> JacobianResult:
    return JacobianResult.load(run / "analysis" / "jacobian.json")


@pytest.mark.slow
def test_two_runs(ditlab, runs, tmp_path):
    out = tmp_path / "out"
    done = ditlab("jacobian", *runs, *QUICK, "--pixels", 2, 3, 5, 5, "--out", out, "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert [(g["label"], g["n"]) for g in record["groups"]] == [("global", 20), ("3,3", 20)]
    assert (record["target"], record["decomposition"], record["dimension"]) == ("x0", "svd", 192)
    kinds = ("denoised", "spectra", "vectors", "measures", "shrinkage", "sensitivity")
    names = {"jacobian-comparison.json", *(f"jacobian-{kind}.png" for kind in kinds)}
    assert {path.name for path in out.iterdir()} == names
    assert sorted(record["files"]) == sorted(str(out / name) for name in names)
    for run, group in zip(runs, record["groups"], strict=True):
        assert sorted(p.name for p in (run / "analysis").iterdir()) == ["jacobian.json", "jacobian.npz"]
        result, opened = kept(run), Run.open(run)
        [point] = result.points
        assert result.about.settings["images_from"] == "test"
        assert (result.about.step, result.about.ema, point.image, point.sigma) == (6, True, 0, 0.5)
        assert point.sensitivity is not None
        assert point.sensitivity.pixels == ((2, 3), (5, 5))
        assert (point.clean == opened.pictures("test", 1)[0][0].numpy()).all()
        mean = group["by_level"][0]["mean"]
        assert mean["trace"] == pytest.approx(point.numbers["trace"])
        assert {"r_hom", "r_lin", "Wiener locality 0.5"} <= set(mean)
    # Both runs are shown the same noise.
    assert (kept(runs[0]).points[0].noisy == kept(runs[1]).points[0].noisy).all()


def test_tables_and_sentences(ditlab, runs, tmp_path, undrawn):
    done = ditlab("jacobian", *runs, *QUICK, "--out", tmp_path / "out", "--labels", "a", "b", "--step", 4, "--raw")
    assert done.status == 0, done.err
    heading = next(line for line in done.out.splitlines() if "harmonic" in line and "run" in line)
    assert heading.split()[-2:] == ["r_hom", "r_lin"]
    assert CAUTION in done.out
    assert re.search(r"^b, N = 20, σ = 0\.5: r_hom [\d.]+, r_lin [\d.]+:", done.out, re.MULTILINE)
    assert (kept(runs[1]).about.label, kept(runs[1]).about.step, kept(runs[1]).about.ema) == ("b", 4, False)


@pytest.mark.slow
def test_a_kept_result_is_used_again(ditlab, runs, tmp_path, counted, undrawn):
    words = ["jacobian", runs[0], *QUICK, "--out", tmp_path / "out"]
    assert ditlab(*words).status == 0
    before = (tmp_path / "out" / "jacobian-comparison.json").read_bytes()
    times = [p.stat().st_mtime_ns for p in (runs[0] / "analysis").iterdir()]
    done = ditlab(*words, "--chunk", 3)
    assert "1 of 1 Jacobians were measured before" in done.out
    assert (tmp_path / "out" / "jacobian-comparison.json").read_bytes() == before
    assert counted == [((0,), (0.5,))]
    # Only what is missing is measured; other weights, noise or settings are another measurement.
    assert ditlab(*words[:-2], "--levels", 0.5, 1, "--images", 0, 3, "--out", tmp_path / "out").status == 0
    assert counted[1:] == [((0,), (1.0,)), ((3,), (0.5, 1.0))]
    assert [(p.image, p.sigma) for p in kept(runs[0]).points] == [(0, 0.5), (0, 1.0), (3, 0.5), (3, 1.0)]
    assert [p.stat().st_mtime_ns for p in (runs[0] / "analysis").iterdir()] != times
    for more in (["--raw"], ["--step", 4], ["--noise-seed", 1], ["--target", "eps"], ["--images-from", "train"]):
        del counted[:]
        assert ditlab(*words, *more).status == 0
        assert counted == [((0,), (0.5,))], more


def test_what_was_broken_off_goes_on(ditlab, runs, tmp_path, monkeypatch, undrawn):
    asked, measure = [], measure_jacobian

    def interrupted(denoiser, images, config, **more):
        asked.append(config.images)
        if config.images == (2,) and asked.count((2,)) == 1:
            raise KeyboardInterrupt
        return measure(denoiser, images, config, **more)

    monkeypatch.setattr(jacobian_points, "measure_jacobian", interrupted)
    words = ["jacobian", runs[0], *QUICK, "--images", 0, 1, 2, "--out", tmp_path / "out"]
    assert ditlab(*words).status == 130
    folder = runs[0] / "analysis"
    assert sorted(p.name for p in folder.iterdir()) == ["jacobian-unfinished.json", "jacobian-unfinished.npz"]
    done = ditlab(*words)
    assert done.status == 0, done.err
    assert asked == [(0,), (1,), (2,), (2,)]
    assert sorted(p.name for p in folder.iterdir()) == ["jacobian.json", "jacobian.npz"]
    opened = Run.open(runs[0])
    config = JacobianConfig(images=(0, 1, 2), show=(0, 1, 4), levels=(0.5,))
    train = opened.pictures("train", 20)[0]
    whole = measure(opened.denoiser(), opened.pictures("test", 3)[0], config, train=train)
    for one, two in zip(kept(runs[0]).points, whole.points, strict=True):
        # Not to the last bit: rows or columns are chosen by what is faster at the moment.
        assert one.values == pytest.approx(two.values, abs=1e-6)
        assert one.numbers["r_hom"] == pytest.approx(two.numbers["r_hom"], abs=1e-5)


def test_a_damaged_result_is_measured_again(ditlab, runs, tmp_path, undrawn):
    words = ["jacobian", runs[0], *QUICK, "--out", tmp_path / "out"]
    assert ditlab(*words).status == 0
    (runs[0] / "analysis" / "jacobian.npz").write_bytes(b"no archive")
    done = ditlab(*words)
    assert done.status == 0, done.err
    assert "note: not used again:" in done.out
    assert len(kept(runs[0]).points) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--top", 5, "--decomposition", "eig", "--target", "eps"],
        ["--decomposition", "eig-right", "--target", "I-eps"],
        ["--top", 5, "--decomposition", "eigh"],
        ["--decomposition", "eigh", "--images-from", "train", "--steps", 100, 300],
        ["--right", "--target", "I-eps"],
    ],
)
def test_other_settings(ditlab, runs, tmp_path, words, undrawn):
    levels = [] if "--steps" in words else ["--levels", 0.5]
    done = ditlab("jacobian", runs[0], "--show", 0, 1, *levels, *words, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("jacobian-right-vectors.png" in files) == ("--right" in words)
    assert ("jacobian-vectors-sigma1.24.png" in files) == ("--steps" in words)
    assert any("sensitivity" in name for name in files) == ("train" in words)
    if "--top" in words:
        assert len(kept(runs[0]).points[0].values) == 5


def test_a_run_with_classes_is_told_the_class(ditlab, place, tmp_path, undrawn):
    run = place.copy(place.trained("classes", "--conditional"))
    assert ditlab("jacobian", run, *QUICK, "--images", 1, "--out", tmp_path / "out").status == 0
    opened, [point] = Run.open(run), kept(run).points
    images, labels = opened.pictures("test", 2)
    config = JacobianConfig(images=(1,), show=(0, 1, 4), levels=(0.5,))
    told, not_told = (measure_jacobian(opened.denoiser(), images, config, labels=given) for given in (labels, None))
    assert np.abs(point.values - told.points[0].values).max() < 1e-6
    assert np.abs(point.denoised - not_told.points[0].denoised).max() > 1e-6


def picture(path, size=(24, 16), mode="RGB"):
    """A picture file with a bright disc left of the middle."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    disc = 200.0 * ((rows - size[1] / 2) ** 2 + (columns - size[0] / 2 + 2) ** 2 < 9) + rows
    Image.fromarray(disc.astype(np.uint8)).convert(mode).save(path)
    return path


def test_pictures_of_ones_own(ditlab, runs, tmp_path, counted, undrawn):
    files = [picture(tmp_path / "disc.png"), picture(tmp_path / "small.png", (8, 8))]
    words = ["jacobian", *runs, *QUICK, "--out", tmp_path / "out", "--pictures", *files]
    done = ditlab(*words, "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert (record["images"], record["images_from"], record["shuffled"]) == ([0, 1], "files", False)
    for run in runs:
        first, second = kept(run).points
        assert (first.clean == to_float(torch.from_numpy(_planes(files[0]))).numpy()).all()
        assert (second.clean == planes(Image.open(files[1])).astype(np.float32) / 127.5 - 1).all()
    del counted[:]
    again = ditlab(*words)
    assert "Jacobian of x0, 192 dimensions, 2 given images" in again.out
    assert counted == []
    # Another picture under the same name is another measurement; so are shuffled pixels.
    picture(files[0], (16, 24))
    assert ditlab(*words).status == 0
    assert counted == [((0,), (0.5,)), ((1,), (0.5,))] * 2
    before = kept(runs[0]).points
    assert "2 given images with shuffled pixels" in ditlab(*words, "--shuffled").out
    for one, two, other in zip(before, kept(runs[0]).points, kept(runs[1]).points, strict=True):
        assert (np.sort(one.clean.reshape(3, -1)) == np.sort(two.clean.reshape(3, -1))).all()
        assert (one.clean != two.clean).any()
        assert (two.clean == other.clean).all()
        # Channels stay together.
        pixels = {tuple(pixel) for pixel in one.clean.reshape(3, -1).T}
        assert pixels == {tuple(pixel) for pixel in two.clean.reshape(3, -1).T}


def _planes(file) -> np.ndarray:
    with Image.open(file) as opened:
        return np.ascontiguousarray(planes(centre_crop(opened, 8)))


def test_shuffled_images_of_a_run(ditlab, runs, tmp_path, undrawn):
    done = ditlab("jacobian", runs[0], *QUICK, "--images", 1, "--shuffled", "--out", tmp_path / "out")
    assert "192 dimensions, held-out image 1 with shuffled pixels" in done.out
    [point] = kept(runs[0]).points
    clean = Run.open(runs[0]).pictures("test", 2)[0][1].numpy()
    assert (np.sort(point.clean.reshape(3, -1)) == np.sort(clean.reshape(3, -1))).all()
    assert (point.clean != clean).any()


def test_mirrored_training_images_are_known_too(ditlab, place, tmp_path, monkeypatch, undrawn):
    run = place.copy(place.trained("flips", "--training.flip"))
    given = []

    def measured(*arguments, train, **more):
        given.append(train)
        return measure_jacobian(*arguments, train=train, **more)

    monkeypatch.setattr(jacobian_points, "measure_jacobian", measured)
    assert ditlab("jacobian", run, *QUICK, "--out", tmp_path / "out").status == 0
    images = Run.open(run).pictures("train", 20)[0]
    assert (given[0] == torch.cat([images, images.flip(-1)])).all()


def test_bad_pictures(refused, plain, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    tiny = picture(tmp_path / "tiny.png", (7, 30))
    fine = picture(tmp_path / "fine.png")
    for words, says in (
        ([tmp_path / "gone.png"], f"{tmp_path / 'gone.png'}: no such picture file"),
        ([tmp_path], f"{tmp_path}: no such picture file"),
        ([text], f"{text}: not an image file"),
        ([tiny], f"{tiny}: expected a picture of at least 8x8 pixels, found 7x30"),
        ([fine, "--images", 1], "expected --images or --pictures, found both"),
        ([fine, "--images-from", "train"], "expected --images-from or --pictures, found both"),
    ):
        assert says in refused("jacobian", plain, "--pictures", *words), words


def test_bad_input(refused, plain):
    for words, says in (
        (["--images", 20], "jacobian images: expected places from 0 to 19, found 20"),
        (["--images", 0, 0], "expected different places, counted from 0, found [0, 0]"),
        (["--show", -1], "jacobian show: expected different places, counted from 0, found [-1]"),
        (["--show", 192], "jacobian show: expected vectors below 192, found [192]"),
        (["--top", 3, "--show", 3], "jacobian show: expected vectors below 3, found [3]"),
        (["--top", 193], "found 193"),
        (["--levels", 9999], "expected a noise level sigma from 0.0100005 to"),
        (["--levels", 1, "--steps", 3], "expected levels or steps, found both"),
        (["--steps", 1000], "expected steps from 0 to 999, found 1000"),
        (["--pixels", 8, 0], "expected rows below 8 and columns below 8, found 8,0"),
        (["--chunk", 0], "chunk of at least 1"),
        (["--right", "--decomposition", "eig"], "jacobian --right: expected the decomposition svd, found eig"),
        (["--labels", "a", "b"], "--labels: expected 1 labels, one a run, found 2"),
        (["--step", 5], "no checkpoint of step 5"),
    ):
        assert says in refused("jacobian", plain, *words), words
    assert "expected at least one run's folder, found none" in refused("jacobian")
    assert "named twice" in refused("jacobian", plain, plain)


def poison(run):
    """Makes the newest averaged weights NaN, with the hash of what is written."""
    folder = max((run / "checkpoints").iterdir())
    file = folder / "ema.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}, file)
    write_manifest(folder, int(folder.name))


def test_nothing_is_written_where_a_later_run_has_no_jacobian(refused, place, plain, tmp_path):
    told = place.trained("told", "--conditional", "--objective.label-dropout", 0, "--network.no-null-class")
    own = picture(tmp_path / "own.png")
    assert "needs a label" in refused("jacobian", plain, told, *QUICK, "--pictures", own)
    broken = place.copy(place.trained("local", "--network.attention", "3,3"))
    poison(broken)
    says = refused("jacobian", plain, broken, *QUICK)
    assert says == f"run {broken}: jacobian: the denoiser's estimate at noise level 0.5 is not finite"


def test_unknown_choices_are_refused_by_name(ditlab, plain, capsys):
    for words in (["--target", "x1"], ["--decomposition", "lu"], ["--images-from", "samples"]):
        assert ditlab("jacobian", plain, *words).status == 2


def test_a_matrix_that_does_not_fit(refused, plain, monkeypatch):
    monkeypatch.setattr("ditlab.analyses.jacobian.measure.available_memory", lambda: 1000)
    says = refused("jacobian", plain)
    assert says.startswith(f"run {plain}: jacobian: the whole matrix of 192 x 192")
    assert "--top K" in says


def test_runs_that_cannot_stand_side_by_side(refused, place, plain):
    local = place.trained("local", "--network.attention", "3,3")
    says = refused("jacobian", plain, local, "--labels", "same", "same")
    assert says == "jacobian: 'plain' and 'local' are both 'same' with N = 20 and seed 0; give them different labels"
    other = place.copy(plain)
    record = json.loads((other / "config.json").read_text())
    record["split"]["family"] = "1" * 64
    (other / "config.json").write_text(json.dumps(record))
    assert "have different splits" in refused("jacobian", plain, other)


@pytest.fixture
def quick_report(monkeypatch):
    """A report measured in a moment."""
    few = partial(write_report, settings=PSNRConfig(images=10, points=3), attention=AttentionConfig(images=4))
    monkeypatch.setattr(report, "write_report", few)


def sections(path) -> list[str]:
    return re.findall(r'<section id="([^"]+)">', path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_report_shows_what_is_there(ditlab, runs, quick_report, tmp_path, counted, undrawn):
    out = tmp_path / "report.html"
    words = ["report", *runs, "--samples", 0, "--out", out]
    assert ditlab(*words).status == 0
    assert not any(name.startswith("jacobian") for name in sections(out))
    assert counted == []
    assert ditlab("jacobian", *runs, *QUICK, "--out", tmp_path / "out").status == 0
    assert ditlab(*words).status == 0
    assert len(counted) == 2
    assert "jacobian" in sections(out)
    page = out.read_text(encoding="utf-8")
    assert page.count("so the vectors ") == 2
    assert all(f'download="{run.name}-jacobian.json"' in page for run in runs)
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"jacobian-vectors", "jacobian-denoised", "jacobian-spectra"} <= figures
    # Hidden images: no picture of one, and no vector, which may draw one; those of the earlier report are deleted.
    assert ditlab(*words, "--hide-training-images").status == 0
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert not {"jacobian-vectors", "jacobian-denoised"} & figures
    assert {"jacobian-spectra", "jacobian-sensitivity"} <= figures


@pytest.mark.slow
def test_a_report_measures_only_when_asked_and_groups_what_was_measured_alike(
    ditlab, runs, quick_report, tmp_path, counted, undrawn
):
    out = tmp_path / "report.html"
    assert ditlab("jacobian", runs[0], *QUICK, "--out", tmp_path / "out").status == 0
    assert ditlab("report", *runs, "--samples", 0, "--out", out, "--jacobian").status == 0
    assert counted[1:] == [((0,), kept(runs[1]).points[0].sigma and (kept(runs[1]).points[0].sigma,))]
    assert replace(kept(runs[1]).config, levels=None, steps=None) == JacobianConfig()
    # The two were measured at different noise levels, so each has a section of its own.
    assert [name for name in sections(out) if name.startswith("jacobian")] == ["jacobian", "jacobian-2"]
    # An older checkpoint's is not shown, and one that cannot be read is passed over.
    record = json.loads((runs[0] / "analysis" / "jacobian.json").read_text())
    record["about"]["step"] = 4
    (runs[0] / "analysis" / "jacobian.json").write_text(json.dumps(record))
    assert ditlab("report", *runs, "--samples", 0, "--out", out).status == 0
    assert [name for name in sections(out) if name.startswith("jacobian")] == ["jacobian"]
    (runs[1] / "analysis" / "jacobian.npz").write_bytes(b"no archive")
    done = ditlab("report", *runs, "--samples", 0, "--out", out)
    assert done.status == 0, done.err
    assert f"note: passed over: {runs[1] / 'analysis' / 'jacobian.npz'}: expected the arrays" in done.out
    assert not [name for name in sections(out) if name.startswith("jacobian")]
