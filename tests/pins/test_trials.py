"""Pins of studies: the hash of every trial of the built-in studies at every scale, and of each preset's config."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

STUDIES = ("an2024/fig6", "an2024/fig4")
SCALES = ("smoke", "small", "paper")


@pytest.fixture(scope="session")
def planned(pins, tmp_path_factory):
    """Study and scale -> its plan.json and what was printed.

    The paper's scale is planned on 10,300 images of 13x13 pixels, so without its N = 100,000.
    """
    folder, count, side = tmp_path_factory.mktemp("plans"), 10_300, 13
    # The finalizer of splitmix64: no two images alike, and no generator whose draws might change.
    numbers = np.arange(1, count * side**2 // 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    images = numbers.astype("<u8").view(np.uint8)[: count * side**2].reshape(count, side, side, 1)
    np.save(folder / "many.npy", images)
    pins.run(folder, "data", "prepare", "array:many.npy", "many", "--size", side, "--color", "grey")
    plans = {}
    for study in STUDIES:
        for scale in SCALES:
            data = ("--data", "many", "--size", side, "--n", 1000, 10_000) if scale == "paper" else ()
            words = ("study", "run", study, "--scale", scale, "--plan", "--device", "cpu", *data)
            printed = pins.run(folder, *words)
            name = f"{study.replace('/', '-')}-{scale}"
            plan = json.loads((folder / "studies" / name / "plan.json").read_text())
            assert [cell["hash"] for cell in printed["cells"]] == [cell["hash"] for cell in plan["cells"]]
            assert pins.run(folder, "study", "status", study, "--scale", scale) == printed
            plans[name] = plan, printed
    return plans


def test_plans(planned, pins):
    """Everything that is resolved of a study, hashes of its trials among it, but for the command."""
    plans = {name: {key: plan[key] for key in plan if key != "command"} for name, (plan, _) in planned.items()}
    pins.check("plans", plans)


def test_plans_as_printed(planned, pins):
    pins.check("plans-printed", {name: pins.shape(printed) for name, (_, printed) in planned.items()})


def test_list(pins, tmp_path):
    pins.check("study-list", pins.run(tmp_path, "study", "list"))


def test_presets(pins):
    """Of every preset: the trial hash of its config (what decides weights and log), and its sampler."""
    configs = pins.preset_configs()
    hashes = {
        name: {"hash": pins.trial_hash(config, "0" * 64), **config["sampler"]} for name, config in configs.items()
    }
    pins.check("presets", hashes)


@pytest.mark.slow
def test_a_trained_trial(pins, tmp_path):
    """One trial, trained and measured: the files it leaves, its record, and its hash again from its config."""
    axes = ("--n", 10, "--seeds", 0, "--attention", "local", "--steps", 2, "--set", "training.eval_every=1")
    printed = pins.run(tmp_path, "study", "run", "an2024/fig6", "--scale", "smoke", *axes, "--device", "cpu")
    (name,) = [cell["hash"] for cell in printed["cells"]]
    folder = tmp_path / "studies" / "cells" / name
    assert pins.files(folder) == ["attention.json", "cell.json", "psnr-gap.json", "trajectory.json"]
    records = {file: json.loads((folder / f"{file}.json").read_text()) for file in ("cell", "trajectory")}
    pins.check("trial", {name: pins.shape(record) for name, record in {"printed": printed, **records}.items()})
    run = json.loads((tmp_path / "studies" / "runs" / name / "config.json").read_text())
    assert pins.trial_hash(run["config"], run["split"]["imageset"]) == name


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "ditlab", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("ditlab ")
