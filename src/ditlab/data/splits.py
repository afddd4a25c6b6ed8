"""Splits: which images of a set are trained on and which are held out, as a function of a seed.

For one image set, seed and number of test images, the test images are the same whatever N is, and the train images
of a smaller N are the first of those of a larger N: the sets are nested, as in An et al. (2410.21273) and Kadkhodaie
et al. (2310.02557), whose two-subset test needs the disjoint sets that a skip gives. Where the set has pools, test
images come from pool 1 and train images from pool 0 only.

The order comes from raw 64-bit output of NumPy's PCG64, sorted: that stream, unlike `Generator.permutation`, is
promised never to change between versions of NumPy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditlab.data.imageset import ImageSet
from ditlab.data.sources.base import TEST, TRAIN
from ditlab.errors import DitlabError
from ditlab.rng import numpy_generator

__all__ = ["Split", "held_out_order", "make_split", "verify"]


@dataclass(frozen=True, eq=False)
class Split:
    """Disjoint train and test indices into one image set.

    Attributes:
        train: int64 [N], in the seeded order, so that a prefix is the split of a smaller N (and the same skip).
        test: int64 [test], in a seeded order.
        seed: the seed of both orders (An et al. call it "shuffle").
        imageset: hash of the image set.
        test_hash: hash of (image set, seed, test indices); equal for splits that differ only in N and skip.
        hash: hash of (test_hash, train indices).
        skip: how many images at the head of the seeded order were left out before the train images.
    """

    train: np.ndarray
    test: np.ndarray
    seed: int
    imageset: str
    test_hash: str
    hash: str
    skip: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the record that a run keeps: enough to make the split again and to know that it is the same."""
        return {
            "seed": self.seed,
            "train": len(self.train),
            "test": len(self.test),
            "imageset": self.imageset,
            "family": self.test_hash,
            "hash": self.hash,
            "skip": self.skip,
        }


def make_split(imageset: ImageSet, n: int | None, test: int, seed: int, skip: int = 0) -> Split:
    """Splits an image set.

    Args:
        imageset: the set.
        n: number of train images; None for all that remain.
        test: number of test images, at least 0.
        seed: another seed gives other train and other test images.
        skip: leave out so many images at the head of the seeded order; the train images are the next ones. With
            skip = n they are disjoint from those of skip = 0.

    Raises:
        DitlabError: more images are asked for than the set has.
    """
    if n is not None and n < 1:
        raise DitlabError(f"split: expected at least 1 train image, found {n}")
    if test < 0:
        raise DitlabError(f"split: expected 0 or more test images, found {test}")
    if skip < 0:
        raise DitlabError(f"split: expected to skip 0 or more train images, found {skip}")
    test_indices = held_out_order(imageset, seed)
    if test > len(test_indices):
        raise DitlabError(
            f"split: expected at most {len(test_indices)} test images, which {imageset.path} has, found {test}"
        )
    test_indices = test_indices[:test]
    may_train = np.setdiff1d(_allowed(imageset, TRAIN), test_indices)
    left = max(0, len(may_train) - skip)
    n = left if n is None else n
    if n > left or n == 0:
        besides = f" besides {test} test images" if imageset.pool is None and test else ""
        besides += f" and {skip} that are skipped" if skip else ""
        raise DitlabError(f"split: N = {n} train images asked for, but {imageset.path} has {left}{besides}")
    train_indices = _order(may_train, len(imageset), seed, "train")[skip : skip + n]
    test_hash = _hash("family", imageset.hash, str(seed), test_indices)
    whole = _hash("split", test_hash, train_indices)
    return Split(train_indices, test_indices, seed, imageset.hash, test_hash, whole, skip)


def held_out_order(imageset: ImageSet, seed: int) -> np.ndarray:
    """Returns the indices, int64, of all images that may be tested on, in a seeded order: a split takes the first."""
    return _order(_allowed(imageset, TEST), len(imageset), seed, "test")


def verify(record: dict[str, Any], imageset: ImageSet) -> Split:
    """Makes the split of a run again and checks that it is the one the run was trained with.

    Args:
        record: the result of `Split.to_json`; older ones have no `skip`.
        imageset: the image set, opened again.

    Raises:
        DitlabError: the record is incomplete, the image set is another one, or the split differs.
    """
    missing = {"seed", "train", "test", "imageset", "family", "hash"} - record.keys()
    if missing:
        raise DitlabError(f"split record: expected the field '{min(missing)}', found {', '.join(record) or 'none'}")
    if record["imageset"] != imageset.hash:
        raise DitlabError(
            f"{imageset.path}: expected the image set {record['imageset'][:12]} that the run was trained on, "
            f"found {imageset.hash[:12]}"
        )
    split = make_split(imageset, record["train"], record["test"], record["seed"], record.get("skip", 0))
    if (split.test_hash, split.hash) != (record["family"], record["hash"]):
        raise DitlabError(f"{imageset.path}: expected the split {record['hash'][:12]}, found {split.hash[:12]}")
    return split


def _allowed(imageset: ImageSet, pool: int) -> np.ndarray:
    return np.arange(len(imageset)) if imageset.pool is None else np.flatnonzero(imageset.pool == pool)


def _order(indices: np.ndarray, count: int, seed: int, part: str) -> np.ndarray:
    # One number for every image of the set, so that which images are allowed does not change the order of the others.
    numbers = numpy_generator(seed, "split", part).bit_generator.random_raw(count)
    return indices[np.argsort(numbers[indices], kind="stable")].astype(np.int64)


def _hash(*parts: str | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part, "<i8").tobytes())
        digest.update(b"\0")
    return digest.hexdigest()
