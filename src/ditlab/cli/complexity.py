"""`ditlab complexity`: what networks cost, before anything is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ditlab.config import Network, RunConfig
from ditlab.errors import DitlabError
from ditlab.files import write_bytes, write_json
from ditlab.metrics.complexity import Complexity, complexity, match_width
from ditlab.networks.dit_blocks import BlockKind
from ditlab.networks.registry import build_network
from ditlab.presets import preset
from ditlab.studies.published import published

_CHANGES = ("depth", "width", "heads", "attention", "block")
"""Flags that change the network of a preset."""


@dataclass(frozen=True)
class Entry:
    """A network of the table."""

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
            "network": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()},
            **self.cost.to_json(),
            "batch_size": self.batch_size,
            "steps": self.steps,
            "training_gmacs": self.training_compute,
        }


@dataclass(frozen=True)
class ComplexityOf:
    """Show what networks cost: parameters, operations, memory for the backward pass, training compute.

    Nothing is computed but shapes, so the largest takes seconds on any machine. GMACs are 10^9 multiply-accumulates of
    a forward pass for one image; Peebles & Xie call them Gflops. Training compute is GMACs x batch size x steps x 3.
    """

    presets: tyro.conf.Positional[tuple[str, ...]]
    """One or several presets, e.g. dit-s/2 dit-xl/2."""
    size: tuple[int, ...] = ()
    """Side of the image or latent, or its height and width; the presets' own where not given."""
    channels: int = 3
    """Channels of the image; 4 for the latents of Peebles & Xie."""
    classes: int = 0
    """Number of classes of networks that take them, 1000 for ImageNet; the presets' own where not given."""
    depth: int | None = None
    """Number of blocks, instead of the presets' own."""
    width: int | None = None
    """Channels of a token, or of a UNet at full size, instead of the presets' own."""
    heads: int | None = None
    """Attention heads, instead of the presets' own."""
    attention: str | None = None
    """Attention plan, e.g. local or "3,5,7,g*9", instead of the presets' own."""
    block: BlockKind | None = None
    """How time and label enter the blocks, instead of the presets' own."""
    batch: int | None = None
    """Batch size of the training compute, instead of the presets' own."""
    steps: int | None = None
    """Steps of the training compute, instead of the presets' own."""
    match: str | None = None
    """A preset: the width of each network is set so that its GMACs come nearest to this one's on the same images."""
    linear: bool = False
    """With --match: compare GMACs without attention matrices, as An et al. do."""
    memory: bool = True
    """Measure the memory too, which takes most of the time."""
    out: Path | None = None
    """A folder for complexity.json and complexity.png; nothing is written where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Counts, prints a table, and writes it where asked to."""
        self._check()
        wanted = [(name, self._changed(name)) for name in dict.fromkeys(self.presets)]
        if self.match is not None:
            target = self._entry(self.match, preset(self.match), self._fitted(self.match, preset(self.match).network))
            wanted = [(name, self._matched(name, config, target)) for name, config in wanted]
            entries = [target, *(self._entry(self._named(name, c), preset(name), c) for name, c in wanted)]
        else:
            entries = [self._entry(self._named(name, c), preset(name), c) for name, c in wanted]
        console.print(self._table(entries))
        console.print(self._legend(entries), markup=False)
        if self.match is not None:
            for entry in entries[1:]:
                ratio = self._compared(entry.cost) / self._compared(entries[0].cost)
                width = asdict(entry.config)["width"]
                console.print(
                    f"{entry.name}: width {width} costs {100 * ratio:.2f}% of {entries[0].name}'s GMACs"
                    + (" without attention matrices" if self.linear else ""),
                    markup=False,
                )
        result: dict[str, Any] = {"networks": [entry.to_json() for entry in entries]}
        if self.out is not None:
            result["files"] = [str(path) for path in self._save(entries, result)]
            console.print(f"wrote {' and '.join(result['files'])}", markup=False)
        return result

    def _check(self) -> None:
        if not self.presets:
            raise DitlabError("complexity: expected at least one preset (e.g. dit-s/2), found none")
        if len(self.size) > 2 or min(self.size, default=1) < 1:
            raise DitlabError(f"complexity --size: expected one side or height and width, found {list(self.size)}")
        for name in ("batch", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DitlabError(f"complexity --{name}: expected at least 1, found {value}")
        if self.match is not None and self.width is not None:
            raise DitlabError("complexity: --match finds the width, so --width cannot be given with it")
        if self.linear and self.match is None:
            raise DitlabError("complexity: --linear says what --match compares; expected --match with it, found none")

    @cached_property
    def _image_size(self) -> tuple[int, int]:
        """Height and width of the images, the same for all networks of the table."""
        if self.size:
            return self.size[0], self.size[-1]
        names = (*self.presets, self.match) if self.match else self.presets
        own = {name: tuple(preset(name).network.image_size) for name in names}
        if len({*own.values()}) > 1:
            found = ", ".join(f"{rows}x{columns} of {name}" for name, (rows, columns) in own.items())
            raise DitlabError(f"complexity: expected --size for presets whose images differ in size, found {found}")
        rows, columns = next(iter(own.values()))
        return rows, columns

    def _compared(self, cost: Complexity) -> int:
        """What --match makes equal."""
        return cost.macs - (cost.attention_macs if self.linear else 0)

    def _fitted(self, name: str, network: Network, **changes: Any) -> Network:
        """The network on the images asked for."""
        images: dict[str, Any] = {"image_size": self._image_size, "channels": self.channels}
        if self.classes and network.takes_labels:
            images["num_classes"] = self.classes
        missing = [flag for flag in changes if flag not in {field.name for field in fields(network)}]
        if missing:
            raise DitlabError(f"{name}: expected flags of a {network.kind} network, found --{missing[0]}")
        try:
            return replace(network, **images, **changes)
        except DitlabError as error:
            raise DitlabError(f"{name}: {error}") from None

    def _changed(self, name: str) -> Network:
        """The preset's network as the flags say."""
        changes = {flag: getattr(self, flag) for flag in _CHANGES if getattr(self, flag) is not None}
        return self._fitted(name, preset(name).network, **changes)

    def _matched(self, name: str, config: Network, target: Entry) -> Network:
        """The network with the width at which it costs what the target costs."""
        shape = (config.channels, *config.image_size)
        multiple = config.width_step

        def build(width: int) -> torch.nn.Module:
            return _weightless(replace(config, width=width))

        try:
            wanted = self._compared(target.cost)
            return replace(config, width=match_width(build, shape, wanted, multiple, attention=not self.linear))
        except DitlabError as error:
            raise DitlabError(f"{name}: {error}") from None

    def _named(self, name: str, config: Network) -> str:
        """The preset's name, and in what the network differs from it."""
        own, now = asdict(preset(name).network), asdict(config)
        changed = [f"{flag} {now[flag]}" for flag in _CHANGES if flag in now and now[flag] != own[flag]]
        return ", ".join([name, *changed])

    def _entry(self, name: str, recipe: RunConfig, config: Network) -> Entry:
        shape = (config.channels, *config.image_size)
        labelled = config.classes > 0
        cost = complexity(_weightless(config), shape, labelled=labelled, memory=self.memory)
        training = recipe.training
        return Entry(name, config, cost, self.batch or training.batch_size, self.steps or training.steps)

    def _table(self, entries: list[Entry]) -> Table:
        rows, columns = self._image_size
        classes = f", {self.classes} classes" if self.classes else ""
        table = Table(title=f"for one image of {rows}x{columns}x{self.channels}{classes}", title_justify="left")
        table.add_column("network")
        heads = ["params, M", "GMACs", "linear", *(["MiB", "bf16"] if self.memory else [])]
        for head in (*heads, "training"):
            table.add_column(head, justify="right", no_wrap=True)
        for entry in entries:
            cost = entry.cost
            cells = [f"{cost.parameters / 1e6:.2f}", f"{cost.gmacs:.2f}", f"{cost.gmacs_without_attention:.2f}"]
            for kept in (cost.activation_bytes, cost.activation_bytes_bf16):
                cells += [] if kept is None else [f"{kept / 2**20:.1f}"]
            table.add_row(entry.name, *cells, f"{entry.training_compute:.1e}")
        return table

    def _legend(self, entries: list[Entry]) -> str:
        """What the columns are, and the batch sizes and steps that the training compute is of."""
        recipes: dict[str, list[str]] = {}
        for entry in entries:
            recipes.setdefault(f"{entry.batch_size} x {entry.steps:,}", []).append(entry.name)
        (first, *others) = recipes
        which = first if not others else "; ".join(f"{recipe} of {', '.join(of)}" for recipe, of in recipes.items())
        kept = "MiB, bf16: kept of an image for the backward pass, in float32 and bfloat16; " if self.memory else ""
        return f"linear: GMACs without attention matrices; {kept}training: GMACs x batch x steps x 3 ({which})"

    def _save(self, entries: list[Entry], result: dict[str, Any]) -> list[Path]:
        from ditlab.analyses.complexity.figures import complexity_figure
        from ditlab.pages.theme import png

        assert self.out is not None
        figure = complexity_figure([(e.name, e.cost) for e in entries], published=_published_fid(entries))
        files = [self.out / "complexity.json", self.out / "complexity.png"]
        write_json(files[0], result)
        write_bytes(files[1], png(figure))
        return files


def _weightless(config: Network) -> torch.nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(config)


def _published_fid(entries: list[Entry]) -> dict[str, float]:
    """FID by name, of those entries that are a network of Peebles & Xie's on the images it was published for."""
    paper = published("dit/table4")
    assert paper is not None  # it comes with ditlab
    found = {}
    for entry in entries:
        value = paper.value(network=entry.name, quantity="fid")
        c: Any = entry.config
        if value is not None and (c.image_size, c.channels, c.num_classes, c.learn_sigma) == ((32, 32), 4, 1000, True):
            found[entry.name] = float(value["value"])
    return found
