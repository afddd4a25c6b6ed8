"""`ditlab data encode`, `ditlab data info` of latents, and the flags of runs on latents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditlab import api
from ditlab.data import ImageSet, to_uint8
from ditlab.data.autoencoder import open_autoencoder


@pytest.fixture(scope="module")
def weights(place, write_pair) -> Path:
    """A random tiny autoencoder of factor 2 with 4 latent channels."""
    folder = place.folder / "weights"
    return folder if folder.exists() else write_pair(folder)


@pytest.fixture(scope="module")
def latents(place, weights) -> Path:
    """The digits' latents, mirrored ones too; not to be changed."""
    out = place.folder / "digits-latents"
    api.encode(place.images, str(weights), out=out, mirrored=True, device="cpu")
    return out


def test_encode(ditlab, place, weights, latents, tmp_path):
    done = ditlab("data", "encode", place.images, "latents", "--codec", weights, "--threads", 1, "--json")
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    assert printed["shape"] == [4, 4, 4]
    assert printed["latents"]["codec"]["source"] == str(weights)
    assert printed["latents"]["store"] == "mean"
    assert "standard deviation" in done.err
    made, pictures = ImageSet.open("latents"), ImageSet.open(place.images)
    codec = open_autoencoder(weights)
    expected = codec.moments(pictures.batch(range(16)))[0]
    torch.testing.assert_close(made.batch(range(16)), expected, rtol=1e-3, atol=1e-3)
    # Again: nothing is done.
    before = (tmp_path / "latents" / "manifest.json").stat().st_mtime_ns
    assert ditlab("data", "encode", place.images, "latents", "--codec", weights).status == 0
    assert (tmp_path / "latents" / "manifest.json").stat().st_mtime_ns == before
    # Otherwise: refused, or replaced.
    done = ditlab("data", "encode", place.images, "latents", "--codec", weights, "--mirrored")
    assert done.status == 2
    assert "already holds another image set (digits, 4x4x4, latents)" in done.err
    words = ["data", "encode", place.images, "latents", "--codec", weights, "--mirrored", "--overwrite"]
    assert ditlab(*words).status == 0
    assert ImageSet.open("latents").hash == ImageSet.open(latents).hash


def test_info_draws_the_decoded_latents(ditlab, weights, latents, tmp_path):
    words = ["--sheet", tmp_path / "sheet.png", "--count", 4, "--device", "cpu", "--codec", weights]
    done = ditlab("data", "info", latents, *words, "--json")
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    assert printed["latents"]["picture"] == [3, 8, 8]
    assert isinstance(printed["latents"]["round_trip_db"], float)
    assert "round trip" in done.err
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    scale = (sheet.shape[0] - 6) // 2 // 8
    cell = sheet[2 : 2 + 8 * scale : scale, 2 : 2 + 8 * scale : scale].transpose(2, 0, 1)
    opened = ImageSet.open(latents)
    decoded = to_uint8(open_autoencoder(weights).decode(opened.batch(range(len(opened)))))
    assert any(np.array_equal(cell, picture) for picture in decoded.numpy())


def test_a_run_on_latents(ditlab, place, weights, latents):
    words = place.words(Path("run"), "--data", latents, "--training.flip", "--conditional")
    done = ditlab(*words)
    assert done.status == 0, done.err
    assert "done: train PSNR of latents " in done.out
    words = ["--seeds", "0-4", "--sampler", "ddim", "--sampler-steps", 3, "--device", "cpu", "--codec", weights]
    assert ditlab("sample", "run", *words, "--out", "images", "--batch", 2).status == 0
    assert np.load("images/samples.npz")["arr_0"].shape == (5, 8, 8, 3)


@pytest.mark.parametrize("flag", ["--objective.sigma-data", "--objective.sigma_data"])
def test_a_sigma_data_that_was_given_is_kept(ditlab, place, latents, flag):
    done = ditlab(*place.words(Path("measured"), "--data", latents, preset="dit-nano/1-edm", steps=1))
    assert ", the standard deviation of these latents\n" in done.out
    more = ["--data", latents, f"{flag}=0.5"]
    done = ditlab(*place.words(Path("given"), *more, preset="dit-nano/1-edm", steps=1))
    assert (done.status, "objective.sigma_data" in done.out) == (0, False)
    values = [json.loads(Path(run, "config.json").read_text())["config"]["objective"] for run in ("measured", "given")]
    assert values[0]["sigma_data"] != values[1]["sigma_data"] == 0.5


def test_flips_without_mirrored_latents(refused, place, weights, tmp_path):
    unmirrored = place.folder / "unmirrored-by-words"
    api.encode(place.images, str(weights), out=unmirrored)
    says = refused(*place.words(tmp_path / "run", "--data", unmirrored, "--training.flip"))
    assert says.startswith("training.flip: ")
    assert "holds no latents of mirrored pictures; encode it with " in says


def test_bad_input_of_encode(refused, place, weights, latents, tmp_path):
    words = ["data", "encode", place.images, tmp_path / "out", "--codec"]
    assert refused(*words[:-1]) == "--codec: expected an autoencoder's hub id or folder, found nothing"
    assert "found nothing there" in refused(*words, "./none")
    assert "expected the kind 'kl', found 'tiny'" in refused(*words, weights, "--kind", "kl")
    assert "expected a batch of 1 to 64 pictures, found 0" in refused(*words, weights, "--batch", 0)
    assert "found one of latents" in refused("data", "encode", latents, tmp_path / "out", "--codec", weights)
    assert "already holds another image set" in refused("data", "encode", place.images, latents, "--codec", weights)
    assert "expected a folder at" in refused("data", "encode", tmp_path / "no", tmp_path / "out", "--codec", weights)
    odd, grey = place.folder / "odd", place.folder / "grey"
    api.prepare("digits", size=7, out=odd)
    says = refused("data", "encode", odd, tmp_path / "out", "--codec", weights)
    assert "expected pictures whose sides are multiples of 2, found 7x7" in says
    api.prepare("digits", size=8, color="grey", out=grey)
    says = refused("data", "encode", grey, tmp_path / "out", "--codec", weights)
    assert "expected pictures of 3 channels, found 1" in says


def test_a_hub_id_that_is_not_there(refused, place, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    says = refused("data", "encode", place.images, tmp_path / "out", "--codec", "org/vae")
    assert "fetch it where there is a network with `hf download org/vae`, or give a local folder" in says


@pytest.mark.slow
def test_two_processes_encode_one_set(place, weights, latents, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ditlab"]
    words = ["data", "encode", place.images, "latents", "--codec", weights, "--mirrored", "--device", "cpu"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, words), *more],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("standard deviation") == 1
    assert ImageSet.open(tmp_path / "latents").hash == ImageSet.open(latents).hash
    done = run("--store", "sample", "--seed", "1", "--overwrite", "--batch", "0")
    assert done.returncode != 0
    assert done.stderr.count("ditlab: data encode: expected a batch") >= 1
