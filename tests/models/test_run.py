"""Run folders from the library's side: start, train, open, load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ditlab
from ditlab.config import DataConfig, RunConfig, fit_to_images
from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig
from ditlab.errors import DitlabError
from ditlab.models.creating import environment, start, train_run
from ditlab.models.run import Run
from ditlab.networks.dit import DiTConfig
from ditlab.presets import preset
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    return prepare(f"array:{folder / 'pixels.npy'}", folder / "set", size=4)


def settings(images: ImageSet, **training) -> RunConfig:
    recipe = preset("dit-nano/1")
    small = {"steps": 4, "batch_size": 4, "log_every": 2, "eval_every": 2, "save_every": 2, **training}
    config = replace(
        recipe,
        data=DataConfig(n=10, test=8),
        network=DiTConfig(width=16, depth=2, heads=2, image_size=(4, 4)),
        training=TrainingConfig(**small),
        evaluation=replace(recipe.evaluation, images=4, levels=2),
    )
    return fit_to_images(config, images.shape, images.num_classes)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Run:
    run = start(tmp_path_factory.mktemp("runs") / "one", settings(images), images, device=CPU, command="typed")
    train_run(run, DistributedContext(0, 1, CPU))
    return run


def test_a_process_of_few_steps_is_sampled_with_all_of_them(images, tmp_path):
    config = settings(images)
    few = replace(config, objective=replace(config.objective, steps=100))
    assert start(tmp_path / "few", few, images, device=CPU).sampler == DDPMConfig(steps="100")
    # What is asked for stays, and is refused when it is used.
    asked = replace(few, sampler=DDIMConfig(steps="200"))
    assert start(tmp_path / "asked", asked, images, device=CPU).sampler == DDIMConfig(steps="200")
    assert start(tmp_path / "usual", config, images, device=CPU).sampler == DDPMConfig(steps="250")


def test_what_a_run_holds(trained, images):
    run = Run.open(trained.path)
    assert run.name == "one"
    assert run.finished
    assert run.record.command == "typed"
    assert run.record.environment["torch"] == torch.__version__
    assert run.checkpoints.steps() == [2, 4]
    assert [line["step"] for line in run.log] == [0, 2, 4]
    assert (len(run.split.train), len(run.split.test)) == (10, 8)
    assert not set(run.split.train) & set(run.split.test)
    assert run.images.hash == images.hash
    pictures, labels = run.batch("test", 5)
    assert (pictures.shape, labels) == ((5, 3, 4, 4), None)
    provenance = run.provenance(4, label="kind")
    assert (provenance.n, provenance.step, provenance.group, provenance.split_hash) == (10, 4, "kind", run.split.hash)
    assert not run.conditional


def test_load_gives_the_averaged_weights_as_a_denoiser(trained):
    y = torch.randn(2, 3, 4, 4)
    denoiser = ditlab.load(trained.path)
    assert isinstance(denoiser, ditlab.Denoiser)
    assert denoiser.shape == (3, 4, 4)
    x0 = denoiser(y, sigma=0.5)
    assert x0.shape == y.shape
    assert not x0.requires_grad
    assert torch.equal(ditlab.load(str(trained.path), step=4)(y, 0.5), x0)
    assert torch.equal(ditlab.load(trained.path / "checkpoints" / "000000004")(y, 0.5), x0)
    assert not torch.equal(ditlab.load(trained.path / "checkpoints" / "000000002")(y, 0.5), x0)
    assert not torch.equal(ditlab.load(trained.path, ema=False)(y, 0.5), x0)
    ema = trained.checkpoint().ema
    network = trained.network(trained.checkpoint())
    assert all(torch.equal(value, ema[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("reference", ["nowhere", "nowhere/checkpoints/0004"])
def test_load_of_what_is_not_a_run(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DitlabError, match="expected a run's folder, found nothing"):
        ditlab.load(reference)


def test_load_of_a_run_that_was_never_trained(images, tmp_path):
    start(tmp_path / "run", settings(images), images, device=CPU)
    with pytest.raises(DitlabError, match="expected a checkpoint, found none; was it trained"):
        ditlab.load(tmp_path / "run")
    assert not Run.open(tmp_path / "run").finished


def test_start_takes_up_the_same_run_and_refuses_another(images, trained):
    again = start(trained.path, settings(images), images, device=CPU, command="typed later")
    assert again.record.command == "typed"
    with pytest.raises(DitlabError, match=r"started with training.batch_size = 4, now 5 is asked for; give another"):
        start(trained.path, settings(images, batch_size=5), images, device=CPU)
    with pytest.raises(DitlabError, match=r"already made 4 steps, now training\.steps = 2 is asked for"):
        start(trained.path, settings(images, steps=2), images, device=CPU)
    assert Run.open(trained.path).config == again.config


def test_a_rate_that_falls_to_the_last_step_keeps_that_step(images, tmp_path):
    start(tmp_path / "run", settings(images, lr_anneal=True), images, device=CPU)
    with pytest.raises(
        DitlabError, match=r"falls to 0 over training\.steps = 4, now 9 is asked for, which would change"
    ):
        start(tmp_path / "run", settings(images, lr_anneal=True, steps=9), images, device=CPU)
    start(tmp_path / "halved", settings(images, lr_halve_every=2), images, device=CPU)
    start(tmp_path / "halved", settings(images, lr_halve_every=2, steps=9), images, device=CPU)


@pytest.mark.parametrize("sampler", [DDIMConfig(steps="7"), DDPMConfig(steps="9")])
def test_another_sampler_is_no_other_run(images, tmp_path, sampler):
    """It changes no step, and no cell's hash (`ditlab.studies.cells`): the run goes on, and keeps the new one."""
    start(tmp_path / "run", settings(images), images, device=CPU)
    again = start(tmp_path / "run", replace(settings(images), sampler=sampler), images, device=CPU)
    assert again.config.sampler == Run.open(tmp_path / "run").config.sampler == sampler


def test_start_on_other_images_of_the_same_settings(images, trained, tmp_path):
    np.save(tmp_path / "pixels.npy", np.asarray(images.array).transpose(0, 2, 3, 1)[::-1].copy())
    other = prepare(f"array:{tmp_path / 'pixels.npy'}", tmp_path / "set", size=4)
    with pytest.raises(DitlabError, match="it was started on other images"):
        start(trained.path, settings(other), other, device=CPU)


def test_a_kill_while_the_folder_was_made_is_no_hindrance(images, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text('{"config"')
    start(tmp_path / "run", settings(images), images, device=CPU)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_folder_that_cannot_be_written_leaves_nothing(images, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(DitlabError, match="its folder could not be written: No space left on device"):
            start(tmp_path / "run", settings(images), images, device=CPU)
    assert not any(tmp_path.iterdir())


def test_an_image_set_that_was_moved(trained, images, tmp_path):
    import shutil

    moved = shutil.copytree(images.path, tmp_path / "moved")
    record = json.loads((trained.path / "config.json").read_text())
    record["config"]["data"]["path"] = "../gone"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(DitlabError, match="found nothing"):
        _ = Run.open(tmp_path / "run").images
    assert len(Run.open(tmp_path / "run", data=moved).split.train) == 10


def test_the_environment_is_strings():
    found = environment(CPU)
    assert {"ditlab", "python", "torch", "numpy", "system", "processor", "threads", "device"} == found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
