"""Distances of an older definition are labelled, never set beside references of today, and never taken for new ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ditlab.analyses.attention.comparison import compare_locality
from ditlab.analyses.attention.result import OLDER, LocalityResult
from ditlab.analyses.attention.section import attention_tables
from ditlab.errors import Incompatible

RESULTS = Path(__file__).parents[3] / "results"
FACES = sorted((RESULTS / "faces" / "cells").glob("*/attention.json"))


@pytest.mark.parametrize("path", FACES[::6], ids=lambda path: path.parent.name)
def test_committed_results_of_the_older_definition(path):
    """The larger of rows and columns: all mass of a 3x3 window that is not at 0 is at 1, so distance = 1 - mass 0."""
    result = LocalityResult.load(path)
    assert result.outdated
    assert (
        result.uniform_distance == json.loads(path.read_text())["uniform_distance"] == pytest.approx(7.4458, abs=1e-4)
    )
    assert any("older definition" in note for note in result.notes)
    for place, pattern in enumerate(result.patterns):
        if getattr(pattern, "size", None) == 3:
            assert np.allclose(result.distance[:, place], 1 - result.mass[0][:, place], atol=1e-6)
    again = LocalityResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again.outdated
    assert again.to_json() == result.to_json()


def test_tables_name_the_definition_and_its_own_reference():
    (table, *_) = attention_tables(compare_locality([LocalityResult.load(FACES[0])]))
    assert table.caption.endswith(f"has a mean distance of 7.45 tokens; {OLDER}")


def test_results_of_today_are_not_labelled():
    (path,) = (RESULTS / "cifar10-classes").rglob("attention.json")
    result = LocalityResult.load(path)
    assert not result.outdated
    assert not any("older definition" in note for note in result.notes)


def test_two_definitions_are_not_compared():
    old = LocalityResult.load(FACES[0])
    new = replace(old, older_uniform=None, about=replace(old.about, name="new", label="new"))
    with pytest.raises(Incompatible, match="have different definitions of distance; measure both again"):
        compare_locality([old, new])
