"""What the README and results/ say was measured stands in the files that the commands wrote."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ditlab.studies.an2024 import STUDIES
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store
from ditlab.studies.study_page import StudyPage

ROOT = Path(__file__).parents[2]
JACOBIAN = ROOT / "results" / "jacobian"
SEEDS = ROOT / "results" / "quickstart-seeds"
FACES = ROOT / "results" / "faces"


def block(name: str) -> list[str]:
    """The listed sentences of a block of the README."""
    text = (ROOT / "README.md").read_text()
    inside = text[text.index(f"<!-- {name} -->") : text.index(f"<!-- /{name} -->")]
    return [line.removeprefix("- ") for line in inside.splitlines() if line.startswith("- ")]


def test_readme_repeats_the_measured_sentences():
    assert block("quickstart-result") == json.loads((SEEDS / "summary.json").read_text())["sentences"]


def test_readme_repeats_what_was_seen_on_faces():
    assert block("faces-result") == json.loads((FACES / "an2024-fig6-small" / "table.json").read_text())["sentences"]


@pytest.mark.parametrize("name", ["an2024/fig6", "an2024/fig4"])
def test_what_is_said_of_faces_follows_from_the_committed_trials(name):
    folder = FACES / f"{name.replace('/', '-')}-small"
    page = StudyPage(STUDIES[name], [Plan.load(folder / "plan.json")], Store(FACES))
    assert all(trial.status.state == "done" for facet in page.facets for trial in facet.trials)
    assert page.sentences() == json.loads((folder / "table.json").read_text())["sentences"]


@pytest.mark.parametrize("kind", ["global", "local"])
def test_sentences_are_the_means_of_the_results(kind):
    gaps = [
        json.loads((SEEDS / "psnr-gap" / f"{kind}-seed{seed}.json").read_text())["averages"]["mse_mean"]["gap"]
        for seed in range(3)
    ]
    sentence = json.loads((SEEDS / "summary.json").read_text())["sentences"][0 if kind == "global" else 1]
    assert sentence.startswith(kind)
    assert f"gap {np.mean(gaps):.2f} dB, std {np.std(gaps, ddof=1):.2f}" in sentence


@pytest.mark.parametrize("name", ["cifar10-classes", "faces-latents"])
def test_what_results_say_of_single_runs(name):
    folder = ROOT / "results" / name
    means = json.loads((folder / "psnr-gap.json").read_text())["averages"]["mse_mean"]
    said = f"train {means['train']:.2f} dB, test {means['test']:.2f} dB, gap {means['gap']:.2f} dB"
    assert said in " ".join((ROOT / "results" / "README.md").read_text().split())
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    config = json.loads((folder / "config.json").read_text())["config"]
    assert last["step"] == config["training"]["steps"]


def jacobians(folder: str) -> dict[tuple[str, int], dict[str, float]]:
    """Mean numbers by label and N."""
    record = json.loads((JACOBIAN / folder / "jacobian-comparison.json").read_text())
    return {(group["label"], group["n"]): group["by_level"][0]["mean"] for group in record["groups"]}


def said() -> str:
    """All text of the results' page, lines joined."""
    return " ".join((ROOT / "results" / "README.md").read_text().split())


def test_the_table_of_jacobians_is_the_measured_one():
    columns = {
        "trace": ("trace", ".0f"),
        "asymmetry": ("asymmetry", ".2f"),
        "side 50 %": ("locality 0.5", ".1f"),
        "harmonic": ("harmonicity", ".2f"),
        "shuffled": ("harmonicity_shuffled", ".2f"),
        "spread": ("leading participation", ".2f"),
        "edges": ("leading edges", ".2f"),
        "nearest": ("best nearest", ".2f"),
        "others": ("best others", ".2f"),
        "r_hom": ("r_hom", ".2g"),
        "r_lin": ("r_lin", ".2g"),
    }
    text = (ROOT / "results" / "README.md").read_text()
    inside = text[text.index("<!-- jacobian-table -->") : text.index("<!-- /jacobian-table -->")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if "|" in line]
    assert lines[0] == ["run", "N", *columns]
    measured = jacobians("held-out")
    rows = [
        [label, f"{n:,}", *(format(mean[what], form) for what, form in columns.values())]
        for (label, n), mean in measured.items()
    ]
    assert lines[2:] == rows
    assert len(rows) == 8


def test_what_is_said_of_jacobians_in_words():
    held, text = jacobians("held-out"), said()
    many, few = ([held[kind, n]["harmonicity"] for kind in ("UNet", "bias-free")] for n in (1000, 10))
    assert f"{many[0]:.2f} (UNet) and {many[1]:.2f} (bias-free) at N = 1,000" in text
    assert f"and {few[0]:.2f} and {abs(few[1]):.2f} at N = 10" in text
    sides = [held["global", n]["locality 0.5"] for n in (10, 1000)]
    assert f"a square of {sides[0]:.1f} pixels at N = 10 and {sides[1]:.1f}" in text
    assert min(mean["r_hom"] for (kind, _), mean in held.items() if kind != "bias-free") >= 0.295
    assert "For all but the bias-free network r_hom >= 0.30" in " ".join((ROOT / "README.md").read_text().split())
    own = {kind: mean["best image"] for (kind, _), mean in jacobians("train").items()}
    words = ", ".join(f"{own[kind]:.2f} ({kind})" for kind in ("bias-free", "UNet", "global", "local"))
    assert f"with a correlation of {words}" in text
    natural, shuffled = jacobians("bf-cnn")["BF-CNN", 3762], jacobians("bf-cnn-shuffled")["BF-CNN", 3762]
    assert f"{natural['harmonicity']:.2f}, against {shuffled['harmonicity']:.2f} with the pictures' pixels" in text
    assert f"trace {shuffled['trace']:.0f} against {natural['trace']:.0f}" in text


def test_the_published_network_gains_what_is_said():
    text = said()
    for name, words in (("photos32", "brings 20.17 dB to {:.2f} dB"), ("faces32", "on 100 faces to {:.2f} dB")):
        record = json.loads((JACOBIAN / "bf-cnn" / f"psnr-{name}.json").read_text())
        found = record["averages"]["mse_mean"]["test"]
        assert words.format(found) in text
        assert found - 20.17 > 7
        assert record["input_psnr"] == pytest.approx([20.17], abs=0.01)


def test_what_is_said_of_two_subsets_and_agreement():
    text = said()
    for name in ("n10", "n1000"):
        mean = json.loads((JACOBIAN / "two-subsets" / f"{name}.json").read_text())["mean"]
        assert f"{mean['pair']:.2f}, and {mean['nearest']:.2f} with the closest training image" in text
    for name, kind in (("dit-global", "global with Wiener"), ("dit-local", "local with LS")):
        record = json.loads((JACOBIAN / "agreement" / f"{name}.json").read_text())
        best = max(np.median(one["correlation"]) for one in record["references"])
        assert f"{kind} {best:.2f}" in text


def test_no_picture_shows_what_a_network_of_few_faces_draws():
    assert not list((JACOBIAN / "n10").glob("*denoised*"))
    assert {path.stem for path in (JACOBIAN / "two-subsets").glob("*pairs*")} == {"n1000-pairs"}


def test_the_minutes_of_presets_are_the_measured_ones():
    rows = json.loads((ROOT / "results" / "preset-minutes.json").read_text())["rows"]
    page = (ROOT / "docs" / "training.md").read_text()
    shown = dict(re.findall(r"^\| `([\w/-]+)` \| [\d,]+ \| (\d+ \| \d+) \|$", page, re.MULTILINE))
    minutes = {(row["preset"], row["size"]): f"{row['minutes']:.0f}" for row in rows}
    assert shown == {name: f"{minutes[name, 16]} | {minutes[name, 32]}" for name, size in minutes if size == 16}
