"""Published numbers, and how a study's settings differ from those they were measured with.

published/*.json hold each value with its unit, its source, and how certain it is: "stated" in the text or a table,
"read from a figure", "inferred", or "unknown" (a guess where nothing was found).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ditlab.config import flat
from ditlab.nn.attention_plan import parse_plan
from ditlab.presets import preset
from ditlab.studies.grid import Plan


@dataclass(frozen=True)
class Published:
    """What a paper reports about a study's question."""

    paper: str
    certainty: Mapping[str, str]
    """Word -> what it means."""
    settings: tuple[Mapping[str, Any], ...]
    """name, value (or one for each network, by preset), certainty, source."""
    claims: tuple[Mapping[str, Any], ...]
    """text, source, certainty."""
    values: tuple[Mapping[str, Any], ...]
    """images, network, attention, n, quantity, value, unit, source, certainty."""

    def value(self, **wanted: Any) -> Mapping[str, Any] | None:
        """Returns the first value with these fields, or None."""
        return next((v for v in self.values if all(v[k] == w for k, w in wanted.items())), None)

    def gaps(self) -> list[tuple[Any, ...]]:
        """Returns (images, network, N, gap of global, gap of local, difference, source) of what Fig. 6 has of both."""
        rows = []
        shown = [v for v in self.values if v["quantity"] == "gap"]
        for images, network, n in dict.fromkeys((v["images"], v["network"], v["n"]) for v in shown):
            of = {"images": images, "network": network, "n": n, "quantity": "gap", "source": "Fig. 6"}
            a, b = (self.value(**of, attention=kind) for kind in ("global", "local"))
            if a is not None and b is not None:
                difference = b["value"] - a["value"]
                source = f"{a['source']}, {a['certainty']}"
                rows.append((images, network, n, a["value"], b["value"], difference, source))
        return rows


def published(study: str) -> Published | None:
    """Returns what is published about a study ("an2024/fig6"); None if nothing is on file."""
    path = files("ditlab.studies") / "published" / f"{study.partition('/')[0]}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    mine = record["studies"].get(study)
    if mine is None:
        return None
    lists = (tuple(record["settings"]), tuple(mine["claims"]), tuple(mine["values"]))
    return Published(record["paper"], record["certainty"], *lists)


def settings_here(plan: Plan, network: str) -> dict[str, Any]:
    """Returns a plan's settings under the names that published/*.json use, for one network of it."""
    settings = flat(preset(network)) | dict(plan.settings[network])
    sizes = sorted({int(facts["size"]) for facts in plan.images.values()})
    settings["images"] = ", ".join(plan.images)
    settings["network.image_size"] = "; ".join(f"{size}, {size}" for size in sizes)
    settings["n"] = ", ".join(f"{n:,}" for n in plan.axes["n"])
    settings["seeds"] = str(len(plan.axes["seed"]))
    depth = settings["network.depth"]
    local = [text for name, text in plan.plans.items() if name != "global"]
    settings["windows"] = "; ".join(_windows(text, depth) for text in local) or None
    for analysis, config in plan.analyses.items():
        settings |= {f"{analysis}.{name}": value for name, value in config.items()}
    return settings


def _windows(plan: str, depth: int) -> str:
    sizes = [(layer, getattr(p, "size", None)) for layer, p in enumerate(parse_plan(plan, depth), 1)]
    local = [(layer, size) for layer, size in sizes if size is not None]
    if not local:
        return "none"
    layers = [layer for layer, _ in local]
    whole = layers == list(range(layers[0], layers[-1] + 1))
    where = f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))
    return f"{', '.join(str(size) for _, size in local)} in layers {where} of {depth}"


def differing(paper: Published, plan: Plan, network: str) -> list[tuple[str, str, str, str]]:
    """Returns (setting, the paper's value, its certainty and source, the value here) where they differ."""
    here = settings_here(plan, network)
    rows = []
    for setting in paper.settings:
        name, value = setting["name"], setting["value"]
        if isinstance(value, dict):
            value = value.get(network, ", ".join(f"{theirs} ({of})" for of, theirs in value.items()))
        if here.get(name) is not None and _text(here[name]) != _text(value):
            rows.append((name, _text(value), f"{setting['certainty']}: {setting['source']}", _text(here[name])))
    return rows


def _text(value: Any) -> str:
    """A setting as a reader would write it; equal settings give equal texts."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def published_fid(network: Any) -> float | None:
    """Returns the published FID of a `NetworkCost` of Peebles & Xie, on the images it was published for; else None."""
    paper = published("dit/table4")
    assert paper is not None  # it comes with ditlab
    record = paper.value(network=network.name, quantity="fid")
    c = network.config
    if record is None or (c.image_size, c.channels, c.num_classes, c.learn_sigma) != ((32, 32), 4, 1000, True):
        return None
    return float(record["value"])
