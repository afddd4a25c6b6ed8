"""Words that a verb does not take, in one sentence each; flags of earlier versions; help texts."""

from __future__ import annotations

import os
import sys
from io import StringIO

import pytest

from ditlab.cli.console import stop_on_signal
from ditlab.cli.flags import ALIASES, EVERYWHERE, flags_of
from ditlab.cli.main import main, verb_class, verbs
from ditlab.errors import DitlabError

FIRST = {"train": ["dit-nano/1"]}
OLD = [(verb, old, new) for verb, names in ALIASES.items() for old, new in names.items()]
OLD += [(verb, old, new) for verb in ("psnr-gap", "attention", "jacobian") for old, new in EVERYWHERE.items()]
VALUES = {"--classes": "1", "--checkpoint": "4", "--sigmas": "0.5", "--names": "a", "--schedule": "edm"}
VALUES |= {"--sampler-steps": "3", "--timesteps": "3", "--baselines": "ls"}
"""A value for each flag that takes one."""


def words_of(verb: str) -> list[str]:
    return [*verb.split(), *FIRST.get(verb, [])]


@pytest.fixture
def ended(capsys, monkeypatch):
    """`ended(words)` is the exit status, standard output and standard error of a command line."""

    def run(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["ditlab", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(words)
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("verb", verbs())
@pytest.mark.parametrize("flag", ["--bogus", "--bogus=3", "-q"])
def test_unknown_flags(ended, verb, flag):
    status, out, err = ended(*words_of(verb), flag)
    assert (status, out) == (2, "")
    assert err.startswith(f"ditlab: {verb}: unknown flag '{flag.split('=')[0]}' (")
    assert err.count("\n") == 1
    assert err.endswith(")\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sample x --checkpont 3", "sample: unknown flag '--checkpont' (nearest: --checkpoint)"),
        (
            "train dit-nano/1 --training.lrr 1",
            "train: unknown flag '--training.lrr' (nearest: --training.lr, --training.flip, --training.shard)",
        ),
        ("train unet-nano --network.attention g", "train: unknown flag '--network.attention' (nearest: --network.att"),
        ("sample x --batch", "sample --batch: expected a value, found nothing"),
        ("study run x --parallel", "study run --parallel: expected a value, found nothing"),
        ("sample x --batch 1.5", "sample --batch: expected a whole number, found '1.5'"),
        ("train dit-nano/1 --training.lr fast", "train --training.lr: expected a number, found 'fast'"),
        ("train dit-nano/1 -n few", "train --n: expected a whole number, found 'few'"),
        ("psnr-gap x --sigmas a", "psnr-gap --sigmas: expected numbers, found 'a'"),
        ("psnr-gap x --split-seed a", "psnr-gap --split-seed: expected a whole number, found 'a'"),
        ("attention x --timesteps z", "attention --timesteps: expected whole numbers, found 'z'"),
        ("sample x --guidance.interval 1", "sample --guidance.interval: expected two numbers, found '1'"),
        ("complexity dit-s/8 --size big", "complexity --size: expected a value as --help shows it, found 'big'"),
        ("data prepare a --color blue", "data prepare --color: expected one of rgb, grey; found 'blue'"),
        ("data encode a b --kind zz", "data encode --kind: expected one of auto, kl, tiny; found 'zz'"),
        (
            "sample x --sampler zz",
            "sample --sampler: expected one of run, ddpm, ddim, euler, heun, dpm++2m; found 'zz'",
        ),
        ("data prepare", "data prepare: expected SOURCE, found nothing"),
        ("data encode", "data encode: expected IMAGES and OUT, found nothing"),
        ("data encode x", "data encode: expected OUT, found nothing"),
        ("data info", "data info: expected PATH, found nothing"),
        ("sample", "sample: expected MODEL, found nothing"),
        ("convert x", "convert: expected OUT, found nothing"),
        ("study run", "study run: expected STUDY, found nothing"),
        ("report", "models: expected at least one model, found none"),
        ("psnr-gap", "psnr-gap: expected at least 1 model, found 0"),
        ("two-subsets x", "two-subsets: expected 2 models, found 1"),
        ("quickstart x", "quickstart: expected no further value, found 'x'"),
        ("data prepare a b c d", "data prepare: expected no further value, found 'c'"),
        ("data info a b", "data info: expected no further value, found 'b'"),
        ("train dit-nano/1 x", "train: expected no further value, found 'x'"),
        ("sample x y", "sample: expected no further value, found 'y'"),
        ("agreement x y", "agreement: expected 1 model, found 2"),
        ("convert a b c", "convert: expected no further value, found 'c'"),
        ("study list x", "study list: expected no further value, found 'x'"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_words_that_do_not_fit(ended, monkeypatch, words, sentence, encoding):
    """Boxes are drawn with lines or with dashes; neither is seen."""

    class Terminal(StringIO):
        """Standard output of a terminal in some encoding."""

    Terminal.encoding = encoding  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(sys, "stdout", Terminal())
    status, _, err = ended(*words.split())
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"ditlab: {sentence}")
    if not sentence.endswith("att"):
        assert err == f"ditlab: {sentence}\n"


@pytest.mark.parametrize(("verb", "old", "new"), OLD)
def test_flags_of_earlier_versions(ended, verb, old, new):
    """They reach the model, which is not there; and they are not shown."""
    status, help_text, _ = ended(verb, "--help")
    assert status == 0
    assert new in help_text
    assert f"{old} " not in help_text
    value = [VALUES[new]] if new in VALUES and (verb, new) != ("psnr-gap", "--baselines") else []
    for flag in (old, new):
        status, _, err = ended(verb, "nowhere", flag, *value)
        assert (status, err) == (2, "ditlab: run nowhere: expected a run's folder, found nothing\n")


def test_a_flag_of_an_earlier_version_with_its_value():
    from ditlab.cli.parsing import parse

    sample = parse(verb_class("sample"), "sample", ["x", "--steps=7", "--labels=3"])
    assert (sample.settings.sampler_steps, sample.settings.classes) == ("7", (3,))


@pytest.mark.parametrize("verb", [verb for verb in verbs() if verb != "train"])
def test_every_verb_has_help(ended, verb):
    status, out, err = ended(*verb.split(), "--help")
    assert (status, err) == (0, "")
    assert f"ditlab {verb}" in out
    assert "--json" in out
    assert [flag for flag in flags_of(verb_class(verb)) if f"--{flag}" not in out] == []


def test_the_help_of_train(ended):
    assert "--network.attention" in ended("train", "dit-xs/1", "--help")[1]
    assert "--network.attention-at" in ended("train", "unet-nano", "--help")[1]
    assert "dit-nano/1-edm" in ended("train", "--help")[1]
    with pytest.raises(DitlabError, match="expected a preset first"):
        verb_class("train").parse([])


def test_a_verb_stops_when_the_ditlab_process_that_started_it_is_gone(monkeypatch):
    monkeypatch.setenv("DITLAB_PARENT", str(os.getppid()))
    with stop_on_signal() as stop:
        assert not stop.set
        monkeypatch.setenv("DITLAB_PARENT", "1" if os.getppid() != 1 else "2")
        assert stop.set
