"""A network that ditlab does not know: registered by one line, it is trained, saved, opened and sampled like any other."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import nn

import ditlab.networks
from ditlab.config import DataConfig, EvaluationConfig, RunConfig, fit_to_images, from_json, to_json
from ditlab.data.preparing import prepare
from ditlab.diffusion.objective_configs import BlindObjectiveConfig, EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.samplers import DDIMConfig, sample
from ditlab.errors import DitlabError
from ditlab.models.creating import start, train_run
from ditlab.models.opening import open_model
from ditlab.models.run import Run
from ditlab.networks.base import NETWORKS, NetworkConfig, build_network, network_class, register
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext


@dataclass(frozen=True)
class ToyConfig(NetworkConfig):
    """A linear map of the pixels' channels."""

    takes_labels: ClassVar[bool] = True

    kind: Literal["toy"] = "toy"
    num_classes: int = 0
    null_class: bool = False
    gain: float = 0.5


@register(ToyConfig)
class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        self.in_shape = (config.channels, *config.image_size)
        self.mix = nn.Conv2d(config.channels, config.channels, 1)

    def forward(self, x, t, label=None, *, augment=None):
        return self.config.gain * self.mix(x)


del NETWORKS[ToyConfig]  # other tests do not see it


@pytest.fixture(autouse=True)
def _registered():
    NETWORKS[ToyConfig] = Toy
    yield
    del NETWORKS[ToyConfig]


FIXED = VPObjectiveConfig(steps=40, variance="fixed-small", label_dropout=0.0)


def test_a_toy_is_trained_saved_opened_and_sampled(tmp_path):
    np.save(tmp_path / "pixels.npy", np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8))
    images = prepare(f"array:{tmp_path / 'pixels.npy'}", tmp_path / "set", size=4)
    training = TrainingConfig(steps=3, batch_size=4, log_every=1, eval_every=3, save_every=3)
    config = RunConfig(
        data=DataConfig(n=10, test=5),
        network=ToyConfig(gain=0.25),
        objective=FIXED,
        training=training,
        sampler=DDIMConfig(steps="5"),
        evaluation=EvaluationConfig(images=2, levels=2),
    )
    config = fit_to_images(config, images.shape, images.num_classes)
    cpu = torch.device("cpu")
    run = start(tmp_path / "run", config, images, device=cpu)
    train_run(run, DistributedContext(0, 1, cpu))

    written = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert written["network"] == {
        "kind": "toy",
        "image_size": [4, 4],
        "channels": 3,
        "num_classes": 0,
        "null_class": False,
        "gain": 0.25,
    }
    opened = open_model(str(tmp_path / "run"))
    assert isinstance(opened, Run)
    assert opened.config.network == config.network
    assert to_json(from_json(RunConfig, written, "here")) == written
    denoiser = opened.denoiser_and_provenance()[0]
    assert isinstance(denoiser.module, Toy)
    fresh = build_network(config.network, seed=training.seed)
    assert not torch.equal(denoiser.module.mix.weight, fresh.mix.weight)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = [sample(denoiser, opened.sampler, noise) for _ in range(2)]
    assert drawn[0].shape == (2, 3, 4, 4)
    assert drawn[0].isfinite().all()
    assert torch.equal(*drawn)


def test_errors_name_its_settings_without_its_tag():
    values = to_json(RunConfig(network=ToyConfig(), objective=FIXED))
    values["network"]["gain"] = "much"
    with pytest.raises(DitlabError, match=r"here: 'network\.gain': .* found 'much'"):
        from_json(RunConfig, values, "here")
    values["network"] = {"kind": "toy", "depth": 3}
    with pytest.raises(DitlabError, match=r"here: unknown key 'network\.depth'"):
        from_json(RunConfig, values, "here")


def test_what_it_can_do_is_read_from_its_class_attributes():
    with pytest.raises(DitlabError, match="a toy network learns no variance"):
        RunConfig(network=ToyConfig(), objective=VPObjectiveConfig(variance="learned-range"))
    with pytest.raises(DitlabError, match="which a toy network needs; expected a bf-cnn or bf-unet network"):
        RunConfig(network=ToyConfig(), objective=BlindObjectiveConfig())
    with pytest.raises(DitlabError, match="label dropout needs a network with a null class"):
        RunConfig(network=ToyConfig(num_classes=2), objective=EDMObjectiveConfig(label_dropout=0.1))
    with pytest.raises(DitlabError, match=r"expected network\.num_classes 5 or 0, found 2"):
        fit_to_images(RunConfig(network=ToyConfig(num_classes=2), objective=FIXED), (3, 8, 8), 5)


def test_what_cannot_be_registered():
    @dataclass(frozen=True)
    class Loose(NetworkConfig):
        kind: str = "loose"

    with pytest.raises(DitlabError, match="register Loose: expected kind as a Literal"):
        register(Loose)

    @dataclass(frozen=True)
    class Taken(NetworkConfig):
        kind: Literal["toy"] = "toy"

    with pytest.raises(DitlabError, match="expected a new kind, found 'toy', which ToyConfig has"):
        register(Taken)

    @dataclass(frozen=True)
    class Silent(NetworkConfig):
        kind: Literal["silent"] = "silent"
        learn_sigma: bool = False

    with pytest.raises(DitlabError, match="can_learn_variance False expects none of the fields learn_sigma, found"):
        register(Silent)

    @dataclass(frozen=True)
    class Promising(NetworkConfig):
        takes_labels: ClassVar[bool] = True
        kind: Literal["promising"] = "promising"
        num_classes: int = 0

    with pytest.raises(DitlabError, match="takes_labels True expects the fields null_class, num_classes, found num_"):
        register(Promising)
    assert not {Loose, Taken, Silent, Promising} & NETWORKS.keys()
    with pytest.raises(DitlabError, match="expected the config of a registered network, found Silent"):
        build_network(Silent())


def test_a_notebook_cell_that_runs_twice():
    again = dataclass(frozen=True)(type("ToyConfig", (ToyConfig,), {"__module__": ToyConfig.__module__}))
    assert register(again)(Toy) is Toy
    assert again in NETWORKS
    assert ToyConfig not in NETWORKS
    del NETWORKS[again]
    NETWORKS[ToyConfig] = Toy


def test_the_package_offers_every_network():
    own = [config for config in NETWORKS if config.__module__.startswith("ditlab.")]  # tests register others
    assert {config.__name__ for config in own} == {"DiTConfig", "UNetConfig", "BFUNetConfig", "BFCNNConfig"}
    for config in own:
        network = network_class(config)
        assert getattr(ditlab.networks, config.__name__) is config
        assert getattr(ditlab.networks, network.__name__) is network
        assert replace(config(), image_size=(0, 0)).sized is False  # the command line fills the size in later
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = ditlab.networks.Nonsense
