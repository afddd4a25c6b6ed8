"""Test images from a folder of their own, for models that were trained before it was known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import ditlab
from ditlab.errors import DitlabError, Incompatible
from ditlab.models.comparing import open_models


def write(folder, arrays) -> str:
    folder.mkdir()
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture
def second(tmp_path, monkeypatch) -> str:
    """A folder of 6 other pictures, of the size of the set."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "second", np.random.default_rng(9).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8))


def test_a_second_folder_takes_the_place_of_the_test_images(images, train, second, tmp_path):
    train(tmp_path / "run")
    plain = ditlab.open(tmp_path / "run")
    mine = ditlab.Model(plain.denoiser(), images, n=10, test=8, name="mine")
    models = open_models([tmp_path / "run", mine], held_out=second)
    for model in models:
        assert model.held_out is not None
        assert len(model.batch("test", 100)[0]) == 6
        assert torch.equal(model.batch("train", 10)[0], plain.batch("train", 10)[0])
        assert model.decoded_held_out(3).shape == (3, 3, 4, 4)
        about = model.provenance()
        assert about.settings["held_out"] == model.held_out.hash
        assert about.split_hash == plain.provenance().split_hash
        assert about.split_family != plain.provenance().split_family
    assert models[0].test_hash == models[1].test_hash != plain.test_hash
    # A model with other test images is not compared with one of the same seed.
    with pytest.raises(Incompatible, match="have different splits"):
        open_models([models[0], ditlab.Model(plain.denoiser(), images, n=10, test=8, name="other")])
    gap = ditlab.psnr_gap(tmp_path / "run", held_out=second, images=4, points=2, device="cpu")
    assert gap.results[0].test_mse.shape == (2, 4, 1)
    assert gap.results[0].about.split_family == models[0].test_hash


def test_pictures_that_were_trained_on_are_refused_by_name(images, train, second, tmp_path):
    run = train(tmp_path / "run")
    pixels = np.asarray(images.array).transpose(0, 2, 3, 1)
    shared = write(tmp_path / "shared", [np.full((4, 4, 3), 7, np.uint8), pixels[run.split.train[0]]])
    with pytest.raises(DitlabError, match=r"found 1 in both .*1\.png"):
        ditlab.open(tmp_path / "run", held_out=shared)
    # A picture that was only held out may be tested on.
    other = write(tmp_path / "other", [pixels[run.split.test[0]]])
    assert len(ditlab.open(tmp_path / "run", held_out=other).batch("test", 9)[0]) == 1


def test_held_out_images_of_another_size(make_images, images):
    half = ditlab.Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(3, 4, 4))
    model = ditlab.Model(half, images, n=10, test=8, name="mine")
    with pytest.raises(Incompatible, match="model mine: expected held-out images 3x4x4, found 3x8x8 in"):
        model.use_held_out(make_images(3, 5, size=8))
