"""Seeds of samples as text: "0-63", "0-9,20,30-39"."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from ditlab.errors import InvalidConfig

__all__ = ["MAX_IMAGES", "parse_seeds", "seed_list", "seeds_text"]

MAX_IMAGES = 10_000_000
"""Images of one call, at most: a typing error in the seeds should not fill the memory."""

_LARGEST = 10**18 - 1


def parse_seeds(text: str) -> list[int]:
    """Returns the seeds that a text names, in its order: numbers and ranges with both ends, with commas between.

    Raises:
        InvalidConfig: it names none, too many, or one twice.

    Example:
        >>> parse_seeds("0-2,10")
        [0, 1, 2, 10]
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise InvalidConfig(f"`seeds`: expected numbers and ranges such as 0-63 or 0-9,20,30-39, found '{text}'")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return _checked(ranges)


def seed_list(seeds: Any) -> list[int]:
    """Returns seeds as a list.

    Args:
        seeds: text for `parse_seeds`, a seed, or an iterable of seeds.

    Raises:
        InvalidConfig: there are none, too many, one twice, or one that is not a whole number from 0 to 10^18.
    """
    if isinstance(seeds, str):
        return parse_seeds(seeds)
    try:
        values = seeds if isinstance(seeds, Iterable) else [seeds]
        several = seeds if isinstance(seeds, range) else [operator.index(value) for value in values]
    except TypeError:
        raise InvalidConfig(f"`seeds`: expected whole numbers, or text such as 0-63, found {seeds!r}") from None
    ends = (several[0], several[-1]) if isinstance(several, range) and several else several
    if not several or min(ends) < 0 or max(ends) > _LARGEST:
        raise InvalidConfig(f"`seeds`: expected at least one, each from 0 to {_LARGEST}, found {seeds!r}")
    return _checked([several])


def _checked(parts: Sequence[Sequence[int]]) -> list[int]:
    """Returns all seeds of all parts, if they are not too many and no two are alike."""
    count = sum(map(len, parts))
    if count > MAX_IMAGES:
        raise InvalidConfig(f"`seeds`: expected at most {MAX_IMAGES:,} images, found {count:,}")
    seeds = [seed for part in parts for seed in part]
    if len(set(seeds)) < count:
        twice = next(a for a, b in pairwise(sorted(seeds)) if a == b)
        raise InvalidConfig(f"`seeds`: expected each seed once, found {twice} twice")
    return seeds


def seeds_text(seeds: Sequence[int]) -> str:
    """Returns the shortest text that `parse_seeds` reads these seeds from, runs of them as ranges."""
    starts = [i for i, seed in enumerate(seeds) if i == 0 or seed != seeds[i - 1] + 1]
    ends = [*(i - 1 for i in starts[1:]), len(seeds) - 1]
    words = [str(seeds[a]) if a == b else f"{seeds[a]}-{seeds[b]}" for a, b in zip(starts, ends, strict=True)]
    return ",".join(words)
