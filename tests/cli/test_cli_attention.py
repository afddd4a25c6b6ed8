"""`ditlab attention`: files, table, JSON, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from torch import nn

from ditlab.analyses.attention import map_figures as attention_figures
from ditlab.analyses.attention.maps import measure_attention
from ditlab.analyses.attention.result import LocalityResult
from ditlab.models.run import Run


@pytest.fixture
def runs(place, plain):
    return [place.copy(plain), place.copy(place.trained("local", "--network.attention", "3,3"))]


def test_two_runs(ditlab, runs, tmp_path):
    out = tmp_path / "out"
    done = ditlab("attention", *runs, "--images", 4, "--token", "2,3", "--levels", 0.5, 2, "--out", out, "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert [(g["label"], g["n"]) for g in result["groups"]] == [("global", 20), ("3,3", 20)]
    assert result["groups"][1]["mean"]["mass 1"] == pytest.approx(1, abs=1e-5)
    names = {
        "attention-comparison.json", "attention-locality.png", "attention-maps-sigma0.5.png",
        "attention-maps-sigma2.png", "attention-patterns.png",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == names
    assert sorted(result["files"]) == sorted(str(out / name) for name in names)
    for name in names - {"attention-comparison.json"}:
        with Image.open(out / name) as image:
            assert image.width > 300
    for run, plan in zip(runs, ("global", "window 3"), strict=True):
        assert sorted(p.name for p in (run / "analysis").iterdir()) == ["attention.json", "attention.npz"]
        found = LocalityResult.load(run / "analysis" / "attention.json")
        assert (found.levels, found.layers, found.heads, found.grid) == ((0.5, 2.0), (1, 2), 2, (8, 8))
        assert [pattern.name for pattern in found.patterns] == [plan] * 2
        assert (found.about.step, found.about.ema) == (6, True)
        assert found.about.settings["images_from"] == "test"


def test_the_table_is_said(ditlab, runs, tmp_path):
    words = [
        "--images",
        2,
        "--layers",
        2,
        "--steps",
        300,
        "--heads",
        1,
        "--out",
        tmp_path / "out",
        "--labels",
        "a",
        "b",
    ]
    done = ditlab("attention", *runs, *words, "--step", 4, "--raw")
    assert done.status == 0, done.err
    assert "Locality of attention, means over 1 layers, 2 images and noise levels 1.2" in done.out
    assert "Mean attention distance at N = 20: b minus a" in done.out
    found = LocalityResult.load(runs[1] / "analysis" / "attention.json")
    assert (found.timesteps, found.layers, found.about.label) == ((300,), (2,), "b")
    assert (found.about.step, found.about.ema) == (4, False)


def test_seeds_are_averaged_and_the_first_is_drawn(ditlab, runs, place, tmp_path, monkeypatch):
    """Shuffles have test images of their own, so that a picture of one must not stand beside the maps of another."""
    drawn = []
    draw = attention_figures.attention_map_figure
    monkeypatch.setattr(
        attention_figures, "attention_map_figure", lambda rows, **more: drawn.append((rows, more)) or draw(rows, **more)
    )
    other = place.copy(place.trained("seed1", "--seed", 1))
    words = ["--images", 2, "--levels", 1, "--layers", 1, "--out", tmp_path / "out"]
    done = ditlab("attention", runs[0], other, *words, "--labels", "a", "a", "--json")
    assert done.status == 0, done.err
    [group] = json.loads(done.out)["groups"]
    assert (group["runs"], group["std"]["distance"] > 0) == ([runs[0].name, other.name], True)
    local = place.copy(place.trained("local1", "--network.attention", "3,3", "--seed", 1))
    done = ditlab("attention", runs[0], other, runs[1], local, *words, "--labels", "a", "a", "b", "b")
    assert done.status == 0, done.err
    done = ditlab("attention", other, runs[0], runs[1], local, *words, "--labels", "a", "a", "b", "b")
    assert done.status == 0, done.err
    assert [[name for name, _ in rows] for rows, _ in drawn] == [["a"], ["a", "b"], ["a", "b"]]
    # The last call's first runs of a and b are of seeds 1 and 0.
    assert [more["picture"] is None for _, more in drawn] == [False, False, True]


@pytest.mark.parametrize("source", ["train", "samples"])
def test_other_images(ditlab, runs, tmp_path, source):
    words = ["--images", 3, "--levels", 1, "--image", 2, "--images-from", source, "--out", tmp_path / "out", "--json"]
    done = ditlab("attention", runs[0], *words)
    assert done.status == 0, done.err
    found = LocalityResult.load(runs[0] / "analysis" / "attention.json")
    assert (found.images, found.about.settings["images_from"]) == (3, source)


def test_fewer_images_than_asked_for_are_said(ditlab, runs, tmp_path):
    done = ditlab("attention", runs[0], "--images", 500, "--batch-size", 25, "--levels", 1, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert "note: " in done.out
    assert "Only 20 images exist where 500 were asked for." in done.out


def test_a_classes_run_is_shown_its_labels(ditlab, place, tmp_path):
    run = place.copy(place.trained("classes", "--conditional"))
    assert ditlab("attention", run, "--images", 4, "--levels", 1, "--out", tmp_path / "out").status == 0
    found = LocalityResult.load(run / "analysis" / "attention.json")
    opened = Run.open(run)
    images, labels = opened.pictures("test", 4)
    with_labels, without = (
        measure_attention(opened.denoiser(), images, found.config, labels=chosen).distance for chosen in (labels, None)
    )
    assert np.abs(found.distance - with_labels).max() <= 2e-7
    assert np.abs(found.distance - without).max() > 2e-6


def test_bad_input(refused, plain):
    for words, says in (
        (["--layers", 3], "expected layers from 1 to 2, found 3"),
        (["--layers", 0], "counted from 1, found [0]"),
        (["--heads", 3], "expected heads from 1 to 2, found 3"),
        (["--token", "8,0"], "expected a token from 0,0 to 7,7 (row,column), found 8,0"),
        (["--token", "8"], "--token: expected ROW,COLUMN such as 8,8, found '8'"),
        (["--image", 16], "--image: expected 0 to 15, one of --images, found 16"),
        (["--images", 40, "--image", 30], "--image: expected one of the 20 images that exist, found 30"),
        (["--steps", 1000], "expected steps from 0 to 999, found 1000"),
        (["--levels", 9999], "expected a noise level sigma from 0.0100005 to"),
        (["--levels", 1, "--steps", 3], "expected levels or steps, found both"),
        (["--images", 1], "images must be at least 2, found 1"),
        (["--labels", "a", "b"], "--labels: expected 1 labels, one a run, found 2"),
        (["--step", 5], "no checkpoint of step 5"),
    ):
        assert says in refused("attention", plain, *words)
    assert "expected at least one run's folder, found none" in refused("attention")
    assert "named twice" in refused("attention", plain, plain)


def test_a_run_without_attention(refused, plain, monkeypatch):
    class Convolution(nn.Conv2d):
        in_shape = (1, 8, 8)

    monkeypatch.setattr(Run, "network", lambda self, checkpoint, *, ema=True: Convolution(1, 2, 3, padding=1))
    says = refused("attention", plain)
    assert says.startswith(f"run {plain}: attention: expected a network with attention layers, found Convolution")


def test_runs_that_have_other_layers_or_another_grid(refused, place, plain):
    deep = place.trained("deep", "--network.depth", "3")
    says = refused("attention", plain, deep)
    assert "expected runs with the same layers and grid, found layers 1, 2 over 8x8 tokens" in says
    coarse = place.trained("coarse", preset="dit-nano/2")
    assert "layers 1, 2 over 4x4 tokens" in refused("attention", plain, coarse)


def test_runs_that_cannot_be_told_apart(refused, place, plain):
    """Said before anything is measured, like all the rest."""
    local = place.trained("local", "--network.attention", "3,3")
    says = refused("attention", plain, local, "--labels", "same", "same")
    assert says == ("attention: 'plain' and 'local' are both 'same' with N = 20 and seed 0; give them different labels")


def test_runs_of_different_splits(refused, place, plain):
    other = place.copy(plain)
    record = json.loads((other / "config.json").read_text())
    record["split"]["family"] = "1" * 64
    (other / "config.json").write_text(json.dumps(record))
    assert "have different splits" in refused("attention", plain, other)
