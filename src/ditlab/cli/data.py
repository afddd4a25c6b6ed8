"""`ditlab data`: make an image set, look into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditlab.cli.common import noting
from ditlab.data.autoencoder import reopen_autoencoder
from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.data.imageset import ImageSet
from ditlab.data.latents import LatentRecord
from ditlab.data.pixels import to_uint8
from ditlab.data.preparing import default_folder, prepare
from ditlab.data.sources.base import SkippedItem
from ditlab.errors import DitlabError
from ditlab.progress import Bar, Reporter
from ditlab.rng import numpy_generator
from ditlab.training.distributed import pick_device


@dataclass(frozen=True)
class Prepare:
    """Make an image set: images of one size in one memory-mapped file, with labels, hashes and a manifest.

    Example: `ditlab data prepare folder:~/pictures sets/pictures --size 32`
    """

    source: tyro.conf.Positional[str]
    """photos, digits, a folder of images (PATH or folder:PATH), hub:ID, array:PATH or mosaic:PATH."""
    out: tyro.conf.Positional[Path | None] = None
    """The folder to make; it appears whole or not at all (image-sets/SOURCE-SIZE if not given)."""
    held_out: str | None = None
    """A second source, of the images to test on; those of the first are then only trained on."""
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
        images = prepare(
            self.source,
            self.out or default_folder(self.source, self.size, self.color, self.held_out),
            size=self.size,
            color=self.color,
            upscale=self.upscale,
            held_out=self.held_out,
            options={name: getattr(self, name) for name in names if getattr(self, name) is not None},
            near_duplicates=self.near_duplicates,
            near_limit=self.near_limit,
            overwrite=self.overwrite,
            reporter=BarReporter(console),
        )
        result = summary(images)
        print_summary(console, result)
        console.print(f"Look at it with: ditlab data info {escape(str(images.path))}")
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
    count: int | None = None
    """Images on the contact sheet; 100, or 16 of latents, which have to be decoded, where not given."""
    seed: int = 0
    """Another seed shows other images."""
    verify: bool = False
    """Read every file again and compare its hash with the manifest's."""
    codec: str | None = None
    """Where the autoencoder of latents lies now, if it was moved."""
    device: str | None = None
    """Where latents are decoded: cpu, cuda or cuda:N; CUDA where there is one."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints and returns `summary`, with the contact sheet's path under "sheet"."""
        opened = ImageSet.open(self.path)
        if self.verify:
            opened.verify()
        count = (100 if opened.latents is None else 16) if self.count is None else self.count
        if count < 1:
            raise DitlabError(f"contact sheet: expected at least 1 image, found {count}")
        result = summary(opened)
        result["verified"] = self.verify
        sheet = self.sheet or self.path / "contact_sheet.png"
        shown = numpy_generator(self.seed, "contact sheet").permutation(len(opened))[:count]
        if opened.labels is not None:
            shown = shown[np.argsort(opened.labels[shown], kind="stable")]
        images = opened.take(shown) if opened.latents is None else self._decoded(opened, shown, result)
        try:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            image_grid(images, scale=fitting_scale(max(images.shape[2:]))).save(sheet, format="PNG")
        except OSError as error:
            raise DitlabError(f"contact sheet: could not write {sheet} ({error.strerror or error})") from None
        result["sheet"] = str(sheet)
        print_summary(console, result)
        return result

    def _decoded(self, opened: ImageSet, shown: np.ndarray, result: dict[str, Any]) -> np.ndarray:
        """What stored latents look like, uint8; notes how near that is to the pictures, where those are at hand."""
        assert opened.latents is not None
        codec = reopen_autoencoder(opened.latents.record.codec, opened.path, self.codec).to(pick_device(self.device))
        images = to_uint8(codec.decode(opened.batch(shown))).numpy()
        pictures = opened.original
        if pictures is not None:
            errors = (images.astype(np.float64) - pictures.take(shown)) ** 2
            result["latents"]["round_trip_db"] = float(10 * np.log10(255**2 / max(errors.mean(), 1e-9)))
        return images


def summary(imageset: ImageSet) -> dict[str, Any]:
    """What there is to say about an image set, JSON-able."""
    manifest = imageset.manifest
    near = manifest.near_duplicates
    latents = {} if manifest.latents is None else {"latents": _latents(manifest.latents)}
    return {
        "path": str(imageset.path),
        "source": manifest.source,
        "images": len(imageset),
        "shape": list(imageset.shape),
        "megabytes": round(sum(record.bytes for record in manifest.files.values()) / 1e6, 2),
        "classes": dict(zip(manifest.class_names, manifest.label_counts, strict=True)),
        "pools": manifest.pools,
        "exact_duplicates_dropped": manifest.exact_duplicates,
        "exact_duplicate_files": [list(pair) for pair in manifest.duplicate_names[:5]],
        "near_duplicates": None
        if near is None
        else {
            "threshold": near.threshold,
            "searched": near.searched,
            "pairs": near.pairs,
            "images": near.images,
            "pairs_across_train_and_test": near.across_pools,
            "most_similar": [list(pair) for pair in near.examples[:5]],
            "most_similar_files": [
                [imageset.source_of(first), imageset.source_of(second)] for first, second, _ in near.examples[:5]
            ],
        },
        "skipped": manifest.skipped_count,
        "skipped_kinds": manifest.skipped_kinds,
        "skipped_summary": manifest.skipped_summary(),
        "skipped_examples": {item.name: item.reason for item in _images_first(manifest.skipped)[:10]},
        "notes": list(manifest.notes),
        "hash": imageset.hash,
        **latents,
    }


def _images_first(skipped: Sequence[SkippedItem]) -> list[SkippedItem]:
    """Skipped images before files that are no images, which their endings describe."""
    return sorted(skipped, key=lambda item: item.kind.startswith("."))


def _latents(record: LatentRecord) -> dict[str, Any]:
    """What there is to say about latents, JSON-able."""
    return {
        "codec": asdict(record.codec),
        "store": record.store,
        "mirrored": record.mirrored,
        "precision": record.precision,
        "picture": list(record.picture),
        "pictures": record.pictures,
        "channel_mean": [round(value, 4) for value in record.mean],
        "channel_std": [round(value, 4) for value in record.std],
        "overall_std": round(record.overall_std, 4),
    }


def print_summary(console: Console, result: dict[str, Any]) -> None:
    """Prints what `summary` gave as a table."""
    channels, height, width = result["shape"]
    pools, near = result["pools"], result["near_duplicates"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("image set", escape(f"{result['path']}  ({result['source']})"))
    table.add_row("images", f"{result['images']:,} of {channels}x{height}x{width}, {result['megabytes']:,} MB")
    if "latents" in result:
        _latent_rows(table, result["latents"])
    if pools["free"]:
        table.add_row("pools", "free: a split chooses train and test images")
    else:
        table.add_row("pools", f"{pools['train']:,} only to train, {pools['test']:,} only to test")
    if result["classes"]:
        listed = ", ".join(f"{name} {count:,}" for name, count in list(result["classes"].items())[:20])
        more = ", ..." if len(result["classes"]) > 20 else ""
        table.add_row("classes", escape(f"{len(result['classes'])}: {listed}{more}"))
    table.add_row("exact duplicates", f"{result['exact_duplicates_dropped']:,} dropped")
    for dropped, earlier in result["exact_duplicate_files"]:
        table.add_row("", escape(f"{dropped} is {earlier}"))
    if near is not None:
        across = near["pairs_across_train_and_test"]
        table.add_row(
            "near-duplicates",
            f"{near['pairs']:,} pairs, {near['images']:,} images (correlation > {near['threshold']}, kept)"
            + (f"; {across:,} pairs across train and test" if across else ""),
        )
        for first, second in near["most_similar_files"]:
            if first and second:
                table.add_row("", escape(f"{first} and {second}"))
    table.add_row("skipped", escape(result["skipped_summary"].removeprefix("skipped ") or "none"))
    for name, reason in result["skipped_examples"].items():
        table.add_row("", escape(f"{name}: {reason}"))
    for note in result["notes"]:
        table.add_row("note", escape(note))
    table.add_row("hash", result["hash"][:16])
    if "sheet" in result:
        table.add_row("contact sheet", escape(result["sheet"]))
    console.print(table)


def _latent_rows(table: Table, latents: dict[str, Any]) -> None:
    codec = latents["codec"]
    size = "x".join(map(str, latents["picture"]))
    stored = {"moments": "mean and standard deviation", "sample": "one sample each", "mean": "the mean"}
    mirrored = ", of the mirrored pictures too" if latents["mirrored"] else ""
    table.add_row("latents", f"of pictures {size}: {stored[latents['store']]}{mirrored}")
    scaled = f"scale {codec['scale']:g}" + (f", shift {codec['shift']:g}" if codec["shift"] else "")
    table.add_row("codec", escape(f"{codec['source']} ({codec['kind']}, {scaled}, {codec['sha256'][:16]})"))
    low, high = min(latents["channel_std"]), max(latents["channel_std"])
    table.add_row(
        "scaled",
        f"standard deviation {latents['overall_std']:.3f} (EDM presets: --objective.sigma-data), "
        f"of single channels {low:.2f} to {high:.2f}",
    )
    if "round_trip_db" in latents:
        table.add_row("round trip", f"{latents['round_trip_db']:.1f} dB PSNR of the pictures on the sheet")


class BarReporter(Reporter):
    """Prints notes, and draws a bar with its rate and the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, sentence: str) -> None:
        """Prints the sentence as a note."""
        noting(self.console)(sentence)

    @contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """Draws a bar within the block."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, rate="")

            class Drawn(Bar):
                def __call__(self, done: int, total: int | None = None, **fields: object) -> None:
                    speed = progress.tasks[task].speed
                    rate = f"{speed:,.0f} images/s" if speed else ""
                    progress.update(task, completed=done, total=total, rate=rate)

            yield Drawn()
