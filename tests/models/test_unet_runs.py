"""UNets: training with each of improved-diffusion's objectives, resuming, analyses, files of the original."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ditlab
from ditlab.interop.improved_diffusion import UNetFile
from ditlab.models.run import Run

QUICK: dict[str, Any] = {
    "network.width": 8,
    "network.groups": 2,
    "training.batch_size": 16,
    "training.save_every": 10,
    "training.log_every": 5,
    "training.eval_every": 10,
}
BOUND = {"steps": 10, "schedule": "cosine", "time_sampling": "loss-second-moment"}
HYBRID = {"steps": 400, "schedule": "cosine", "variance": "learned-range"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mse": {},
    "hybrid": {**HYBRID, "loss": "rescaled-mse", "rescale_time": True},
    "kl": {**BOUND, "loss": "kl", "variance": "learned-range"},
    "kl-unscaled": {**BOUND, "loss": "kl-unscaled", "variance": "fixed-small"},
}
WIDE = {"network.width": 32, "network.groups": 32}
SPLIT = {"n": 20, "test": 20, "device": "cpu", "threads": 1}


@pytest.fixture
def train(place, tmp_path, monkeypatch):
    """`train(name, steps, objective)` trains a UNet of three narrow levels, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, steps: int, objective: str = "mse", **settings: Any) -> Run:
        chosen = {f"objective.{key}": value for key, value in OBJECTIVES[objective].items()}
        images = {"evaluation.images": 4, "evaluation.levels": 2}
        settings = {**QUICK, "training.steps": steps, **images, **chosen, **settings}
        trained = ditlab.train("unet-nano", place.images, out=f"runs/{name}", **SPLIT, **settings)
        assert trained is not None
        return trained

    return run


def numbers(run: Run) -> list[dict[str, object]]:
    """The log, but for what depends on the machine."""
    return [{key: value for key, value in line.items() if key != "machine"} for line in run.log]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_trains_and_resumes(train, name):
    more = {"network.dropout": 0.2, "training.checkpoint_activations": True} if name == "mse" else {}
    train("twice", 10, name, **more)
    twice, once = train("twice", 20, name, **more), train("once", 20, name, **more)
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        first, second = (run.path / "checkpoints" / "000000020" / file for run in (twice, once))
        assert first.read_bytes() == second.read_bytes()
    assert numbers(twice) == numbers(once)
    assert twice.config.objective == once.config.objective
    assert twice.config.network.learn_sigma == (name in ("hybrid", "kl"))  # pyright: ignore[reportAttributeAccessIssue]
    state = json.loads((twice.path / "checkpoints" / "000000020" / "state.json").read_text())["objective"]
    if name.startswith("kl"):
        # 20 batches of 16 over 10 steps: every step has its ten losses, so t is drawn by them.
        assert [*base64.b64decode(state["counts"])] == [10] * 10
    else:
        assert state == {}


@pytest.mark.slow
def test_everything_that_takes_a_run(train):
    run = train("hybrid", 10, "hybrid")
    run.sample(seeds=range(2), steps=3)
    ditlab.psnr_gap(run, images=4, points=3)
    ditlab.attention(run, images=2)
    ditlab.report(run)
    # One layer of attention, in the middle, at a fourth of the 8 pixels.
    result = json.loads((run.path / "analysis" / "attention.json").read_text())
    assert result["grid"] == [2, 2]
    assert "unet-nano" in (run.path / "report.html").read_text()


def test_attention_at_several_sizes(train, refused):
    run = train("grids", 10, **{"network.attention_at": (4, 2)})
    says = "expected `layers` of one grid and number of heads, found 4x4 tokens with 2 heads in layer 1"
    assert says in refused(ditlab.attention, run, images=2)
    ditlab.attention(run, images=2, layers=(1, 6))


def test_to_the_original_and_back(train, refused, notes, place):
    run = train("wide", 10, "hybrid", **WIDE)
    says = "expected a DiT for diffusers, found a UNet"
    assert says in refused(ditlab.convert, run.path, "out", to="diffusers")
    ditlab.convert(run.path, "unet.pt", reporter=notes)
    assert "UNetModel(in_channels=3, model_channels=32, out_channels=6" in " ".join(notes.sentences)
    says = "its levels ((1, 2, 4)) do not determine its image size; convert it with `unet.size`"
    assert says in refused(ditlab.sample, "unet.pt")
    ditlab.convert("unet.pt", "model", heads=2, unet=UNetFile(size=8, steps=400), reporter=notes)
    assert "the cosine schedule, time rescaled to 1000 steps were assumed" in " ".join(notes.sentences)
    ditlab.convert("model", "back.pt")
    first, second = (torch.load(name, weights_only=True) for name in ("unet.pt", "back.pt"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    ditlab.convert(run.path, "hub:me/mine", dry_run="export")
    card = Path("export/README.md").read_text()
    assert "\n- unet\n" in card
    assert "- dit\n" not in card
    # A safetensors file says all that its shapes do not, so it is a model as it is.
    ditlab.convert(run.path, "unet.safetensors")
    notes.sentences.clear()
    ditlab.sample("unet.safetensors", seeds=range(2), steps=3, reporter=notes)
    ditlab.psnr_gap("unet.safetensors", data=place.images, images=4, points=3, reporter=notes, **SPLIT)
    assert not any("does not say everything" in note for note in notes.sentences)


def test_files_that_cannot_be_used(train, refused):
    run = train("wide", 10, "hybrid", **WIDE)
    ditlab.convert(run.path, "unet.safetensors")
    with Path("unet.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert "expected a whole safetensors file" in refused(ditlab.sample, "unet.safetensors")
    narrow = train("narrow", 10)
    assert "has 32 groups in every norm" in refused(ditlab.convert, narrow.path, "narrow.pt")
    torch.save({"x_embedder.proj.weight": torch.zeros(1)}, "dit.pt")
    says = refused(ditlab.convert, "dit.pt", "out", unet=UNetFile(size=8))
    assert "expected weights of improved-diffusion's UNet for settings of `unet`, found others" in says
