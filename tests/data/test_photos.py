"""The built-in photographs: regions that share no pixel, crops of the right content."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ditlab.data.sources.base import TEST, TRAIN, CropRule, Item
from ditlab.data.sources.photos import PHOTOGRAPHS, Photos, default_scales, find_crops, region_map
from ditlab.errors import DitlabError


@given(
    height=st.integers(20, 150),
    width=st.integers(20, 150),
    block=st.integers(8, 80),
    phase=st.integers(0, 8),
    size=st.integers(2, 12),
    stride=st.integers(1, 9),
    factors=st.lists(st.integers(1, 4), min_size=1, max_size=2, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_train_and_test_crops_never_share_a_pixel(height, width, block, phase, size, stride, factors):
    pools = region_map(height, width, block, phase)
    touched = {TRAIN: np.zeros((height, width), bool), TEST: np.zeros((height, width), bool)}
    for crop in find_crops(pools, size, stride, tuple(factors)):
        assert crop.side == size * crop.factor
        assert crop.top + crop.side <= height
        assert crop.left + crop.side <= width
        touched[crop.pool][crop.top : crop.top + crop.side, crop.left : crop.left + crop.side] = True
    assert not (touched[TRAIN] & touched[TEST]).any()


@pytest.mark.parametrize("size", [8, 12, 16, 32])
def test_every_size_has_thousands_to_train_and_hundreds_to_test_of_every_photograph(size: int):
    items = [item for item in Photos(CropRule(size)) if isinstance(item, Item)]
    sides = {pool: {item.label for item in items if item.pool == pool} for pool in (TRAIN, TEST)}
    assert sum(item.pool == TRAIN for item in items) >= 2000
    assert sum(item.pool == TEST for item in items) >= 600
    assert sides[TRAIN] == sides[TEST] == set(range(len(PHOTOGRAPHS)))
    assert all(item.pixels.shape == (3, size, size) for item in items)


def test_a_crop_is_the_box_average_of_its_source_pixels():
    source = Photos(CropRule(16))
    checked = 0
    for name, crop, pixels in source.crops[::97]:
        photograph = np.asarray(Image.open(source.paths[name]).convert("RGB")).astype(np.float64)
        piece = photograph[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
        expected = piece.reshape(16, crop.factor, 16, crop.factor, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
        assert np.abs(pixels - expected).max() <= 1.01
        checked += 1
    assert checked > 30


def test_plain_crops_are_left_out():
    everything = Photos(CropRule(16), flat=0.0)
    some = Photos(CropRule(16))
    assert everything.count == some.count + some.flat_dropped
    assert min(pixels.mean(axis=0).std() for _, _, pixels in some.crops) >= some.flat


@pytest.mark.parametrize(
    ("size", "options", "sentence"),
    [
        (2000, {}, "no test crop of 2000x2000"),
        (16, {"stride": 0}, "stride of at least 1"),
        (16, {"scales": (0,)}, "scales of at least 1"),
    ],
)
def test_settings_that_leave_no_crops_are_refused(size: int, options: dict, sentence: str):
    with pytest.raises(DitlabError, match=sentence):
        Photos(CropRule(size), **options)


def test_default_crops_show_32_to_64_source_pixels():
    assert {size: default_scales(size) for size in (8, 16, 32, 64)} == {8: (4, 8), 16: (2, 4), 32: (1, 2), 64: (1,)}


def test_the_table_of_photographs_in_the_docs_is_true():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.M)
    assert len(rows) == 5
    for size, scales, train, test in rows:
        source = Photos(CropRule(int(size)))
        pools = [crop.pool for _, crop, _ in source.crops]
        assert scales == ", ".join(map(str, source.scales))
        assert (train, test) == (f"{pools.count(TRAIN):,}", f"{pools.count(TEST):,}")
