"""What networks cost, before anything is trained: parameters, operations, memory, training compute.

Only shapes are computed, so the largest network takes seconds on any machine. GMACs are 10^9 multiply-accumulates of a
forward pass for one image; Peebles & Xie (2212.09748) call them Gflops. Training compute is GMACs x batch size x steps
x 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditlab.analyses.complexity.config import CHANGES, ComplexityConfig
from ditlab.config import Network
from ditlab.errors import DitlabError
from ditlab.files import write_json
from ditlab.metrics.complexity import Complexity, complexity, match_width
from ditlab.networks.registry import build_network
from ditlab.pages.drawing import Drawing, save_drawings
from ditlab.pages.page import Table
from ditlab.presets import preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Costs", "NetworkCost", "measure_costs"]


@dataclass(frozen=True)
class NetworkCost:
    """One network and what it costs."""

    name: str
    config: Network
    cost: Complexity
    batch_size: int
    steps: int

    @property
    def training_compute(self) -> float:
        """GMACs of its training."""
        return self.cost.training_compute(self.batch_size, self.steps)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "network": asdict(self.config),
            **self.cost.to_json(),
            "batch_size": self.batch_size,
            "steps": self.steps,
            "training_gmacs": self.training_compute,
        }


@dataclass(frozen=True, eq=False)
class Costs:
    """Networks and their costs; a notebook shows the table and the figure."""

    networks: Sequence[NetworkCost]
    config: ComplexityConfig
    image_size: tuple[int, int]
    """Height and width of the images."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Name -> FID that was published for it."""
    files: list[Path] = field(default_factory=list)
    """Files that were written."""

    def table(self) -> Table:
        """Returns one row for each network."""
        memory = self.config.memory
        columns = ("network", "params, M", "GMACs", "linear", *(("MiB", "bf16") if memory else ()), "training")
        rows = []
        for network in self.networks:
            cost = network.cost
            stored = (cost.activation_bytes, cost.activation_bytes_bf16)
            mebibytes = [f"{size / 2**20:.1f}" for size in stored if size is not None]
            numbers = (f"{cost.parameters / 1e6:.2f}", f"{cost.gmacs:.2f}", f"{cost.gmacs_without_attention:.2f}")
            rows.append((network.name, *numbers, *mebibytes, f"{network.training_compute:.1e}"))
        height, width = self.image_size
        classes = f", {self.config.classes} classes" if self.config.classes else ""
        return Table(columns, rows, f"For one image of {height}x{width}x{self.config.channels}{classes}")

    def legend(self) -> str:
        """Returns what the columns are, and the batch sizes and steps of the training compute."""
        recipes: dict[str, list[str]] = {}
        for network in self.networks:
            recipes.setdefault(f"{network.batch_size} x {network.steps:,}", []).append(network.name)
        (first, *others) = recipes
        which = first if not others else "; ".join(f"{recipe} of {', '.join(of)}" for recipe, of in recipes.items())
        memory = "MiB, bf16: stored for the backward pass of an image, in float32 and bfloat16; "
        stored = memory if self.config.memory else ""
        return f"linear: GMACs without attention matrices; {stored}training: GMACs x batch x steps x 3 ({which})"

    def sentences(self) -> list[str]:
        """Returns how near each matched network comes to the one that it was matched with."""
        if self.config.match is None:
            return []
        target, *matched = self.networks
        without = " without attention matrices" if self.config.linear else ""
        return [
            f"{network.name}: width {asdict(network.config)['width']} costs "
            f"{100 * _compared(network.cost, self.config) / _compared(target.cost, self.config):.2f}% of "
            f"{target.name}'s GMACs{without}"
            for network in matched
        ]

    def drawings(self) -> dict[str, Drawing]:
        """Returns the figure of parameters against GMACs."""
        from ditlab.analyses.complexity.figures import complexity_figure

        costs = [(network.name, network.cost) for network in self.networks]
        names = ", ".join(network.name for network in self.networks)
        return {
            "complexity": Drawing(
                lambda theme: complexity_figure(costs, published=self.published, theme=theme),
                f"Parameters of {names} against their GMACs.",
            )
        }

    def figures(self) -> dict[str, Figure]:
        """Returns file name -> matplotlib figure."""
        return {name: drawing.figure() for name, drawing in self.drawings().items()}

    @property
    def notes(self) -> list[str]:
        """What the columns are."""
        return [self.legend()]

    def tables(self) -> list[Table]:
        """Returns the table."""
        return [self.table()]

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers as JSON values."""
        return {"networks": [network.to_json() for network in self.networks]}

    def save(self, out: Path) -> list[Path]:
        """Writes complexity.json and complexity.png; returns the paths."""
        return [write_json(out / "complexity.json", self.to_json()), *save_drawings(self.drawings(), out)]

    def _repr_html_(self) -> str:
        from ditlab.pages.notebook import comparison_html

        return comparison_html(self)


def measure_costs(
    presets: Sequence[str],
    config: ComplexityConfig | None = None,
    published: Callable[[NetworkCost], float | None] = lambda network: None,
) -> Costs:
    """Counts what the networks of presets cost; `published` gives the published FID of one, or None.

    Raises:
        DitlabError: no preset or an unknown one, settings that a network does not have, presets of different sizes.
    """
    if not presets:
        raise DitlabError("complexity: expected at least one preset (e.g. dit-s/2), found none")
    counting = _Counting(tuple(dict.fromkeys(presets)), config or ComplexityConfig())
    networks = counting.networks()
    fids = {network.name: fid for network in networks if (fid := published(network)) is not None}
    return Costs(networks, counting.config, counting.image_size, fids)


@dataclass(frozen=True)
class _Counting:
    presets: tuple[str, ...]
    config: ComplexityConfig

    def networks(self) -> list[NetworkCost]:
        """The networks of the presets, after the one that they are matched with."""
        changes = {name: getattr(self.config, name) for name in CHANGES if getattr(self.config, name) is not None}
        networks = [(name, self._fitted(name, changes)) for name in self.presets]
        match = self.config.match
        if match is None:
            return [self._counted(name, network) for name, network in networks]
        target = self._counted(match, self._fitted(match, {}))
        wanted = _compared(target.cost, self.config)
        return [target, *(self._counted(name, self._matched(name, network, wanted)) for name, network in networks)]

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, the same for all networks of the table."""
        if self.config.size:
            return self.config.size[0], self.config.size[-1]
        names = (*self.presets, self.config.match) if self.config.match else self.presets
        own = {name: tuple(preset(name).network.image_size) for name in names}
        if len({*own.values()}) > 1:
            sizes = ", ".join(f"{rows}x{columns} of {name}" for name, (rows, columns) in own.items())
            raise DitlabError(f"complexity: expected `size` for presets whose images differ in size, found {sizes}")
        rows, columns = next(iter(own.values()))
        return rows, columns

    def _fitted(self, name: str, changes: Mapping[str, Any]) -> Network:
        """The preset's network with these changes, for the images of the config."""
        network = preset(name).network
        images: dict[str, Any] = {"image_size": self.image_size, "channels": self.config.channels}
        if self.config.classes and network.takes_labels:
            images["num_classes"] = self.config.classes
        known = {field.name for field in fields(network)}
        for setting in changes:
            if setting not in known:
                raise DitlabError(f"{name}: expected settings of a {network.kind} network, found `{setting}`")
        try:
            return replace(network, **images, **changes)
        except DitlabError as error:
            raise DitlabError(f"{name}: {error}") from None

    def _matched(self, name: str, network: Network, wanted: int) -> Network:
        """The network with the width at which it costs the wanted number of operations."""
        shape = (network.channels, *network.image_size)

        def build(width: int) -> torch.nn.Module:
            return _weightless(replace(network, width=width))

        try:
            width = match_width(build, shape, wanted, network.width_step, attention=not self.config.linear)
            return replace(network, width=width)
        except DitlabError as error:
            raise DitlabError(f"{name}: {error}") from None

    def _counted(self, name: str, network: Network) -> NetworkCost:
        """What a network costs, under the preset's name and the settings in which the network differs from it."""
        recipe = preset(name)
        own, now = asdict(recipe.network), asdict(network)
        changed = [f"{key} {now[key]}" for key in CHANGES if key in now and now[key] != own[key]]
        shape, labelled = (network.channels, *network.image_size), network.classes > 0
        cost = complexity(_weightless(network), shape, labelled=labelled, memory=self.config.memory)
        batch, steps = self.config.batch or recipe.training.batch_size, self.config.steps or recipe.training.steps
        return NetworkCost(", ".join([name, *changed]), network, cost, batch, steps)


def _compared(cost: Complexity, config: ComplexityConfig) -> int:
    """Operations that `match` makes equal."""
    return cost.macs - (cost.attention_macs if config.linear else 0)


def _weightless(config: Network) -> torch.nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(config)
