"""The analysis of models: files, what is reused and resumed, the images, what a report shows, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import ditlab
from ditlab.analyses import analysis
from ditlab.analyses.base import ReportContext
from ditlab.analyses.jacobian.config import JacobianConfig
from ditlab.analyses.jacobian.measure import measure_jacobian
from ditlab.analyses.jacobian.result import JacobianResult
from ditlab.data.pixels import centre_crop, planes, to_float
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError, Incompatible
from ditlab.models.comparing import open_models
from ditlab.models.model import Model
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.pages.page import ThemedFigure
from ditlab.progress import Bar, Reporter

QUICK = {"sigmas": (0.5,), "show": (0, 1, 4)}


def saved(model: Model) -> JacobianResult:
    return JacobianResult.load(model.path / "analysis" / "jacobian.json")


class Recorder(Reporter):
    """Keeps notes and progress."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.progress: list[tuple[int, int | None]] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    @contextmanager
    def bar(self, title: str, total: int | None = None):
        recorder = self

        class Recording(Bar):
            def __call__(self, done: int, total: int | None = None, **fields: object) -> None:
                recorder.progress.append((done, total))

        yield Recording()


def test_the_room_is_known_without_torch():
    code = "import sys; from ditlab.analyses import analysis; analysis('jacobian'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_run_and_a_function_side_by_side(run, function, counted, undrawn, tmp_path):
    mine = function("mine")
    found = ditlab.jacobian([run.path, mine], sigmas=(0.3,), top=8, out=tmp_path / "out")
    assert len(found.labels) == 2
    assert found.labels[1] == "mine"
    assert [result.about.name for result in found.results] == ["one", "mine"]
    assert all(len(result.points[0].values) == 8 for result in found.results)
    assert found.results[1].points[0].values == pytest.approx(np.full(8, 0.5), abs=1e-5)
    assert (found.results[0].points[0].noisy == found.results[1].points[0].noisy).all()
    assert counted == [((0,), (0.3,))] * 2
    # The run's Jacobian is reused, the function's is measured each time.
    ditlab.jacobian([run.path, mine], sigmas=(0.3,), top=8, out=tmp_path / "out")
    assert counted == [((0,), (0.3,))] * 3
    assert (ditlab.jacobian(function("mine", 0.2), sigmas=(0.3,), top=8).results[0].points[0].values < 0.3).all()
    assert "r_hom" in found._repr_html_()


def test_two_models(model, tmp_path):
    models = [model("a"), model("b", "3,3")]
    found = ditlab.jacobian(models, **QUICK, pixels=((2, 3), (5, 5)), out=tmp_path / "out")
    record = found.to_json()
    assert [(g["label"], g["n"]) for g in record["groups"]] == [("a", 20), ("b", 20)]
    assert (record["target"], record["decomposition"], record["dimension"]) == ("x0", "svd", 192)
    kinds = ("denoised", "spectra", "vectors", "measures", "shrinkage", "sensitivity")
    names = {"jacobian-comparison.json", *(f"jacobian-{kind}.png" for kind in kinds)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names == {path.name for path in found.files}
    for each, group in zip(models, record["groups"], strict=True):
        assert sorted(p.name for p in (each.path / "analysis").iterdir()) == ["jacobian.json", "jacobian.npz"]
        result = saved(each)
        [point] = result.points
        assert result.about.settings["images_from"] == "test"
        assert (point.image, point.sigma) == (0, 0.5)
        assert point.sensitivity is not None
        assert point.sensitivity.pixels == ((2, 3), (5, 5))
        assert (point.clean == each.batch("test", 1)[0][0].numpy()).all()
        mean = group["by_level"][0]["mean"]
        assert mean["trace"] == pytest.approx(point.numbers["trace"])
        assert {"r_hom", "r_lin", "Wiener locality 0.5"} <= set(mean)
    assert (saved(models[0]).points[0].noisy == saved(models[1]).points[0].noisy).all()
    section = found.section({name: ThemedFigure(b"", b"", "", "") for name in found.drawings()})
    assert section.id == "jacobian"
    assert set(section.data) == {"jacobian.json", "a-jacobian.json", "b-jacobian.json"}


def test_settings_in_files_have_their_old_names(model, tmp_path, undrawn):
    a = model("a")
    ditlab.jacobian(a, timesteps=(100,), top=3, show=(0,), out=tmp_path / "out")
    config = json.loads((a.path / "analysis" / "jacobian.json").read_text())["config"]
    assert (config["levels"], config["steps"]) == (None, [100])
    assert list(config)[:4] == ["images", "levels", "steps", "target"]
    assert saved(a).config == JacobianConfig(timesteps=(100,), top=3, show=(0,))


def test_a_saved_result_is_reused(model, tmp_path, counted, undrawn):
    a, out, told = model("a"), tmp_path / "out", Recorder()
    ditlab.jacobian(a, **QUICK, out=out)
    before = (out / "jacobian-comparison.json").read_bytes()
    times = {p.name: p.stat().st_mtime_ns for p in (a.path / "analysis").iterdir()}
    ditlab.jacobian(a, **QUICK, chunk=3, mode="reverse", out=out, reporter=told)
    assert "a: 1 of 1 Jacobians were measured before and are reused" in told.notes
    assert (out / "jacobian-comparison.json").read_bytes() == before
    assert counted == [((0,), (0.5,))]
    # Only what is missing is measured, and what was measured before stays.
    more = {**QUICK, "sigmas": (0.5, 1.0), "images": (0, 3)}
    ditlab.jacobian(a, **more, out=out)
    assert counted[1:] == [((0,), (1.0,)), ((3,), (0.5, 1.0))]
    assert [(p.image, p.sigma) for p in saved(a).points] == [(0, 0.5), (0, 1.0), (3, 0.5), (3, 1.0)]
    del counted[:]
    ditlab.jacobian(a, **QUICK, out=out)
    assert counted == []
    assert {p.name: p.stat().st_mtime_ns for p in (a.path / "analysis").iterdir()} != times
    # Other noise, settings, images or weights are another measurement.
    for other in ({"noise_seed": 1}, {"target": "eps"}, {"images_from": "train"}, {"top": 3, "show": (0,)}):
        del counted[:]
        ditlab.jacobian(a, **{**QUICK, **other}, out=out)
        assert counted == [((0,), (0.5,))], other
    del counted[:]
    with torch.no_grad():
        next(a.source_denoiser.module.parameters()).add_(0.1)
    ditlab.jacobian(a, **QUICK, out=out)
    assert counted == [((0,), (0.5,))]


def test_an_interrupted_measurement_resumes(model, tmp_path, monkeypatch, undrawn):
    a, asked = model("a"), []

    def interrupted(denoiser, images, config, **more):
        asked.append(config.images)
        if config.images == (2,) and asked.count((2,)) == 1:
            raise KeyboardInterrupt
        return measure_jacobian(denoiser, images, config, **more)

    monkeypatch.setattr("ditlab.analyses.jacobian.job.measure_jacobian", interrupted)
    settings = {**QUICK, "images": (0, 1, 2), "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        ditlab.jacobian(a, **settings)
    folder = a.path / "analysis"
    assert sorted(p.name for p in folder.iterdir()) == ["jacobian-unfinished.json", "jacobian-unfinished.npz"]
    told = Recorder()
    ditlab.jacobian(a, **settings, reporter=told)
    assert asked == [(0,), (1,), (2,), (2,)]
    assert sorted(p.name for p in folder.iterdir()) == ["jacobian.json", "jacobian.npz"]
    assert told.progress[-1][0] == told.progress[-1][1]
    config = JacobianConfig(images=(0, 1, 2), show=(0, 1, 4), sigmas=(0.5,))
    whole = measure_jacobian(a.source_denoiser, a.batch("test", 3)[0], config, train=a.batch("train", 20)[0])
    for first, second in zip(saved(a).points, whole.points, strict=True):
        # Not to the last bit: rows or columns are chosen by what is faster at the moment.
        assert first.values == pytest.approx(second.values, abs=1e-6)
        assert first.numbers["r_hom"] == pytest.approx(second.numbers["r_hom"], abs=1e-5)


def test_progress_of_all_images_is_one_bar(model, tmp_path, undrawn):
    told = Recorder()
    ditlab.jacobian(model("a"), sigmas=(0.2, 0.5), images=(0, 1), out=tmp_path / "out", reporter=told)
    assert told.progress == sorted(told.progress)
    assert told.progress[-1] == (4 * 192, 4 * 192)
    assert {total for _, total in told.progress} == {4 * 192}


def test_a_damaged_result_is_measured_again(model, tmp_path, undrawn):
    a, told = model("a"), Recorder()
    ditlab.jacobian(a, **QUICK, out=tmp_path / "out")
    (a.path / "analysis" / "jacobian.npz").write_bytes(b"no archive")
    ditlab.jacobian(a, **QUICK, out=tmp_path / "out", reporter=told)
    assert any(note.startswith("not used:") for note in told.notes)
    assert len(saved(a).points) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"top": 5, "decomposition": "eig", "target": "eps"},
        {"decomposition": "eig-right", "target": "I-eps"},
        {"top": 5, "decomposition": "eigh"},
        {"decomposition": "eigh", "images_from": "train", "timesteps": (100, 300)},
        {"right": True, "target": "I-eps"},
    ],
)
def test_other_settings(model, tmp_path, settings, undrawn):
    sigmas = {} if "timesteps" in settings else {"sigmas": (0.5,)}
    found = ditlab.jacobian(model("a"), show=(0, 1), **sigmas, **settings, out=tmp_path / "out")
    names = set(found.drawings())
    assert ("jacobian-right-vectors" in names) == ("right" in settings)
    assert ("jacobian-vectors-sigma1.24" in names) == ("timesteps" in settings)
    assert any("sensitivity" in name for name in names) == ("images_from" in settings)
    if "top" in settings:
        assert len(found.results[0].points[0].values) == 5


def test_the_tables_have_the_numbers_of_a_terminal(model, tmp_path, undrawn):
    """No number is cut in 80 columns, and r_hom and r_lin are beside every number of the vectors."""
    from rich.console import Console

    from ditlab.cli.console import rich_table

    found = ditlab.jacobian([model("global"), model("3,3", "3,3")], **QUICK, out=tmp_path / "out")
    for table in found.tables():
        console = Console(width=80, soft_wrap=True)
        with console.capture() as printed:
            console.print(rich_table(table))
        lines = printed.get().splitlines()
        assert max(map(len, lines)) <= 80
        for row in table.texts:
            assert any(row[0] in line and all(cell in line for cell in row[3:]) for line in lines), row


def with_classes(images, tmp_path, labelled: bool = True) -> Model:
    config = DiTConfig(image_size=(8, 8), width=16, depth=1, heads=2, num_classes=10, null_class=labelled)
    network = DiT(config).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.2 * torch.randn_like(value))
    denoiser = VPDenoiser(network, make_schedule("linear", 1000))
    return Model(denoiser, images, n=20, test=15, name="classes", out=tmp_path / "classes")


def test_a_model_with_classes_gets_the_class(images, tmp_path, undrawn):
    classes = with_classes(images, tmp_path)
    ditlab.jacobian(classes, **QUICK, images=(1,), out=tmp_path / "out")
    [point], (clean, labels) = saved(classes).points, classes.batch("test", 2)
    config = JacobianConfig(images=(1,), show=(0, 1, 4), sigmas=(0.5,))
    with_class, without = (measure_jacobian(classes.source_denoiser, clean, config, labels=y) for y in (labels, None))
    assert np.abs(point.values - with_class.points[0].values).max() < 1e-6
    assert np.abs(point.denoised - without.points[0].denoised).max() > 1e-6


def picture(path, size=(24, 16), mode="RGB"):
    """Writes a picture file with a bright disc left of the middle."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    disc = 200.0 * ((rows - size[1] / 2) ** 2 + (columns - size[0] / 2 + 2) ** 2 < 9) + rows
    Image.fromarray(disc.astype(np.uint8)).convert(mode).save(path)
    return path


def cut(file) -> np.ndarray:
    with Image.open(file) as opened:
        return np.ascontiguousarray(planes(centre_crop(opened, 8)))


def test_pictures_of_ones_own(model, tmp_path, counted, undrawn):
    models = [model("a"), model("b")]
    files = [picture(tmp_path / "disc.png"), picture(tmp_path / "small.png", (8, 8))]
    settings = {**QUICK, "pictures": files, "out": tmp_path / "out"}
    found = ditlab.jacobian(models, **settings)
    record = found.to_json()
    assert (record["images"], record["images_from"], record["shuffled"]) == ([0, 1], "files", False)
    assert found.title == "Jacobian of x0, 192 dimensions, 2 pictures"
    for each in models:
        first, second = saved(each).points
        assert (first.clean == to_float(torch.from_numpy(cut(files[0]))).numpy()).all()
        assert (second.clean == planes(Image.open(files[1])).astype(np.float32) / 127.5 - 1).all()
    del counted[:]
    ditlab.jacobian(models, **settings)
    assert counted == []
    # Another picture under the same name is another measurement; so are shuffled pixels.
    picture(files[0], (16, 24))
    ditlab.jacobian(models, **settings)
    assert counted == [((0,), (0.5,)), ((1,), (0.5,))] * 2
    before = saved(models[0]).points
    assert ditlab.jacobian(models, **settings, shuffled=True).title.endswith("2 pictures with shuffled pixels")
    for first, second, other in zip(before, saved(models[0]).points, saved(models[1]).points, strict=True):
        assert (np.sort(first.clean.reshape(3, -1)) == np.sort(second.clean.reshape(3, -1))).all()
        assert (first.clean != second.clean).any()
        assert (second.clean == other.clean).all()
        # Channels stay together.
        pixels = {tuple(pixel) for pixel in first.clean.reshape(3, -1).T}
        assert pixels == {tuple(pixel) for pixel in second.clean.reshape(3, -1).T}


def test_shuffled_images_of_a_model(model, tmp_path, undrawn):
    a = model("a")
    found = ditlab.jacobian(a, **QUICK, images=(1,), shuffled=True, out=tmp_path / "out")
    assert found.title == "Jacobian of x0, 192 dimensions, held-out image 1 with shuffled pixels"
    [point] = saved(a).points
    clean = a.batch("test", 2)[0][1].numpy()
    assert (np.sort(point.clean.reshape(3, -1)) == np.sort(clean.reshape(3, -1))).all()
    assert (point.clean != clean).any()


def test_mirrored_training_images_count_too(model, tmp_path, monkeypatch, undrawn):
    a, known = model("a", mirrored=True), []

    def measured(*arguments, train, **more):
        known.append(train)
        return measure_jacobian(*arguments, train=train, **more)

    monkeypatch.setattr("ditlab.analyses.jacobian.job.measure_jacobian", measured)
    ditlab.jacobian(a, **QUICK, out=tmp_path / "out")
    train = a.batch("train", 20)[0]
    assert (known[0] == torch.cat([train, train.flip(-1)])).all()


def refused(models, **settings) -> str:
    with pytest.raises(DitlabError) as error:
        ditlab.jacobian(models, **settings)
    return str(error.value)


def test_bad_pictures(model, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    tiny, fine = picture(tmp_path / "tiny.png", (7, 30)), picture(tmp_path / "fine.png")
    for settings, says in (
        ({"pictures": [tmp_path / "gone.png"]}, f"{tmp_path / 'gone.png'}: no such picture file"),
        ({"pictures": [tmp_path]}, f"{tmp_path}: no such picture file"),
        ({"pictures": [text]}, f"{text}: not an image file"),
        ({"pictures": [tiny]}, f"{tiny}: expected a picture of at least 8x8 pixels, found 7x30"),
        ({"pictures": [fine], "images": (1,)}, "expected `images` or `pictures`, found both"),
        ({"pictures": [fine], "images_from": "train"}, "expected `images_from` or `pictures`, found both"),
    ):
        assert says in refused(model("a"), **settings), settings
    assert not (tmp_path / "a").exists()


def test_bad_settings(model, tmp_path):
    a = model("a")
    for settings, says in (
        ({"images": (15,)}, "model a: jacobian: `images` must be places from 0 to 14, found 15"),
        ({"images": (0, 0)}, "`images` must be different places, counted from 0, found [0, 0]"),
        ({"show": (-1,)}, "`show` must be different places, counted from 0, found [-1]"),
        ({"show": (192,)}, "`show` must have a vector below 192, found [192]"),
        ({"top": 3, "show": (3,)}, "`show` must have a vector below 3, found [3]"),
        ({"top": 193}, "found 193"),
        ({"sigmas": (9999.0,)}, "expected a noise level sigma from 0.0100005 to"),
        ({"sigmas": (1.0,), "timesteps": (3,)}, "expected `sigmas` or `timesteps`, found both"),
        ({"timesteps": (1000,)}, "from 0 to 999, found 1000"),
        ({"pixels": ((8, 0),)}, "`pixels` must be rows below 8 and columns below 8, found 8,0"),
        ({"right": True, "decomposition": "eig"}, "`right` needs the `decomposition` svd, found eig"),
        ({"nothing": 1}, "nothing"),
    ):
        assert says in refused(a, **settings), settings
    assert not a.path.exists()


def test_nothing_is_written_if_a_later_model_has_no_jacobian(model, images, tmp_path):
    a, broken = model("a"), model("broken")
    with torch.no_grad():
        for value in broken.source_denoiser.module.parameters():
            value.fill_(torch.nan)
    says = refused([a, broken], **QUICK)
    assert says == "model broken: jacobian: the denoiser's estimate at noise level 0.5 is not finite"
    own = picture(tmp_path / "own.png")
    assert "needs a label" in refused([a, with_classes(images, tmp_path, labelled=False)], **QUICK, pictures=[own])
    assert not a.path.exists()


def test_a_matrix_that_does_not_fit(model, monkeypatch):
    monkeypatch.setattr("ditlab.analyses.jacobian.measure.available_memory", lambda: 1000)
    says = refused(model("a"))
    assert says.startswith("model a: jacobian: the whole matrix of 192 x 192")
    assert "`top` computes only the leading ones" in says


def test_models_that_cannot_be_compared(model, function):
    with pytest.raises(Incompatible, match="are both 'same' with N = 20 and seed 0; give them different `names`"):
        ditlab.jacobian([model("a"), model("b")], names=("same", "same"), **QUICK)
    assert refused([]) == "jacobian: expected at least 1 model, found 0"
    # Without sigmas each has its own default level; here they are too far apart.
    cosine = model("cosine")
    cosine.source_denoiser = VPDenoiser(cosine.source_denoiser.module, make_schedule("cosine", 20))
    with pytest.raises(Incompatible, match=r"the same noise levels.*give `sigmas`"):
        ditlab.jacobian([function("mine"), cosine])


def reported(models, context: ReportContext, reporter: Reporter | None = None):
    return analysis("jacobian").for_report(open_models(models), context, reporter or Reporter())


def test_a_report_shows_what_is_saved(model, function, tmp_path, counted, undrawn):
    models = [model("a"), model("b"), function("mine")]
    assert reported(models, ReportContext()) == []
    assert counted == []
    ditlab.jacobian(models, **QUICK, out=tmp_path / "out")
    assert len(counted) == 3
    # A function may have changed since it was measured, so it is not shown.
    [shown] = reported(models, ReportContext())
    assert shown.labels == ("a", "b")
    assert len(counted) == 3
    assert len(shown.gaps()) == 2
    assert {"jacobian-vectors", "jacobian-denoised", "jacobian-spectra"} <= set(shown.drawings())
    # With hidden images there is no image, and no vector, which may draw one.
    [hidden] = reported(models, ReportContext(hide_training_images=True))
    assert {"jacobian-spectra", "jacobian-sensitivity"} <= set(hidden.drawings())
    assert not {"jacobian-vectors", "jacobian-denoised"} & set(hidden.drawings())


def test_a_report_measures_only_if_asked_and_groups_by_settings(model, tmp_path, counted, undrawn):
    models = [model("a"), model("b")]
    ditlab.jacobian(models[0], **QUICK, out=tmp_path / "out")
    del counted[:]
    shown = reported(models, ReportContext(measure=frozenset({"jacobian"})))
    assert counted == [((0,), (saved(models[1]).points[0].sigma,))]
    assert saved(models[1]).config == JacobianConfig()
    # The two were measured at different noise levels, so each has a section of its own.
    assert [comparison.labels for comparison in shown] == [("a",), ("b",)]
    assert [comparison.section({}, i).id for i, comparison in enumerate(shown, 1)] == ["jacobian", "jacobian-2"]
    # Settings that the report gives are measured, whatever is saved.
    del counted[:]
    given = {"jacobian": JacobianConfig(sigmas=(0.5,), show=(0, 1, 4))}
    [shown] = reported(models, ReportContext(measure=frozenset({"jacobian"}), configs=given))
    assert counted == [((0,), (0.5,))]
    assert shown.labels == ("a", "b")


def test_a_report_does_not_show_other_weights_or_damaged_results(model, tmp_path, undrawn):
    models = [model("a"), model("b")]
    ditlab.jacobian(models, **QUICK, out=tmp_path / "out")
    with torch.no_grad():
        next(models[0].source_denoiser.module.parameters()).add_(0.1)
    [shown] = reported(models, ReportContext())
    assert shown.labels == ("b",)
    (models[1].path / "analysis" / "jacobian.npz").write_bytes(b"no archive")
    told = Recorder()
    assert reported(models, ReportContext(), told) == []
    assert any("expected the arrays" in note for note in told.notes)
