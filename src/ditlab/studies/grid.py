"""A study: axes, the runs that they span, the analyses on each, and the published numbers it is compared with.

A study is declared once, at several scales, and never measured by hand. `resolve` turns it, with what the user wants
otherwise, into a `Plan`: a list of cells, written as plan.json. Nothing is trained before every cell was checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.data.imageset import ImageSet
from ditlab.data.splits import make_split
from ditlab.errors import DitlabError, unknown_name
from ditlab.files import read_json, write_json
from ditlab.presets import PRESETS
from ditlab.studies.cells import Cell, cell_config, cell_hash

SCALES = ("smoke", "small", "paper")
"""Minutes, in CI; a cell of a few minutes on two CPU cores; the paper's own settings."""


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
    """What a cell costs, in words, and on what machine."""
    data: tuple[str, ...] = ()
    """Sources of images; empty where the user must name one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every run by dotted name."""
    psnr: PSNRConfig = field(default_factory=PSNRConfig)
    """How the PSNR gap is measured."""
    attention_maps: AttentionConfig = field(default_factory=AttentionConfig)
    """How the locality of attention is measured."""

    def analysis(self, name: str) -> dict[str, Any]:
        """The settings of an analysis as JSON values, but for those that do not change its result."""
        settings = asdict({"psnr-gap": self.psnr, "attention": self.attention_maps}[name])
        del settings["batch_size"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


@dataclass(frozen=True)
class Study:
    """One question, the grid of runs that answers it, and where it was asked before."""

    name: str
    """As on the command line, "an2024/fig6"."""
    title: str
    question: str
    """What it is to find out, one sentence."""
    scales: Mapping[str, Scale]
    analyses: tuple[str, ...]
    """What is measured on each cell: "psnr-gap", "attention"."""
    asks: tuple[str, ...] = ()
    """What the page's first sentences answer, in order (`ditlab.studies.study_page.seen`)."""
    published: str = ""
    """Key of its numbers in published/*.json ("an2024/fig6"); empty where there are none."""
    margin: float | None = None
    """In dB: two kinds of runs whose difference lies inside it are called similar. Declared with the study, and so
    before its runs are looked at; None makes no such claim."""

    def scale(self, name: str) -> Scale:
        """One of its scales. Raises DitlabError for an unknown name."""
        if name not in self.scales:
            raise unknown_name(f"scale of {self.name}", name, self.scales)
        return self.scales[name]


@dataclass(frozen=True)
class Overrides:
    """What a user wants otherwise than the scale says; None leaves an axis as it is."""

    data: tuple[str, ...] | None = None
    size: int | None = None
    networks: tuple[str, ...] | None = None
    attention: tuple[str, ...] | None = None
    n: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def overridden(study: Study, scale: str, overrides: Overrides) -> Scale:
    """A scale with a user's axes and settings in it.

    An attention plan may be named as the scale does ("local") or written out ("3,3,g*4"); a network is any preset.

    Raises:
        DitlabError: an axis is empty or has a value twice, or a network is unknown.
    """
    base = study.scale(scale)
    where = f"study {study.name}, scale {scale}"
    data = base.data if overrides.data is None else overrides.data
    if overrides.data is None and not data:
        raise DitlabError(f"{where}: expected --data with a source of images (folder:PATH, hub:ID, ...), found none")
    networks = base.networks if overrides.networks is None else overrides.networks
    attention = base.attention if overrides.attention is None else overrides.attention
    n = base.n if overrides.n is None else overrides.n
    seeds = base.seeds if overrides.seeds is None else overrides.seeds
    axes = {"data": data, "network": tuple(networks), "attention": tuple(attention), "n": n, "seeds": seeds}
    for name, values in axes.items():
        if not values:
            raise DitlabError(f"{where}: expected at least one value of '{name}', found none: the study is empty")
        if len(set(values)) != len(values):
            raise DitlabError(f"{where}: expected different values of '{name}', found {', '.join(map(str, values))}")
    for name in networks:
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
    if min(n) < 1:
        raise DitlabError(f"{where}: expected numbers of training images of at least 1, found {min(n)}")
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
    """A short name of a source or an image set's folder: "celeba32" of "mosaic:images/celeba32"."""
    return Path(source.rpartition(":")[2]).name or source


@dataclass(frozen=True)
class Plan:
    """A resolved study: which cells it has, of which images, measured how."""

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
    """What is measured on each cell ("psnr-gap", "attention"), with its settings."""
    cells: tuple[Mapping[str, Any], ...]
    """`Cell.place` of each, in the order in which they are trained."""
    margin: float | None = None
    """`Study.margin`."""
    command: str = ""
    """The command that planned it."""

    kind = "study-plan"
    version = 1

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {"kind": self.kind, "version": self.version, **asdict(self), "cells": [dict(c) for c in self.cells]}

    def save(self, folder: Path) -> Path:
        """Writes plan.json, whole or not at all."""
        return write_json(folder / "plan.json", self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads what `save` wrote. Raises DitlabError where it is absent, damaged or something else."""
        record = read_json(path, cls.kind, cls.version)
        values = {k: v for k, v in record.items() if k not in ("kind", "version")}
        try:
            plan = cls(**{**values, "cells": tuple(values["cells"])})
            for cell in plan.cells:
                for name in ("hash", "data", "network", "attention", "n", "seed"):
                    cell[name]
        except (KeyError, TypeError) as error:
            raise DitlabError(f"{path}: a field of the plan is missing or unknown ({error})") from error
        return plan


def merged(old: Plan, new: Plan) -> Plan | None:
    """One plan of the cells of both, in the order of `resolve`; None where they do not make one grid.

    They do where the study, the scale and the analyses are the same, and every image set, network and attention plan
    that both name is the same in both. Cells that neither asked for are not in it.
    """

    def alike(name: str) -> bool:
        one, two = getattr(old, name), getattr(new, name)
        return all(_json(one[key]) == _json(two[key]) for key in one.keys() & two.keys())

    def hashes(plan: Plan) -> dict[str, str]:
        return {name: facts["hash"] for name, facts in plan.images.items()}

    same = all(
        _json(getattr(old, name)) == _json(getattr(new, name)) for name in ("study", "scale", "analyses", "margin")
    )
    mine, theirs = hashes(old), hashes(new)
    if (
        not same
        or not alike("plans")
        or not alike("settings")
        or any(mine[k] != theirs[k] for k in mine.keys() & theirs)
    ):
        return None
    axes = {name: _joined(old.axes[name], new.axes[name]) for name in new.axes}
    axes |= {name: sorted(axes[name]) for name in ("n", "seed")}
    cells = {cell["hash"]: dict(cell) for plan in (old, new) for cell in plan.cells}
    order = ("seed", "data", "network", "n", "attention")
    known = {cell["hash"] for cell in old.cells}
    return replace(
        new,
        axes=axes,
        plans={**old.plans, **new.plans},
        images={**old.images, **new.images},
        settings={**old.settings, **new.settings},
        cells=tuple(sorted(cells.values(), key=lambda cell: [axes[name].index(cell[name]) for name in order])),
        # The commands that together planned it.
        command=old.command if cells.keys() == known else "\n".join(dict.fromkeys([old.command, new.command])).strip(),
    )


def _joined(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """The values of both, in the order of the one that has them all, if one does: the scale's own comes first."""
    first, second = (new, old) if set(new) >= set(old) else (old, new)
    return list(dict.fromkeys([*first, *second]))


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def resolve(
    study: Study, scale_name: str, scale: Scale, images: Mapping[str, ImageSet], command: str = ""
) -> tuple[Plan, list[Cell]]:
    """Every cell of a study, checked, and the plan that lists them.

    Cells are ordered so that a study that is cut short has whole seeds: by seed, then data, network, N and attention.

    Args:
        study: the study.
        scale_name: the scale's name.
        scale: the scale, with a user's changes (`overridden`).
        images: source -> the image set made of it at the scale's size.
        command: the command line, kept in the plan.

    Raises:
        DitlabError: a setting is unknown or cannot be, or a set has too few images for the largest N and the test set.
    """
    names = {source: data_name(source) for source in images}
    if len(set(names.values())) != len(names):
        names = {source: source for source in images}
    cells = []
    for seed, (source, found), network, n, (label, attention) in product(
        scale.seeds, images.items(), scale.networks, scale.n, scale.attention.items()
    ):
        settings = {**scale.settings, **scale.networks[network]}
        config = cell_config(network, settings, found, attention=attention, n=n, seed=seed)
        cells.append(Cell(cell_hash(config, found.hash), config, found.hash, names[source], network, label, n, seed))
    for found in images.values():
        for seed in scale.seeds:
            make_split(found, max(scale.n), cells[0].config.data.test, seed, cells[0].config.data.skip)
    hashes: dict[str, Cell] = {}
    for cell in cells:
        twin = hashes.setdefault(cell.hash, cell)
        if twin is not cell:
            raise DitlabError(f"study {study.name}: '{twin.name}' and '{cell.name}' are the same run")
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
            names[source]: {"source": source, "size": found.shape[1], "count": len(found), "hash": found.hash}
            for source, found in images.items()
        },
        settings={name: {**scale.settings, **own} for name, own in scale.networks.items()},
        analyses={name: scale.analysis(name) for name in study.analyses},
        cells=tuple(cell.place() for cell in cells),
        margin=study.margin,
        command=command,
    )
    return plan, cells
