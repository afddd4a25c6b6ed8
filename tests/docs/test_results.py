"""What the README and results/ say was measured stands in the files that the commands wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from ditlab.studies.an2024 import STUDIES
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store
from ditlab.studies.study_page import StudyPage

ROOT = Path(__file__).parents[2]
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
def test_what_is_said_of_faces_follows_from_the_committed_cells(name):
    folder = FACES / f"{name.replace('/', '-')}-small"
    page = StudyPage(STUDIES[name], [Plan.load(folder / "plan.json")], Store(FACES))
    assert all(cell.standing.state == "done" for panel in page.panels for cell in panel.cells)
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
