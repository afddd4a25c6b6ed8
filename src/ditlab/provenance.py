"""What a result was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ditlab.errors import Incompatible

__all__ = ["Provenance", "check_groups", "check_splits"]


@dataclass(frozen=True)
class Provenance:
    """Which denoiser was measured, trained on what. A result without these cannot be compared honestly."""

    name: str
    """The model's name, or the baseline's ("empirical Bayes")."""
    label: str = ""
    """The kind of model: what runs that differ only in seed and N share ("global"); the name where empty."""
    n: int | None = None
    """Number of training images."""
    seed: int = 0
    """Seed of the run and of its split."""
    step: int | None = None
    """Training step of the weights; None for a closed form."""
    ema: bool | None = None
    """Whether the averaged weights were measured; None for a closed form."""
    split_family: str = ""
    """Hash of (image set, seed, test images): equal for nested training sets. Only equal families are comparable."""
    split_hash: str = ""
    """Hash that also covers the training images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping with the numbers; must be JSON."""
    weights: str = ""
    """SHA-256 of the weights; "" where they cannot be hashed, and in results of earlier versions."""

    @property
    def group(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name

    @property
    def title(self) -> str:
        """The group and N, as sentences have it."""
        return self.group if self.n is None else f"{self.group}, N = {self.n}"

    def same_model(self, other: Provenance) -> bool:
        """Returns whether this result is of a model's weights and images; names, labels and settings do not matter.

        Results of earlier versions have no hash of the weights: of those, the training step is compared.

        Args:
            other: the model's provenance.
        """
        if (self.split_family, self.split_hash) != (other.split_family, other.split_hash):
            return False
        if self.weights:
            return self.weights == other.weights
        return self.step is not None and (self.step, self.ema) == (other.step, other.ema)

    def same_measurement(self, other: Provenance) -> bool:
        """Returns whether both are of the same weights, images and settings; names and labels do not matter."""
        if not self.weights or not self.same_model(other):
            return False
        # A result also says whether its numbers are those of latents, which follows from the rest.
        mine, theirs = ({**about.settings, "space": None} for about in (self, other))
        return json.loads(json.dumps(mine)) == json.loads(json.dumps(theirs))


def check_groups(runs: Sequence[Provenance], what: str) -> None:
    """Refuses runs that cannot be grouped by label, N and seed.

    Args:
        runs: what is to be compared.
        what: the analysis that asks, for errors.

    Raises:
        DitlabError: two runs of one label, N and seed, or runs of different splits.
    """
    seen: dict[tuple[str, int | None, int], Provenance] = {}
    for r in runs:
        key = (r.group, r.n, r.seed)
        if key in seen:
            raise Incompatible(
                f"{what}: '{seen[key].name}' and '{r.name}' are both '{r.group}' with N = {r.n} and seed {r.seed}; "
                "give them different `names`"
            )
        seen[key] = r
    check_splits(runs)


def check_splits(runs: Sequence[Provenance]) -> None:
    """Refuses runs that may not be compared, whatever was measured on them.

    Raises:
        DitlabError: one seed with two different test sets, or with two training sets at one N; labels without a common
            seed.
    """
    by_seed: dict[int, Provenance] = {}
    trained: dict[tuple[int, int | None], Provenance] = {}
    for r in runs:
        same_seed = by_seed.setdefault(r.seed, r)
        if same_seed.split_family != r.split_family:
            raise Incompatible(
                f"comparison: '{same_seed.name}' and '{r.name}' have different splits (family "
                f"{same_seed.split_family[:12]} and {r.split_family[:12]}): they have other "
                "test images, so they cannot be compared"
            )
        same_n = trained.setdefault((r.seed, r.n), r)
        if same_n.split_hash != r.split_hash:
            raise Incompatible(
                f"comparison: '{same_n.name}' and '{r.name}' have different training images at equal N and "
                f"seed (split {same_n.split_hash[:12]} and {r.split_hash[:12]})"
            )
    seeds_of: dict[str, dict[int, str]] = {}
    for r in runs:
        seeds_of.setdefault(r.group, {})[r.seed] = r.name
    for (_, first), (_, second) in combinations(seeds_of.items(), 2):
        if not set(first) & set(second):
            raise Incompatible(
                f"comparison: '{next(iter(first.values()))}' and '{next(iter(second.values()))}' have different splits "
                f"(seeds {sorted(first)} and {sorted(second)}): compare runs trained with the same seed"
            )
