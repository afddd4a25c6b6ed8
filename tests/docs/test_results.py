"""What the README and results/ say was measured stands in the files that the commands wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "results" / "quickstart-seeds"


def test_readme_repeats_the_measured_sentences():
    text = (ROOT / "README.md").read_text()
    block = text[text.index("<!-- quickstart-result -->") : text.index("<!-- /quickstart-result -->")]
    said = [line.removeprefix("- ") for line in block.splitlines() if line.startswith("- ")]
    assert said == json.loads((SEEDS / "summary.json").read_text())["sentences"]


@pytest.mark.parametrize("kind", ["global", "local"])
def test_sentences_are_the_means_of_the_results(kind):
    gaps = [
        json.loads((SEEDS / "psnr-gap" / f"{kind}-seed{seed}.json").read_text())["averages"]["mse_mean"]["gap"]
        for seed in range(3)
    ]
    sentence = json.loads((SEEDS / "summary.json").read_text())["sentences"][0 if kind == "global" else 1]
    assert sentence.startswith(kind)
    assert f"gap {np.mean(gaps):.2f} dB, std {np.std(gaps, ddof=1):.2f}" in sentence
