"""Sources made of others: an image set read again, a source of held-out images, and the two pools joined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ditlab.data.imageset import ImageSet
from ditlab.data.sources.base import TEST, TRAIN, CropRule, Item, SkippedItem, Source
from ditlab.errors import DitlabError

__all__ = ["HeldOut", "Joined", "Prepared"]


class Prepared(Source):
    """The images of an image set of pixels, as they are; the set must have the rule's size and colour."""

    def __init__(self, rule: CropRule, images: ImageSet) -> None:
        manifest = images.manifest
        if images.latents is not None:
            raise DitlabError(f"{images.path}: expected an image set of pixels, found one of latents")
        if (manifest.size, manifest.color) != (rule.size, rule.color):
            raise DitlabError(
                f"{images.path}: expected images of {rule.size}x{rule.size} pixels in {rule.color}, "
                f"found {manifest.size}x{manifest.size} in {manifest.color}"
            )
        self.rule, self.images = rule, images
        self.class_names, self.count = images.class_names, len(images)

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        labels, pool = self.images.labels, self.images.pool
        for index, pixels in enumerate(self.images.array):
            yield Item(
                pixels,
                self.images.source_of(index) or f"image {index}",
                None if labels is None else int(labels[index]),
                None if pool is None else int(pool[index]),
            )

    def origin(self) -> dict[str, Any]:
        """Returns the hash of the set."""
        return {"image_set": self.images.hash}


class _OnePool(Source):
    """The images of another source, all in one pool, labelled by `class_names`; others get no label.

    Images that the source itself has in the other pool are refused with the sentence `refusal`.
    """

    def __init__(self, source: Source, pool: int, class_names: tuple[str, ...], refusal: str) -> None:
        self.source, self.pool, self.class_names, self.refusal = source, pool, class_names, refusal
        self.rule, self.count, self.left_out = source.rule, source.count, source.left_out

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        places = {name: index for index, name in enumerate(self.class_names)}
        labels = [places.get(name) for name in self.source.class_names]
        for item in self.source:
            if isinstance(item, SkippedItem):
                yield item
                continue
            if item.pool not in (None, self.pool):
                raise DitlabError(f"{self.refusal}, e.g. {item.name}")
            yield Item(item.pixels, item.name, None if item.label is None else labels[item.label], self.pool)

    def origin(self) -> dict[str, Any]:
        """Returns the origin of the other source."""
        return self.source.origin()


class HeldOut(_OnePool):
    """The images of another source, which may only be tested on; `class_names` are those of the training images."""

    def __init__(self, source: Source, name: str, class_names: tuple[str, ...]) -> None:
        self.name = name
        found = "expected held-out images alone, found images that the source gives for training"
        super().__init__(source, TEST, class_names, f"held_out '{name}': {found}")


class Joined(Source):
    """Training images from one source, which must not choose test images itself, and held-out images from another."""

    def __init__(self, train: Source, train_name: str, held_out: Source, held_out_name: str) -> None:
        self.rule, self.count = train.rule, train.count + held_out.count
        self.left_out = train.left_out + held_out.left_out
        if train.class_names and held_out.class_names:
            others = [name for name in held_out.class_names if name not in train.class_names]
            self.class_names = (*train.class_names, *others)
        refusal = (
            f"source '{train_name}': expected training images alone beside held_out '{held_out_name}', "
            "found images that the source holds out itself"
        )
        self.train = _OnePool(train, TRAIN, self.class_names, refusal)
        self.held_out = HeldOut(held_out, held_out_name, self.class_names)

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        yield from self.train
        yield from self.held_out

    def origin(self) -> dict[str, Any]:
        """Returns the origins of both sources."""
        return {"train": self.train.origin(), "held_out": self.held_out.origin()}
