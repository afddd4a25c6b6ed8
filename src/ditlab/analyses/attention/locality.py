"""How local attention maps are: numbers with a closed form, each a pure function of the maps.

A map is softmax(q k^T / sqrt(head_dim)) of one head over the tokens of a grid: float `[..., T, T]`, T = rows * columns
numbered row by row, rows of the map are queries and sum to 1; maps over another number of tokens raise DitlabError.
Every number is a mean over the queries of a map, so the leading axes (images, heads) stay. Distances are in tokens;
times the patch's side they are pixels.

Sources: the mean attention distance is Dosovitskiy et al., "An Image is Worth 16x16 Words" (2010.11929, Fig. 7 right
and Appendix D.7). An et al. (2410.21273, Sec. 3 and Appendix B) say of attention maps that they are local at large N,
the same for all queries at N = 10, and alike across images, and give no number for any of it; mass within a radius,
entropy, position invariance and consistency are the numbers chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global, Grid, Pattern
from ditlab.rng import torch_generator


@lru_cache(maxsize=4)
def token_offsets(grid: Grid) -> tuple[Float[Tensor, "T T"], Float[Tensor, "T T"]]:
    """Returns row and column distances |drow| and |dcol| between all pairs of tokens, float64 `[T, T]` each."""
    row = torch.arange(grid[0], dtype=torch.float64).repeat_interleave(grid[1])
    column = torch.arange(grid[1], dtype=torch.float64).repeat(grid[0])
    return (row[:, None] - row).abs(), (column[:, None] - column).abs()


def grid_part(weights: Float[Tensor, "*batch n n"], grid: Grid) -> Float[Tensor, "*batch T T"]:
    """Returns the map over the grid's tokens alone, with rows that sum to 1.

    Off-grid tokens (`SelfAttention.extra`) come after the grid's and have no place, so no distance. Raises DitlabError
    for a map over fewer tokens than the grid has.
    """
    tokens = grid[0] * grid[1]
    if weights.shape[-1] < tokens:
        raise DitlabError(
            f"attention map: expected at least {grid[0]}x{grid[1]} = {tokens} tokens, found {weights.shape[-1]}"
        )
    if weights.shape[-1] == tokens:
        return weights
    inside = weights[..., :tokens, :tokens]
    return inside / inside.sum(-1, keepdim=True)


def mean_distance(weights: Float[Tensor, "*batch T T"], grid: Grid) -> Float[Tensor, "*batch"]:
    """Returns the mean attention distance: sum_j A_ij |p_i - p_j| averaged over queries i, Euclidean, in tokens.

    0 where every token sees only itself; `uniform_distance(grid)` where all see all alike.
    """
    return _mean_over_queries(weights, torch.hypot(*token_offsets(grid))[..., None], grid)[..., 0]


def mass_within(weights: Float[Tensor, "*batch T T"], grid: Grid, radius: int) -> Float[Tensor, "*batch"]:
    """Returns the share of attention that goes to tokens at most `radius` rows and columns away, in [0, 1].

    Radius r is the window of size 2r + 1 (1 .. 6 are the windows 3 .. 13 of An et al.); radius 0 is the token itself.
    Raises DitlabError for a negative radius.
    """
    return masses_within(weights, grid, [radius])[..., 0]


def masses_within(
    weights: Float[Tensor, "*batch T T"], grid: Grid, radii: Sequence[int]
) -> Float[Tensor, "*batch radii"]:
    """Returns `mass_within` for several radii, in one pass over the maps."""
    for radius in radii:
        if radius < 0:
            raise DitlabError(f"attention mass: expected a radius of at least 0, found {radius}")
    distance = torch.maximum(*token_offsets(grid))
    return _mean_over_queries(weights, torch.stack([distance <= radius for radius in radii], -1), grid)


def entropies(
    weights: Float[Tensor, "*batch T T"], pattern: Pattern, grid: Grid
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Returns the mean entropy of the rows in nats, and that of each row over the log of its number of keys.

    -sum_j A_ij ln A_ij is 0 for one key and ln T for all keys alike. The second lies in [0, 1]: 1 where each query sees
    alike all that the pattern lets it see. A query with a single key counts as 1, for it can see no other way.
    """
    _check(weights, grid)
    rows = torch.special.entr(weights).sum(-1)
    keys = pattern.mask(grid).sum(-1).to(weights)
    shares = torch.where(keys > 1, rows / keys.log().clamp(min=1e-12), torch.ones_like(rows))
    return rows.mean(-1), shares.mean(-1)


def entropy(weights: Float[Tensor, "*batch T T"]) -> Float[Tensor, "*batch"]:
    """Returns the mean entropy of the rows in nats: 0 for one key, ln T for all keys alike."""
    return torch.special.entr(weights).sum(-1).mean(-1)


def position_invariance(weights: Float[Tensor, "*batch T T"]) -> Float[Tensor, "*batch"]:
    """Returns the mean cosine between rows of different queries: 1 if all see the same keys, 0 if they share none.

    Raises DitlabError for a map of a single token.
    """
    tokens = weights.shape[-1]
    if tokens < 2:
        raise DitlabError(f"position invariance: expected at least 2 tokens, found {tokens}")
    # sum_{i != j} u_i u_j = |sum_i u_i|^2 - T for unit rows u.
    total = torch.nn.functional.normalize(weights, dim=-1).sum(-2).square().sum(-1)
    return (total - tokens) / (tokens * (tokens - 1))


def pattern_weights(pattern: Pattern, grid: Grid) -> Float[Tensor, "T T"]:
    """Returns the map of uniform attention within a pattern: the reference for every number here."""
    mask = pattern.mask(grid).double()
    return mask / mask.sum(-1, keepdim=True)


def pattern_distance(pattern: Pattern, grid: Grid) -> float:
    """Returns the mean attention distance, in tokens, of uniform attention within a pattern, clipped at borders."""
    return float(mean_distance(pattern_weights(pattern, grid), grid))


def uniform_distance(grid: Grid) -> float:
    """Returns the mean attention distance, in tokens, of uniform attention over the whole grid."""
    return pattern_distance(Global(), grid)


class MapConsistency:
    """How similar the maps of different images are, gathered batch by batch; in memory is one map for each head.

    With u_b the map of image b as one vector of length 1, the mean cosine over pairs of different images is
    (|sum_b u_b|^2 - B) / (B (B - 1)). Its control permutes the rows of one map in each pair, so that rows of different
    queries are compared: the similarity that remains does not depend on the place of the query.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed, self._images = seed, 0
        self._sum: Any = 0.0
        self._itself: Any = 0.0
        self._order: Tensor | None = None

    def add(self, maps: Float[Tensor, "b *heads T T"]) -> None:
        """Adds the maps of further images."""
        unit = maps / torch.linalg.vector_norm(maps, dim=(-2, -1), keepdim=True)
        self._images += len(maps)
        self._sum = self._sum + unit.sum(0)
        self._itself = self._itself + (unit * unit[..., self._permutation(maps), :]).sum((0, -2, -1))

    def _permutation(self, maps: Tensor) -> Tensor:
        """One cycle through all queries in a drawn order, so that no row stays in its place."""
        if self._order is None:
            drawn = torch.randperm(maps.shape[-1], generator=torch_generator(self._seed, "attention-control"))
            order = torch.empty_like(drawn)
            order[drawn] = drawn.roll(-1)
            self._order = order.to(maps.device)
        return self._order

    def values(self) -> tuple[Float[Tensor, "*heads"], Float[Tensor, "*heads"]]:
        """Returns the mean cosine over pairs of different images, of which there must be two, and its control."""
        if self._images < 2:
            raise DitlabError(f"consistency of attention maps: expected at least 2 images, found {self._images}")
        pairs = self._images * (self._images - 1)
        together = self._sum.square().sum((-2, -1)) - self._images
        control = (self._sum * self._sum[..., self._permutation(self._sum), :]).sum((-2, -1)) - self._itself
        return together / pairs, control / pairs


def consistency(maps: Float[Tensor, "b *heads T T"]) -> Float[Tensor, "*heads"]:
    """Returns the mean cosine between maps of different images, for each head: 1 if the image does not matter.

    Raises DitlabError for the maps of fewer than two images.
    """
    return _consistencies(maps, 0)[0]


def consistency_control(maps: Float[Tensor, "b *heads T T"], *, seed: int = 0) -> Float[Tensor, "*heads"]:
    """Returns `consistency` with the rows of one map of each pair permuted: similarity without the query's place.

    No row stays in its place in the permutation, which is drawn from `seed`.
    """
    return _consistencies(maps, seed)[1]


def _consistencies(maps: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    gathered = MapConsistency(seed)
    gathered.add(maps)
    return gathered.values()


def _check(weights: Tensor, grid: Grid) -> None:
    tokens = grid[0] * grid[1]
    if tuple(weights.shape[-2:]) != (tokens, tokens):
        raise DitlabError(
            f"attention map: expected {tokens}x{tokens} weights for {grid[0]}x{grid[1]} tokens, "
            f"found {weights.shape[-2]}x{weights.shape[-1]}"
        )


def _mean_over_queries(weights: Tensor, values: Tensor, grid: Grid) -> Tensor:
    """sum_j A_ij values_ijk averaged over i: maps `[..., T, T]` and values `[T, T, K]` to `[..., K]`."""
    _check(weights, grid)
    return weights.flatten(-2) @ values.to(weights).flatten(0, 1) / weights.shape[-1]
