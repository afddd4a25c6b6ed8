"""Draws samples of models for a page, and finds the training images nearest to them.

Distances are between pictures as the denoiser knows them: of latents, both sides are decoded, so that a replay of a
training image is at distance 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ditlab.analyses.base import ReportContext
from ditlab.analyses.samples.figures import SampleRow
from ditlab.errors import DitlabError
from ditlab.metrics.nearest import NearestResult
from ditlab.models.comparing import ModelSet, OpenedModel
from ditlab.models.memorization import mask_images, near_copies, nearest_training, training_pictures
from ditlab.models.model import Model
from ditlab.progress import SILENT, Reporter
from ditlab.sampling.draw import draw, with_guidance

__all__ = ["KindSamples", "SampleSet"]

MAX_KINDS = 12
"""Kinds of models that are sampled, at most."""
SHOWN = 16
"""Samples of each kind that the page shows, at most; distances are given for all."""
SHEET = 96
"""Samples of all kinds together that the page shows, at most."""
THUMBNAILS = 8
"""Images in a row of the first screen."""


@dataclass(frozen=True, eq=False)
class KindSamples:
    """Samples of one model, which stands for its kind at its N."""

    model: Model
    name: str
    label: str
    samples: torch.Tensor
    """float32 [count, C, H, W], as the denoiser sees images; from the same noise for every model."""
    images: np.ndarray
    """What they look like, uint8 [count, C, H, W]."""
    nearest: NearestResult | None = None
    """None where the training images are unknown."""
    classes: torch.Tensor | None = None
    """The class that each was drawn for, int64 [count]."""

    @classmethod
    def draw(cls, opened: OpenedModel, name: str, count: int, reporter: Reporter = SILENT) -> KindSamples:
        """Draws samples with the model's own sampler and guidance; of conditional models of each class in turn."""
        model = opened.model
        denoiser = with_guidance(model, opened.denoiser)
        classes = torch.arange(count) % denoiser.num_classes if denoiser.num_classes else None
        with reporter.bar(f"samples of {name}", count) as bar:
            samples = draw(denoiser, model.sampler, range(count), label=classes, bar=bar)
        return cls.of(opened, name, samples, classes)

    @classmethod
    def of(
        cls, opened: OpenedModel, name: str, samples: torch.Tensor, classes: torch.Tensor | None = None
    ) -> KindSamples:
        """Finds the training images nearest to samples of `opened`, and those of held-out images as a control."""
        model, about = opened.model, replace(opened.provenance, name=name)
        images = model.decode(samples)
        result = None
        if about.n is not None:
            nearest, held_out = nearest_training(model, images)
            if model.images.latents is not None:
                about = replace(about, settings={**about.settings, "space": "latents"})
            result = NearestResult(about, nearest, held_out, model.mirrored)
        return cls(model, name, about.group, samples, images, result, classes)

    @property
    def caption(self) -> str:
        """The kind, N and seed."""
        about = None if self.nearest is None else self.nearest.about
        return self.label if about is None else f"{about.title}, seed {about.seed}"

    @property
    def near_copies(self) -> np.ndarray:
        """Whether each sample shows too much of a training image where none may be shown, bool [count]."""
        if self.nearest is None:
            return np.ones(len(self.images), bool)
        return near_copies(self.nearest.samples, self.nearest.held_out, known=self.model.knows_training_images)

    @property
    def nearest_images(self) -> np.ndarray | None:
        """The nearest training image of each sample, uint8 [count, C, H, W], mirrored where that is nearer."""
        if self.nearest is None:
            return None
        return training_pictures(self.model, self.nearest.samples.index, self.nearest.samples.mirrored)

    @property
    def sources(self) -> list[str]:
        """The file, row or crop of the nearest training image of each sample; "" where the image set has no names."""
        if self.nearest is None:
            return [""] * len(self.images)
        return [self.model.images.source_of(int(i)) for i in self.model.split.train[self.nearest.samples.index]]


@dataclass(frozen=True, eq=False)
class SampleSet:
    """The samples of all kinds of a page."""

    kinds: tuple[KindSamples, ...]
    training: tuple[str, np.ndarray] | None
    """A caption and a few training images, uint8 [n, C, H, W]; None where none may be shown or is known."""
    hide: bool
    """Whether no picture of a real image may be shown."""

    @classmethod
    def draw(cls, models: ModelSet, context: ReportContext, reporter: Reporter = SILENT) -> SampleSet:
        """Draws samples of the first seed of each kind at each N; notes which models cannot be sampled."""
        drawn: dict[tuple[str, int | None], KindSamples] = {}
        for place, name in enumerate(models.names) if context.samples else ():
            try:
                opened = models.open_one(place, reporter)
                key = opened.provenance.group, opened.provenance.n
                if key not in drawn and len(drawn) < MAX_KINDS:
                    drawn[key] = KindSamples.draw(opened, name, context.samples, reporter)
            except DitlabError as error:
                context.notes.append(f"{name}: no samples ({error}).")
        return cls(tuple(drawn.values()), _training_images(models, context), context.hide_training_images)

    def shown(self) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """Returns model name -> its samples that may be shown, and their classes."""
        chosen: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for kind in self.kinds:
            keep = torch.from_numpy(~kind.near_copies if self.hide else np.ones(len(kind.images), bool))
            chosen[kind.name] = kind.samples[keep], None if kind.classes is None else kind.classes[keep]
        return chosen

    def rows(self) -> list[SampleRow]:
        """Returns the rows of the figure."""
        rows, count = [], min(SHOWN, SHEET // max(1, len(self.kinds)))
        for kind in self.kinds:
            nearest = None if kind.nearest is None else kind.nearest.samples.take(count)
            beneath = None if self.hide else kind.nearest_images
            pictures, sources = None if beneath is None else beneath[:count], () if self.hide else kind.sources[:count]
            rows.append(SampleRow(kind.caption, self._allowed(kind, count), nearest, pictures, sources))
        return rows

    def thumbnails(self) -> list[tuple[str, np.ndarray]]:
        """Returns rows of the first screen: training images, and samples of the first two kinds."""
        rows = [] if self.training is None else [self.training]
        return rows + [(f"samples of {kind.caption}", self._allowed(kind, THUMBNAILS)) for kind in self.kinds[:2]]

    def _allowed(self, kind: KindSamples, count: int) -> np.ndarray:
        images = kind.images[:count]
        return mask_images(images, kind.near_copies[:count]) if self.hide else images


def _training_images(models: ModelSet, context: ReportContext) -> tuple[str, np.ndarray] | None:
    """A few training images of the first model that has any."""
    if context.hide_training_images:
        return None
    for model in models:
        try:
            train = model.split.train
            images = model.originals(train[:THUMBNAILS])
        except DitlabError:
            continue
        if images.shape[1] in (1, 3):
            return f"{len(images)} of {len(train):,} training images", images
    return None
