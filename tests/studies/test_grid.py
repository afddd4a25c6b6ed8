"""Studies resolve to trials, or are refused before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare
from ditlab.errors import DitlabError
from ditlab.studies.an2024 import FIG4, FIG6, STUDIES
from ditlab.studies.grid import SCALES, Overrides, Plan, apply_overrides, data_name, resolve


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> ImageSet:
    return prepare("digits", tmp_path_factory.mktemp("sets") / "digits", size=8)


def planned(digits, study=FIG6, **overrides):
    return resolve(
        study, "smoke", apply_overrides(study, "smoke", Overrides(**overrides)), {"digits": digits}, "ditlab x"
    )


def test_axes_span_the_trials(digits):
    plan, trials = planned(digits, n=(50, 10), seeds=(1, 0), attention=("local", "3*3"))
    assert plan.axes == {
        "data": ["digits"], "network": ["dit-nano/1"], "attention": ["local", "3*3"], "n": [10, 50], "seed": [0, 1]
    }  # fmt: skip
    assert plan.plans == {"local": "3,5,g", "3*3": "3*3"}
    # Whole seeds first, so that a study that is cut short has pairs.
    assert [(c.seed, c.n, c.attention) for c in trials] == [
        (s, n, a) for s in (0, 1) for n in (10, 50) for a in ("local", "3*3")
    ]
    assert len({c.hash for c in trials}) == 8
    assert [c.config.network.attention for c in trials[:2]] == ["3,5,g", "3*3"]
    assert plan.analyses.keys() == {"psnr-gap", "attention"}
    assert [place["hash"] for place in plan.trials] == [c.hash for c in trials]


def test_studies_share_trials(digits):
    (_, six), (_, four) = planned(digits), planned(digits, FIG4)
    assert {c.hash for c in four} == {c.hash for c in six if c.attention == "global"}


def test_settings_on_top(digits):
    _, trials = planned(digits, settings={"training.steps": 9, "network.width": 16})
    assert {(c.config.training.steps, c.config.network.width) for c in trials} == {(9, 16)}


def test_a_plan_is_read_back(digits, tmp_path):
    plan, _ = planned(digits)
    path = plan.save(tmp_path)
    assert Plan.load(path) == Plan.load(path)
    assert Plan.load(path).to_json() == json.loads(path.read_text())
    record = json.loads(path.read_text())
    for broken in ({**record, "more": 1}, {**record, "cells": [{"hash": "ab"}]}, {**record, "kind": "other"}):
        path.write_text(json.dumps(broken))
        with pytest.raises(DitlabError, match=r"plan\.json"):
            Plan.load(path)
    path.write_text("{")
    with pytest.raises(DitlabError, match="expected a JSON result"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n": ()}, "expected at least one value of `n`, found none: the study is empty"),
        ({"seeds": ()}, "expected at least one value of `seeds`, found none: the study is empty"),
        ({"attention": ()}, "expected at least one value of `attention`, found none"),
        ({"data": ()}, "expected at least one value of `data`, found none"),
        ({"networks": ()}, "expected at least one value of `network`, found none"),
        ({"n": (5, 5)}, "expected different values of `n`, found 5, 5"),
        ({"n": (0, 5)}, "expected numbers of training images of at least 1, found 0"),
        ({"networks": ("dit-nano/3",)}, "unknown preset 'dit-nano/3'"),
        ({"attention": ("locl",)}, "unknown attention plan 'locl'"),
        ({"n": (2000,)}, "N = 2000 train images asked for"),
        ({"settings": {"training.stps": 1}}, "unknown study setting 'training.stps'"),
    ],
)
def test_studies_that_cannot_be(digits, overrides, message):
    with pytest.raises(DitlabError, match=message.replace("(", r"\(")):
        planned(digits, **overrides)


def test_the_paper_needs_images_and_names_are_known():
    with pytest.raises(DitlabError, match="expected `data` with a source of images"):
        apply_overrides(FIG6, "paper", Overrides())
    with pytest.raises(DitlabError, match="unknown scale of an2024/fig6 'large'"):
        FIG6.scale("large")


def test_every_study_has_every_scale():
    for name, study in STUDIES.items():
        assert study.name == name
        assert tuple(study.scales) == SCALES
        for scale in study.scales.values():
            assert scale.cost
            changed = replace(scale, measured={"psnr-gap": {"batch_size": 3}})
            assert "batch_size" not in changed.stored_settings("psnr-gap")


def test_short_names_of_sources():
    assert data_name("mosaic:images/celeba32") == "celeba32"
    assert data_name("hub:someone/cats") == "cats"
    assert data_name("photos") == "photos"
    assert data_name("sets/photos/") == "photos"
