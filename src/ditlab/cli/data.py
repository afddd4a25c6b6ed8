"""`ditlab data prepare` and `ditlab data info`: make an image set, and show what is in one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ditlab.cli.console import Output
from ditlab.cli.data_summary import print_summary
from ditlab.cli.options import keywords

_OF_SOURCES = (
    "stride",
    "scales",
    "flat",
    "image_column",
    "label_column",
    "config",
    "splits",
    "images_key",
    "labels_key",
)


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
    """photos: step between crops, in crop pixels (half the size if not given)."""
    scales: tuple[int, ...] | None = None
    """photos: by how much the photographs are reduced before cropping, one or more factors."""
    flat: float | None = None
    """photos: leave out crops whose grey values have a standard deviation below this (of 255)."""
    image_column: str | None = None
    """hub: the column of images (the first one if not given)."""
    label_column: str | None = None
    """hub: the column of classes (the first class column if not given)."""
    config: str | None = None
    """hub: the dataset's configuration, where it has several."""
    splits: tuple[str, ...] | None = None
    """hub: the splits to read."""
    images_key: str | None = None
    """array: the name of the images in a .npz file."""
    labels_key: str | None = None
    """array: the name of the labels in a .npz file."""

    def run(self, output: Output) -> dict[str, Any]:
        """Makes the set, prints what it holds, and returns the same as JSON values."""
        from ditlab import api
        from ditlab.data.summary import describe

        # Flags that belong to one kind of source are given only if the user set them.
        flags = keywords(self)
        for name in [name for name in _OF_SOURCES if flags[name] is None]:
            del flags[name]
        images = api.prepare(**flags, reporter=output.reporter)
        summary = describe(images)
        print_summary(output, summary)
        output.line(f"Look at it with: ditlab data info {images.path}")
        return summary


@dataclass(frozen=True)
class Info:
    """Show what an image set holds, and draw a contact sheet of it.

    Example: `ditlab data info sets/pictures --verify`
    """

    path: tyro.conf.Positional[Path]
    """The image set's folder."""
    sheet: Path | None = None
    """Where the contact sheet goes (PATH/contact_sheet.png if not given)."""
    count: int | None = None
    """Images on the contact sheet; 100, or 16 of latents, which have to be decoded, if not given."""
    seed: int = 0
    """Another seed shows other images."""
    verify: bool = False
    """Read every file again and compare its hash with the manifest's."""
    codec: str | None = None
    """Where the autoencoder of latents is now, if it was moved."""
    device: str | None = None
    """Where latents are decoded: cpu, cuda or cuda:N; CUDA if there is one."""

    def run(self, output: Output) -> dict[str, Any]:
        """Prints what the set holds, and returns it as JSON values with the contact sheet's path under "sheet"."""
        from ditlab.data import ImageSet
        from ditlab.data.summary import describe, save_contact_sheet
        from ditlab.training.distributed import pick_device

        images = ImageSet.open(self.path)
        if self.verify:
            images.verify()
        sheet, device = self.sheet or self.path / "contact_sheet.png", str(pick_device(self.device))
        psnr = save_contact_sheet(images, sheet, count=self.count, seed=self.seed, codec=self.codec, device=device)
        summary = {**describe(images), "verified": self.verify, "sheet": str(sheet)}
        if psnr is not None:
            summary["latents"]["round_trip_db"] = psnr
        print_summary(output, summary)
        return summary
