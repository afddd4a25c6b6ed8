"""`ditlab study`: what it lists and plans, and what it refuses before anything is written."""

from __future__ import annotations

import json

import pytest

from ditlab.studies.an2024 import STUDIES


def test_list(ditlab):
    done = ditlab("study", "list")
    assert done.status == 0
    for name in STUDIES:
        assert name in done.out
    records = json.loads(ditlab("study", "list", "--json").out)["studies"]
    assert {(r["study"], r["scale"]): r["cells"] for r in records}["an2024/fig6", "paper"] == 36
    assert all(r["cost"] and r["question"] for r in records)


@pytest.mark.parametrize("verb", ["study list", "study run", "study status", "study report"])
def test_help(ditlab, verb):
    done = ditlab(*verb.split(), "--help")
    assert done.status == 0
    assert f"ditlab {verb}" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("study", "'study' needs one of: study list, study run, study status, study report; found nothing"),
        ("study run an2024/fig7", "unknown study 'an2024/fig7' (nearest: an2024/fig"),
        ("study status nonsense", "unknown study 'nonsense' ("),
        ("study report nonsense", "unknown study 'nonsense' ("),
        ("study run an2024/fig6 --scale big", "unknown scale of an2024/fig6 'big' ("),
        ("study status an2024/fig6 --scale big", "unknown scale of an2024/fig6 'big' ("),
        ("study report an2024/fig6 --scale big", "unknown scale of an2024/fig6 'big' ("),
        ("study report an2024/fig6 --scale small small", "study report: expected different values of --scale, found ["),
        ("study run an2024/fig6 --scale paper", "scale paper: expected --data with a source of images"),
        (
            "study report an2024/fig6 --scale paper",
            "expected a plan at studies/an2024-fig6-paper/plan.json, found none",
        ),
        (
            "study status an2024/fig6",
            "expected a plan at studies/an2024-fig6-small/plan.json, found none; `ditlab study run` makes it",
        ),
        ("study run an2024/fig6 --n", "expected at least one value of --n, found none: the study is empty"),
        ("study run an2024/fig6 --seeds", "expected at least one value of --seeds, found none: the study is empty"),
        ("study run an2024/fig6 --attention", "expected at least one value of --attention, found none"),
        ("study run an2024/fig6 --n 10 10", "expected different values of --n, found 10, 10"),
        ("study run an2024/fig6 --network dit-nona/1", "unknown preset 'dit-nona/1' (nearest: dit-nano/1"),
        ("study run an2024/fig6 --data folder:none", "folder source: expected a folder at none, found nothing"),
        ("study run an2024/fig6 --parallel 0", "--parallel: expected at least 1, found 0"),
        ("study run an2024/fig6 --device tpu", "--device: expected 'cpu', 'cuda' or 'cuda:N', found 'tpu'"),
        ("study run an2024/fig6 --set lr", "study run: expected --set with NAME=VALUE, found 'lr'"),
        ("study run an2024/fig6 --scale smoke --data DIGITS --set lr=1", "unknown study setting 'lr' ("),
        ("study run an2024/fig6 --scale smoke --data DIGITS --steps 0", "training: steps must be at least 1, found 0"),
        ("study run an2024/fig6 --scale smoke --data DIGITS --n 5000", "N = 5000 train images asked for"),
        ("study run an2024/fig6 --scale smoke --data DIGITS --attention 4,g,g", "expected an odd size (3, 5, 7, ...)"),
        (
            "study run an2024/fig6 --scale smoke --data DIGITS --attention 3,g",
            "one entry for each of 3 layers, found 2",
        ),
    ],
)
def test_bad_input(refused, place, words, message):
    assert message in refused(*(str(place.images) if word == "DIGITS" else word for word in words.split()))


def test_a_plan_without_training(ditlab, place, tmp_path):
    words = ["an2024/fig6", "--scale", "smoke", "--out", "here"]
    more = ["--data", place.images, "--n", 10, "--seeds", 0, 1, "--attention", "local"]
    done = ditlab("study", "run", *words, *more, "--plan", "--json")
    assert done.status == 0, done.err
    assert [(c["n"], c["seed"], c["state"]) for c in json.loads(done.out)["cells"]] == [
        (10, 0, "empty"),
        (10, 1, "empty"),
    ]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["an2024-fig6-smoke"]
    status = ditlab("study", "status", *words, "--json")
    assert json.loads(status.out) == json.loads(done.out)


def test_a_plan_on_record_is_kept(ditlab, place, tmp_path, monkeypatch):
    """--plan leaves it alone; another part of the grid is added to it; other settings keep the earlier one beside."""
    monkeypatch.setattr("ditlab.studies.study.run_jobs", lambda *_, **__: [])
    folder = tmp_path / "here" / "an2024-fig6-smoke"
    words = ["study", "run", "an2024/fig6", "--scale", "smoke", "--out", "here", "--data", place.images]

    def run(*more: object) -> str:
        done = ditlab(*words, *more)
        assert done.status == 0, done.err
        return " ".join(done.out.split())

    def places() -> list[tuple]:
        cells = json.loads((folder / "plan.json").read_text())["cells"]
        return [(c["seed"], c["n"], c["attention"]) for c in cells]

    run("--n", 10, "--attention", "local", "--seeds", 1)
    assert places() == [(1, 10, "local")]
    before = (folder / "plan.json").read_bytes()
    assert "stays as it is" in run("--plan")
    assert (folder / "plan.json").read_bytes() == before
    assert "the study's plan has 3 trials" in run("--n", 20, "--seeds", 0)
    assert places() == [(0, 20, "global"), (0, 20, "local"), (1, 10, "local")]
    command = json.loads((folder / "plan.json").read_text())["command"]
    run("--n", 20, "--seeds", 0, "--attention", "global")
    assert places() == [(0, 20, "global"), (0, 20, "local"), (1, 10, "local")]
    assert json.loads((folder / "plan.json").read_text())["command"] == command
    # Two of the twelve places between are empty, and the page is made all the same.
    assert ditlab("study", "report", "an2024/fig6", "--scale", "smoke", "--out", "here").status == 0
    before = (folder / "plan.json").read_bytes()
    said = run("--n", 10, "--seeds", 0, "--steps", 70)
    assert "WARNING: the plan of an2024/fig6 at scale smoke changed" in said
    assert places() == [(0, 10, "global"), (0, 10, "local")]
    assert (folder / "plan-previous.json").read_bytes() == before
    (folder / "plan.json").write_text("{")
    assert "WARNING" in run("--n", 10, "--seeds", 0)
