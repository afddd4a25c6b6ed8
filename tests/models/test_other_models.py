"""Models that ditlab did not train: measured, sampled, beside a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ditlab
from ditlab.models.opening import open_model

pytest.importorskip("diffusers")

SPLIT = {"n": 20, "test": 10, "device": "cpu", "threads": 1}
QUICK = {"images": 5, "points": 3, "baselines": False}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def results_of(source: str, out: str = "external") -> Path:
    """Where analyses of a model that is not a run are saved."""
    return open_model(source, out=Path(out)).path / "analysis"


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_measuring_and_sampling_diffusers_models(place, notes, diffusers_folder, kind):
    source = f"diffusers:{diffusers_folder(kind, 'theirs')}"
    ditlab.psnr_gap(source, data=place.images, reporter=notes, **SPLIT, **QUICK)
    says = "theirs: The training images of this model are unknown: the 20 training and 10 test images of"
    assert any(says in note for note in notes.sentences)
    result = json.loads((results_of(source) / "psnr-gap.json").read_text())
    assert result["about"]["settings"]["notes"][0].startswith("The training images of this model are unknown")
    assert result["about"]["n"] == 20
    assert np.isfinite(result["averages"]["mse_mean"]["gap"])
    # The user may say so, and choose where results go.
    notes.sentences.clear()
    ditlab.psnr_gap(source, data=place.images, own_split=True, out="mine", reporter=notes, **SPLIT, **QUICK)
    assert not any("are unknown" in note for note in notes.sentences)
    assert (results_of(source, "mine") / "psnr-gap.json").is_file()
    ditlab.attention(source, data=place.images, images=2, layers=(1, 2), **SPLIT)
    assert list(results_of(source).glob("attention-maps*.png"))
    assert ditlab.sample(source, seeds=range(3), steps=3, device="cpu").images.shape == (3, 8, 8, 3)


def test_a_source_of_images(diffusers_folder):
    source = f"diffusers:{diffusers_folder('unet', 'theirs')}"
    ditlab.psnr_gap(source, data="digits", **SPLIT, **{**QUICK, "points": 2})
    assert Path("image-sets/digits-8/manifest.json").is_file()


def test_beside_a_run(refused, place, plain, diffusers_folder):
    models = [place.copy(plain), f"diffusers:{diffusers_folder('unet', 'theirs')}"]
    settings = {"data": place.images, "device": "cpu", "threads": 1, "out": "both", **QUICK}
    assert "have different splits" in refused(ditlab.psnr_gap, models, n=20, test=10, **settings)
    comparison = ditlab.psnr_gap(models, n=20, test=20, **settings)
    assert {group["label"] for group in comparison.to_json()["groups"]} == {"dit-nano/1, global", "theirs"}


def test_what_cannot_be_measured(refused, place, plain, diffusers_folder):
    unet = f"diffusers:{diffusers_folder('unet', 'unet')}"
    large = f"diffusers:{diffusers_folder('unet', 'large', sample_size=16)}"
    on = {"data": place.images}
    assert "model unet: training images unknown; pass an image set as `data`" in refused(ditlab.psnr_gap, unet)
    assert "expected images 3x16x16, found 3x8x8" in refused(ditlab.attention, large, **on)
    assert "named twice" in refused(ditlab.report, [unet, unet], **on)
    assert "found the source 'digits'" in refused(ditlab.psnr_gap, plain, data="digits")
    assert "expected no `checkpoint`, for it has one set of weights, found 3" in refused(
        ditlab.psnr_gap, unet, checkpoint=3, **on
    )
    assert "expected at most 1797 test images" in refused(ditlab.psnr_gap, unet, test=5000, **on)
    says = refused(ditlab.attention, unet, **on, **SPLIT)
    assert "expected `layers` of one grid and number of heads, found 4x4 tokens" in says
    assert says.endswith("are alike")
