"""The report shows what `agreement` and `two-subsets` have left, where it is of the newest checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ditlab.analyses.agreement.result import AgreementResult
from ditlab.analyses.two_subsets.measure import TwoSubsetsResult, closest
from ditlab.cli.left import agreement_pictures, left_behind, without_copies
from ditlab.models.run import Run

QUICK = ["--threads", 1, "--device", "cpu"]
AGREE = [*QUICK, "--references", "empirical-bayes", "ls", "--window", 3, "--images", 2, "--sampler-steps", 2]


@pytest.fixture
def runs(ditlab, place, plain):
    """Two runs on disjoint images, and what both verbs found of them."""
    pair = [place.copy(plain), place.copy(place.trained("twin", "--skip", 20))]
    assert ditlab("agreement", pair[0], *AGREE).status == 0
    assert ditlab("two-subsets", *pair, *QUICK, "--seeds", "0-3", "--sampler-steps", 2).status == 0
    return pair


@pytest.mark.slow
def test_both_sections(ditlab, runs, tmp_path):
    page = tmp_path / "page" / "report.html"
    done = ditlab("report", runs[0], "--samples", 0, *QUICK, "--out", page)
    assert done.status == 0, done.err
    text = page.read_text()
    assert "Beside closed-form denoisers" in text
    assert "Two runs that share no training image" in text
    assert "images are most like those of" in text
    figures = {path.stem for path in (page.parent / "figures").iterdir()}
    mine = {"agreement-1", "agreement-images-1", "two-subsets-1", "two-subsets-pairs-1"}
    assert mine <= figures
    # Figures of what is no longer there go.
    (runs[0] / "analysis" / "agreement.json").unlink()
    (runs[0] / "analysis" / "two-subsets.json").unlink()
    assert ditlab("report", runs[0], "--samples", 0, *QUICK, "--out", page).status == 0
    assert "closed-form denoisers" not in page.read_text()
    assert not mine & {path.stem for path in (page.parent / "figures").iterdir()}


def test_results_of_other_weights_are_passed_over(runs):
    run = Run.open(runs[0])
    found = left_behind([run], ["kind"], ["name"])
    [(_, alone)], [pair] = found.agreements, found.subsets
    assert (alone.about.name, alone.about.label, pair.about[0].name, pair.about[1].name) == (
        "name", "kind", "name", runs[1].name,
    )  # fmt: skip
    path = runs[0] / "analysis" / "agreement.json"
    record = json.loads(path.read_text())
    record["about"]["step"] = 4
    path.write_text(json.dumps(record))
    (runs[0] / "analysis" / "two-subsets.json").write_text("{}")
    found = left_behind([run], ["kind"], ["name"])
    assert (list(found.agreements), list(found.subsets)) == ([], [])


def test_what_is_nearly_a_training_image_is_blank_where_none_may_be_shown(runs):
    """A network that replays its images draws real ones, whoever else may be hidden."""
    run = Run.open(runs[0])
    result = AgreementResult.load(runs[0] / "analysis" / "agreement.json")
    assert result.images is not None
    replayed = replace(result, images=run.images.batch(run.split.train[:2]).numpy())
    hidden = agreement_pictures(run, replayed, hide_training_images=True)
    assert "empirical-bayes" not in hidden
    assert (hidden["network"] == 127).all()
    assert np.ptp(hidden["noise"]) > 0
    assert (agreement_pictures(run, replayed)["network"] != 127).any()
    assert np.ptp(agreement_pictures(run, result, hide_training_images=True)["network"]) > 0  # two noisy images

    pair = TwoSubsetsResult.load(runs[0] / "analysis" / "two-subsets.json")
    assert pair.pictures is not None
    copies = run.pixels_at(run.split.train[:4])
    near = closest(copies, [(copies, None)])
    replayed = replace(pair, pictures=np.stack([copies, pair.pictures[1]]), nearest=(near, pair.nearest[1]))
    shown = without_copies(replayed).pictures
    assert shown is not None
    assert (shown[0] == 127).all()
    assert (shown[1] == pair.pictures[1]).all()
