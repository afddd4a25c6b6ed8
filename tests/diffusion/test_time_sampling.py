"""Importance sampling of t: its closed form, its memory, and what it does to the loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.time_sampling import LAST, UNIFORM, LossSecondMoment
from ditlab.errors import DitlabError
from ditlab.rng import torch_generator


def filled(steps: int, seed: int = 0) -> tuple[LossSecondMoment, np.ndarray]:
    """With twelve losses of each step, and the last ten of them [T, 10]."""
    losses = torch.rand(12, steps, generator=torch_generator(seed, "losses")) * torch.linspace(0.1, 3, steps)
    sampling = LossSecondMoment(steps)
    for row in losses:
        sampling.update(torch.arange(steps), row)
    return sampling, losses[2:].T.double().numpy()


def test_probabilities_are_the_published_ones():
    sampling, last = filled(7)
    root = np.sqrt((last**2).mean(1))
    np.testing.assert_allclose(sampling.probabilities(), 0.999 * root / root.sum() + 0.001 / 7, rtol=1e-12)
    assert sampling.probabilities().sum() == pytest.approx(1)
    assert (LAST, UNIFORM) == (10, 0.001)


def test_it_is_uniform_until_every_step_has_ten_losses():
    sampling, _ = filled(5)
    short = LossSecondMoment(5)
    for _ in range(9):
        short.update(torch.arange(5), torch.arange(5.0))
    short.update(torch.arange(4), torch.ones(4))
    assert short.probabilities().tolist() == [0.2] * 5
    assert short.draw(torch_generator(0, "draw"), 6)[1].tolist() == [1.0] * 6
    short.update(torch.tensor([4]), torch.ones(1))
    assert len(set(short.probabilities().tolist())) > 1
    nothing = LossSecondMoment(5)
    nothing.update(torch.arange(5).repeat(10), torch.zeros(50))
    np.testing.assert_allclose(nothing.probabilities(), 0.2)
    assert sampling.draw(torch_generator(0, "draw"), 6)[1].unique().numel() > 1


def test_the_weighted_mean_is_the_mean_over_all_steps():
    sampling, _ = filled(40)
    p, losses = sampling.probabilities(), np.linspace(-1, 2, 40)
    t, weight = sampling.draw(torch_generator(1, "draw"), 200_000)
    every, first = np.unique(t.numpy(), return_index=True)
    assert len(every) == 40
    # The estimator's mean, from the weights that came with the draws: exact up to their float32.
    assert (p * weight.numpy()[first] * losses).sum() == pytest.approx(losses.mean(), rel=1e-6)
    share = np.bincount(t.numpy(), minlength=40) / len(t)
    np.testing.assert_allclose(share, p, atol=5 * np.sqrt(p.max() / len(t)))


def test_draws_are_a_function_of_generator_and_memory():
    a, _ = filled(6)
    b, _ = filled(6)
    other, _ = filled(6, seed=1)
    draws = [s.draw(torch_generator(3, "draw"), 50) for s in (a, b, other)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][1], draws[2][1])


def test_its_memory_goes_through_json_to_the_bit_and_is_short():
    sampling, _ = filled(4000)
    text = json.dumps(sampling.state_dict())
    assert len(text) < 230_000  # 40,000 decimal numbers would take about 800,000
    other = LossSecondMoment(4000)
    other.load_state_dict(json.loads(text))
    assert np.array_equal(other.losses, sampling.losses)
    other.update(torch.tensor([3]), torch.tensor([7.0]))
    assert other.losses[3, -1] == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"time_sampling": "another"}, "expected the remembered losses of time_sampling loss-second-moment"),
        ({"more": 1}, "found counts, losses, more, time_sampling"),
        ({"losses": "!"}, "in base64"),
        ({"losses": 3}, "in base64"),
        ({"losses": ""}, "10 remembered losses of each of 5 steps, found 0 of 5 steps"),
        ({"counts": "/////w8="}, "10 remembered losses of each of 5 steps"),
    ],
)
def test_a_memory_of_something_else_is_refused(change, says):
    sampling, _ = filled(5)
    with pytest.raises(DitlabError, match=says):
        sampling.load_state_dict(sampling.state_dict() | change)
    with pytest.raises(DitlabError, match="found nothing"):
        sampling.load_state_dict({})


def test_the_objective_weights_its_loss_and_remembers_it_without_the_weight():
    objective = VPObjectiveConfig(
        steps=30, variance="fixed-small", label_dropout=0.0, time_sampling="loss-second-moment"
    ).build()
    plain = VPObjectiveConfig(steps=30, variance="fixed-small", label_dropout=0.0).build()
    assert objective.history_keys == ("t", "unweighted")
    assert plain.history_keys == ()
    objective.update({"t": torch.arange(30).repeat(10), "unweighted": torch.linspace(0.1, 2, 300)})
    images = torch.rand(16, 3, 4, 4, generator=torch_generator(0, "x")) * 2 - 1
    draws = objective.draw(torch_generator(0, "step", 1), 16, (3, 4, 4))

    class Half(torch.nn.Module):
        def forward(self, x, t, label=None):
            return x * 0.5

    result = objective.losses(Half(), images, None, draws)
    torch.testing.assert_close(result["loss"], result["unweighted"] * draws["weight"])
    same = plain.losses(Half(), images, None, {k: v for k, v in draws.items() if k != "weight"})
    assert torch.equal(result["unweighted"], same["loss"])
    assert not torch.equal(result["loss"], same["loss"])
    again = VPObjectiveConfig(steps=30, variance="fixed-small", time_sampling="loss-second-moment").build()
    again.load_state_dict(json.loads(json.dumps(objective.state_dict())))
    back = again.draw(torch_generator(0, "step", 1), 16, (3, 4, 4))
    assert all(torch.equal(back[name], draws[name]) for name in draws)
    with pytest.raises(DitlabError, match="found counts, losses, time_sampling"):
        plain.load_state_dict(objective.state_dict())
