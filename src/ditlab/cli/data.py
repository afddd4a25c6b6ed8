"""`ditlab data`: make an image set, look into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.data.imageset import ImageSet, prepare
from ditlab.data.imageset import Progress as Told
from ditlab.errors import DitlabError
from ditlab.randomness import numpy_generator


@dataclass(frozen=True)
class Prepare:
    """Make an image set: images of one size in one memory-mapped file, with labels, hashes and a manifest.

    Example: `ditlab data prepare folder:~/pictures sets/pictures --size 32`
    """

    source: tyro.conf.Positional[str]
    """photos, digits, folder:PATH, hub:ID, array:PATH or mosaic:PATH."""
    out: tyro.conf.Positional[Path]
    """The folder to make; it appears whole or not at all."""
    size: int = 32
    """Height and width of the images, in pixels."""
    color: Literal["rgb", "grey"] = "rgb"
    """Three channels or one."""
    upscale: bool = False
    """Enlarge images that are smaller than the size, instead of skipping them."""
    near_duplicates: float | None = 0.95
    """Correlation above which two images are reported as near-duplicates; None to not look."""
    near_limit: int = 50_000
    """Look for near-duplicates among at most so many images."""
    overwrite: bool = False
    """Replace an image set that was made from something else or with other settings."""
    stride: int | None = None
    """photos: step between crops, in crop pixels (half the size where not given)."""
    scales: tuple[int, ...] | None = None
    """photos: by how much the photographs are reduced before cropping, one or more factors."""
    flat: float | None = None
    """photos: leave out crops whose grey values have a standard deviation below this (of 255)."""
    image_column: str | None = None
    """hub: the column of images (the first one where not given)."""
    label_column: str | None = None
    """hub: the column of classes (the first class column where not given)."""
    config: str | None = None
    """hub: the dataset's configuration, where it has several."""
    splits: tuple[str, ...] | None = None
    """hub: the splits to read."""
    images_key: str | None = None
    """array: the name of the images in a .npz file."""
    labels_key: str | None = None
    """array: the name of the labels in a .npz file."""

    def run(self, console: Console) -> dict[str, Any]:
        """Makes the set, prints what it holds, and returns the same as a JSON-able dict (`summary`)."""
        names = ("stride", "scales", "flat", "image_column", "label_column", "config", "splits")
        names += ("images_key", "labels_key")
        with _bars(console) as told:
            made = prepare(
                self.source,
                self.out,
                size=self.size,
                color=self.color,
                upscale=self.upscale,
                options={name: getattr(self, name) for name in names if getattr(self, name) is not None},
                near_duplicates=self.near_duplicates,
                near_limit=self.near_limit,
                overwrite=self.overwrite,
                progress=told,
            )
        result = summary(made)
        _print(console, result)
        console.print(f"Look at it with: ditlab data info {escape(str(self.out))}")
        return result


@dataclass(frozen=True)
class Info:
    """Show what an image set holds, and draw a contact sheet of it.

    Example: `ditlab data info sets/pictures --verify`
    """

    path: tyro.conf.Positional[Path]
    """The image set's folder."""
    sheet: Path | None = None
    """Where the contact sheet goes (PATH/contact_sheet.png where not given)."""
    count: int = 100
    """Images on the contact sheet."""
    seed: int = 0
    """Another seed shows other images."""
    verify: bool = False
    """Read every file again and compare its hash with the manifest's."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints and returns `summary`, with the contact sheet's path under "sheet"."""
        opened = ImageSet.open(self.path)
        if self.verify:
            opened.verify()
        if self.count < 1:
            raise DitlabError(f"contact sheet: expected at least 1 image, found {self.count}")
        result = summary(opened)
        result["verified"] = self.verify
        sheet = self.sheet or self.path / "contact_sheet.png"
        shown = numpy_generator(self.seed, "contact sheet").permutation(len(opened))[: self.count]
        if opened.labels is not None:
            shown = shown[np.argsort(opened.labels[shown], kind="stable")]
        try:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            image_grid(opened.take(shown), scale=fitting_scale(max(opened.shape[1:]))).save(sheet, format="PNG")
        except OSError as error:
            raise DitlabError(f"contact sheet: could not write {sheet} ({error.strerror or error})") from None
        result["sheet"] = str(sheet)
        _print(console, result)
        return result


def summary(imageset: ImageSet) -> dict[str, Any]:
    """What there is to say about an image set, JSON-able."""
    manifest = imageset.manifest
    near = manifest.near_duplicates
    return {
        "path": str(imageset.path),
        "source": manifest.source,
        "images": len(imageset),
        "shape": list(imageset.shape),
        "megabytes": round(sum(record.bytes for record in manifest.files.values()) / 1e6, 2),
        "classes": dict(zip(manifest.class_names, manifest.label_counts, strict=True)),
        "pools": manifest.pools,
        "exact_duplicates_dropped": manifest.exact_duplicates,
        "near_duplicates": None
        if near is None
        else {
            "threshold": near.threshold,
            "searched": near.searched,
            "pairs": near.pairs,
            "images": near.images,
            "pairs_across_train_and_test": near.across_pools,
            "most_similar": [list(pair) for pair in near.examples[:5]],
        },
        "skipped": manifest.skipped_count,
        "skipped_examples": {item.name: item.reason for item in manifest.skipped[:10]},
        "notes": list(manifest.notes),
        "hash": imageset.hash,
    }


def _print(console: Console, result: dict[str, Any]) -> None:
    channels, height, width = result["shape"]
    pools, near = result["pools"], result["near_duplicates"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("image set", escape(f"{result['path']}  ({result['source']})"))
    table.add_row("images", f"{result['images']:,} of {channels}x{height}x{width}, {result['megabytes']:,} MB")
    if pools["free"]:
        table.add_row("pools", "free: a split chooses train and test images")
    else:
        table.add_row("pools", f"{pools['train']:,} only to train, {pools['test']:,} only to test")
    if result["classes"]:
        listed = ", ".join(f"{name} {count:,}" for name, count in list(result["classes"].items())[:20])
        more = ", ..." if len(result["classes"]) > 20 else ""
        table.add_row("classes", escape(f"{len(result['classes'])}: {listed}{more}"))
    table.add_row("exact duplicates", f"{result['exact_duplicates_dropped']:,} dropped")
    if near is not None:
        across = near["pairs_across_train_and_test"]
        table.add_row(
            "near-duplicates",
            f"{near['pairs']:,} pairs, {near['images']:,} images (correlation > {near['threshold']}, kept)"
            + (f"; {across:,} pairs across train and test" if across else ""),
        )
    table.add_row("skipped", f"{result['skipped']:,}")
    for name, reason in result["skipped_examples"].items():
        table.add_row("", escape(f"{name}: {reason}"))
    for note in result["notes"]:
        table.add_row("note", escape(note))
    table.add_row("hash", result["hash"][:16])
    if "sheet" in result:
        table.add_row("contact sheet", escape(result["sheet"]))
    console.print(table)


@contextmanager
def _bars(console: Console) -> Iterator[Told]:
    """A progress bar for each stage, with its rate and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}

    def told(stage: str, done: int, total: int) -> None:
        # Started with the first image, so that a source that is refused at once draws no bar.
        bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, rate="")
        speed = bars.tasks[tasks[stage]].speed
        bars.update(tasks[stage], completed=done, total=total, rate=f"{speed:,.0f} images/s" if speed else "")

    try:
        yield told
    finally:
        if tasks:
            bars.stop()
