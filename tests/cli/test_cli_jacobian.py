"""The verb `ditlab jacobian`: flags, tables, JSON, errors. tests/analyses/jacobian has what it measures."""

from __future__ import annotations

import json
import re

import pytest

from ditlab.analyses.jacobian.comparison import CAUTION
from ditlab.analyses.jacobian.result import JacobianResult

QUICK = ["--show", 0, 1, "--sigmas", 0.5, "--top", 4]


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures are put together but not rendered."""
    monkeypatch.setattr("ditlab.pages.drawing.save_drawings", lambda drawings, folder: [])


def test_json_tables_and_sentences(ditlab, place, plain, tmp_path, undrawn):
    run = place.copy(plain)
    words = ["jacobian", run, *QUICK, "--out", tmp_path / "out", "--names", "a", "--checkpoint", 4, "--raw"]
    done = ditlab(*words, "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert [(g["label"], g["n"]) for g in record["groups"]] == [("a", 20)]
    assert (record["kind"], record["top"], record["levels"]) == ("jacobian-comparison", 4, [0.5])
    about = JacobianResult.load(run / "analysis" / "jacobian.json").about
    assert (about.label, about.step, about.ema) == ("a", 4, False)
    done = ditlab(*words)
    headings = [line.split() for line in done.out.splitlines() if line.split()[:1] == ["model"]]
    assert headings
    assert all(heading[-2:] == ["r_hom", "r_lin"] for heading in headings)
    assert "1 of 1 Jacobians were measured before and are reused" in done.out
    assert "r_hom: |f - J x| / |f|" in done.out
    assert "64" not in done.out
    assert CAUTION in done.out
    assert re.search(r"^a, N = 20, σ = 0\.5: r_hom [\d.e-]+, r_lin [\d.e-]+:", done.out, re.MULTILINE)


def test_flags_of_earlier_versions(ditlab, place, plain, tmp_path, undrawn):
    run = place.copy(plain)
    words = ["--show", 0, "--steps", 100, "--top", 2, "--labels", "a", "--step", 4, "--out", tmp_path / "out"]
    done = ditlab("jacobian", run, *words)
    assert done.status == 0, done.err
    result = JacobianResult.load(run / "analysis" / "jacobian.json")
    assert (result.config.timesteps, result.about.label, result.about.step) == ((100,), "a", 4)


def test_errors_name_flags(refused, plain):
    for words, says in (
        (["--images", 20], "model plain: jacobian: --images must be places from 0 to 19, found 20"),
        (["--sigmas", 1, "--timesteps", 3], "jacobian: expected --sigmas or --timesteps, found both"),
        (["--right", "--decomposition", "eig"], "jacobian: --right needs the --decomposition svd, found eig"),
        (["--top", 193], "--top must be 1 to 190"),
        (["--checkpoint", 5], "no checkpoint of step 5"),
    ):
        assert says in refused("jacobian", plain, *words), words


def test_unknown_choices_are_refused_by_name(ditlab, plain):
    for words in (["--target", "x1"], ["--decomposition", "lu"], ["--images-from", "samples"]):
        assert ditlab("jacobian", plain, *words).status == 2
