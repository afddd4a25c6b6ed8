"""Packing attention maps into a page: what comes out again, what a budget keeps, what is refused."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
import pytest

from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global, Partition, Window
from ditlab.pages.token_picker import AttentionPicker, frame_size, pack_map, pack_run, query_stride

GRID = (6, 5)


def rows_that_sum_to_one(*shape: int, seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).random(shape) ** 6 + 1e-6
    return weights / weights.sum(-1, keepdims=True)


def unpack_map(content: bytes, grid: tuple[int, int]) -> np.ndarray:
    """Returns the map that the page's script makes of `pack_map`, float32 [queries, T]."""
    stride, tokens = query_stride(grid), grid[0] * grid[1]
    queries = len(range(0, grid[0], stride)) * len(range(0, grid[1], stride))
    content = zlib.decompress(content)
    scaled = np.frombuffer(content, np.uint8, queries * tokens).reshape(queries, tokens)
    largest = np.frombuffer(content, "<f4", queries, queries * tokens)
    return scaled.astype(np.float32) / 255 * largest[:, None]


def test_a_map_comes_out_as_it_went_in():
    weights = rows_that_sum_to_one(30, 30)
    # To half of one of the 255 steps of each row.
    assert np.abs(unpack_map(pack_map(weights, GRID), GRID) - weights).max() <= weights.max() / 255 / 2 + 1e-7
    row = unpack_map(pack_map(weights, GRID), GRID)
    assert np.all(np.abs(row - weights) <= weights.max(1, keepdims=True) / 255 / 2 * 1.001)
    faint = np.full((30, 30), 1e-9)
    np.testing.assert_allclose(unpack_map(pack_map(faint, GRID), GRID), faint, rtol=1e-6)


def test_of_large_grids_every_second_token_is_kept():
    grid = (32, 32)
    assert query_stride(grid) == 2
    assert query_stride((16, 16)) == 1
    weights = rows_that_sum_to_one(1024, 1024)
    kept = weights.reshape(32, 32, 1024)[::2, ::2].reshape(256, 1024)
    assert np.abs(unpack_map(pack_map(weights, grid), grid) - kept).max() <= weights.max() / 255


def packed(budget: int, layers: int = 4, heads: int = 3, levels: int = 3):
    asked = []

    def maps(level: int, layer: int) -> np.ndarray:
        asked.append((level, layer))
        return rows_that_sum_to_one(heads, 30, 30, seed=100 * level + layer)

    return pack_run("mine", {n: Global() for n in range(1, layers + 1)}, GRID, levels, maps, budget), asked


def test_everything_is_kept_where_it_fits():
    run, asked = packed(10**9)
    assert sorted(run.packed) == [(v, layer, h) for v in range(3) for layer in range(1, 5) for h in range(4)]
    assert run.left_out == ()
    assert sorted(asked) == [(v, layer) for v in range(3) for layer in range(1, 5)]
    maps = rows_that_sum_to_one(3, 30, 30, seed=102)
    assert np.abs(unpack_map(run.packed[1, 2, 3], GRID) - maps[2]).max() < 1e-2
    assert np.abs(unpack_map(run.packed[1, 2, 0], GRID) - maps.mean(0)).max() < 1e-2


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3, 0.1, 0.05])
def test_a_budget_is_kept_and_what_is_missing_is_said(share):
    whole = packed(10**9)[0].size
    run, _ = packed(int(whole * share))
    assert run.size <= whole * share
    assert run.left_out
    # The middle level's means come first, and the last layer before others.
    assert (1, 4, 0) in run.packed
    told = " ".join(run.left_out)
    for level in range(3):
        for head, what in ((0, "the mean over heads"), (1, "the single heads")):
            missing = any((level, layer, head) not in run.packed for layer in range(1, 5))
            named = any(
                what in s and f"{level + 1}" in s.split("noise level")[1].split("of 3")[0] for s in run.left_out
            )
            assert missing == named, told


@pytest.mark.parametrize("pattern", [Global(), Window(3)])
def test_the_size_is_that_on_the_page(pattern):
    """With images, boxes and names: nothing that a picker adds to a page is forgotten."""
    sides, grid = (64, 64), (16, 16)
    maps = rows_that_sum_to_one(3, 256, 256)
    run = pack_run("mine", {1: pattern, 2: pattern}, grid, 3, lambda level, layer: maps, 300_000)
    image = np.zeros((*sides, 3), np.uint8)
    picker = AttentionPicker("t", image, [image] * 3, ["σ = 1"] * 3, grid, [run])
    written = len(json.dumps(picker.payload({}), separators=(",", ":")))
    assert written <= frame_size(sides, 3) + run.size
    assert run.size <= 300_000
    assert written > 4 * 64 * 64 * 4 + 0.95 * run.size


def test_the_least_that_is_kept_is_one_map():
    run, _ = packed(10)
    assert list(run.packed) == [(1, 4, 0)]
    assert list(run.patterns) == [4]


def test_one_head_needs_no_mean_beside_it():
    run, _ = packed(10**9, heads=1)
    assert {head for _, _, head in run.packed} == {0}


@pytest.mark.parametrize("pattern", [Global(), Window(3), Window(3, "shift"), Partition(2)])
def test_boxes_are_what_a_token_may_see(pattern):
    run = pack_run("a", {1: pattern}, GRID, 1, lambda level, layer: rows_that_sum_to_one(2, 30, 30))
    image = np.zeros((12, 10, 3), np.uint8)
    payload = AttentionPicker("t", image, [image], ["σ = 1"], GRID, [run]).payload({"a": 3})
    assert json.loads(json.dumps(payload))["runs"][0]["slot"] == 3
    boxes = payload["runs"][0]["layers"][0]["boxes"]
    if isinstance(pattern, Global):
        assert boxes is None
        return
    rebuilt = np.zeros((30, *GRID), bool)
    for token, (top, bottom, left, right) in enumerate(np.frombuffer(base64.b64decode(boxes), np.uint8).reshape(30, 4)):
        rebuilt[token, top : bottom + 1, left : right + 1] = True
    np.testing.assert_array_equal(rebuilt.reshape(30, 30), pattern.mask(GRID).numpy())


def test_bad_input():
    run, _ = packed(10**9)
    image = np.zeros((12, 10, 3), np.uint8)
    with pytest.raises(DitlabError, match="at least one model"):
        AttentionPicker("t", image, [], [], GRID, [])
    for wrong in (image.astype(float), image[:11], image[..., :2]):
        with pytest.raises(DitlabError, match="6 x 5 tokens divides"):
            AttentionPicker("t", wrong, [], [], GRID, [run])
    with pytest.raises(DitlabError, match="one size"):
        AttentionPicker("t", image, [image[:6]], ["σ"], GRID, [run])
    with pytest.raises(DitlabError, match="found none"):
        pack_run("a", {}, GRID, 1, lambda level, layer: np.zeros((1, 30, 30)))
    with pytest.raises(DitlabError, match=r"30 x 30 tokens .* found \[31, 31\]"):
        pack_map(np.zeros((31, 31)), GRID)
