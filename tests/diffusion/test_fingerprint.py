"""What a user's own code is told apart by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ditlab
from ditlab.diffusion.denoisers import Denoiser, hash_of_weights
from ditlab.diffusion.fingerprint import UNKNOWN, fingerprint
from ditlab.networks.base import build_network
from ditlab.networks.dit_config import DiTConfig


class Shrink(torch.nn.Module):
    def __init__(self, factor, **others) -> None:
        super().__init__()
        self.factor = factor
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.register_buffer("grid", torch.full((2,), 2.0), persistent=False)
        for name, value in others.items():
            setattr(self, name, value)

    def forward(self, y, sigma, label):
        return self.factor * y

    def first(self, y, sigma, label):
        return y + self.factor

    def second(self, y, sigma, label):
        return y - self.factor


class Other(Shrink):
    def forward(self, y, sigma, label):
        return -self.factor * y


def digest(function) -> str:
    return hash_of_weights(Denoiser.wrap(function, shape=(3, 4, 4)))


def make(factor, kind):
    """Two classes of one name, whose methods differ in what they enclose."""

    class Enclosing(torch.nn.Module):
        def forward(self, y, sigma, label):
            return factor * kind * y

    return Enclosing()


def test_equal_networks_have_equal_hashes():
    assert digest(Shrink(0.9)) == digest(Shrink(0.9)) != ""
    assert digest(Shrink(0.9).first) == digest(Shrink(0.9).first) != ""
    assert digest(make(0.1, 1)) == digest(make(0.1, 1)) != ""


def with_buffer() -> Shrink:
    network = Shrink(0.9)
    network.grid += 1
    return network


@pytest.mark.parametrize(
    "other",
    [
        lambda: Shrink(0.1),
        lambda: Other(0.9),
        lambda: Shrink(0.9).first,
        lambda: Shrink(0.9, scale=[1, (2.0, torch.ones(1))]),
        with_buffer,
    ],
)
def test_other_attributes_classes_methods_and_buffers_have_other_hashes(other):
    assert digest(other()) not in ("", digest(Shrink(0.9)))
    assert digest(Shrink(0.9).first) != digest(Shrink(0.9).second)
    assert digest(make(0.1, 1)) != digest(make(0.2, 1))


def test_a_network_that_holds_an_unknown_object_has_no_hash():
    assert digest(Shrink(0.9, other=object())) == ""
    assert digest(make(object(), 1)) == ""


def test_a_denoiser_of_a_users_own_class_is_told_apart_by_its_attributes():
    class Own(Denoiser):
        module = None  # pyright: ignore[reportAssignmentType]

        def __init__(self, factor: float) -> None:
            self.shape, self.module, self.factor = (3, 4, 4), Shrink(1.0), factor
            self.levels = Denoiser.wrap(lambda y, sigma, label: y, shape=(3, 4, 4)).levels

        def estimate(self, y, sigma, label=None):
            raise NotImplementedError

    assert hash_of_weights(Own(0.5)) == hash_of_weights(Own(0.5)) != ""
    assert hash_of_weights(Own(0.5)) != hash_of_weights(Own(0.6))


def test_a_wrapped_network_of_ditlab_has_a_hash():
    config = DiTConfig(image_size=(8, 8), channels=3, patch=2, width=16, depth=1, heads=2)
    network = build_network(config)
    before = digest(network)
    with torch.no_grad():
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1), None)
    assert before == digest(network) != ""


def test_functions_get_folders_of_their_own():
    functions = [lambda y, sigma, label: 0.5 * y, lambda y, sigma, label: 0.9 * y]
    models = [ditlab.Model(Denoiser.wrap(function, shape=(3, 4, 4)), name="mine") for function in functions]
    assert models[0].path != models[1].path
    again = ditlab.Model(Denoiser.wrap(functions[0], shape=(3, 4, 4)), name="mine")
    assert again.path == models[0].path
    assert models[0].path.parent == Path("external")


def test_what_cannot_be_known_is_marked():
    assert fingerprint(object()).startswith(UNKNOWN)
    assert not fingerprint(test_what_cannot_be_known_is_marked).startswith(UNKNOWN)
