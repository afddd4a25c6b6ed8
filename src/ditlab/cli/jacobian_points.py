"""Jacobians of a run, measured, or taken from what an earlier command has left: a large one takes minutes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ditlab.analyses.jacobian.comparison import JacobianComparison, compare_jacobians, differs
from ditlab.analyses.jacobian.measure import check_differentiable, check_jacobian, jacobian_levels, measure_jacobian
from ditlab.analyses.jacobian.result import JacobianConfig, JacobianPoint, JacobianResult
from ditlab.cli.common import counting, noting
from ditlab.cli.jacobian_images import Shown
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.models.model import Model
from ditlab.provenance import Provenance

NAME = "jacobian"
_UNFINISHED = "jacobian-unfinished"
"""What is kept of a measurement that was broken off, until it is finished."""


@dataclass(frozen=True, eq=False)
class Looked:
    """A run whose Jacobians are to be taken, checked as far as can be before work starts."""

    run: Model
    denoiser: Denoiser
    config: JacobianConfig
    facts: Provenance
    levels: tuple[float, ...]
    images: Tensor
    """The images as far as they are asked for, float32 [n, C, H, W], as the denoiser sees them."""
    labels: Tensor | None

    @classmethod
    def open(
        cls,
        run: Model,
        config: JacobianConfig,
        console: Console,
        *,
        shown: Shown | None = None,
        label: str = "",
        step: int | None = None,
        ema: bool = True,
        device: torch.device | str = "cpu",
    ) -> Looked:
        """Opens a run's denoiser and the images: held-out ones where it is not told which are `shown`.

        Raises:
            DitlabError: settings that do not fit, images that are not there, a denoiser without a Jacobian.
        """
        shown = shown or Shown()
        config = shown.settings(config)
        denoiser, facts = run.denoiser_and_provenance(
            step=step, ema=ema, label=label, device=device, say=noting(console)
        )
        images, labels, about = shown.images(run, config, denoiser.shape)
        facts = replace(facts, settings={**facts.settings, **about})
        try:
            check_jacobian(denoiser, len(images), config)
            levels = jacobian_levels(denoiser, config)
            check_differentiable(denoiser, images, config, labels)
        except DitlabError as error:
            raise DitlabError(f"run {run.path}: {error}") from None
        return cls(run, denoiser, config, facts, levels, images, labels)

    def measure(self, console: Console) -> JacobianResult:
        """The Jacobians at all images and levels, saved into the run's analysis folder.

        Those that an earlier command measured with the same settings, weights and images are taken from there. What is
        finished is saved image by image, so that a command that was broken off goes on where it was.
        """
        folder, config = self.run.path / "analysis", self.config
        known = self._known(console)
        found: dict[tuple[int, float], JacobianPoint] = {
            (image, sigma): known[image, sigma] for image in config.images for sigma in self.levels
            if (image, sigma) in known
        }  # fmt: skip
        reused = len(found)
        train: Tensor | None = None
        for place, image in enumerate(config.images):
            missing = tuple(sigma for sigma in self.levels if (image, sigma) not in found)
            if not missing:
                continue
            if train is None:
                train = self._training_images()
            several = "" if len(config.images) == 1 else f", image {place + 1} of {len(config.images)}"
            with counting(console, f"Jacobian of {self.facts.name}{several}") as progress:
                measured = measure_jacobian(
                    self.denoiser,
                    self.images,
                    replace(config, images=(image,), levels=missing, steps=None),
                    labels=self.labels,
                    about=self.facts,
                    train=train,
                    progress=progress,
                )
            found |= {(point.image, point.sigma): point for point in measured.points}
            if len(found) < len(config.images) * len(self.levels):
                self._result(found).save(folder, _UNFINISHED)
        if reused:
            console.print(
                f"{self.facts.name}: {reused} of {len(found)} Jacobians were measured before and are used again",
                markup=False,
            )
        result = self._result(found)
        if reused < len(found) or not self._is_kept(result):
            result.save(folder, NAME)
        for ending in (".json", ".npz"):
            (folder / f"{_UNFINISHED}{ending}").unlink(missing_ok=True)
        return result

    def _training_images(self) -> Tensor:
        """Those that the weights know, [N, C, H, W]; each of them mirrored too, where training mirrored them."""
        count = self.run.split_record.train
        images, twins = self.run.pictures("train", count)[0], self.run.mirrored_twins(count)
        return images if twins is None else torch.cat([images, twins])

    def _result(self, found: dict[tuple[int, float], JacobianPoint]) -> JacobianResult:
        order = [(image, sigma) for image in self.config.images for sigma in self.levels]
        return JacobianResult(self.facts, self.config, tuple(found[key] for key in order if key in found))

    def _known(self, console: Console) -> dict[tuple[int, float], JacobianPoint]:
        """What earlier commands left, as far as it was measured alike, by image and level."""
        found: dict[tuple[int, float], JacobianPoint] = {}
        for name in (NAME, _UNFINISHED):
            path = self.run.path / "analysis" / f"{name}.json"
            if not path.is_file():
                continue
            try:
                result = JacobianResult.load(path)
            except DitlabError as error:
                console.print(f"note: not used again: {error}", markup=False)
                continue
            if _same_weights(result.about, self.facts) and _alike(result.config) == _alike(self.config):
                found |= {(point.image, point.sigma): point for point in result.points}
        return found

    def _is_kept(self, result: JacobianResult) -> bool:
        """Whether just this result lies in the run's folder."""
        path = self.run.path / "analysis" / f"{NAME}.json"
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == json.loads(
            json.dumps(result.to_json())
        )


def kept_result(run: Model, console: Console) -> JacobianResult | None:
    """What `ditlab jacobian` left of the run's newest weights, measured in any way; None where there is nothing, or
    nothing that can be read, which is said."""
    path = run.path / "analysis" / f"{NAME}.json"
    if not path.is_file():
        return None
    try:
        found = JacobianResult.load(path)
    except DitlabError as error:
        console.print(f"note: passed over: {error}", markup=False)
        return None
    fresh = found.about.step == run.newest_step and found.about.split_hash == run.split_record.hash and found.about.ema
    return found if fresh else None


def _alike(config: JacobianConfig) -> JacobianConfig:
    """A config without what does not change a single Jacobian."""
    return replace(config, images=(0,), levels=None, steps=None, mode="auto", chunk=1)


def _same_weights(one: Provenance, two: Provenance) -> bool:
    """Whether results are of the same weights and images."""

    def facts(about: Provenance) -> list[object]:
        return [about.n, about.seed, about.step, about.ema, about.split_hash, about.settings]

    return json.dumps(facts(one), sort_keys=True) == json.dumps(facts(two), sort_keys=True)


def pixels_of(run: Model) -> Callable[[np.ndarray], np.ndarray]:
    """How this run's images, float32 [N, C, H, W], become pictures, uint8 [N, 1 or 3, H, W]."""
    return lambda images: run.pixels(torch.from_numpy(np.ascontiguousarray(images)))


@dataclass(frozen=True, eq=False)
class Directions:
    """Jacobians of runs that were measured alike, for a report."""

    comparison: JacobianComparison
    pixels: Callable[[np.ndarray], np.ndarray]
    """How images as the denoisers see them become pictures."""


def directions(
    runs: Sequence[Model],
    labels: Sequence[str],
    names: Sequence[str],
    console: Console,
    *,
    measure: bool = False,
    device: torch.device | str = "cpu",
) -> list[Directions]:
    """What `ditlab jacobian` left of the newest weights of the runs, those measured alike side by side.

    Args:
        runs: the runs.
        labels: the kind of each.
        names: a name for each, no two alike.
        console: where progress is shown.
        measure: also measure runs of which nothing is there, with the default settings.
        device: where it is measured.
    """
    alike: list[list[tuple[Model, JacobianResult]]] = []
    for run, label, name in zip(runs, labels, names, strict=True):
        found = kept_result(run, console)
        if found is None and measure:
            found = Looked.open(run, JacobianConfig(), console, device=device).measure(console)
        if found is None:
            continue
        found = replace(found, about=replace(found.about, label=label, name=name))
        for members in alike:
            if differs(members[0][1], found) is None:
                members.append((run, found))
                break
        else:
            alike.append([(run, found)])
    return [Directions(compare_jacobians([f for _, f in members]), pixels_of(members[0][0])) for members in alike]
