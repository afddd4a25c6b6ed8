"""`ditlab convert`, and the other verbs on models that ditlab did not train."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ditlab as library
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.interop.original_dit import to_original
from ditlab.models.opening import open_model
from ditlab.networks.dit import DiT, DiTConfig

pytest.importorskip("diffusers")

SPLIT = ["--n", 20, "--test", 10, "--device", "cpu", "--threads", 1]


def weights(**settings):
    """An original checkpoint's state dict, of random weights."""
    network = DiT(
        DiTConfig(
            **{"image_size": (8, 8), "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 10} | settings
        )
    )
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.05)
    return to_original(network, VPObjectiveConfig())


@pytest.fixture
def original(tmp_path) -> Path:
    torch.save(weights(), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def results_of(folder: Path, reference: str, out: str = "foreign") -> Path:
    """Where analyses of a model that is not a run are kept."""
    return folder / open_model(reference, results=Path(out)).path / "analysis"


def same(a: object, b: object) -> bool:
    one, other = library.load(str(a)), library.load(str(b))
    y, label = torch.randn(2, *one.shape), torch.tensor([1, 9])
    return torch.allclose(one(y, 0.5, label), other(y, 0.5, label), atol=1e-5)


def test_an_original_checkpoint_to_ditlab_and_back(ditlab, original, tmp_path):
    done = ditlab("convert", original, "converted", "--heads", 2, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert (told["format"], told["parameters"]) == ("ditlab", 15416)
    assert ditlab("convert", "converted", "again.pt").status == 0
    assert ditlab("convert", "again.pt", "twice").status == 0  # which says how many heads it has
    assert same("converted", "twice")
    state = torch.load("again.pt", weights_only=True)["ema"]
    first = torch.load(original, weights_only=True)
    assert all(torch.allclose(state[key], value, atol=1e-6) for key, value in first.items())


def test_averaged_or_raw(ditlab, tmp_path):
    ema = weights()
    raw = {key: value if key == "pos_embed" else 2 * value for key, value in ema.items()}
    torch.save({"model": raw, "ema": ema, "args": argparse.Namespace(num_classes=10)}, "both.pt")
    for name, flags in (("averaged", []), ("raw", ["--raw"])):
        assert ditlab("convert", "both.pt", name, "--heads", 2, *flags).status == 0
    torch.save(raw, "last.pt")
    assert ditlab("convert", "last.pt", "last", "--heads", 2).status == 0
    assert same("raw", "last")
    assert not same("averaged", "last")


def test_diffusers_there_and_back(ditlab, diffusers_folder, tmp_path):
    folder = diffusers_folder("dit")
    done = ditlab("convert", f"diffusers:{folder}", "converted", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["difference"] < 1e-4
    assert ditlab("convert", "converted", "back", "--to", "diffusers").status == 0
    assert same("converted", f"diffusers:{folder}")
    assert same("diffusers:back", f"diffusers:{folder}")


def test_a_run_to_diffusers(ditlab, place, tmp_path):
    flags = ["--conditional", "--network.time-frequencies", "diffusers"]
    run = place.trained("for-diffusers", *flags, preset="dit-nano/2")
    assert ditlab("convert", run, "out", "--to", "diffusers").status == 0
    assert same(run, "diffusers:out")
    assert ditlab("convert", run, "second", "--to", "diffusers", "--step", 4).status == 0
    assert not same(run, "diffusers:second")


def test_a_run_to_the_original(ditlab, place, tmp_path):
    run = place.trained("for-original", "--conditional", preset="dit-nano/2")
    assert ditlab("convert", run, "out.pt").status == 0
    assert ditlab("convert", "out.pt", "converted").status == 0
    assert same(run, "converted")


def test_guessed_heads_are_said(ditlab, tmp_path):
    torch.save(weights(width=384, heads=3, depth=1), tmp_path / "wide.pt")
    for out, flags in (("guessed", []), ("told", ["--heads", 3]), ("again.pt", ["--heads", 3])):
        done = ditlab("convert", "wide.pt", out, *flags)
        assert ("note: wide.pt does not say how many attention heads it has: 6 were assumed" in done.out) == (not flags)
    done = ditlab("convert", "again.pt", "again")
    assert "note" not in done.out
    assert same("again", "told")
    assert not same("again", "guessed")


def test_the_autoencoder_of_a_run_goes_along_to_diffusers(ditlab, place, write_kl, tmp_path):
    import diffusers

    kl = write_kl(tmp_path / "kl")
    assert ditlab("data", "encode", place.images, "latents", "--codec", kl, "--device", "cpu").status == 0
    flags = ["--conditional", "--network.time-frequencies", "diffusers"]
    words = place.words(tmp_path / "run", "--data", tmp_path / "latents", *flags, preset="dit-nano/2")
    assert ditlab(*words).status == 0
    done = ditlab("convert", "run", "out", "--to", "diffusers")
    assert done.status == 0, done.err
    assert "note" not in done.out
    assert same("run", "diffusers:out")
    z = torch.randn(2, 4, 4, 4)
    run, found = open_model("run"), open_model("diffusers:out")
    assert np.array_equal(found.pixels(z), run.pixels(z))
    assert type(diffusers.DiTPipeline.from_pretrained("out").vae).__name__ == "AutoencoderKL"
    # A converted model's own goes along as well.
    assert ditlab("convert", "diffusers:out", "converted").status == 0
    assert ditlab("convert", "converted", "second", "--to", "diffusers").status == 0
    assert np.array_equal(open_model("diffusers:second").pixels(z), run.pixels(z))
    # It may have been moved since.
    kl.rename(tmp_path / "moved")
    done = ditlab("convert", "run", "third", "--to", "diffusers")
    assert (done.status, "give --codec" in done.err, (tmp_path / "third").exists()) == (2, True, False)
    assert ditlab("convert", "run", "third", "--to", "diffusers", "--codec", "moved").status == 0
    assert (tmp_path / "third" / "vae" / "config.json").is_file()


def test_an_autoencoder_that_cannot_go_along_is_named(ditlab, place, write_pair, tmp_path):
    pair = write_pair(tmp_path / "pair")
    assert ditlab("data", "encode", place.images, "latents", "--codec", pair, "--device", "cpu").status == 0
    for out, flags, says in (
        ("out.pt", [], "the original format has no place"),
        ("out", ["--network.time-frequencies", "diffusers"], "a DiTPipeline takes an AutoencoderKL only"),
    ):
        run = tmp_path / f"run-for-{out}"
        words = place.words(run, "--data", tmp_path / "latents", "--conditional", *flags, preset="dit-nano/2")
        assert ditlab(*words).status == 0
        done = ditlab("convert", run, out, *([] if out == "out.pt" else ["--to", "diffusers"]))
        assert done.status == 0, done.err
        record = open_model(run).codec.record
        assert f"note: its autoencoder does not go along ({says}): these are latents of '{pair}', SHA-256 " in done.out
        assert f"{record.sha256[:12]}, scale 1, shift 0" in done.out
    assert not (tmp_path / "out" / "vae").exists()


def test_what_cannot_be_converted(refused, place, plain, original, diffusers_folder, tmp_path):
    unet, dit = diffusers_folder("unet", "unet"), diffusers_folder("dit", "dit")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    flags = ["--conditional", "--network.no-null-class", "--objective.label-dropout", 0]
    nobody = place.trained("without-null", *flags, preset="dit-nano/2")
    local = place.trained("for-refusal", "--conditional", "--network.attention", "3,g", preset="dit-nano/2")
    cases = [
        ([original, "out"], "do not determine the number of attention heads"),
        ([original, "out", "--heads", 3], "width must be a multiple of the 3 heads"),
        ([plain, "out"], "is a run of ditlab already"),
        ([plain, "out.pt"], "knows class-conditional networks only, this DiT has no classes"),
        ([plain, "out", "--to", "diffusers"], "knows class-conditional networks only, this DiT has no classes"),
        ([nobody, "out.pt"], "needs a row for the null class in the label table .*, this DiT's has none"),
        ([original, "out", "--heads", 2, "--step", 4], "--step: only a run has checkpoints to choose from"),
        ([f"diffusers:{dit}", "out", "--step", 4], "--step: only a run has checkpoints to choose from"),
        ([original, "out", "--heads", 2, "--codec", "kl"], "--codec: expected a run on latents and --to diffusers"),
        ([original, "out.pt", "--heads", 2, "--codec", "kl"], "--codec: expected a run on latents and --to diffusers"),
        ([plain, "hub:me/mine", "--codec", "kl"], "goes to the hub as it is"),
        ([local, "out.pt"], r"has local windows in layers 1"),
        ([local, "out", "--to", "diffusers"], "has local windows in layers 1"),
        ([plain, "out", "--to", "original"], "expected OUT to end in .pt"),
        ([f"diffusers:{dit}", "out.pt"], "the original DiT format has time frequencies 'original'"),
        ([f"diffusers:{dit}", "out.pt", "--to", "ditlab"], "expected OUT to end in .pt"),
        ([f"diffusers:{dit}", "out", "--heads", 2], "only checkpoints of original codes leave open"),
        ([f"diffusers:{dit}", "out", "--raw"], "has one set of weights only"),
        ([f"diffusers:{unet}", "out"], "found a UNet2DModel, for which ditlab has no network"),
        ([original, "there", "--heads", 2], "expected a new file or folder, found something there"),
        ([original, "out", "--heads", 2, "--licence", "mit"], "are for the hub"),
        ([tmp_path / "nowhere", "out"], "expected a run's folder, found nothing"),
        ([plain, "hub:mine"], "expected hub:ORG/NAME, found 'hub:mine'"),
        ([f"diffusers:{dit}", "hub:me/mine"], "expected a run of ditlab to send to the hub"),
        ([plain, "hub:me/mine", "--raw"], "goes to the hub as it is"),
        ([plain, "hub:me/mine", "--samples", "--dry-run", "out"], "expected samples to show, found none"),
    ]
    for words, says in cases:
        assert re.search(says, refused("convert", *words)), words


class Malicious:
    """Would make a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("verb", ["convert", "sample", "psnr-gap"])
def test_a_checkpoint_with_code_in_it(refused, place, tmp_path, verb):
    mark = tmp_path / "was-run"
    torch.save({"ema": weights(), "args": Malicious(mark)}, tmp_path / "bad.pt")
    words = {"convert": ["out"], "sample": [], "psnr-gap": ["--data", place.images]}[verb]
    says = refused(verb, tmp_path / "bad.pt", *words)
    assert "it wants to run 'posix.system' when it is opened" in says
    assert "save its tensors with safetensors.torch.save_file" in says
    assert not mark.exists()


def test_an_export(ditlab, place, plain, tmp_path, monkeypatch):
    run = place.copy(plain)
    assert ditlab("psnr-gap", run, "--images", 4, "--points", 3, "--no-references", "--device", "cpu").status == 0
    assert ditlab("attention", run, "--images", 2, "--device", "cpu").status == 0
    assert ditlab("sample", run, "--seeds", "0-3", "--steps", 2, "--device", "cpu").status == 0
    done = ditlab("convert", run, "hub:me/mine", "--dry-run", "export", "--licence", "cc-by-4.0", "--samples")
    assert done.status == 0, done.err
    out = tmp_path / "export"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "log.jsonl",
        *(f"analysis/{name}" for name in ("attention.json", "attention.npz")),
        *(f"analysis/psnr-gap.{kind}" for kind in ("csv", "json", "npz")),
        *(f"checkpoints/000000006/{name}.safetensors" for name in ("ema", "model", "optimizer")),
        *(f"checkpoints/000000006/{name}.json" for name in ("manifest", "state")),
        *(
            f"figures/{name}.png"
            for name in ("attention-locality", "gap-along-training", "losses", "psnr-curves", "samples")
        ),
    }
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ditlab\nlicense: cc-by-4.0\n")
    for target in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert (out / target).is_file()
    gap = json.loads((run / "analysis" / "psnr-gap.json").read_text())["averages"]["mse_mean"]
    assert f"| PSNR gap | {gap['gap']:.2f} dB" in card
    assert f"| PSNR on training images | {gap['train']:.2f} dB |" in card
    assert "| training images | 20 |" in card
    assert "| steps | 6 |" in card
    assert 'ditlab.load("hub:me/mine")' in card
    # Where the images lay is nobody's concern, and they did not come along.
    assert json.loads((out / "config.json").read_text())["config"]["data"]["path"] == ""
    library.load(out)
    done = ditlab("psnr-gap", out)
    assert (done.status, done.err.split(": ", 1)[1]) == (
        2,
        "run export: its images did not come with it; give --data with their set's folder\n",
    )
    words = ["--images", 4, "--points", 3, "--no-references", "--device", "cpu"]
    assert ditlab("psnr-gap", out, "--data", place.images, *words).status == 0


def test_an_export_of_other_weights_has_no_numbers_of_these(ditlab, place, plain, tmp_path):
    run = place.copy(plain)
    assert ditlab("psnr-gap", run, "--images", 4, "--points", 3, "--no-references", "--device", "cpu").status == 0
    done = ditlab("convert", run, "hub:me/mine", "--dry-run", "export", "--step", 4)
    assert done.status == 0
    assert "no --licence was given" in done.out
    card = (tmp_path / "export" / "README.md").read_text()
    assert "PSNR gap |" not in card
    assert "license:" not in card
    assert not (tmp_path / "export" / "analysis").exists()


@pytest.mark.parametrize("kind", ["raw", "split"])
def test_numbers_of_raw_weights_and_of_other_splits_are_not_on_the_card(ditlab, place, plain, tmp_path, kind):
    run = place.copy(plain)
    words = ["--images", 4, "--points", 3, "--no-references", "--device", "cpu"]
    assert ditlab("psnr-gap", run, *words, *(["--raw"] if kind == "raw" else [])).status == 0
    if kind == "split":
        file = run / "analysis" / "psnr-gap.json"
        values = json.loads(file.read_text())
        values["about"]["split_hash"] = "0" * 64
        file.write_text(json.dumps(values))
    assert ditlab("convert", run, "hub:me/mine", "--dry-run", "export").status == 0
    assert "PSNR gap |" not in (tmp_path / "export" / "README.md").read_text()
    assert not (tmp_path / "export" / "analysis").exists()


def test_sending_and_fetching(ditlab, place, plain, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    import shutil

    kept = tmp_path / "on-the-hub"

    class Api:
        def create_repo(self, repo, **_):
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, kept)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, *, allow_patterns: str(kept))
    done = ditlab("convert", plain, "hub:me/mine")
    assert done.status == 0, done.err
    assert "sent to https://huggingface.co/me/mine" in done.out
    for flags in (["--step", 4], ["--raw"]):
        done = ditlab("convert", "hub:me/mine", "fetched", *flags)
        assert (done.status, (tmp_path / "fetched").exists()) == (2, False)
        assert "is a run, fetched as it is; expected no --step or --raw, found one" in done.err
    assert ditlab("convert", "hub:me/mine", "fetched").status == 0
    y = torch.randn(1, 3, 8, 8)
    expected = library.load(plain)(y, 0.5)
    assert torch.equal(library.load("fetched")(y, 0.5), expected)
    assert torch.equal(library.load("hub:me/mine")(y, 0.5), expected)
    assert ditlab("sample", "hub:me/mine", "--seeds", "0-1", "--steps", 2, "--device", "cpu").status == 0
    assert next((tmp_path / "foreign" / "me--mine" / "samples").glob("*/grid.png"))


def test_an_interrupted_download(refused, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def broken(*_, **__):
        raise ConnectionError("Connection broken: 1048576 bytes read, 99 more expected")

    monkeypatch.setattr(hub, "snapshot_download", broken)
    for words in (["convert", "hub:me/mine", "out"], ["sample", "diffusers:me/mine"], ["psnr-gap", "hub:me/mine"]):
        assert "run the same again to resume" in refused(*words)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_measuring_and_sampling_diffusers_models(ditlab, place, diffusers_folder, tmp_path, kind):
    reference = f"diffusers:{diffusers_folder(kind, 'theirs')}"
    words = [reference, "--data", place.images, *SPLIT]
    done = ditlab("psnr-gap", *words, "--images", 5, "--points", 3, "--no-references")
    assert done.status == 0, done.err
    note = "note: theirs: Nobody said which images this model was trained on: 20 training and 10 test images of"
    assert note in done.out
    result = json.loads((results_of(tmp_path, reference) / "psnr-gap.json").read_text())
    assert result["about"]["settings"]["notes"][0].startswith("Nobody said")
    assert result["about"]["n"] == 20
    assert np.isfinite(result["averages"]["mse_mean"]["gap"])
    # The user may say so, and choose where results go.
    done = ditlab("psnr-gap", *words, "--images", 5, "--points", 3, "--no-references", "--own-split", "--out", "mine")
    assert "Nobody said" not in done.out
    assert (results_of(tmp_path, reference, "mine") / "psnr-gap.json").is_file()
    done = ditlab("attention", *words, "--images", 2, "--layers", 1, 2)
    assert done.status == 0, done.err
    assert list(results_of(tmp_path, reference).glob("attention-maps*.png"))
    done = ditlab("sample", reference, "--seeds", "0-2", "--steps", 3, "--device", "cpu", "--out", "samples")
    assert done.status == 0, done.err
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (3, 8, 8, 3)


def test_a_source_of_images(ditlab, diffusers_folder, tmp_path):
    reference = f"diffusers:{diffusers_folder('unet', 'theirs')}"
    words = ["--images", 5, "--points", 2, "--no-references", *SPLIT]
    assert ditlab("psnr-gap", reference, "--data", "digits", *words).status == 0
    assert (tmp_path / "image-sets" / "digits-8" / "manifest.json").is_file()


def test_beside_a_run(ditlab, place, plain, diffusers_folder, tmp_path):
    reference = f"diffusers:{diffusers_folder('unet', 'theirs')}"
    words = [
        "psnr-gap",
        place.copy(plain),
        reference,
        "--data",
        place.images,
        "--images",
        5,
        "--points",
        3,
        "--no-references",
    ]
    words += ["--device", "cpu", "--threads", 1, "--out", "both"]
    says = ditlab(*words, "--n", 20, "--test", 10).err
    assert "have different splits" in says
    done = ditlab(*words, "--n", 20, "--test", 20, "--json")
    assert done.status == 0, done.err
    assert {group["label"] for group in json.loads(done.out)["groups"]} == {"dit-nano/1, global", "theirs"}


def test_what_cannot_be_looked_at(refused, place, plain, diffusers_folder, tmp_path):
    unet = f"diffusers:{diffusers_folder('unet', 'unet')}"
    large = f"diffusers:{diffusers_folder('unet', 'large', sample_size=16)}"
    assert "which images it was trained on is not known; give --data" in refused("psnr-gap", unet)
    assert "expected images 3x16x16, found 3x8x8" in refused("attention", large, "--data", place.images)
    assert "named twice" in refused("report", unet, unet, "--data", place.images)
    assert "found the source 'digits'" in refused("psnr-gap", plain, "--data", "digits")
    assert "expected no step" in refused("psnr-gap", unet, "--data", place.images, "--step", 3)
    assert "split: 5000 test images asked for" in refused("psnr-gap", unet, "--data", place.images, "--test", 5000)
    assert "name layers that are alike" in refused("attention", unet, "--data", place.images, *SPLIT)
