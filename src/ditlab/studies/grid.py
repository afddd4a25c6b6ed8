"""A study: axes, the trials that they span, the analyses of each, and the published numbers it is compared with.

A study is declared once, at several scales. `resolve` turns it, with the user's overrides, into a `Plan`: a list of
trials, written as plan.json. Every trial is checked before anything is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ditlab.analyses import analysis
from ditlab.analyses.stored import stored_config
from ditlab.data.imageset import ImageSet
from ditlab.data.splits import make_split
from ditlab.errors import Damaged, Incompatible, InvalidConfig, unknown_name
from ditlab.files import read_json, write_json
from ditlab.presets import PRESETS
from ditlab.studies.trial import PLACE, Trial, trial_config, trial_hash

__all__ = ["SCALES", "Overrides", "Plan", "Scale", "Study", "apply_overrides", "data_name", "merge_plans", "resolve"]

SCALES = ("smoke", "small", "paper")
"""Minutes, in CI; trials of a few minutes on two CPU cores; the paper's own settings."""

_NOT_STORED = ("batch_size", "chunk")
"""Settings of analyses that do not change a result beyond rounding."""


@dataclass(frozen=True)
class Scale:
    """How large a study is: the values of its axes and the settings of its runs."""

    networks: Mapping[str, Mapping[str, Any]]
    """Preset -> its settings by dotted name, on top of the preset."""
    attention: Mapping[str, str]
    """Name -> attention plan."""
    n: tuple[int, ...]
    """Numbers of training images."""
    seeds: tuple[int, ...]
    """Seeds of split and training, paired between the other axes."""
    size: int
    """Side of the images in pixels."""
    cost: str
    """What a trial costs, in words, and on what machine."""
    data: tuple[str, ...] = ()
    """Sources of images; empty where the user must name one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every run by dotted name."""
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Analysis -> its settings, where they differ from the defaults."""

    def stored_settings(self, name: str) -> dict[str, Any]:
        """Returns the settings of an analysis under their names in files, without those that do not change a result."""
        config = analysis(name).Config(**self.measured.get(name, {}))
        return {key: value for key, value in stored_config(config).items() if key not in _NOT_STORED}


@dataclass(frozen=True)
class Study:
    """One question, the grid of runs that answers it, and where it was asked before."""

    name: str
    """As on the command line, "an2024/fig6"."""
    title: str
    question: str
    """One sentence."""
    scales: Mapping[str, Scale]
    analyses: tuple[str, ...]
    """What is measured on each trial, e.g. "psnr-gap"."""
    asks: tuple[str, ...] = ()
    """The questions that the page's first sentences answer, in order (`ditlab.studies.findings.answer`)."""
    published: str = ""
    """Key of its numbers in published/*.json ("an2024/fig6"); empty where there are none."""
    margin: float | None = None
    """In dB: two kinds of runs whose difference is inside it are called similar. It is declared with the study, before
    its runs are measured; None makes no such claim."""

    def scale(self, name: str) -> Scale:
        """Returns one of its scales; raises NotFound for an unknown name."""
        if name not in self.scales:
            raise unknown_name(f"scale of {self.name}", name, self.scales)
        return self.scales[name]


@dataclass(frozen=True)
class Overrides:
    """A user's values of the axes, and settings; None leaves an axis as the scale has it."""

    data: tuple[str, ...] | None = None
    size: int | None = None
    networks: tuple[str, ...] | None = None
    attention: tuple[str, ...] | None = None
    n: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def apply_overrides(study: Study, scale: str, overrides: Overrides) -> Scale:
    """Returns a scale with a user's axes and settings.

    An attention plan may be named as the scale does ("local") or written out ("3,3,g*4"); a network is any preset.

    Raises:
        DitlabError: an axis is empty or has a value twice, or a network is unknown.
    """
    base = study.scale(scale)
    where = f"study {study.name}, scale {scale}"

    def chosen(axis: str, own: Sequence[Any]) -> tuple[Any, ...]:
        values = getattr(overrides, axis)
        return tuple(own if values is None else values)

    data = chosen("data", base.data)
    if overrides.data is None and not data:
        raise InvalidConfig(f"{where}: expected `data` with a source of images (folder:PATH, hub:ID, ...), found none")
    networks, attention = chosen("networks", tuple(base.networks)), chosen("attention", tuple(base.attention))
    n, seeds = chosen("n", base.n), chosen("seeds", base.seeds)
    axes = {"data": data, "network": networks, "attention": attention, "n": n, "seeds": seeds}
    for name, values in axes.items():
        if not values:
            raise InvalidConfig(f"{where}: expected at least one value of `{name}`, found none: the study is empty")
        if len(set(values)) != len(values):
            raise InvalidConfig(f"{where}: expected different values of `{name}`, found {', '.join(map(str, values))}")
    for name in networks:
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
    if min(n) < 1:
        raise InvalidConfig(f"{where}: expected numbers of training images of at least 1, found {min(n)}")
    return replace(
        base,
        data=data,
        size=base.size if overrides.size is None else overrides.size,
        # A user's settings also stand above those that belong to one network.
        networks={name: {**base.networks.get(name, {}), **overrides.settings} for name in networks},
        attention={name: base.attention.get(name, name) for name in attention},
        n=tuple(sorted(n)),
        seeds=tuple(sorted(seeds)),
    )


def data_name(source: str) -> str:
    """Returns a short name of a source or an image set's folder: "celeba32" of "mosaic:images/celeba32"."""
    return Path(source.rpartition(":")[2]).name or source


@dataclass(frozen=True)
class Plan:
    """A resolved study: which trials it has, of which images, measured how."""

    study: str
    scale: str
    axes: Mapping[str, Sequence[Any]]
    """Axis -> its values: data, network, attention, n, seed."""
    plans: Mapping[str, str]
    """Name on the attention axis -> the plan."""
    images: Mapping[str, Mapping[str, Any]]
    """Name on the data axis -> source, size, count and hash of the image set."""
    settings: Mapping[str, Mapping[str, Any]]
    """Name on the network axis -> the settings of its runs on top of the preset, by dotted name."""
    analyses: Mapping[str, Mapping[str, Any]]
    """What is measured on each trial, with its settings under their names in files."""
    trials: tuple[Mapping[str, Any], ...]
    """`Trial.place` of each, in the order in which they are trained; "cells" in files."""
    margin: float | None = None
    """`Study.margin`."""
    command: str = ""
    """The command that planned it."""

    kind = "study-plan"
    version = 1

    def to_json(self) -> dict[str, Any]:
        """Returns everything, as JSON values."""
        values = {("cells" if name == "trials" else name): value for name, value in asdict(self).items()}
        return {"kind": self.kind, "version": self.version, **values, "cells": list(map(dict, self.trials))}

    def save(self, folder: Path) -> Path:
        """Writes plan.json, whole or not at all."""
        return write_json(folder / "plan.json", self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads what `save` wrote; raises DitlabError if it is missing, damaged or something else."""
        record = read_json(path, cls.kind, cls.version)
        try:
            trials = tuple(record.pop("cells"))
            for place in trials:
                for name in PLACE:
                    place[name]
            return cls(**{k: v for k, v in record.items() if k not in ("kind", "version")}, trials=trials)
        except (KeyError, TypeError) as error:
            raise Damaged(f"{path}: a field of the plan is missing or unknown ({error})") from error


def merge_plans(old: Plan, new: Plan) -> Plan | None:
    """Returns one plan with the trials of both, in the order of `resolve`; None if they do not make one grid.

    They do if the study, the scale and the analyses are the same, and every image set, network and attention plan that
    both name is the same in both. Trials that neither asked for are not in it.
    """

    first, second = (json.loads(json.dumps(plan.to_json())) for plan in (old, new))

    def agree(name: str) -> bool:
        """Whether a mapping has the same values in both plans, for the keys that both have."""
        mine, theirs = first[name], second[name]
        return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())

    same = all(first[name] == second[name] for name in ("study", "scale", "analyses", "margin"))
    same_images = all(old.images[name]["hash"] == new.images[name]["hash"] for name in old.images.keys() & new.images)
    if not (same and same_images and agree("plans") and agree("settings")):
        return None
    axes = {name: _join(old.axes[name], new.axes[name]) for name in new.axes}
    axes |= {name: sorted(axes[name]) for name in ("n", "seed")}
    places = {place["hash"]: dict(place) for plan in (old, new) for place in plan.trials}
    order = ("seed", "data", "network", "n", "attention")
    commands = "\n".join(dict.fromkeys([old.command, new.command])).strip()
    return replace(
        new,
        axes=axes,
        plans={**old.plans, **new.plans},
        images={**old.images, **new.images},
        settings={**old.settings, **new.settings},
        trials=tuple(sorted(places.values(), key=lambda place: [axes[name].index(place[name]) for name in order])),
        command=old.command if len(places) == len(old.trials) else commands,
    )


def _join(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """Returns the values of both; if one has them all, in its order, for that is the scale's own."""
    first, second = (new, old) if set(new) >= set(old) else (old, new)
    return list(dict.fromkeys([*first, *second]))


def resolve(
    study: Study, scale_name: str, scale: Scale, images: Mapping[str, ImageSet], command: str = ""
) -> tuple[Plan, list[Trial]]:
    """Returns every trial of a study, checked, and the plan that lists them; `images` are made at the scale's size.

    Trials are ordered so that a study that is cut short has whole seeds: by seed, then data, network, N and attention.

    Raises:
        DitlabError: a setting is unknown or impossible, or a set has too few images for the largest N and the test set.
    """
    names = {source: data_name(source) for source in images}
    if len(set(names.values())) != len(names):
        names = {source: source for source in images}
    trials: list[Trial] = []
    for seed, (source, image_set), network, n, (label, attention) in product(
        scale.seeds, images.items(), scale.networks, scale.n, scale.attention.items()
    ):
        settings = {**scale.settings, **scale.networks[network]}
        config = trial_config(network, settings, image_set, attention=attention, n=n, seed=seed)
        hashed = trial_hash(config, image_set.hash)
        trials.append(Trial(hashed, config, image_set.hash, names[source], network, label, n, seed))
    split = trials[0].config.data
    for image_set, seed in product(images.values(), scale.seeds):
        make_split(image_set, max(scale.n), split.test, seed, split.skip)
    hashes: dict[str, Trial] = {}
    for trial in trials:
        twin = hashes.setdefault(trial.hash, trial)
        if twin is not trial:
            raise Incompatible(f"study {study.name}: '{twin.name}' and '{trial.name}' are the same run")
    plan = Plan(
        study=study.name,
        scale=scale_name,
        axes={
            "data": list(names.values()),
            "network": list(scale.networks),
            "attention": list(scale.attention),
            "n": list(scale.n),
            "seed": list(scale.seeds),
        },
        plans=dict(scale.attention),
        images={
            names[source]: {
                "source": source, "size": image_set.shape[1], "count": len(image_set), "hash": image_set.hash
            }
            for source, image_set in images.items()
        },
        settings={name: {**scale.settings, **own} for name, own in scale.networks.items()},
        analyses={name: scale.stored_settings(name) for name in study.analyses},
        trials=tuple(trial.place() for trial in trials),
        margin=study.margin,
        command=command,
    )  # fmt: skip
    return plan, trials
