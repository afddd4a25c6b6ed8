"""Attention maps and token pickers of a study's page: of which runs, kept for when those are gone, without real images."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from ditlab.cli.main import main
from ditlab.studies.an2024 import STUDIES
from ditlab.studies.grid import Study

pytestmark = pytest.mark.slow

REPORT = ("study", "report", "tiny/maps", "--scale", "smoke", "--out", "out")
FIGURES = Path("out") / "tiny-maps-smoke" / "figures"
REAL = "the first held-out image"


@pytest.fixture(scope="session")
def study(tiny) -> Study:
    """Global attention at two N, one seed, with attention measured."""
    base = tiny.scale("smoke")
    scale = replace(
        base,
        attention={"global": "global"},
        n=(10, 20),
        seeds=(0,),
        settings={**base.settings, "training.steps": 20, "training.eval_every": 20},
        measured={"attention": {"images": 2}},
    )
    return replace(
        tiny, name="tiny/maps", scales=dict.fromkeys(tiny.scales, scale), analyses=("attention",), published=""
    )


@pytest.fixture(scope="session")
def trained(study, tmp_path_factory) -> Path:
    """A folder in which it was run; not to be changed."""
    folder = tmp_path_factory.mktemp("maps")
    words = ["study", "run", study.name, "--scale", "smoke", "--out", "out", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setitem(STUDIES, study.name, study)
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            main(words)
    assert ended.value.code == 0
    return folder


@pytest.fixture
def folder(trained, study, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be changed."""
    monkeypatch.setitem(STUDIES, study.name, study)
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def report(ditlab, folder):
    """`report(...)` makes the page; what was said, and the page."""

    def make(*words: str) -> tuple[str, str]:
        done = ditlab(folder, *REPORT, *words)
        assert done.status == 0, done.err
        return done.out, (folder / "out" / "tiny-maps-smoke" / "report.html").read_text()

    return make


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / FIGURES).glob("attention-maps*")}


def maps(page: str) -> int:
    """How many pictures of attention maps a page has."""
    return page.count("Attention maps by layer for ")


def pickers(page: str) -> list[str]:
    """The titles of a page's token pickers."""
    return re.findall(r'<figcaption class="picker-title">(.*?)</figcaption>', page)


def test_no_real_image_is_shown_where_they_are_hidden(folder, report):
    """Whatever an earlier report showed, and whether or not the runs are still there."""
    _, page = report()
    shown = {path.name: path.read_bytes() for path in (folder / FIGURES).glob("attention-maps*.png")}
    assert maps(page) > 0
    # One for the smallest and one for the largest N.
    assert pickers(page) == [f"N = {n}, seed 0: {REAL}" for n in (10, 20)]
    runs = folder / "out" / "runs"
    runs.rename(folder / "aside")
    said, page = report("--hide-training-images")
    assert "no attention maps of global attention" in said
    assert "no token picker" in said
    assert maps(page) == 0
    assert pickers(page) == []
    assert not any(name.endswith(".png") for name in kept(folder))
    (folder / "aside").rename(runs)
    said, page = report("--hide-training-images")
    assert maps(page) > 0
    assert REAL not in page
    sample = "a sample drawn by global attention at N = 20"
    assert pickers(page) == [f"N = {n}, seed 0: {sample}" for n in (10, 20)]
    for name, content in shown.items():
        assert (folder / FIGURES / name).read_bytes() != content
    # What shows no image may be shown again when the runs are gone, hidden or not.
    shutil.rmtree(runs)
    for words in ((), ("--hide-training-images",)):
        said, page = report(*words)
        assert "attention maps of global attention are those drawn before" in said
        assert maps(page) > 0


def test_kept_maps_of_other_runs_are_not_shown(folder, report):
    """The plan now has one N less: the kept picture shows rows that its caption does not speak of."""
    _, page = report()
    count = maps(page)
    (folder / "out" / "runs").rename(folder / "aside")
    assert maps(report()[1]) == count > 0
    path = folder / "out" / "tiny-maps-smoke" / "plan.json"
    plan = json.loads(path.read_text())
    plan["cells"] = [trial for trial in plan["cells"] if trial["n"] == 10]
    plan["axes"]["n"] = [10]
    path.write_text(json.dumps(plan))
    said, page = report()
    assert "no attention maps of global attention" in said
    assert maps(page) == 0


def test_runs_without_their_images_still_have_a_page(folder, report):
    shutil.rmtree(folder / "image-sets")
    said, page = report()
    assert "note: no token picker: image set: expected a folder" in said
    assert pickers(page) == []
