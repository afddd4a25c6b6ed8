"""Latents by configuration alone: encode, train, sample, measure, look, report; and what is refused on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ditlab.cli.measuring import measure_references
from PIL import Image
from rich.console import Console

from ditlab.analyses.jacobian.result import JacobianResult
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.samples.measure import KindSamples
from ditlab.config import RunRecord, from_json, to_json
from ditlab.data import ImageSet, to_uint8
from ditlab.data.autoencoder import open_autoencoder
from ditlab.data.pixels import centre_crop, planes, to_float
from ditlab.diffusion.likelihood import bits_per_dimension
from ditlab.diffusion.samplers import ImageNoise
from ditlab.errors import DitlabError
from ditlab.metrics.nearest import nearest
from ditlab.models import memorization
from ditlab.models.comparing import OpenedModel
from ditlab.models.run import Run


@pytest.fixture(scope="module")
def weights(place, write_pair) -> Path:
    """A random tiny autoencoder of factor 2 with 4 latent channels."""
    folder = place.folder / "weights"
    return folder if folder.exists() else write_pair(folder)


@pytest.fixture(scope="module")
def latents(place, weights) -> Path:
    """The digits' latents, mirrored ones too; not to be changed."""
    out = place.folder / "digits-latents"
    if not out.exists():
        place._quietly("data", "encode", place.images, out, "--codec", weights, "--mirrored", "--device", "cpu")
    return out


@pytest.fixture
def latent(place, latents) -> Path:
    """A run on latents, class-conditional, with flips; not to be changed."""
    return place.trained("latent", "--data", latents, "--training.flip", "--conditional")


def test_encode(ditlab, place, weights, latents, tmp_path):
    done = ditlab("data", "encode", place.images, "latents", "--codec", weights, "--threads", 1, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert told["shape"] == [4, 4, 4]
    assert told["latents"]["codec"]["source"] == str(weights)
    assert told["latents"]["store"] == "mean"
    assert "standard deviation" in done.err
    made, pictures = ImageSet.open("latents"), ImageSet.open(place.images)
    codec = open_autoencoder(weights)
    expected = codec.moments(pictures.batch(range(16)))[0]
    torch.testing.assert_close(made.batch(range(16)), expected, rtol=1e-3, atol=1e-3)
    # Again: found, and nothing done.
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


def test_info_draws_the_decoded_latents(ditlab, place, weights, latents, tmp_path):
    from PIL import Image

    done = ditlab("data", "info", latents, "--sheet", tmp_path / "sheet.png", "--count", 4, "--device", "cpu", "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert told["latents"]["picture"] == [3, 8, 8]
    assert isinstance(told["latents"]["round_trip_db"], float)
    assert "round trip" in done.err
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    scale = (sheet.shape[0] - 6) // 2 // 8
    cell = sheet[2 : 2 + 8 * scale : scale, 2 : 2 + 8 * scale : scale].transpose(2, 0, 1)
    opened = ImageSet.open(latents)
    decoded = to_uint8(open_autoencoder(weights).decode(opened.batch(range(len(opened)))))
    assert any(np.array_equal(cell, picture) for picture in decoded.numpy())


def test_a_run_on_latents(latent, latents, weights, place):
    run = Run.open(latent)
    assert run.record.codec is not None
    assert (latent / run.record.codec.place).resolve() == weights.resolve()
    assert run.config.network.channels == 4  # pyright: ignore[reportAttributeAccessIssue]
    assert run.config.network.image_size == (4, 4)  # pyright: ignore[reportAttributeAccessIssue]
    assert run.settings["codec"] == str(weights)
    denoiser = run.denoiser()
    assert not denoiser.pixel_space
    assert denoiser.shape == (4, 4, 4)
    images, labels = run.pictures("test", 3)
    assert images.shape == (3, 4, 4, 4)
    assert labels is not None
    assert run.pixels(images).shape == (3, 3, 8, 8)
    # Real pictures where they lie where they lay, else decoded ones.
    stored = ImageSet.open(place.images)
    assert np.array_equal(run.originals([4, 2]), stored.take([4, 2]))
    alone = shutil.copytree(latents, place.folder / "elsewhere" / "far" / "latents", dirs_exist_ok=True)
    moved = Run.open(latent, alone, weights)
    assert np.array_equal(moved.pixels_at([4, 2]), moved.pixels(moved.images.batch([4, 2])))
    assert not np.array_equal(moved.pixels_at([4, 2]), stored.take([4, 2]))


def test_runs_on_pixels_keep_no_codec(plain, latent):
    values = json.loads((plain / "config.json").read_text())
    assert values.pop("codec") is None
    assert from_json(RunRecord, values, "before").codec is None
    record = Run.open(latent).record
    assert from_json(RunRecord, to_json(record), "again") == record


def test_sample(ditlab, latent, weights, tmp_path):
    words = ["sample", latent, "--seeds", "0-4", "--sampler", "ddim", "--steps", 3, "--device", "cpu"]
    done = ditlab(*words, "--out", "images", "--batch", 2)
    assert done.status == 0, done.err
    images = np.load("images/samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((5, 8, 8, 3), np.uint8)
    done = ditlab(*words, "--out", "again", "--codec", weights)
    assert done.status == 0, done.err
    assert np.abs(np.load("again/samples.npz")["arr_0"].astype(int) - images).max() <= 1


@pytest.mark.slow
def test_every_analysis(ditlab, place, latent, weights, tmp_path):
    run = place.copy(latent)
    done = ditlab("psnr-gap", run, "--images", 4, "--points", 3, "--device", "cpu")
    assert done.status == 0, done.err
    assert "PSNRs are those of latents, with M = 2 by convention" in done.out
    kept = json.loads((run / "analysis" / "psnr-gap.json").read_text())
    assert kept["about"]["settings"]["space"] == "latents"
    done = ditlab("attention", run, "--images", 2, "--levels", 0.5, "--images-from", "samples", "--codec", weights)
    assert done.status == 0, done.err
    done = ditlab("report", run, "--samples", 2, "--device", "cpu", "--hide-training-images")
    assert done.status == 0, done.err
    page = (run / "report.html").read_text()
    assert "PSNRs are those of latents" in page
    assert "both sides are decoded" in page
    assert str(weights) in page
    assert (run / "figures" / "samples.png").is_file()


@pytest.mark.slow
def test_moments_of_a_kl_autoencoder(ditlab, place, write_kl, tmp_path):
    write_kl(tmp_path / "kl", scaling_factor=0.4)
    done = ditlab("data", "encode", place.images, "latents", "--codec", "kl", "--kind", "kl")
    assert done.status == 0, done.err
    assert ImageSet.open("latents").stochastic
    done = ditlab(*place.words(tmp_path / "run", "--data", tmp_path / "latents"))
    assert done.status == 0, done.err
    assert "train PSNR of latents" in done.out
    # Interrupted and taken up, the same: the noise of the posterior belongs to the step.
    words = place.words(tmp_path / "twice", "--data", tmp_path / "latents", steps=3)
    assert ditlab(*words).status == 0
    assert ditlab(*place.words(tmp_path / "twice", "--data", tmp_path / "latents")).status == 0
    once, twice = Run.open("run"), Run.open("twice")
    assert once.log[-1]["loss"] == twice.log[-1]["loss"]
    assert all(torch.equal(value, twice.checkpoint().model[name]) for name, value in once.checkpoint().model.items())
    done = ditlab("sample", "run", "--seeds", "0-1", "--steps", 2, "--out", "images")
    assert done.status == 0, done.err
    assert np.load("images/samples.npz")["arr_0"].shape == (2, 8, 8, 3)


def test_edm_on_latents(place, latents):
    run = Run.open(
        place.trained("latent-edm", "--data", latents, "--objective.sigma-data", 0.7, preset="dit-nano/1-edm")
    )
    assert not run.denoiser().pixel_space


def test_sigma_data_follows_the_latents(ditlab, place, latents, tmp_path):
    """Without a word of the user's, and said in a line; what the user gave counts; pixels keep EDM's 0.5."""
    measured = float(f"{ImageSet.open(latents).latents.record.overall_std:.3g}")  # pyright: ignore[reportOptionalMemberAccess]
    assert measured not in (0.5, 0.7)

    def words(out: str, *more: object, steps: int = 1) -> list[str]:
        return place.words(tmp_path / out, *more, preset="dit-nano/1-edm", steps=steps)

    def kept(out: str) -> float:
        return json.loads((tmp_path / out / "config.json").read_text())["config"]["objective"]["sigma_data"]

    said = f"objective.sigma_data = {measured:g}, the standard deviation of these latents\n"
    done = ditlab(*words("run", "--data", latents))
    assert (done.status, said in done.out, kept("run")) == (0, True, measured)
    assert Run.open("run").denoiser().identity["sigma_data"] == measured
    done = ditlab(*words("run", "--data", latents, steps=2))  # goes on
    assert (done.status, "going on from step 1" in done.out, kept("run")) == (0, True, measured)
    for given, flag in ((0.7, ["--objective.sigma-data", 0.7]), (0.5, ["--objective.sigma_data=0.5"])):
        done = ditlab(*words(f"given-{given}", "--data", latents, *flag))
        assert (done.status, "objective.sigma_data" in done.out, kept(f"given-{given}")) == (0, False, given)
    for out, flags in (("pixels", []), ("ve", ["--data", latents, "--objective.precond", "ve"])):
        done = ditlab(*words(out, *flags))
        assert (done.status, "objective.sigma_data" in done.out, kept(out)) == (0, False, 0.5), done.err


def test_references_are_marked_as_latents_too(plain, latent):
    for path, latents in ((plain, False), (latent, True)):
        found = measure_references(Run.open(path), PSNRConfig(images=3), [0.5, 1.0], Console(quiet=True))
        assert [result.about.name for result in found] == ["empirical Bayes", "Wiener"]
        assert [result.latents for result in found] == [latents, latents]


@pytest.mark.parametrize("moved", [False, True])
def test_a_replay_of_latents_lies_at_no_distance(place, latent, latents, weights, moved, monkeypatch):
    """Decoded pictures are compared with decoded ones, also of mirrored latents; the originals are only shown."""
    monkeypatch.setattr(memorization, "DECODE_BATCH", 7)
    if moved:
        alone = shutil.copytree(latents, place.folder / "elsewhere" / "far" / "latents", dirs_exist_ok=True)
        run = Run.open(latent, alone, weights)
    else:
        run = Run.open(latent)
    indices = run.split.train[[0, 3, 9, 19, 4, 11]]
    flip_mask = torch.tensor([False] * 4 + [True] * 2)
    replayed = run.images.batch(indices, mirrored=flip_mask)
    generator = np.random.default_rng(0)
    other = torch.from_numpy(generator.normal(size=(2, 4, 4, 4))).float()
    opened = OpenedModel(run, run.denoiser(), run.provenance(run.newest_step))
    drawn = KindSamples.of(opened, "a", torch.cat([replayed, other]))
    found = drawn.nearest.samples
    assert found.index[:6].tolist() == [0, 3, 9, 19, 4, 11]
    assert found.mirrored[:6].tolist() == flip_mask.tolist()
    # Pictures that are decoded beside others may round differently.
    assert found.first[:6].max() < 0.3
    assert found.first[6:].min() > 1
    assert drawn.near_copies[:6].all()
    assert drawn.nearest.samples.copied[:6].all()
    # The control is of decoded pictures too.
    train, test = run.decoded(run.split.train), run.decoded(run.split.test)
    twins = run.decoded(run.split.train, mirrored=True)
    expected = np.minimum(nearest(test, train).first, nearest(test, twins).first)
    assert drawn.nearest.held_out is not None
    np.testing.assert_allclose(drawn.nearest.held_out.first, expected, atol=0.3)
    shown = run.originals(indices)
    np.testing.assert_array_equal(drawn.nearest_images[:4], shown[:4])
    np.testing.assert_array_equal(drawn.nearest_images[4:6], shown[4:, ..., ::-1])
    assert drawn.nearest.latents


def test_latents_are_never_clipped(refused, ditlab, latent, place):
    run = Run.open(latent)
    says = refused("psnr-gap", latent, "--images", 2, "--points", 2, "--clip", "--device", "cpu")
    assert says == "psnr-gap: clip: latents have no bounds to clip estimates to; expected no clipping"
    with pytest.raises(DitlabError, match="expected a denoiser of 8-bit images, found one of latents"):
        bits_per_dimension(run.denoiser(), run.pictures("test", 1)[0], ImageNoise([0], (4, 4, 4)))
    copy = place.copy(latent)
    values = json.loads((copy / "config.json").read_text())
    values["config"]["sampler"]["clip"] = True
    (copy / "config.json").write_text(json.dumps(values))
    done = ditlab("sample", copy, "--seeds", "0", "--steps", 2)
    assert done.status == 2
    assert "latents have no bounds to clip estimates to" in done.err


def test_flips_without_mirrored_latents(refused, ditlab, place, weights, tmp_path):
    assert ditlab("data", "encode", place.images, place.folder / "unmirrored", "--codec", weights).status == 0
    says = refused(*place.words(tmp_path / "run", "--data", place.folder / "unmirrored", "--training.flip"))
    assert says.startswith("training.flip: ")
    assert says.endswith(
        "holds no latents of mirrored pictures; encode it with --mirrored, or train with --training.no-flip"
    )


def test_bad_input_of_encode(refused, place, weights, latents, tmp_path, write_pair):
    words = ["data", "encode", place.images, tmp_path / "out", "--codec"]
    assert refused(*words[:-1]) == "data encode --codec: expected an autoencoder's hub id or folder, found nothing"
    assert "found nothing there" in refused(*words, "./none")
    assert "expected the kind 'kl', found 'tiny'" in refused(*words, weights, "--kind", "kl")
    assert "expected a batch of 1 to 64 pictures, found 0" in refused(*words, weights, "--batch", 0)
    assert "found one of latents" in refused("data", "encode", latents, tmp_path / "out", "--codec", weights)
    assert "already holds another image set" in refused("data", "encode", place.images, latents, "--codec", weights)
    assert "expected a folder at" in refused("data", "encode", tmp_path / "no", tmp_path / "out", "--codec", weights)
    odd = place.folder / "odd"
    if not odd.exists():
        place._quietly("data", "prepare", "digits", odd, "--size", 7)
    says = refused("data", "encode", odd, tmp_path / "out", "--codec", weights)
    assert "expected pictures whose sides are multiples of 2, found 7x7" in says
    grey = place.folder / "grey"
    if not grey.exists():
        place._quietly("data", "prepare", "digits", grey, "--size", 8, "--color", "grey")
    assert "expected pictures of 3 channels, found 1" in refused(
        "data", "encode", grey, tmp_path / "out", "--codec", weights
    )


def test_a_hub_id_that_is_not_there(refused, place, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    says = refused("data", "encode", place.images, tmp_path / "out", "--codec", "org/vae")
    assert "fetch it where there is a network with `hf download org/vae`, or give a local folder" in says


def test_a_codec_that_is_gone_or_another(refused, place, latent, weights, latents, tmp_path, write_pair):
    copy = place.copy(latent)
    values = json.loads((copy / "config.json").read_text())
    values["codec"] |= {"place": "../gone", "source": "gone"}
    (copy / "config.json").write_text(json.dumps(values))
    words = ["sample", copy, "--seeds", "0", "--sampler", "ddim", "--steps", 2, "--device", "cpu"]
    says = refused(*words, "--out", tmp_path / "images")
    assert "found nothing there; pass its new place as `codec`" in says
    other = place.folder / "other-weights"
    if not other.exists():
        write_pair(other, latents=6)
    says = refused(*words, "--out", tmp_path / "images", "--codec", other)
    assert "expected the autoencoder that" in says
    assert "found 6" in says or "sha256" in says


def test_a_run_does_not_go_on_with_other_images(refused, place, latent, latents):
    says = refused(*place.words(latent, "--conditional"))
    assert "it was started with" in says or "other images" in says


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


@pytest.mark.slow
def test_the_autoencoder_of_flux2_on_faces(ditlab, shared, tmp_path):
    done = ditlab("data", "prepare", f"mosaic:{shared}/data/celeba64", "all", "--size", 64)
    assert done.status == 0, done.err
    np.save("few.npy", ImageSet.open("all").take(range(0, 1280, 40)).transpose(0, 2, 3, 1))
    assert ditlab("data", "prepare", "array:few.npy", "faces", "--size", 64).status == 0
    done = ditlab("data", "encode", "faces", "latents", "--codec", shared / "weights", "--device", "cpu")
    assert done.status == 0, done.err
    told = json.loads(ditlab("data", "info", "latents", "--device", "cpu", "--json").out)
    assert told["shape"] == [32, 8, 8]
    assert told["latents"]["round_trip_db"] >= 27.5
    words = "train dit-nano/1 --data latents --n 20 --test 8 --training.steps 2 --training.batch-size 4 --out run"
    done = ditlab(*words.split(), "--evaluation.levels", 0, "--device", "cpu")
    assert done.status == 0, done.err
    done = ditlab("sample", "run", "--seeds", "0-1", "--sampler", "ddim", "--steps", 2, "--device", "cpu")
    assert done.status == 0, done.err
    assert Run.open("run").pixels_at([3]).shape == (1, 3, 64, 64)


def test_the_jacobian_at_a_picture(ditlab, place, latent, tmp_path):
    file = tmp_path / "ramp.png"
    ramp = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    Image.fromarray(ramp).save(file)
    run = Run.open(place.copy(latent))
    words = ["--show", 0, "--levels", 0.5, "--top", 2, "--pictures", file]
    done = ditlab("jacobian", run.path, *words, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    [point] = JacobianResult.load(run.path / "analysis" / "jacobian.json").points
    middle = torch.from_numpy(planes(centre_crop(Image.fromarray(ramp), 8))[None].copy())
    means, record = run.codec.moments(to_float(middle).repeat(1, 3, 1, 1))[0], run.codec.record
    assert np.abs(point.clean - (means[0].numpy() - record.shift) * record.scale).max() < 1e-5
    assert point.clean.shape == (4, 4, 4)
