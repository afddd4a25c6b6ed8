"""Splits: disjoint, nested, seeded, recognised again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditlab.data.contact_sheet import image_grid
from ditlab.data.imageset import ImageSet
from ditlab.data.pixels import flip
from ditlab.data.preparing import prepare
from ditlab.data.sources.base import TEST, TRAIN
from ditlab.data.splits import Split, make_split, verify
from ditlab.errors import DitlabError

# The first images of the digits' split with seed 0.
TRAIN_ORDER = [1595, 1143, 1370, 692, 681]
TEST_ORDER = [1072, 1579, 354, 1003]
HASH = "dbe7fee470f6"


@pytest.fixture(scope="module")
def free(tmp_path_factory) -> ImageSet:
    return prepare("digits", tmp_path_factory.mktemp("sets") / "digits", size=8, color="grey")


@pytest.fixture(scope="module")
def pooled(tmp_path_factory) -> ImageSet:
    return prepare("photos", tmp_path_factory.mktemp("sets") / "photos", size=16)


@given(small=st.integers(1, 700), more=st.integers(0, 700), test=st.integers(0, 397), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_splits_are_disjoint_and_nested(free, small, more, test, seed):
    few, many = make_split(free, small, test, seed), make_split(free, small + more, test, seed)
    assert len(few.train) == small
    assert len(few.test) == test
    assert not np.intersect1d(many.train, many.test).size
    assert len(np.unique(many.train)) == small + more
    assert (many.train[:small] == few.train).all()
    assert (many.test == few.test).all()
    assert few.test_hash == many.test_hash
    assert (few.hash == many.hash) == (more == 0)


def test_another_seed_is_another_shuffle(free):
    first, second = make_split(free, 100, 100, 0), make_split(free, 100, 100, 1)
    assert first.test_hash != second.test_hash
    assert len(np.intersect1d(first.test, second.test)) < 30


def test_pools_are_kept_and_all_is_all(pooled):
    split = make_split(pooled, None, 300, 3)
    assert pooled.pool is not None
    assert (pooled.pool[split.train] == TRAIN).all()
    assert (pooled.pool[split.test] == TEST).all()
    assert len(split.train) == (pooled.pool == TRAIN).sum()


def test_the_order_never_changes(free):
    # Written down once: a change of these numbers would make every run's split record wrong.
    split = make_split(free, 5, 4, 0)
    assert split.train.tolist() == TRAIN_ORDER
    assert split.test.tolist() == TEST_ORDER


def test_what_is_skipped_is_another_training_set_of_the_same_family(free):
    whole = make_split(free, 200, 30, 4)
    first, second = make_split(free, 100, 30, 4), make_split(free, 100, 30, 4, skip=100)
    assert (np.concatenate([first.train, second.train]) == whole.train).all()
    assert (second.test == first.test).all()
    assert (second.test_hash, second.hash != first.hash) == (first.test_hash, True)
    assert (first.skip, second.skip, len(make_split(free, None, 30, 4, skip=1700).train)) == (0, 100, 67)
    assert (verify(second.to_json(), free).train == second.train).all()


def test_hashes_without_a_skip_and_records_from_before_it(free):
    # Written down before images could be skipped: runs are recognised by these.
    split = make_split(free, 5, 4, 0)
    assert split.hash[:12] == HASH
    record = {key: value for key, value in split.to_json().items() if key != "skip"}
    assert (verify(record, free).train == split.train).all()


def test_a_skip_that_cannot_be(free):
    with pytest.raises(DitlabError, match="to skip 0 or more train images, found -1"):
        make_split(free, 5, 4, 0, -1)
    with pytest.raises(DitlabError, match=r"N = 5 train .* has 3 besides 4 test images and 1790 that are skipped"):
        make_split(free, 5, 4, 0, 1790)
    with pytest.raises(DitlabError, match=r"N = 0 train .* has 0 besides 4 test images and 9999 that are skipped"):
        make_split(free, None, 4, 0, 9999)


@pytest.mark.parametrize(
    ("n", "test", "sentence"),
    [
        (1800, 0, "N = 1800 train images asked for, but .* has 1797"),
        (1500, 300, "N = 1500 train images asked for, but .* has 1497 besides 300 test images"),
        (10, 1798, "at most 1797 test images, which .* has, found 1798"),
        (0, 10, "at least 1 train image"),
        (10, -1, "0 or more test images"),
        (None, 1797, "has 0 besides 1797"),
    ],
)
def test_more_images_than_there_are_is_one_sentence(free, n, test: int, sentence: str):
    with pytest.raises(DitlabError, match=sentence):
        make_split(free, n, test, 0)


def test_a_record_is_recognised_and_a_wrong_one_refused(free, pooled):
    split = make_split(free, 20, 30, 7)
    again = verify(split.to_json(), free)
    assert isinstance(again, Split)
    assert (again.train == split.train).all()
    with pytest.raises(DitlabError, match=r"expected the image set .* that the run was trained on"):
        verify(split.to_json(), pooled)
    with pytest.raises(DitlabError, match="expected the split"):
        verify(split.to_json() | {"seed": 8}, free)
    with pytest.raises(DitlabError, match="expected the field 'hash'"):
        verify({key: value for key, value in split.to_json().items() if key != "hash"}, free)


def test_flip_mirrors_where_the_coin_says():
    images = torch.arange(12.0).reshape(2, 1, 2, 3)
    flipped = flip(images, torch.tensor([True, False]))
    assert flipped[0, 0, 0].tolist() == [2, 1, 0]
    assert torch.equal(flipped[1], images[1])


def test_image_grid_puts_images_row_by_row():
    images = np.stack([np.full((1, 2, 2), value, np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(image_grid(images, columns=2, scale=3, gap=1))
    assert sheet.shape == (15, 15, 3)
    assert (sheet[1:7, 1:7] == 10).all()
    assert (sheet[1:7, 8:14] == 20).all()
    assert (sheet[8:14, 1:7] == 30).all()
    assert (sheet[8:14, 8:14] == 255).all()
    with pytest.raises(DitlabError, match=r"found float64 \[1, 1, 2, 2\]"):
        image_grid(np.zeros((1, 1, 2, 2)))
