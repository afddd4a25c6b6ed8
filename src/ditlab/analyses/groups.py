"""Results grouped by kind of model and N, over seeds: what comparisons of kinds of models are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ditlab.errors import InvalidConfig
from ditlab.provenance import check_groups

__all__ = ["Group", "Groups", "group_results"]

ResultT = TypeVar("ResultT")
GroupT = TypeVar("GroupT", bound="Group[Any]")


@dataclass(frozen=True, eq=False)
class Group(Generic[ResultT]):
    """Results that differ only in their seed: one kind of model at one N."""

    label: str
    n: int | None
    results: tuple[ResultT, ...]
    """One for each seed, seeds ascending."""

    @property
    def name(self) -> str:
        """The label, with N."""
        return self.label if self.n is None else f"{self.label}, N = {self.n}"


@dataclass(frozen=True, eq=False)
class Groups(Generic[GroupT, ResultT]):
    """Groups in the order in which their labels were first given, N ascending within a label."""

    groups: tuple[GroupT, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The kinds of models, each once."""
        return tuple(dict.fromkeys(group.label for group in self.groups))

    @property
    def counts(self) -> tuple[int | None, ...]:
        """The numbers of training images, ascending, each once."""
        return tuple(sorted({group.n for group in self.groups}, key=_none_first))

    @property
    def results(self) -> list[ResultT]:
        """All results, group after group."""
        return [result for group in self.groups for result in group.results]

    @property
    def first(self) -> ResultT:
        """The first result, for what all have in common."""
        return self.results[0]


def group_results(
    kind: Callable[[str, int | None, tuple[Any, ...]], GroupT], results: Sequence[Any], what: str
) -> tuple[GroupT, ...]:
    """Returns groups of a class, for `Groups`, of results of any labels, N and seeds.

    Raises:
        DitlabError: no result, two results of one label, N and seed, or models of different splits. `what` is the
            analysis that asks.
    """
    if not results:
        raise InvalidConfig(f"{what}: expected at least one result to compare, found none")
    check_groups([result.about for result in results], what)
    members: dict[tuple[str, int | None], dict[int, Any]] = {}
    for result in results:
        members.setdefault((result.about.group, result.about.n), {})[result.about.seed] = result
    labels = list(dict.fromkeys(label for label, _ in members))
    ordered = sorted(members, key=lambda key: (labels.index(key[0]), _none_first(key[1])))
    return tuple(kind(*key, tuple(result for _, result in sorted(members[key].items()))) for key in ordered)


def _none_first(n: int | None) -> int:
    return -1 if n is None else n
