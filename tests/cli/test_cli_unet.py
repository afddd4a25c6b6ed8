"""The verbs on UNets: training with each of improved-diffusion's objectives, going on, analyses, files of the original."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from ditlab.models.run import Run

QUICK = ["--n", 20, "--test", 20, "--training.batch-size", 16, "--training.save-every", 10, "--training.log-every", 5]
QUICK += ["--training.eval-every", 10]
QUICK += ["--evaluation.images", 4, "--evaluation.levels", 2, "--device", "cpu", "--threads", 1]
BOUND = ["--objective.steps", 10, "--objective.schedule", "cosine", "--objective.time-sampling", "loss-second-moment"]
HYBRID = ["--objective.steps", 400, "--objective.schedule", "cosine", "--objective.variance", "learned-range"]
OBJECTIVES = {
    "mse": ["--network.dropout", 0.2, "--checkpoint-activations"],
    "hybrid": [*HYBRID, "--objective.loss", "rescaled-mse", "--objective.rescale-time"],
    "kl": [*BOUND, "--objective.loss", "kl", "--objective.variance", "learned-range"],
    "kl-unscaled": [*BOUND, "--objective.loss", "kl-unscaled", "--objective.variance", "fixed-small"],
}
SPLIT = ["--n", 20, "--test", 20, "--device", "cpu", "--threads", 1]


@pytest.fixture
def train(ditlab, place):
    """`train(name, steps, *flags)` trains a UNet of three narrow levels, in the current folder."""

    def run(name: str, steps: int, *flags: object) -> Run:
        words = ["--data", place.images, "--out", f"runs/{name}", "--training.steps", steps, *QUICK, *flags]
        done = ditlab("train", "unet-nano", "--network.width", 8, "--network.groups", 2, *words)
        assert done.status == 0, done.err
        return Run.open(f"runs/{name}")

    return run


def numbers(run: Run) -> list[dict[str, object]]:
    """The log, but for what depends on the machine."""
    return [{key: value for key, value in line.items() if key != "machine"} for line in run.log]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_trains_and_goes_on(train, name):
    flags = OBJECTIVES[name]
    train("twice", 10, *flags)
    twice, once = train("twice", 20, *flags), train("once", 20, *flags)
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (run.path / "checkpoints" / "000000020" / file for run in (twice, once))
        assert one.read_bytes() == other.read_bytes()
    assert numbers(twice) == numbers(once)
    assert twice.config.objective == once.config.objective
    assert twice.config.network.learn_sigma == (name in ("hybrid", "kl"))
    state = json.loads((twice.path / "checkpoints" / "000000020" / "state.json").read_text())["objective"]
    if name.startswith("kl"):
        # 20 batches of 16 over 10 steps: every step has its ten losses, so t is drawn by them.
        assert [*base64.b64decode(state["counts"])] == [10] * 10
    else:
        assert state == {}


@pytest.mark.slow
def test_every_verb_that_takes_a_run(train, ditlab):
    run = train("hybrid", 10, *OBJECTIVES["hybrid"])
    for words in (
        ["sample", run.path, "--seeds", "0-1", "--steps", 3],
        ["psnr-gap", run.path, "--images", 4, "--points", 3],
        ["attention", run.path, "--images", 2],
        ["report", run.path],
    ):
        done = ditlab(*words)
        assert done.status == 0, done.err
    # One layer of attention, in the middle, at a fourth of the 8 pixels.
    found = json.loads((run.path / "analysis" / "attention.json").read_text())
    assert found["grid"] == [2, 2]
    assert "unet-nano" in (run.path / "report.html").read_text()


def test_attention_at_several_sizes(train, ditlab, refused):
    run = train("grids", 10, "--network.attention-at", 4, 2)
    assert "expected layers of one grid and number of heads, found 4x4 tokens with 2 heads in layer 1" in refused(
        "attention", run.path, "--images", 2
    )
    done = ditlab("attention", run.path, "--images", 2, "--layers", 1, 6)
    assert done.status == 0, done.err


def test_to_the_original_and_back(train, ditlab, refused, place):
    run = train("wide", 10, *OBJECTIVES["hybrid"], "--network.width", 32, "--network.groups", 32)
    assert "expected a DiT for diffusers, found a UNet" in refused("convert", run.path, "out", "--to", "diffusers")
    done = ditlab("convert", run.path, "unet.pt")
    assert done.status == 0, done.err
    assert "UNetModel(in_channels=3, model_channels=32, out_channels=6" in done.out
    assert "its image size cannot be told from its levels ((1, 2, 4)); name it" in refused("sample", "unet.pt")
    assert "expected weights of improved-diffusion's UNet with --unet flags" in _of_a_dit(refused)
    told = ["--unet.size", 8, "--unet.steps", 400, "--heads", 2]
    done = ditlab("convert", "unet.pt", "model", *told)
    assert "the cosine schedule, time rescaled to 1000 steps were taken" in done.out
    assert ditlab("convert", "model", "back.pt").status == 0
    one, other = (torch.load(name, weights_only=True) for name in ("unet.pt", "back.pt"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert ditlab("convert", run.path, "hub:me/mine", "--dry-run", "export").status == 0
    card = Path("export/README.md").read_text()
    assert "\n- unet\n" in card
    assert "- dit\n" not in card
    # A safetensors file says all that its shapes do not, so it is a model as it is.
    assert ditlab("convert", run.path, "unet.safetensors").status == 0
    for words in (["sample", "unet.safetensors", "--seeds", "0-1", "--steps", 3], ["psnr-gap", "unet.safetensors", "--data", place.images, "--images", 4, "--points", 3, *SPLIT]):  # fmt: skip
        done = ditlab(*words)
        assert done.status == 0, done.err
        assert "note: unet.safetensors does not say everything" not in done.err


def _of_a_dit(refused) -> str:
    torch.save({"x_embedder.proj.weight": torch.zeros(1)}, "dit.pt")
    return refused("convert", "dit.pt", "out", "--unet.size", 8)


def test_files_that_cannot_be_used(train, ditlab, refused):
    run = train("wide", 10, *OBJECTIVES["hybrid"], "--network.width", 32, "--network.groups", 32)
    assert ditlab("convert", run.path, "unet.safetensors").status == 0
    with Path("unet.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert "expected a whole safetensors file" in refused("sample", "unet.safetensors")
    narrow = train("narrow", 10)
    assert "has 32 groups in every norm" in refused("convert", narrow.path, "narrow.pt")
