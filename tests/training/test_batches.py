"""The batch of a step: a function of seed and step, the same for one process and several, for pixels and for latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ditlab.data import ImageSet, flip, prepare
from ditlab.data.autoencoder import Autoencoder
from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.encode import LatentEncoder
from ditlab.data.encode_config import EncodeConfig
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.rng import torch_generator
from ditlab.training.batches import Batches, image_order
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext

CPU = torch.device("cpu")


class Halves(Autoencoder):
    """Every second pixel, with a deviation that depends on the picture."""

    record = AutoencoderRecord("kl", "halves", "", "0" * 64, 3, 3, 2, 1.0, 0.0)

    def moments(self, pictures):
        part = pictures[..., ::2, ::2]
        return part, 1 + part.abs()

    def decode(self, latents, batch=64):
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> ImageSet:
    return prepare("digits", tmp_path_factory.mktemp("sets") / "digits", size=8, near_duplicates=None)


@pytest.fixture(scope="module")
def latents(pixels) -> ImageSet:
    out: Path = pixels.path.parent / "latents"
    work = LatentEncoder(pixels, out, Halves(), EncodeConfig(mirrored=True))
    with work.locked():
        work.encode()
        return work.finish()


def batches(images: ImageSet, *, world: int = 1, rank: int = 0, seed: int = 0, **settings) -> Batches:
    config = TrainingConfig(batch_size=8, seed=seed, **settings)
    context = DistributedContext(rank, world, CPU)
    return Batches(images, np.arange(100), VPObjectiveConfig().build(), config, context)


@pytest.mark.parametrize("mirror", [False, True])
def test_batches_of_pixels_are_what_they_always_were(pixels, mirror):
    made = batches(pixels, flip=mirror, seed=5)(3)
    images = pixels.batch(image_order(5, 3, 8, np.arange(100)))
    if mirror:
        images = flip(images, torch.rand(8, generator=torch_generator(5, "flip", 3)) < 0.5)
    assert torch.equal(made.images, images)


def test_each_step_draws_its_own_sample_of_the_posterior(pixels, latents):
    once, again, later = batches(latents)(0), batches(latents)(0), batches(latents)(1)
    assert torch.equal(once.images, again.images)
    indices = image_order(0, 0, 8, np.arange(100))
    mean = latents.batch(indices)
    noise = (once.images - mean) / (1 + mean.abs()).half().float()
    expected = torch.randn(8, 3, 4, 4, generator=torch_generator(0, "posterior", 0))
    torch.testing.assert_close(noise, expected, rtol=1e-2, atol=5e-3)
    # The same images at another step, under another noise.
    assert not torch.equal(later.images[:1], once.images[:1])
    # The noise of the objective is that of a run on pixels of this shape.
    draws = VPObjectiveConfig().build().draw(torch_generator(0, "objective", 0), 8, (3, 4, 4))
    assert all(torch.equal(once.draws[name], value) for name, value in draws.items())


def test_flips_take_the_latents_of_the_mirrored_pictures(pixels, latents):
    flip_mask = torch.rand(8, generator=torch_generator(0, "flip", 2)) < 0.5
    assert 0 < flip_mask.sum() < 8
    made = batches(latents, flip=True)(2).images
    noise = torch.randn(8, 3, 4, 4, generator=torch_generator(0, "posterior", 2))
    pictures = flip(pixels.batch(image_order(0, 2, 8, np.arange(100))), flip_mask)
    mean, std = (x.half().float() for x in Halves().moments(pictures))
    torch.testing.assert_close(made, mean + std * noise)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_processes_share_the_batch(kind, request):
    images = request.getfixturevalue(kind)
    whole = batches(images, flip=True)(4)
    parts = [batches(images, world=2, rank=rank, flip=True)(4) for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.label for part in parts]), whole.label)  # pyright: ignore[reportArgumentType]
