"""What `import ditlab` offers: the script of the example, the same verbs as the command line, no console."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

import ditlab
from ditlab import api
from ditlab.cli.main import verbs

EXAMPLE = Path(__file__).parents[1] / "examples" / "python_api.py"


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLE))
    samples, gap, jacobian = names["samples"], names["gap"], names["jacobian"]
    assert samples.images.shape == (4, 8, 8, 3)
    assert str(samples.images.dtype) == "uint8"
    again = ditlab.open("runs/global").sample(seeds=range(4), sampler="ddim", steps=10)
    assert again.images.tolist() == samples.images.tolist()
    assert {"psnr-curves", "gap-bars"} <= gap.figures().keys()
    assert [group["label"] for group in gap.to_json()["groups"]] == ["g*4", "3*4"]
    assert "<table>" in gap._repr_html_()
    # "shrink" multiplies by 1 / (1 + 3 sigma^2): all singular values of its Jacobian are that number.
    shrink = jacobian.results[1].points[0]
    assert shrink.sigma == pytest.approx(0.3)
    assert "shrink" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "runs/global/analysis/psnr-gap.json").is_file()
    printed = capsys.readouterr()
    assert "g*4" in printed.out
    assert not printed.err


def test_the_example_does_not_use_the_command_line():
    imported = {
        name
        for node in ast.walk(ast.parse(EXAMPLE.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert not any(name.startswith("ditlab.cli") for name in imported)


CALLS = {
    "data prepare": "prepare",
    "data encode": "encode",
    "data info": None,  # an `ImageSet` shows itself
    "study list": "study",
    "study run": "study",
    "study status": "study",
    "study report": "study",
}
"""Verb -> its call, where the name is not the same."""


def test_every_verb_is_a_call():
    for verb in verbs():
        name = CALLS.get(verb, verb.replace("-", "_"))
        if name is not None:
            assert callable(getattr(ditlab, name)), verb
            assert name in ditlab.__all__
            assert name in dir(ditlab)


def test_the_public_names_exist():
    for name in ditlab.__all__:
        assert getattr(ditlab, name) is not None
    assert set(api.__all__) <= set(ditlab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ditlab.nonsense


def test_a_setting_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ditlab.DitlabError, match=r"unknown setting of psnr-gap 'imagse' \(nearest: images"):
        ditlab.psnr_gap("runs/nothing", imagse=3)
    with pytest.raises(ditlab.DitlabError, match=r"unknown setting of complexity 'sizes' \(nearest: size"):
        ditlab.complexity("dit-nano/1", sizes=(8,))
    with pytest.raises(ditlab.DitlabError, match="unknown preset 'dit-nono/1'"):
        ditlab.train("dit-nono/1", "photos")
