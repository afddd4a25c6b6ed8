"""The result of a two-subset test: `ditlab.analyses.two_subsets.measure` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from ditlab.analyses.stored import StoredResult
from ditlab.provenance import Provenance

__all__ = ["Closest", "TwoSubsetsResult"]


@dataclass(frozen=True, eq=False)
class Closest:
    """The most similar training image of each of n images."""

    index: Int64[np.ndarray, " n"]
    """Its place among the training images, the first one of equals."""
    cosine: Float[np.ndarray, " n"]
    """Cosine of the image and its closest training image, in [-1, 1]."""
    mirrored: np.ndarray
    """Whether the mirror image of the training image is the closest, bool [n]."""

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {name: getattr(self, name).tolist() for name in ("index", "cosine", "mirrored")}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Closest:
        """Returns what `to_json` gave."""
        return cls(
            np.array(record["index"], np.int64), np.array(record["cosine"], float), np.array(record["mirrored"], bool)
        )


@dataclass(frozen=True, eq=False)
class TwoSubsetsResult(StoredResult):
    """Two runs on disjoint training sets, and the samples of both from the same noise."""

    about: tuple[Provenance, Provenance]
    seeds: tuple[int, ...]
    """Seeds of the samples, the same for both runs."""
    mean_removed: bool
    """Whether each image's mean was subtracted."""
    pair: Float[np.ndarray, " n"]
    """Cosine of the two samples of each seed."""
    nearest: tuple[Closest, Closest]
    """The closest training image of each run's samples, in its own training set."""
    control: Float[np.ndarray, " m"]
    """Cosine of training images of the first run with the closest ones of the second."""
    settings: Mapping[str, Any]
    """How the samples were drawn, as JSON values."""
    pictures: UInt8[np.ndarray, "2 k c h w"] | None = None
    """The first samples of both; None if only the JSON is there."""

    kind = file = "two-subsets"

    @property
    def names(self) -> str:
        """The names of the two runs."""
        return " and ".join(about.group for about in self.about)

    @property
    def nearest_cosine(self) -> Float[np.ndarray, " k"]:
        """Cosine of each sample of both runs with its closest training image."""
        return np.concatenate([side.cosine for side in self.nearest])

    @property
    def difference(self) -> float:
        """Mean cosine of the pairs minus mean cosine with the closest training images: above 0 if the networks agree
        more with each other than with their training images."""
        return self.means["difference"]

    @property
    def means(self) -> dict[str, float]:
        """The mean cosines, by their names in files."""
        pair, nearest, control = (float(v.mean()) for v in (self.pair, self.nearest_cosine, self.control))
        return {"pair": pair, "nearest": nearest, "difference": pair - nearest, "control": control}

    @property
    def near_copies(self) -> np.ndarray:
        """Whether each sample is nearly a training image of its own run, bool [2, n].

        That is, less than half as far from it as the images of the control from theirs (their median). Vectors of
        length 1 with the cosine c are sqrt(2 - 2 c) apart.
        """
        limit = (1 - float(np.median(self.control))) / 4
        return np.stack([1 - side.cosine < limit for side in self.nearest])

    def sentences(self) -> tuple[str, ...]:
        """Returns the cosines, which of them is larger, and the control."""
        pair, near, difference, control = self.means.values()
        means = "subtracted" if self.mean_removed else "kept"
        if difference > 0:
            verdict = "the two networks agree more with each other than with their training images"
        else:
            verdict = "each network's samples are more like its training images than like the other network's samples"
        cosine = (
            f"{self.names}, N = {self.about[0].n} each, no image in common: mean cosine {pair:.2f} between "
            f"the {len(self.pair)} pairs of samples from the same noise, {near:.2f} between samples and their closest "
            f"training images (image means {means})."
        )
        caution = (
            "Samples are less like any training image than the images of one set are like those of the other. They may "
            "not be images of this kind at all: networks that have learned nothing agree, too."
        )
        return (
            cosine,
            f"The difference is {difference:+.2f}: {verdict}.",
            f"Control: the mean cosine of images of one training set and the closest of the other is {control:.2f}.",
            *([caution] if near < control else []),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "version": self.version,
            "about": [asdict(about) for about in self.about],
            "seeds": list(self.seeds),
            "mean_removed": self.mean_removed,
            "settings": dict(self.settings),
            "mean": self.means,
            "pair": self.pair.tolist(),
            "nearest": [side.to_json() for side in self.nearest],
            "control": self.control.tolist(),
            "sentences": list(self.sentences()),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        return {} if self.pictures is None else {"pictures": self.pictures}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TwoSubsetsResult:
        first, second = (Provenance(**about) for about in record["about"])
        nearest, other = (Closest.from_json(side) for side in record["nearest"])
        return cls(
            about=(first, second),
            seeds=tuple(record["seeds"]),
            mean_removed=record["mean_removed"],
            pair=np.array(record["pair"], float),
            nearest=(nearest, other),
            control=np.array(record["control"], float),
            settings=record["settings"],
            pictures=arrays.get("pictures"),
        )


def table_row(result: TwoSubsetsResult) -> tuple[Any, ...]:
    """Returns runs, N, pairs, and the mean cosines: pair, closest training image, difference, control."""
    return (result.names, result.about[0].n, len(result.pair), *result.means.values())


def cosine_rows(result: TwoSubsetsResult) -> list[tuple[Any, ...]]:
    """Returns mean, median and quantiles of the cosines of pairs, of each run's closest images, and of the control."""
    sides = zip(result.about, result.nearest, strict=True)
    rows = (
        ("samples from the same noise", result.pair),
        *((f"samples of {about.group} and its training images", side.cosine) for about, side in sides),
        ("control: the two training sets", result.control),
    )
    return [(name, *map(float, (v.mean(), np.median(v), *np.quantile(v, (0.05, 0.95))))) for name, v in rows]
