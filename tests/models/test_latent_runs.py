"""Runs on latents: train, sample, measure, decode, report; and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditlab
from ditlab.analyses.jacobian.result import JacobianResult
from ditlab.analyses.samples.measure import KindSamples
from ditlab.config import RunRecord, from_json, to_json
from ditlab.data import ImageSet
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
    ditlab.encode(place.images, str(weights), out=out, mirrored=True, device="cpu")
    return out


@pytest.fixture
def latent(place, latents) -> Path:
    """A run on latents, class-conditional, with flips; not to be changed."""
    return place.trained("latent", images=latents, conditional=True, **{"training.flip": True})


@pytest.fixture
def moved(place, latent, latents, weights) -> Run:
    """The same run, whose latents lie far from the pictures."""
    alone = shutil.copytree(latents, place.folder / "elsewhere" / "far" / "latents", dirs_exist_ok=True)
    return Run.open(latent, alone, weights)


def test_a_run_on_latents(latent, moved, weights, place):
    run = Run.open(latent)
    assert run.record.codec is not None
    assert (latent / run.record.codec.place).resolve() == weights.resolve()
    assert run.config.network.channels == 4  # pyright: ignore[reportAttributeAccessIssue]
    assert run.config.network.image_size == (4, 4)  # pyright: ignore[reportAttributeAccessIssue]
    assert run.settings["codec"] == str(weights)
    denoiser = run.denoiser()
    assert not denoiser.pixel_space
    assert denoiser.shape == (4, 4, 4)
    images, labels = run.batch("test", 3)
    assert images.shape == (3, 4, 4, 4)
    assert labels is not None
    assert run.decode(images).shape == (3, 3, 8, 8)
    # Real pictures where they lie where they lay, else decoded ones.
    stored = ImageSet.open(place.images)
    assert np.array_equal(run.originals([4, 2]), stored.take([4, 2]))
    assert np.array_equal(moved.originals([4, 2]), moved.decode(moved.images.batch([4, 2])))
    assert not np.array_equal(moved.originals([4, 2]), stored.take([4, 2]))


def test_runs_on_pixels_have_no_codec(plain, latent):
    values = json.loads((plain / "config.json").read_text())
    assert values.pop("codec") is None
    assert from_json(RunRecord, values, "before").codec is None
    record = Run.open(latent).record
    assert from_json(RunRecord, to_json(record), "again") == record


def test_samples(latent, weights):
    settings: dict[str, Any] = {"seeds": range(5), "sampler": "ddim", "steps": 3, "device": "cpu"}
    images = ditlab.sample(latent, batch=2, **settings).images
    assert (images.shape, images.dtype) == ((5, 8, 8, 3), np.uint8)
    again = ditlab.sample(latent, codec=weights, **settings).images
    assert np.abs(again.astype(int) - images).max() <= 1


@pytest.mark.slow
def test_every_analysis(place, latent, weights):
    run = place.copy(latent)
    gap = ditlab.psnr_gap(run, images=4, points=3, device="cpu")
    assert "PSNRs are those of latents, with M = 2 by convention" in " ".join([*gap.notes, *gap.sentences()])
    saved = json.loads((run / "analysis" / "psnr-gap.json").read_text())
    assert saved["about"]["settings"]["space"] == "latents"
    ditlab.attention(run, images=2, sigmas=(0.5,), images_from="samples", codec=str(weights))
    ditlab.report(run, samples=2, device="cpu", hide_training_images=True)
    page = (run / "report.html").read_text()
    assert "PSNRs are those of latents" in page
    assert "both sides are decoded" in page
    assert str(weights) in page
    assert (run / "figures" / "samples.png").is_file()


@pytest.mark.slow
def test_moments_of_a_kl_autoencoder(place, write_kl, tmp_path):
    kl = write_kl(tmp_path / "kl", scaling_factor=0.4)
    encoded = ditlab.encode(place.images, str(kl), out=tmp_path / "latents", kind="kl")
    assert encoded is not None
    assert encoded.stochastic
    once = Run.open(place.train(tmp_path / "run", images=encoded.path))
    # Interrupted and resumed, the same: the noise of the posterior belongs to the step.
    place.train(tmp_path / "twice", images=encoded.path, **{"training.steps": 3})
    twice = Run.open(place.train(tmp_path / "twice", images=encoded.path))
    assert once.log[-1]["loss"] == twice.log[-1]["loss"]
    assert all(torch.equal(value, twice.checkpoint().model[name]) for name, value in once.checkpoint().model.items())
    assert once.sample(seeds=range(2), steps=2).images.shape == (2, 8, 8, 3)


def test_a_denoiser_of_ones_own_on_latents(latents, latent):
    """Its pictures are made by the autoencoder of the image set."""
    denoiser = ditlab.Denoiser.wrap(lambda y, sigma, label: y / (1 + sigma.view(-1, 1, 1, 1) ** 2), shape=(4, 4, 4))
    model = ditlab.Model(denoiser, latents, n=30, test=10)
    images, _ = model.batch("test", 3)
    assert np.array_equal(model.decode(images), Run.open(latent).decode(images))


def test_edm_on_latents(place, latents):
    run = Run.open(place.trained("latent-edm", images=latents, preset="dit-nano/1-edm", sigma_data=0.7))
    assert not run.denoiser().pixel_space


def test_sigma_data_follows_the_latents(place, latents, notes, tmp_path):
    """Where the user says nothing, with a note; what the user gave counts; pixels keep EDM's 0.5."""
    measured = float(f"{ImageSet.open(latents).latents.record.overall_std:.3g}")  # pyright: ignore[reportOptionalMemberAccess]
    assert measured not in (0.5, 0.7)

    def train(out: str, *, steps: int = 1, **settings: Any) -> float:
        notes.sentences.clear()
        settings |= {"preset": "dit-nano/1-edm", "training.steps": steps, "reporter": notes}
        place.train(tmp_path / out, **settings)
        return json.loads((tmp_path / out / "config.json").read_text())["config"]["objective"]["sigma_data"]

    assert train("run", images=latents) == measured
    assert f"objective.sigma_data = {measured:g}, the standard deviation of these latents" in notes.sentences
    assert Run.open(tmp_path / "run").denoiser().identity["sigma_data"] == measured
    assert train("run", images=latents, steps=2) == measured  # resumed
    assert any("resuming from step 1" in note for note in notes.sentences)
    for value, name in ((0.7, "objective.sigma_data"), (0.5, "sigma_data")):
        assert train(f"given-{value}", images=latents, **{name: value}) == value
        assert not any("objective.sigma_data" in note for note in notes.sentences)
    others: dict[str, dict[str, Any]] = {"pixels": {}, "ve": {"images": latents, "objective.precond": "ve"}}
    for out, settings in others.items():
        assert train(out, **settings) == 0.5
        assert not any("objective.sigma_data" in note for note in notes.sentences)


def test_baselines_are_marked_as_latents_too(place, plain, latent):
    for run, latents in ((plain, False), (latent, True)):
        gap = ditlab.psnr_gap(place.copy(run), images=3, sigmas=(0.5, 1.0))
        baselines = gap.baselines
        assert [result.about.name for result in baselines] == ["empirical Bayes", "Wiener", "floor"]
        assert [result.latents for result in baselines] == [latents] * 3


@pytest.mark.parametrize("where", ["near", "far"])
def test_a_replay_of_latents_has_no_distance(latent, moved, where, monkeypatch):
    """Decoded pictures are compared with decoded ones, also of mirrored latents; the originals are only shown."""
    monkeypatch.setattr(memorization, "DECODE_BATCH", 7)
    run = moved if where == "far" else Run.open(latent)
    indices = run.split.train[[0, 3, 9, 19, 4, 11]]
    flip_mask = torch.tensor([False] * 4 + [True] * 2)
    replayed = run.images.batch(indices, mirrored=flip_mask)
    generator = np.random.default_rng(0)
    other = torch.from_numpy(generator.normal(size=(2, 4, 4, 4))).float()
    opened = OpenedModel(run, run.denoiser(), run.provenance(run.newest_step))
    drawn = KindSamples.of(opened, "a", torch.cat([replayed, other]))
    samples = drawn.nearest.samples
    assert samples.index[:6].tolist() == [0, 3, 9, 19, 4, 11]
    assert samples.mirrored[:6].tolist() == flip_mask.tolist()
    # Pictures that are decoded beside others may round differently.
    assert samples.first[:6].max() < 0.3
    assert samples.first[6:].min() > 1
    assert drawn.near_copies[:6].all()
    assert samples.copied[:6].all()
    # The control is of decoded pictures too.
    train, test = run.decoded(run.split.train), run.decoded(run.split.test)
    twins = run.decoded(run.split.train, mirrored=True)
    expected = np.minimum(nearest(test, train).first, nearest(test, twins).first)
    assert drawn.nearest.held_out is not None
    np.testing.assert_allclose(drawn.nearest.held_out.first, expected, atol=0.3)
    shown = run.originals(indices)
    assert drawn.nearest_images is not None
    np.testing.assert_array_equal(drawn.nearest_images[:4], shown[:4])
    np.testing.assert_array_equal(drawn.nearest_images[4:6], shown[4:, ..., ::-1])
    assert drawn.nearest.latents


def test_latents_are_never_clipped(refused, latent, place):
    run = Run.open(latent)
    says = refused(ditlab.psnr_gap, latent, images=2, points=2, clip=True, device="cpu")
    assert says == "psnr-gap: clip: latents have no bounds to clip estimates to; expected no clipping"
    with pytest.raises(DitlabError, match="expected a denoiser of 8-bit images, found one of latents"):
        bits_per_dimension(run.denoiser(), run.batch("test", 1)[0], ImageNoise([0], (4, 4, 4)))
    copy = place.copy(latent)
    values = json.loads((copy / "config.json").read_text())
    values["config"]["sampler"]["clip"] = True
    (copy / "config.json").write_text(json.dumps(values))
    says = refused(ditlab.sample, copy, seeds=[0], steps=2)
    assert "latents have no bounds to clip estimates to" in says


def test_flips_without_mirrored_latents(refused, place, weights, tmp_path):
    unmirrored = place.folder / "unmirrored"
    ditlab.encode(place.images, str(weights), out=unmirrored)
    says = refused(place.train, tmp_path / "run", images=unmirrored, **{"training.flip": True})
    assert says.startswith("training.flip: ")
    assert "holds no latents of mirrored pictures; encode it with `mirrored`" in says


def test_a_codec_that_is_gone_or_another(refused, place, latent, write_pair):
    copy = place.copy(latent)
    values = json.loads((copy / "config.json").read_text())
    values["codec"] |= {"place": "../gone", "source": "gone"}
    (copy / "config.json").write_text(json.dumps(values))
    settings: dict[str, Any] = {"seeds": [0], "sampler": "ddim", "steps": 2, "device": "cpu"}
    says = refused(ditlab.sample, copy, **settings)
    assert "found nothing there; pass its new place as `codec`" in says
    other = place.folder / "other-weights"
    if not other.exists():
        write_pair(other, latents=6)
    says = refused(ditlab.sample, copy, codec=other, **settings)
    assert "expected the autoencoder that" in says
    assert "found 6" in says or "sha256" in says


def test_a_run_does_not_resume_with_other_images(refused, place, latent):
    says = refused(place.train, latent, conditional=True)
    assert "it was started with" in says or "other images" in says


def test_the_jacobian_at_a_picture(place, latent, tmp_path):
    file = tmp_path / "ramp.png"
    ramp = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    Image.fromarray(ramp).save(file)
    run = Run.open(place.copy(latent))
    ditlab.jacobian(run, show=(0,), sigmas=(0.5,), top=2, pictures=(file,), out=tmp_path / "out")
    [point] = JacobianResult.load(run.path / "analysis" / "jacobian.json").points
    middle = torch.from_numpy(planes(centre_crop(Image.fromarray(ramp), 8))[None].copy())
    means, record = run.codec.moments(to_float(middle).repeat(1, 3, 1, 1))[0], run.codec.record
    assert np.abs(point.clean - (means[0].numpy() - record.shift) * record.scale).max() < 1e-5
    assert point.clean.shape == (4, 4, 4)


@pytest.mark.slow
def test_the_autoencoder_of_flux2_on_faces(shared, tmp_path):
    images = ditlab.prepare(f"mosaic:{shared}/data/celeba64", size=64, out=tmp_path / "all")
    np.save(tmp_path / "few.npy", images.take(range(0, 1280, 40)).transpose(0, 2, 3, 1))
    faces = ditlab.prepare(f"array:{tmp_path}/few.npy", size=64, out=tmp_path / "faces")
    latents = ditlab.encode(faces, str(shared / "weights"), out=tmp_path / "latents", device="cpu")
    assert latents is not None
    assert latents.shape == (32, 8, 8)
    assert _round_trip(latents, tmp_path) >= 27.5
    settings: dict[str, Any] = {"steps": 2, "batch_size": 4, "evaluation.levels": 0, "device": "cpu"}
    run = ditlab.train("dit-nano/1", latents, n=20, test=8, out=tmp_path / "run", **settings)
    assert run is not None
    assert run.sample(seeds=range(2), sampler="ddim", steps=2).images.shape == (2, 64, 64, 3)
    assert run.originals([3]).shape == (1, 3, 64, 64)


def _round_trip(latents: ImageSet, folder: Path) -> float:
    from ditlab.data import summary

    save: Callable[..., float | None] = summary.save_contact_sheet
    psnr = save(latents, folder / "sheet.png", count=None, seed=0, codec=None, device="cpu")
    assert psnr is not None
    return psnr
