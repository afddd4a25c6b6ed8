"""The two-subset test: do two networks that share no training image draw the same images from the same noise?

Kadkhodaie et al. (ICLR 2024, 2310.02557; spec: their `im_set_corr`) train two networks on disjoint sets of N images and
let both draw from equal noise. Networks that memorize draw images of their own sets: the pair is unlike, each near a
training image. Networks that generalize have learned one density: the pair is alike, and neither is near any training
image. Likeness is the cosine of images about their means. The control is how near images of one set come to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from ditlab.errors import DitlabError
from ditlab.files import read_arrays, read_json, write_arrays, write_json
from ditlab.metrics.similarity import cosines, unit_vectors
from ditlab.provenance import Provenance

Parts = Iterable[tuple[np.ndarray, np.ndarray | None]]
"""Training images uint8 [r, C, H, W] part by part, with their mirrored twins where those count too, or None."""

SHOWN = 16
"""Pairs of samples that are kept to be looked at, at most."""


@dataclass(frozen=True, eq=False)
class Closest:
    """For each of n images the training image that is most like it."""

    index: Int64[np.ndarray, " n"]
    """Its place among the training images, the first of equally near ones."""
    cosine: Float[np.ndarray, " n"]
    """Of the two, in [-1, 1]."""
    mirrored: np.ndarray
    """Whether it was nearest left to right reversed, bool [n]."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: getattr(self, name).tolist() for name in ("index", "cosine", "mirrored")}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Closest:
        """Again, from `to_json()`."""
        return cls(
            np.array(record["index"], np.int64), np.array(record["cosine"], float), np.array(record["mirrored"], bool)
        )


def closest(images: UInt8[np.ndarray, "n c h w"], parts: Parts, *, mean_removed: bool = True) -> Closest:
    """The training image with the highest cosine to each image, exact.

    Args:
        images: uint8 [n, C, H, W].
        parts: the training images; their places are counted through all parts.
        mean_removed: whether each image's mean is taken off first. If not, grey levels are counted from the middle
            of their range, so that the cosine is that of images in [-1, 1].

    Raises:
        DitlabError: no training image, or images of another shape.
    """
    mine = unit_vectors(centred(images), mean_removed=mean_removed)
    count, rows, start = len(images), np.arange(len(images)), 0
    index, best, mirrored = np.full(count, -1), np.full(count, -np.inf), np.zeros(count, bool)
    for part, twins in parts:
        if part.shape[1:] != images.shape[1:]:
            raise DitlabError(
                f"two subsets: expected training images {list(images.shape[1:])}, found {list(part.shape[1:])}"
            )
        for side, reversed_ in ((part, False), (twins, True)):
            if side is None:
                continue
            products = mine @ unit_vectors(centred(side), mean_removed=mean_removed).T
            here = products.argmax(1)
            nearer = products[rows, here] > best
            index = np.where(nearer, start + here, index)
            mirrored = np.where(nearer, reversed_, mirrored)
            best = np.where(nearer, products[rows, here], best)
        start += len(part)
    if not start:
        raise DitlabError("two subsets: expected at least one training image, found none")
    return Closest(index, best.clip(-1, 1), mirrored)


def centred(images: UInt8[np.ndarray, "n c h w"]) -> Float[np.ndarray, "n c h w"]:
    """Grey levels as numbers in [-1, 1], float64."""
    return images / 127.5 - 1


@dataclass(frozen=True, eq=False)
class TwoSubsetsResult:
    """Two runs on disjoint training sets, and what both drew from equal noise."""

    about: tuple[Provenance, Provenance]
    seeds: tuple[int, ...]
    """Of the samples; each seed's noise is the same for both."""
    mean_removed: bool
    """Whether each image's mean was taken off."""
    pair: Float[np.ndarray, " n"]
    """Cosine of the two samples of each seed."""
    nearest: tuple[Closest, Closest]
    """Of each run's samples, in its own training set."""
    control: Float[np.ndarray, " m"]
    """Cosine of training images of the first run to the closest one of the second."""
    settings: Mapping[str, Any]
    """How the samples were drawn, as JSON values."""
    pictures: UInt8[np.ndarray, "2 k c h w"] | None = None
    """The first samples of both, to look at; None where only the JSON was kept."""

    kind = "two-subsets"
    version = 1

    @property
    def nearest_cosine(self) -> Float[np.ndarray, " k"]:
        """Cosine of every sample of both runs to its closest training image."""
        return np.concatenate([side.cosine for side in self.nearest])

    @property
    def difference(self) -> float:
        """Mean cosine of the pairs minus mean cosine to the closest training image: above 0 where networks agree more
        with one another than with what they were trained on."""
        return float(self.pair.mean() - self.nearest_cosine.mean())

    @property
    def telling(self) -> np.ndarray:
        """Whether each run's samples show too much of a training image where none may be shown, bool [2, n].

        So does one less than half as far from a training image of its own run as the images of the control are from
        theirs, by their median: vectors of length 1 with the cosine c lie sqrt(2 - 2 c) apart.
        """
        limit = (1 - float(np.median(self.control))) / 4
        return np.stack([1 - side.cosine < limit for side in self.nearest])

    def sentences(self) -> tuple[str, ...]:
        """What was found, one sentence each."""
        first, second = self.about
        pair, near = float(self.pair.mean()), float(self.nearest_cosine.mean())
        which = "about their means" if self.mean_removed else "with their means"
        if self.difference > 0:
            words = "the two networks agree more with one another than either does with an image it was trained on"
        else:
            words = "each network's samples are more like an image it was trained on than like the other's samples"
        alike = (
            f"{first.name} and {second.name}, N = {first.n} each, no image in common: mean cosine {pair:.2f} between "
            f"the {len(self.pair)} pairs of samples from equal noise, {near:.2f} to the closest training image "
            f"(images {which})."
        )
        control = float(self.control.mean())
        caution = (
            "Samples are less like any training image than the images of one set are like those of the other, so they "
            "may not be images of this kind at all: networks that have learned nothing agree, too."
        )
        return (
            alike,
            f"The difference is {self.difference:+.2f}: {words}.",
            f"Control: an image of one training set has a mean cosine of {control:.2f} to the closest of the other.",
            *([caution] if near < control else []),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "kind": self.kind,
            "version": self.version,
            "about": [asdict(facts) | {"settings": dict(facts.settings)} for facts in self.about],
            "seeds": list(self.seeds),
            "mean_removed": self.mean_removed,
            "settings": dict(self.settings),
            "mean": {
                "pair": float(self.pair.mean()),
                "nearest": float(self.nearest_cosine.mean()),
                "difference": self.difference,
                "control": float(self.control.mean()),
            },
            "pair": self.pair.tolist(),
            "nearest": [side.to_json() for side in self.nearest],
            "control": self.control.tolist(),
            "sentences": list(self.sentences()),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], pictures: np.ndarray | None = None) -> TwoSubsetsResult:
        """The result again, from `to_json()`.

        Raises:
            DitlabError: a field is missing or unknown.
        """
        try:
            first, second = (Provenance(**facts) for facts in record["about"])
            mine, theirs = (Closest.from_json(side) for side in record["nearest"])
            return cls(
                about=(first, second),
                seeds=tuple(record["seeds"]),
                mean_removed=record["mean_removed"],
                pair=np.array(record["pair"], float),
                nearest=(mine, theirs),
                control=np.array(record["control"], float),
                settings=record["settings"],
                pictures=pictures,
            )
        except DitlabError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DitlabError(f"two-subsets result: a field is missing or unknown ({error})") from error

    def save(self, folder: Path | str, name: str = "two-subsets") -> Path:
        """Writes NAME.npz (where there are pictures) and then NAME.json; returns the JSON's path."""
        folder = Path(folder)
        if self.pictures is not None:
            write_arrays(folder / f"{name}.npz", {"pictures": self.pictures})
        return write_json(folder / f"{name}.json", self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> TwoSubsetsResult:
        """Reads what `save` wrote, from the JSON's path; the .npz need not lie beside it.

        Raises:
            DitlabError: a file is damaged, or is another kind of result.
        """
        path = Path(path)
        record = read_json(path, cls.kind, cls.version)
        beside = path.with_suffix(".npz")
        return cls.from_json(record, read_arrays(beside, ("pictures",))["pictures"] if beside.exists() else None)


def compare_subsets(
    about: tuple[Provenance, Provenance],
    samples: tuple[UInt8[np.ndarray, "n c h w"], UInt8[np.ndarray, "n c h w"]],
    training: tuple[Callable[[], Parts], Callable[[], Parts]],
    control: UInt8[np.ndarray, "m c h w"],
    *,
    seeds: Sequence[int],
    mean_removed: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> TwoSubsetsResult:
    """The test on samples that are drawn already, as pictures.

    Args:
        about: the two runs.
        samples: what they drew, of the same seeds.
        training: give each run's training images, from the first one on, whenever they are called.
        control: training images of the first run, which are looked for among the second's.
        seeds: of the samples.
        mean_removed: whether each image's mean is taken off first.
        settings: how the samples were drawn, as JSON values.

    Raises:
        DitlabError: see `check_disjoint` and `closest`.
    """
    check_facts(*about)
    one, two = samples
    near = [closest(drawn, parts(), mean_removed=mean_removed) for drawn, parts in zip(samples, training, strict=True)]
    return TwoSubsetsResult(
        about=about,
        seeds=tuple(seeds),
        mean_removed=mean_removed,
        pair=cosines(centred(one), centred(two), mean_removed=mean_removed),
        nearest=(near[0], near[1]),
        control=closest(control, training[1](), mean_removed=mean_removed).cosine,
        settings=settings or {},
        pictures=np.stack([one[:SHOWN], two[:SHOWN]]),
    )


def check_facts(first: Provenance, second: Provenance) -> None:
    """Raises DitlabError unless the runs were held back the same test images of one set, and trained on as many."""
    if not first.split_family or first.split_family != second.split_family:
        raise DitlabError(
            f"two-subsets: expected runs of one image set, seed and test images, found the split families "
            f"{first.split_family[:12] or 'none'} of {first.name} and {second.split_family[:12] or 'none'} of "
            f"{second.name}"
        )
    if first.n != second.n:
        raise DitlabError(
            f"two-subsets: expected training sets of one size, found N = {first.n} of {first.name} and "
            f"N = {second.n} of {second.name}"
        )


def check_disjoint(
    first: Provenance, second: Provenance, train: tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]
) -> None:
    """Raises DitlabError where two runs share training images, given by their places in one image set.

    An image set holds no image twice, so equal places are all that has to be looked for.
    """
    shared = len(np.intersect1d(*train))
    if shared:
        raise DitlabError(
            f"two-subsets: expected disjoint training sets, found {shared} of {first.name}'s {len(train[0])} images "
            f"in {second.name}'s too; train one of them with --skip {len(train[0])}"
        )
