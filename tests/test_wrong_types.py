"""A value of a wrong type in a public call is one sentence that names the parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import ditlab
from ditlab import api
from ditlab.analyses.base import settings_of
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.errors import InvalidConfig


@pytest.fixture
def model(tmp_path) -> ditlab.Model:
    def shrink(y: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return 0.5 * y

    return ditlab.Model(ditlab.Denoiser.wrap(shrink, shape=(3, 8, 8)), out=tmp_path / "model")


WRONG: list[tuple[str, Callable[[Any], Any]]] = [
    ("`images`: expected a whole number, found 2.5", lambda m: ditlab.psnr_gap(m, images=2.5)),
    ("`images`: expected a whole number, found True", lambda m: ditlab.psnr_gap(m, images=True)),
    ("`baselines`: expected True or False, found 'no'", lambda m: ditlab.psnr_gap(m, baselines="no")),
    ("`sigmas`: expected a sequence of values, each a number or None", lambda m: ditlab.psnr_gap(m, sigmas="0.1")),
    ("`models`: expected text, a path, a Model or a sequence of", lambda m: ditlab.psnr_gap(5)),  # pyright: ignore
    ("`models`: ", lambda m: ditlab.psnr_gap([m, 5])),  # pyright: ignore
    ("`config`: expected a PSNRConfig, found {'images': 3}", lambda m: ditlab.psnr_gap(m, config={"images": 3})),
    ("`options`: expected a PSNROptions", lambda m: ditlab.psnr_gap(m, options=5)),
    ("`threads`: expected a whole number or None", lambda m: ditlab.psnr_gap(m, threads="x")),
    ("`split`: expected a SplitConfig or None, found 5", lambda m: ditlab.psnr_gap(m, split=5)),
    ("`out`: expected text, a path or None, found 5", lambda m: ditlab.psnr_gap(m, out=5)),
    ("`preset`: expected text, found None", lambda m: ditlab.train(None, "photos")),  # pyright: ignore
    ("`images`: expected an ImageSet, text or a path, found 5", lambda m: ditlab.train("dit-nano/2", 5)),  # pyright: ignore
    ("`n`: ", lambda m: ditlab.train("dit-nano/2", "photos", n="x")),  # pyright: ignore
    (
        "preset dit-nano/2: 'training.steps': expected a number, found True",
        lambda m: ditlab.train("dit-nano/2", "photos", steps=True),
    ),
    ("`test`: ", lambda m: ditlab.train("dit-nano/2", "photos", test="x")),  # pyright: ignore
    ("`samples`: ", lambda m: ditlab.report(m, samples="x")),  # pyright: ignore
    ("`sampler`: expected one of 'run', 'ddpm'", lambda m: m.sample(sampler=5)),
    ("`batch`: ", lambda m: m.sample(batch="x")),
    ("`strip`: ", lambda m: m.sample(strip="x")),
    ("`threads`: ", lambda m: m.sample(threads="x")),
    ("`size`: ", lambda m: ditlab.prepare("photos", size="x")),  # pyright: ignore
    ("`source`: ", lambda m: ditlab.prepare(5)),  # pyright: ignore
    ("`scale`: expected text, found 5", lambda m: ditlab.study("an2024/fig6", scale=5)),  # pyright: ignore
    ("`n`: ", lambda m: ditlab.study("an2024/fig6", n="x")),  # pyright: ignore
    ("`steps`: ", lambda m: ditlab.quickstart(steps="x")),
    ("`presets`: ", lambda m: ditlab.complexity(5)),  # pyright: ignore
    ("`source`: ", lambda m: ditlab.convert(5, "out")),  # pyright: ignore
    ("`source`: ", lambda m: ditlab.load(5)),  # pyright: ignore
    ("`data`: ", lambda m: ditlab.open("run", data=5)),  # pyright: ignore
    ("`codec`: ", lambda m: ditlab.encode("set", 5, out="out")),  # pyright: ignore
    ("`device`: expected text, a device or None, found 5", lambda m: m.sample(device=5)),
    ("`device`: expected text, a device or None, found 5", lambda m: ditlab.psnr_gap(m, device=5)),
    ("`device`: expected text or a device, found 5", lambda m: ditlab.load("run", device=5)),  # pyright: ignore
    ("`denoiser`: expected a Denoiser, found Linear(", lambda m: ditlab.Model(torch.nn.Linear(1, 1))),  # pyright: ignore
    ("`images`: expected an ImageSet, text, a path or None", lambda m: ditlab.Model(m.source_denoiser, 5)),  # pyright: ignore
    ("`n`: expected a whole number", lambda m: ditlab.Model(m.source_denoiser, n="x")),  # pyright: ignore
    ("`module`: expected a Module, found 5", lambda m: ditlab.Model.from_diffusers(5, None)),  # pyright: ignore
]


@pytest.mark.parametrize(("sentence", "call"), WRONG, ids=[f"{i}-{s[1:9]}" for i, (s, _) in enumerate(WRONG)])
def test_a_wrong_type_is_one_sentence(sentence, call, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidConfig) as refusal:
        call(model)
    assert str(refusal.value).startswith(sentence)
    assert ", found " in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_a_device_of_torch_is_a_device(model):
    drawn = [model.sample(seeds=range(2), steps=2, device=device).images for device in ("cpu", torch.device("cpu"))]
    assert np.array_equal(*drawn)
    assert model.device == torch.device("cpu")


UNCHECKED = ("psnr_gap", "attention", "jacobian", "agreement", "two_subsets")
"""Calls that give their arguments to `analyze`."""


def test_arrays_and_numbers_of_numpy_are_settings():
    config, left = settings_of(PSNRConfig, {"images": np.int64(3), "sigmas": np.array([0.5, 2.0]), "other": 1})
    assert config == PSNRConfig(images=3, sigmas=(0.5, 2.0))
    assert type(config.images) is int
    assert left == {"other": 1}


def test_a_missing_argument_is_named_as_python_names_it():
    with pytest.raises(TypeError, match="missing a required argument: 'preset'"):
        ditlab.train()  # pyright: ignore


@pytest.mark.parametrize("name", sorted(set(api.__all__) - set(UNCHECKED)))
def test_every_annotation_of_a_call_is_known(name):
    """Binding fails on the first wrong value, so each parameter is tried after right ones for those before it."""
    right = {"name": "psnr-gap", "preset": "dit-nano/2", "codec": "kl", "out": "out"}
    call = getattr(api, name)
    required = {
        p.name: right.get(p.name, "x") for p in inspect.signature(call).parameters.values() if p.default is p.empty
    }
    required = {key: value for key, value in required.items() if key not in ("settings", "options")}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD or parameter.annotation == "Any":
            continue
        with pytest.raises(InvalidConfig, match=f"^`{parameter.name}`: expected"):
            call(**{**required, parameter.name: object()})
