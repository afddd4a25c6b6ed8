"""One job of `ditlab sample`: what is to be drawn, batch by batch, and what becomes of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ditlab
from ditlab.config import differing_settings
from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import GuidanceConfig
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.samplers import SamplerConfig, SamplerStep, evaluations
from ditlab.errors import DitlabError
from ditlab.files import flush, write_json
from ditlab.sampling.batch_store import Part, Parts, write_pngs, writing
from ditlab.sampling.draw import draw_batch
from ditlab.sampling.model import Sampled

COLUMNS = 8
"""Steps that `--strip` shows, before the image itself."""


@dataclass(frozen=True, eq=False)
class Job:
    """Images of some seeds, with one guidance or several (a sweep), and where they go."""

    run: Sampled
    denoisers: Sequence[Denoiser]
    """The run's denoiser, once for each guidance."""
    guidances: Sequence[GuidanceConfig]
    config: SamplerConfig
    seeds: Sequence[int]
    labels: Tensor | None
    """Class of each image, int64 [len(seeds)]; None for an unconditional run."""
    batch: int
    strip: int
    """How many of the first images are shown on their way from noise to image."""
    pngs: bool
    """Whether each image is also written as a PNG."""
    out: Path
    about: Mapping[str, Any]
    """Everything that decides the images and the files, as JSON values; samples.json begins with it."""
    seconds: list[float] = field(default_factory=list)

    @property
    def sweep(self) -> bool:
        """Whether it compares guidance scales."""
        return len(self.guidances) > 1

    @cached_property
    def parts(self) -> Parts:
        """Where finished batches lie."""
        settings = {name: value for name, value in self.run.settings.items() if name.startswith(("network.", "objec"))}
        versions = [ditlab.__version__, torch.__version__]
        here = [dict(self.about), settings, self.denoisers[0].device.type, versions]
        text = json.dumps(here, sort_keys=True, default=str)
        return Parts(self.out, hashlib.sha256(text.encode()).hexdigest())

    @property
    def count(self) -> int:
        """How many images are to be drawn: each seed with each guidance, place by place."""
        return len(self.seeds) * len(self.guidances)

    def finished(self) -> dict[str, Any] | None:
        """What samples.json says where these very samples are there already.

        Raises:
            DitlabError: the output holds something else, or samples with other settings.
        """
        file = self.out / "samples.json"
        if not file.is_file():
            if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
                raise DitlabError(
                    f"sample --out {self.out}: expected a new folder or one of samples, found something else"
                )
            return None
        try:
            found = json.loads(file.read_text())
        except ValueError:
            raise DitlabError(f"{file}: expected JSON, found something else") from None
        wrong = differing_settings({name: found.get(name) for name in self.about}, self.about)
        if wrong:
            name, (before, now) = next(iter(wrong.items()))
            raise DitlabError(
                f"sample --out {self.out}: it holds samples with {name} = {_short(before)}, now {_short(now)} is asked "
                "for; give another --out, or the same settings"
            )
        return found

    def missing(self) -> list[Part]:
        """The batches that are still to be drawn: what the finished ones leave out, whatever their sizes."""
        found, place = [], 0
        for start, count in [*self.parts.done(), (self.count, 0)]:
            while place < start:
                of_this_guidance = len(self.seeds) - place % len(self.seeds)
                found.append((place, min(self.batch, start - place, of_this_guidance)))
                place += found[-1][1]
            place = start + count
        return found

    def draw(self, batches: Sequence[Part], progress: Callable[[int, int], None]) -> None:
        """Draws batches and keeps each when it is finished.

        Args:
            batches: which.
            progress: told how many images are done, of how many.

        Raises:
            DitlabError: what was drawn is not finite, or cannot be written; finished batches stay.
        """
        total, done = sum(count for _, count in batches), 0
        for place, count in batches:
            which, start = divmod(place, len(self.seeds))
            seeds = self.seeds[start : start + count]
            label = None if self.labels is None else self.labels[start : start + len(seeds)]
            path = _Path(self.run, max(0, min(len(seeds), self.strip - start)))

            def after(step: SamplerStep, done: int = done, size: int = len(seeds), path: _Path = path) -> None:
                path(step)
                progress(done + size * (step.index + 1) // step.steps, total)

            began = time.perf_counter()
            drawn = draw_batch(self.denoisers[which], self.config, seeds, label=label, callback=after)
            _check_finite(drawn, seeds)
            images = np.ascontiguousarray(self.run.decode(drawn).transpose(0, 2, 3, 1))
            seconds = np.asarray(time.perf_counter() - began)
            with writing(self.parts):
                if self.pngs:
                    write_pngs(self.parts.folder / "images" / self._subfolder(which), images, seeds)
                size = np.asarray(self.batch)
                self.parts.keep(place, images=images, seconds=seconds, batch=size, **path.arrays())
            done += len(seeds)
            progress(done, total)

    def finish(self) -> dict[str, Any]:
        """Writes what comes from all batches, and gives the folder its name; returns what samples.json says."""
        parts, folder = self.parts, self.parts.folder
        costs = [evaluations(self.config, denoiser) for denoiser in self.denoisers]
        count, done = self.count, parts.done()
        seconds = sum(float(parts.array(part, "seconds")) for part in done)
        found = {
            **self.about,
            "count": count,
            "nfe": costs[0].nfe,
            "passes": [cost.passes for cost in costs] if self.sweep else costs[0].passes,
            "seconds": round(seconds, 3),
            "seconds_per_image": round(seconds / count, 6),
            "batch": sorted({int(parts.array(part, "batch")) for part in done}),
            "device": str(self.denoisers[0].device),
        }
        with writing(parts):
            if self.sweep:
                self._save_sweep(folder / "sweep.png")
            else:
                first = parts.first(100).transpose(0, 3, 1, 2)
                image_grid(first, scale=fitting_scale(first.shape[-1])).save(folder / "grid.png")
                labels = None if self.labels is None else self.labels.numpy()
                parts.write_npz(folder / "samples.npz", len(self.seeds), labels)
            if self.strip:
                self._save_strip(folder / "strip.png")
            flush(folder)
            write_json(folder / "samples.json", found)
            parts.publish()
        return found

    def _subfolder(self, which: int) -> str:
        return f"scale-{self.guidances[which].scale:g}" if self.sweep else ""

    def _words(self, place: int) -> str:
        """What a picture calls the image in this place."""
        if self.labels is None:
            return f"seed {self.seeds[place]}"
        label = int(self.labels[place])
        return f"seed {self.seeds[place]}\n" + self._classes.get(label, f"class {label}")

    @cached_property
    def _classes(self) -> dict[int, str]:
        """Names of the classes, as far as the image set is there to tell them."""
        names: tuple[str, ...] = ()
        with suppress(DitlabError):  # sampling needs no images
            names = self.run.images.class_names
        return {**dict(enumerate(names)), self.denoisers[0].num_classes: "no class"}

    def _save_sweep(self, path: Path) -> None:
        from ditlab.pages.grids import labelled_grid
        from ditlab.pages.theme import save

        images = self.parts.first(self.count).transpose(0, 3, 1, 2)
        table = images.reshape(len(self.guidances), len(self.seeds), *images.shape[1:])
        rows = [f"w = {guidance.scale:g}" for guidance in self.guidances]
        save(labelled_grid(table, rows, [self._words(i) for i in range(len(self.seeds))]), path)

    def _save_strip(self, path: Path) -> None:
        from ditlab.pages.grids import labelled_grid
        from ditlab.pages.theme import save

        states, estimates, images = [], [], []
        sigmas = np.empty(0)
        for part in (part for part in self.parts.done() if part[0] < self.strip):
            sigmas = self.parts.array(part, "sigmas")
            for name, where in (("states", states), ("estimates", estimates), ("images", images)):
                where.append(self.parts.array(part, name))
        last = np.concatenate(images)[: self.strip, None]
        above = np.concatenate([np.concatenate(states), last], 1)
        below = np.concatenate([np.concatenate(estimates), last], 1)
        table = np.stack([above, below], 1).reshape(-1, *above.shape[1:]).transpose(0, 1, 4, 2, 3)
        rows = [words for i in range(self.strip) for words in (f"{self._words(i)}\nstate", "estimate of\nthe image")]
        columns = [*(_level(self.denoisers[0], float(sigma)) for sigma in sigmas), "image"]
        save(labelled_grid(table, rows, columns), path)


class _Path:
    """What `--strip` keeps of the first images of a batch, while they are drawn."""

    def __init__(self, run: Sampled, count: int) -> None:
        self._run, self._count = run, count
        self._sigmas: list[float] = []
        self._kept: dict[str, list[np.ndarray]] = {"states": [], "estimates": []}

    def __call__(self, step: SamplerStep) -> None:
        """Keeps the state, scaled to unit variance, and the estimate, at some of the steps."""
        if self._count and step.index in np.linspace(0, step.steps - 1, min(COLUMNS, step.steps)).round():
            self._sigmas.append(step.sigma)
            for name, images in (("states", step.y / math.sqrt(1 + step.sigma**2)), ("estimates", step.x0)):
                pictures = self._run.decode(images[: self._count].float())
                self._kept[name].append(pictures.transpose(0, 2, 3, 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Levels [K], states and estimates uint8 [n, K, H, W, C]; nothing where no image of the batch is shown."""
        if not self._sigmas:
            return {}
        return {"sigmas": np.array(self._sigmas), **{name: np.stack(kept, 1) for name, kept in self._kept.items()}}


def _check_finite(drawn: Tensor, seeds: Sequence[int]) -> None:
    """Refuses images [b, C, H, W] that hold NaN or an infinity: as 8-bit pixels they would be black or white."""
    fine = drawn.isfinite().flatten(1).all(1).tolist()
    if not all(fine):
        raise DitlabError(
            f"sample: expected finite images, found NaN or infinite values in {fine.count(False)} of the {len(fine)} "
            f"images of a batch, the first of them of seed {seeds[fine.index(False)]}; nothing of this batch was kept"
        )


def fingerprint(run: Sampled, denoiser: Denoiser) -> str:
    """16 hexadecimal digits of what makes the images: the network's weights and process, the codec's weights and scale.

    Args:
        run: for its codec.
        denoiser: not guided; guidance is told apart by itself.
    """
    codec = {k: v for k, v in asdict(run.codec.record).items() if k not in ("source", "place")}
    digest = hashlib.sha256(json.dumps([denoiser.identity, codec], sort_keys=True, default=str).encode())
    if denoiser.module is not None:
        for name, value in sorted(denoiser.module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def about_sampler(config: SamplerConfig) -> dict[str, Any]:
    """A sampler's settings as JSON values."""
    return {"kind": config.kind, **{name: value for name, value in asdict(config).items() if name != "kind"}}


def about_guidance(configs: Sequence[GuidanceConfig], channels: int) -> dict[str, Any] | None:
    """The settings of a guidance as JSON values, with the number of channels that it guides; None for none.

    Those of a sweep, which differ in their scales alone, are without it.
    """
    config = next((config for config in configs if config.on), None)
    if config is None:
        return None
    interval = None if config.interval is None else list(config.interval)
    found = {**asdict(config), "interval": interval, "channels": config.guided_channels(channels)}
    if len(configs) > 1:
        del found["scale"]
    return found


def _level(denoiser: Denoiser, sigma: float) -> str:
    """What a picture calls a level: the step where steps are numbered, else sigma."""
    levels = denoiser.levels
    if isinstance(levels, DiscreteLevels):
        return f"t = {levels.step(sigma):.0f}"
    return f"σ = {sigma:.3g}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
