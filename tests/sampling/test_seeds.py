"""Seeds as text, numbers and sequences."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ditlab.errors import DitlabError
from ditlab.sampling.seeds import parse_seeds, seed_list, seeds_text


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("7", [7]), ("9,0-2,4", [9, 0, 1, 2, 4]), (" 1 , 2 ", [1, 2]), ("5-5", [5])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds
    assert parse_seeds(seeds_text(seeds)) == seeds
    assert seeds_text([0, 1, 2, 10, 12, 13]) == "0-2,10,12-13"


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "0-", "1,,2", "1.5", "0-2-4", "٣"])
def test_seeds_that_cannot_be_read(text):
    with pytest.raises(DitlabError, match=re.escape(f"such as 0-63 or 0-9,20,30-39, found '{text}'")):
        parse_seeds(text)


def test_seeds_of_a_python_caller():
    assert seed_list("0-2") == seed_list(range(3)) == seed_list((0, 1, 2)) == seed_list(np.arange(3)) == [0, 1, 2]
    assert seed_list(7) == [7]
    assert seed_list(range(3, 0, -1)) == [3, 2, 1]
    for seeds, message in (
        ([], "expected at least one"),
        ([-1], "each from 0"),
        ([10**18], "each from 0"),
        ([0, 1.5], "expected whole numbers"),
        (None, "expected whole numbers"),
        ([3, 1, 3], "expected each seed once, found 3 twice"),
        (range(10**12), "expected at most 10,000,000 images, found 1,000,000,000,000"),
    ):
        with pytest.raises(DitlabError, match=message):
            seed_list(seeds)
