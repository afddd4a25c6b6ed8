"""Small models of one image set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditlab.analyses.jacobian.measure import measure_jacobian
from ditlab.config import DataConfig, fit_to_images
from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.schedules import make_schedule
from ditlab.models.creating import start, train_run
from ditlab.models.model import Model
from ditlab.models.run import Run
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.presets import preset
from ditlab.rng import torch_generator
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> ImageSet:
    """Digits of 3x8x8, with classes."""
    return prepare("digits", tmp_path_factory.mktemp("images") / "set", size=8)


@pytest.fixture
def model(images, tmp_path) -> Callable[..., Model]:
    """`model("a")` makes a model of a random network, whose results go to tmp_path/a."""

    def make(name: str, attention: str = "global", **settings: object) -> Model:
        network = DiT(DiTConfig(image_size=(8, 8), width=16, depth=2, heads=2, attention=attention)).eval()
        with torch.no_grad():
            for value in network.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=torch_generator(0, name)))
        denoiser = VPDenoiser(network, make_schedule("linear", 1000))
        return Model(denoiser, images, **{"n": 20, "test": 15, "name": name, "out": tmp_path / name, **settings})

    return make


@pytest.fixture
def function(images, tmp_path) -> Callable[..., Model]:
    """`function("mine")` makes a model of a function, which has no weights."""

    def make(name: str, factor: float = 0.5) -> Model:
        denoiser = Denoiser.wrap(lambda y, sigma, label: factor * y, shape=(3, 8, 8))
        return Model(denoiser, images, n=20, test=15, name=name, out=tmp_path / name)

    return make


@pytest.fixture(scope="session")
def run(images, tmp_path_factory) -> Run:
    """A run of four steps; not to be changed."""
    recipe = preset("dit-nano/1")
    config = replace(
        recipe,
        data=DataConfig(n=20, test=15),
        network=DiTConfig(width=16, depth=2, heads=2, image_size=(8, 8)),
        training=TrainingConfig(steps=4, batch_size=4, log_every=2, eval_every=2, save_every=2),
        evaluation=replace(recipe.evaluation, images=4, levels=2),
    )
    config = fit_to_images(config, images.shape, images.num_classes)
    made = start(tmp_path_factory.mktemp("runs") / "one", config, images, device=CPU)
    train_run(made, DistributedContext(0, 1, CPU))
    return made


@pytest.fixture
def counted(monkeypatch) -> list[tuple[tuple[int, ...], tuple[float, ...] | None]]:
    """The (images, levels) of each measurement."""
    measured = []

    def counting(denoiser, images, config, **more):
        measured.append((config.images, config.sigmas))
        return measure_jacobian(denoiser, images, config, **more)

    monkeypatch.setattr("ditlab.analyses.jacobian.job.measure_jacobian", counting)
    return measured


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures are put together but not rendered, which takes most of the time here."""

    def names(drawings, folder: Path) -> list[Path]:
        return [folder / f"{name}.png" for name in drawings]

    monkeypatch.setattr("ditlab.pages.drawing.save_drawings", names)
