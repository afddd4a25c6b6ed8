"""Numbers on attention maps, against closed forms and brute force."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from ditlab.analyses.attention.locality import (
    MapConsistency,
    consistency,
    consistency_control,
    entropies,
    entropy,
    grid_part,
    mass_within,
    masses_within,
    mean_distance,
    pattern_distance,
    pattern_weights,
    position_invariance,
    uniform_distance,
)
from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global, Partition, Window

GRID = (4, 6)
TOKENS = 24
PATTERNS = [Global(), Window(1), Window(3), Window(5), Window(3, "shift"), Partition(3)]


def random_maps(*shape: int, grid=GRID, sharpness: float = 3.0) -> torch.Tensor:
    tokens = grid[0] * grid[1]
    return (sharpness * torch.randn(*shape, tokens, tokens)).softmax(-1)


def places(grid) -> list[tuple[int, int]]:
    return list(product(range(grid[0]), range(grid[1])))


@pytest.mark.parametrize("grid", [(1, 2), (3, 3), (4, 6)])
def test_distance_of_uniform_and_of_identity(grid):
    tokens = grid[0] * grid[1]
    brute = sum(math.dist(p, q) for p in places(grid) for q in places(grid)) / tokens**2
    assert uniform_distance(grid) == pytest.approx(brute, rel=1e-12)
    assert float(mean_distance(torch.full((tokens, tokens), 1 / tokens), grid)) == pytest.approx(brute, rel=1e-5)
    assert float(mean_distance(torch.eye(tokens), grid)) == 0


def test_two_tokens_by_hand():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert float(mean_distance(weights, (1, 2))) == pytest.approx(0.375)
    assert float(mean_distance(weights, (2, 1))) == pytest.approx(0.375)
    assert float(mass_within(weights, (1, 2), 0)) == pytest.approx(0.625)
    assert float(mass_within(weights, (1, 2), 1)) == 1
    nats = (-0.75 * math.log(0.75) - 0.25 * math.log(0.25) + math.log(2)) / 2
    assert float(entropy(weights)) == pytest.approx(nats)
    cosine = (0.75 * 0.5 + 0.25 * 0.5) / (math.hypot(0.75, 0.25) * math.hypot(0.5, 0.5))
    assert float(position_invariance(weights)) == pytest.approx(cosine)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_references_of_patterns_by_brute_force(pattern):
    mask = pattern.mask(GRID)
    total, within = 0.0, 0.0
    for i, p in enumerate(places(GRID)):
        seen = [q for j, q in enumerate(places(GRID)) if mask[i, j]]
        total += sum(math.dist(p, q) for q in seen) / len(seen)
        within += sum(max(abs(p[0] - q[0]), abs(p[1] - q[1])) <= 1 for q in seen) / len(seen)
    assert pattern_distance(pattern, GRID) == pytest.approx(total / TOKENS, rel=1e-12)
    assert float(mass_within(pattern_weights(pattern, GRID), GRID, 1)) == pytest.approx(within / TOKENS)


def test_a_clipped_window_by_hand():
    # 3 tokens in a line, window 3: the ends see 2 (distance 1/2 on average), the middle 3 (2/3).
    assert pattern_distance(Window(3), (1, 3)) == pytest.approx((0.5 + 2 / 3 + 0.5) / 3)


def test_maps_keep_their_leading_axes():
    maps = random_maps(2, 3)
    for number in (mean_distance(maps, GRID), mass_within(maps, GRID, 2), entropy(maps), position_invariance(maps)):
        assert number.shape == (2, 3)
    assert torch.allclose(mean_distance(maps, GRID)[1, 2], mean_distance(maps[1, 2], GRID))
    masses = masses_within(maps, GRID, range(7))
    assert (masses.diff(dim=-1) >= -1e-6).all()
    assert torch.allclose(masses[..., 5], torch.ones(2, 3))  # a radius of 5 reaches all of 4 x 6 tokens
    assert torch.allclose(masses[..., 0], maps.diagonal(dim1=-2, dim2=-1).mean(-1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_entropy_of_uniform_attention_over_a_pattern(pattern):
    nats, share = entropies(pattern_weights(pattern, GRID), pattern, GRID)
    keys = pattern.mask(GRID).sum(-1).double()
    assert float(nats) == pytest.approx(float(keys.log().mean()))
    assert float(share) == pytest.approx(1)


def test_entropy_of_one_key_is_zero():
    nats, share = entropies(torch.eye(TOKENS), Global(), GRID)
    assert (float(nats), float(share)) == (0, 0)


def test_position_invariance():
    same = random_maps(2)[:, :1].expand(2, TOKENS, TOKENS)
    assert torch.allclose(position_invariance(same), torch.ones(2), atol=1e-5)
    assert float(position_invariance(torch.eye(TOKENS))) == 0
    maps = random_maps()
    cosines = [
        float(torch.cosine_similarity(maps[i], maps[j], dim=0)) for i in range(TOKENS) for j in range(TOKENS) if i != j
    ]
    assert float(position_invariance(maps)) == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)


def test_consistency_is_the_mean_cosine_of_pairs():
    maps = random_maps(5, 2)
    flat = maps.flatten(-2)
    pairs = [torch.cosine_similarity(flat[a], flat[b], dim=-1) for a in range(5) for b in range(5) if a != b]
    assert torch.allclose(consistency(maps), torch.stack(pairs).mean(0), atol=1e-6)


def test_the_control_is_the_mean_cosine_with_permuted_rows():
    maps = random_maps(4, 2)
    similarity = MapConsistency(7)
    similarity.add(maps)
    order = similarity._permutation(maps)
    assert sorted(order.tolist()) == list(range(TOKENS))
    assert (order != torch.arange(TOKENS)).all()
    flat, moved = maps.flatten(-2), maps[..., order, :].flatten(-2)
    pairs = [torch.cosine_similarity(flat[a], moved[b], dim=-1) for a in range(4) for b in range(4) if a != b]
    assert torch.allclose(consistency_control(maps, seed=7), torch.stack(pairs).mean(0), atol=1e-6)


def test_the_control_falls_only_where_maps_depend_on_the_query():
    diagonal = pattern_weights(Window(3), GRID).float().expand(3, TOKENS, TOKENS)
    assert float(consistency(diagonal)) == pytest.approx(1)
    assert float(consistency_control(diagonal)) < 0.5
    assert float(consistency_control(torch.eye(TOKENS).expand(3, TOKENS, TOKENS))) == 0
    constant = random_maps()[:1].expand(3, TOKENS, TOKENS)
    assert float(consistency_control(constant)) == pytest.approx(float(consistency(constant)), abs=1e-5)


def test_consistency_batch_by_batch():
    maps = random_maps(5, 2)
    whole, parts = MapConsistency(), MapConsistency()
    whole.add(maps)
    for part in maps.split([1, 3, 1]):
        parts.add(part)
    for one, other in zip(whole.values(), parts.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_tokens_off_the_grid_are_left_out():
    maps = torch.rand(2, TOKENS + 3, TOKENS + 3).softmax(-1)
    inside = grid_part(maps, GRID)
    assert inside.shape == (2, TOKENS, TOKENS)
    assert torch.allclose(inside.sum(-1), torch.ones(2, TOKENS))
    assert torch.allclose(inside[0, 0, 1] / inside[0, 0, 0], maps[0, 0, 1] / maps[0, 0, 0])
    assert grid_part(inside, GRID) is inside


def test_what_is_refused():
    with pytest.raises(DitlabError, match="expected 25x25 weights for 5x5 tokens, found 24x24"):
        mean_distance(random_maps(), (5, 5))
    with pytest.raises(DitlabError, match="radius of at least 0, found -1"):
        mass_within(random_maps(), GRID, -1)
    with pytest.raises(DitlabError, match="at least 2 images, found 1"):
        consistency(random_maps(1))
    with pytest.raises(DitlabError, match="at least 4x7 = 28 tokens, found 24"):
        grid_part(random_maps(), (4, 7))
    with pytest.raises(DitlabError, match="at least 2 tokens, found 1"):
        position_invariance(torch.ones(1, 1))
    with pytest.raises(DitlabError, match="expected 25x25 weights"):
        entropies(random_maps(), Global(), (5, 5))
