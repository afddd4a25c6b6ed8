"""`ditlab.convert`: original checkpoints, diffusers folders and ditlab's own, there and back."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ditlab
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.interop.original_dit import to_original
from ditlab.models.opening import open_model
from ditlab.networks.dit import DiT, DiTConfig

pytest.importorskip("diffusers")

FOR_DIFFUSERS = {"preset": "dit-nano/2", "conditional": True, "network.time_frequencies": "diffusers"}


def weights(**settings):
    """An original checkpoint's state dict, of random weights."""
    shape = {"image_size": (8, 8), "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 10}
    network = DiT(DiTConfig(**shape | settings))
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.05)
    return to_original(network, VPObjectiveConfig())


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def original(tmp_path) -> Path:
    torch.save(weights(), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def same(a: object, b: object) -> bool:
    first, second = ditlab.load(str(a)), ditlab.load(str(b))
    y, label = torch.randn(2, *first.shape), torch.tensor([1, 9])
    return torch.allclose(first(y, 0.5, label), second(y, 0.5, label), atol=1e-5)


def test_an_original_checkpoint_to_ditlab_and_back(original):
    made = ditlab.convert(original, "converted", heads=2)
    assert (made.format, made.parameters) == ("ditlab", 15416)
    ditlab.convert("converted", "again.pt")
    ditlab.convert("again.pt", "twice")  # which says how many heads it has
    assert same("converted", "twice")
    state = torch.load("again.pt", weights_only=True)["ema"]
    first = torch.load(original, weights_only=True)
    assert all(torch.allclose(state[key], value, atol=1e-6) for key, value in first.items())


def test_averaged_or_raw():
    ema = weights()
    raw = {key: value if key == "pos_embed" else 2 * value for key, value in ema.items()}
    torch.save({"model": raw, "ema": ema, "args": argparse.Namespace(num_classes=10)}, "both.pt")
    ditlab.convert("both.pt", "averaged", heads=2)
    ditlab.convert("both.pt", "raw", heads=2, raw=True)
    torch.save(raw, "last.pt")
    ditlab.convert("last.pt", "last", heads=2)
    assert same("raw", "last")
    assert not same("averaged", "last")


def test_diffusers_there_and_back(diffusers_folder):
    folder = diffusers_folder("dit")
    made = ditlab.convert(f"diffusers:{folder}", "converted")
    assert made.difference is not None
    assert made.difference < 1e-4
    ditlab.convert("converted", "back", to="diffusers")
    assert same("converted", f"diffusers:{folder}")
    assert same("diffusers:back", f"diffusers:{folder}")


def test_a_run_to_diffusers(place):
    run = place.trained("for-diffusers", **FOR_DIFFUSERS)
    ditlab.convert(run, "out", to="diffusers")
    assert same(run, "diffusers:out")
    ditlab.convert(run, "second", to="diffusers", checkpoint=4)
    assert not same(run, "diffusers:second")


def test_a_run_to_the_original(place):
    run = place.trained("for-original", conditional=True, preset="dit-nano/2")
    ditlab.convert(run, "out.pt")
    ditlab.convert("out.pt", "converted")
    assert same(run, "converted")


def test_guessed_heads_are_noted(notes):
    torch.save(weights(width=384, heads=3, depth=1), "wide.pt")
    for out, heads in (("guessed", None), ("given", 3), ("again.pt", 3)):
        notes.sentences.clear()
        ditlab.convert("wide.pt", out, heads=heads, reporter=notes)
        says = "wide.pt does not say how many attention heads it has: 6 were assumed"
        assert any(says in note for note in notes.sentences) == (heads is None)
    notes.sentences.clear()
    ditlab.convert("again.pt", "again", reporter=notes)
    assert notes.sentences == []
    assert same("again", "given")
    assert not same("again", "guessed")


def test_the_autoencoder_of_a_run_goes_along_to_diffusers(refused, place, notes, write_kl, tmp_path):
    import diffusers

    kl = write_kl(tmp_path / "kl")
    ditlab.encode(place.images, str(kl), out="latents", device="cpu")
    run = place.train("run", images=tmp_path / "latents", **FOR_DIFFUSERS)
    ditlab.convert(run, "out", to="diffusers", reporter=notes)
    assert notes.sentences == []
    assert same(run, "diffusers:out")
    z = torch.randn(2, 4, 4, 4)
    expected = open_model(run).decode(z)
    assert np.array_equal(open_model("diffusers:out").decode(z), expected)
    assert type(diffusers.DiTPipeline.from_pretrained("out").vae).__name__ == "AutoencoderKL"
    # A converted model's own goes along as well.
    ditlab.convert("diffusers:out", "converted")
    ditlab.convert("converted", "second", to="diffusers")
    assert np.array_equal(open_model("diffusers:second").decode(z), expected)
    # It may have been moved since.
    kl.rename(tmp_path / "moved")
    assert "`codec`" in refused(ditlab.convert, run, "third", to="diffusers")
    ditlab.convert(run, "third", to="diffusers", codec="moved")
    assert Path("third/vae/config.json").is_file()


def test_an_autoencoder_that_cannot_go_along_is_named(place, notes, write_pair, tmp_path):
    pair = write_pair(tmp_path / "pair")
    ditlab.encode(place.images, str(pair), out="latents", device="cpu")
    for out, settings, says in (
        ("out.pt", {"preset": "dit-nano/2", "conditional": True}, "the original format has no place"),
        ("out", FOR_DIFFUSERS, "a DiTPipeline takes an AutoencoderKL only"),
    ):
        run = place.train(f"run-for-{out}", images=tmp_path / "latents", **settings)
        notes.sentences.clear()
        ditlab.convert(run, out, to=None if out == "out.pt" else "diffusers", reporter=notes)
        record = open_model(run).codec.record
        [note] = notes.sentences
        assert f"its autoencoder does not go along ({says}): these are latents of '{pair}', SHA-256 " in note
        assert f"{record.sha256[:12]}, scale 1, shift 0" in note
    assert not Path("out/vae").exists()


def test_what_cannot_be_converted(refused, place, plain, original, diffusers_folder, tmp_path):
    unet, dit = f"diffusers:{diffusers_folder('unet', 'unet')}", f"diffusers:{diffusers_folder('dit', 'dit')}"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    two = {"preset": "dit-nano/2", "conditional": True}
    nobody = place.trained("without-null", **two, **{"network.null_class": False, "objective.label_dropout": 0})
    local = place.trained("for-refusal", **two, **{"network.attention": "3,g"})
    cases: list[tuple[object, str, dict[str, object], str]] = [
        (original, "out", {}, "do not determine the number of attention heads"),
        (original, "out", {"heads": 3}, "width must be a multiple of the 3 heads"),
        (plain, "out", {}, "is a run of ditlab already"),
        (plain, "out.pt", {}, "knows class-conditional networks only, this DiT has no classes"),
        (plain, "out", {"to": "diffusers"}, "knows class-conditional networks only, this DiT has no classes"),
        (nobody, "out.pt", {}, "needs a row for the null class in the label table .*, this DiT's has none"),
        (original, "out", {"heads": 2, "checkpoint": 4}, "`checkpoint`: only a run has checkpoints to choose from"),
        (dit, "out", {"checkpoint": 4}, "`checkpoint`: only a run has checkpoints to choose from"),
        (original, "out", {"heads": 2, "codec": "kl"}, "`codec`: expected a run on latents and `to` diffusers"),
        (original, "out.pt", {"heads": 2, "codec": "kl"}, "`codec`: expected a run on latents and `to` diffusers"),
        (plain, "hub:me/mine", {"codec": "kl"}, "goes to the hub as it is"),
        (local, "out.pt", {}, r"has local windows in layers 1"),
        (local, "out", {"to": "diffusers"}, "has local windows in layers 1"),
        (plain, "out", {"to": "original"}, "expected `out` to end in .pt"),
        (dit, "out.pt", {}, "the original DiT format has time frequencies 'original'"),
        (dit, "out.pt", {"to": "ditlab"}, "expected `out` to end in .pt"),
        (dit, "out", {"heads": 2}, "only checkpoints of original codes leave open"),
        (dit, "out", {"raw": True}, "has one set of weights only"),
        (unet, "out", {}, "found a UNet2DModel, for which ditlab has no network"),
        (original, "there", {"heads": 2}, "expected a new file or folder, found something there"),
        (original, "out", {"heads": 2, "licence": "mit"}, "are for the hub"),
        (tmp_path / "nowhere", "out", {}, "expected a run's folder, found nothing"),
        (plain, "hub:mine", {}, "expected `out` as hub:ORG/NAME, found 'hub:mine'"),
        (dit, "hub:me/mine", {}, "expected a run of ditlab to send to the hub"),
        (plain, "hub:me/mine", {"raw": True}, "goes to the hub as it is"),
        (plain, "hub:me/mine", {"samples": True, "dry_run": "out"}, "expected samples to show, found none"),
    ]
    for source, out, settings, says in cases:
        assert re.search(says, refused(ditlab.convert, source, out, **settings)), (source, out, settings)


class Malicious:
    """Would make a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("call", ["convert", "sample", "psnr_gap"])
def test_a_checkpoint_with_code_in_it(refused, place, tmp_path, call):
    mark = tmp_path / "was-run"
    torch.save({"ema": weights(), "args": Malicious(mark)}, tmp_path / "bad.pt")
    more = {"convert": {"out": "out"}, "sample": {}, "psnr_gap": {"data": place.images}}[call]
    says = refused(getattr(ditlab, call), tmp_path / "bad.pt", **more)
    assert "it wants to run 'posix.system' when it is opened" in says
    assert "save its tensors with safetensors.torch.save_file" in says
    assert not mark.exists()
