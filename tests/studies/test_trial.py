"""A trial's hash is a promise: results that were committed must be found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ditlab.config import RunConfig, fit_to_images, from_json
from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare
from ditlab.errors import DitlabError
from ditlab.presets import PRESETS
from ditlab.studies import trial as trials
from ditlab.studies.an2024 import STUDIES
from ditlab.studies.pipeline import train_job
from ditlab.studies.trial import Trial, trial_config, trial_hash

IMAGES = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> ImageSet:
    return prepare("digits", tmp_path_factory.mktemp("sets") / "digits", size=8)


def test_hashes_of_fixed_settings_never_change():
    """If this fails because a setting was added, name it in `trial.ADDED_DEFAULTS` with the value that gives the earlier behaviour."""
    assert trial_hash(PRESETS["dit-xs/1"], IMAGES) == "e84658159ab437dc"
    edm = PRESETS["dit-nano/2-edm"]
    assert trial_hash(replace(edm, training=replace(edm.training, steps=7, lr=0.25)), IMAGES) == "f429bf0a682864f6"


def test_what_a_hash_covers():
    base = PRESETS["dit-nano/1"]
    same = [
        replace(base, preset="mine"),
        replace(base, data=replace(base.data, path="elsewhere")),
        replace(base, training=replace(base.training, keep=5, keep_every=100, save_every=7)),
        replace(base, sampler=replace(base.sampler, clip=True)),
    ]
    assert {trial_hash(config, IMAGES) for config in same} == {trial_hash(base, IMAGES)}
    other = [
        replace(base, data=replace(base.data, n=5)),
        replace(base, data=replace(base.data, test=5)),
        replace(base, data=replace(base.data, seed=5)),
        replace(base, training=replace(base.training, steps=5)),
        replace(base, training=replace(base.training, eval_every=5)),
        replace(base, evaluation=replace(base.evaluation, images=5)),
        replace(base, network=replace(base.network, attention="3*4")),
    ]
    hashes = [trial_hash(base, IMAGES), trial_hash(base, IMAGES[::-1]), *(trial_hash(c, IMAGES) for c in other)]
    assert len(set(hashes)) == len(hashes)


def test_a_setting_added_later_counts_only_where_it_differs(monkeypatch):
    base = PRESETS["dit-nano/1"]
    monkeypatch.setattr(trials, "ADDED_DEFAULTS", {"training.lr": base.training.lr})
    before = trial_hash(base, IMAGES)
    assert "training.lr" not in trials.hashed_settings(base, IMAGES)["settings"]
    assert trial_hash(replace(base, training=replace(base.training, lr=0.5)), IMAGES) != before
    assert (
        "training.lr"
        in trials.hashed_settings(replace(base, training=replace(base.training, lr=0.5)), IMAGES)["settings"]
    )


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_a_trials_job_gives_its_settings(study, scale, digits, tmp_path):
    """What a worker reads from the JSON of a trial are the trial's settings, to the hash."""
    chosen = STUDIES[study].scale(scale)
    for network, own in chosen.networks.items():
        for plan in chosen.attention.values():
            settings = {**chosen.settings, **own, "training.flip": True, "training.betas": [0.8, 0.9]}
            config = trial_config(network, settings, digits, attention=plan, n=10, seed=2)
            job = train_job(config, digits, tmp_path / "run", device="cpu", threads=1, command="")
            read = from_json(RunConfig, json.loads(json.dumps(job))["config"], "job")
            assert read == config
            assert trial_hash(read, digits.hash) == trial_hash(config, digits.hash)


def test_settings_come_from_the_preset_the_changes_and_the_images(digits):
    config = trial_config("dit-nano/1", {"network.depth": 2, "training.lr": 0.5}, digits, attention="3,g", n=10, seed=3)
    assert (config.network.depth, config.training.lr, config.network.attention) == (2, 0.5, "3,g")
    assert (config.data.n, config.data.seed, config.training.seed) == (10, 3, 3)
    assert fit_to_images(config, digits.shape, digits.num_classes) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.learning_rate": 1}, "unknown study setting 'training.learning_rate' (nearest: "),
        ({"training": 1}, "unknown study setting 'training' (nearest: "),
        ({"nonsense": 1}, "unknown study setting 'nonsense' ("),
        ({"training.lr": "fast"}, "study settings on dit-nano/1: 'training.lr': "),
        ({"training.lr": -1}, "study settings on dit-nano/1: training: lr must be positive, found -1"),
        ({"network.image_size": [4, 4]}, "study setting 'network.image_size': follows from the axes and the images"),
        ({"network.attention": "3*4"}, "study setting 'network.attention': follows from the axes"),
        ({"network.depth": 3}, "study settings on dit-nano/1: attention plan '3,g': expected one entry for each of 3"),
    ],
)
def test_settings_that_cannot_be(digits, settings, message):
    with pytest.raises(DitlabError) as error:
        trial_config("dit-nano/1", {"network.depth": 2, **settings}, digits, attention="3,g", n=10, seed=0)
    assert str(error.value).startswith(message)


def test_a_trials_name_and_place(digits):
    config = trial_config("dit-nano/1", {}, digits, attention="3*4", n=10, seed=1)
    trial = Trial("ab", config, digits.hash, "digits", "dit-nano/1", "local", 10, 1)
    assert trial.name == "digits dit-nano/1 local N=10 seed 1"
    assert trial.place() == {
        "hash": "ab", "data": "digits", "network": "dit-nano/1", "attention": "local", "n": 10, "seed": 1
    }  # fmt: skip
    assert Path(digits.path).is_dir()
