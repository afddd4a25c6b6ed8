"""The sources by name: `photos`, `digits`, `folder:PATH`, `hub:ID`, `array:PATH`, `mosaic:PATH`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditlab.data.imageset import is_image_set
from ditlab.data.manifest import hash_file
from ditlab.data.pixels import Color, UnusableImage, decode
from ditlab.data.sources.base import TEST, TRAIN, CropRule, Item, SkippedItem, Source
from ditlab.data.sources.folder import Folder, listing_hash
from ditlab.data.sources.hub import Hub
from ditlab.data.sources.photos import Photos
from ditlab.errors import DitlabError, unknown_name

Arrays = dict[str, np.ndarray] | np.lib.npyio.NpzFile

__all__ = ["SOURCES", "Array", "Digits", "Mosaic", "is_source", "read_source", "source_name"]


def read_source(
    spec: str, size: int, *, color: Color = "rgb", upscale: bool = False, options: Mapping[str, Any] | None = None
) -> Source:
    """Opens a source by name, checking all that can be checked before the images are read.

    Args:
        spec: `photos`, `digits`, `folder:PATH`, `hub:ID`, `array:PATH`, `mosaic:PATH`, or the path of a folder of
            images.
        size: height and width to which images are fitted, in pixels.
        color: "rgb" (3 channels) or "grey" (1 channel).
        upscale: enlarge images below `size` instead of skipping them.
        options: keyword arguments of that source's class, e.g. `{"stride": 8}` for `photos`.

    Raises:
        DitlabError: an unknown source or option, a path that does not exist, a source without images.
    """
    spec = source_name(spec)
    kind, _, where = spec.partition(":")
    if kind not in SOURCES:
        names = [name + (":..." if takes_path else "") for name, (_, takes_path) in SOURCES.items()]
        raise unknown_name("source", spec, names)
    make, takes_path = SOURCES[kind]
    if takes_path and not where:
        raise DitlabError(
            f"source '{spec}': expected {kind}:{'ID' if kind == 'hub' else 'PATH'}, found nothing after it"
        )
    if where and not takes_path:
        raise DitlabError(f"source '{spec}': expected just '{kind}', which takes no path")
    options = dict(options or {})
    known = set(make.__init__.__annotations__) - {"rule", "where", "return"}
    for name in options:
        if name not in known:
            raise DitlabError(f"source '{kind}' has no option '{name}' (it has: {', '.join(sorted(known)) or 'none'})")
    rule = CropRule(size, color, upscale)
    return make(rule, where, **options) if takes_path else make(rule, **options)


def source_name(spec: str) -> str:
    """Returns a source's full name: `folder:PATH` for the bare path of a folder of images, else the name itself.

    A folder that is an image set, or that holds a config.json (a run, a diffusers model), is no folder of images.
    """
    kind = spec.partition(":")[0]
    path = Path(spec).expanduser()
    if kind in SOURCES or not path.is_dir() or is_image_set(path) or (path / "config.json").exists():
        return spec
    return f"folder:{spec}"


def is_source(spec: str) -> bool:
    """Returns whether a string names a source of images, rather than the folder of an image set."""
    kind, colon, _ = source_name(spec).partition(":")
    return not is_image_set(Path(spec)) and kind in SOURCES and bool(colon) == SOURCES[kind][1]


class Digits(Source):
    """The 1,797 handwritten digits of scikit-learn (8x8, 17 grey levels), classes 0 to 9; pools are free."""

    def __init__(self, rule: CropRule) -> None:
        from sklearn.datasets import load_digits

        self.rule = rule
        # Rows of 64 values from 0 to 16, which become 0 to 255.
        images, self.labels = load_digits(return_X_y=True)
        self.images = (np.asarray(images).reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.class_names = tuple(str(digit) for digit in range(10))
        self.count = len(self.images)
        _refuse_small(rule, "digits", 8)

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        from PIL import Image

        for index, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            yield Item(self.rule(Image.fromarray(image)), f"digit {index}", int(label))


class Array(Source):
    """A NumPy file of uint8 images, [N, H, W, C], [N, C, H, W] or [N, H, W], with C of 1 or 3; pools are free.

    Args:
        where: a `.npy` file, or a `.npz` with the images and perhaps labels.
        images_key: name of the images in the `.npz`; if None: `images`, `x` or `arr_0`, or the only array.
        labels_key: name of the labels (integers [N], from 0); where None: `labels`, `label` or `y` if present.
    """

    def __init__(
        self, rule: CropRule, where: str, *, images_key: str | None = None, labels_key: str | None = None
    ) -> None:
        self.rule = rule
        self.path = path = Path(where).expanduser()
        arrays = _load_arrays(path)
        images_key = images_key or _find_key(path, arrays, ("images", "x", "arr_0"))
        images = _get(path, arrays, images_key)
        if images.dtype != np.uint8:
            raise DitlabError(f"{path}: expected '{images_key}' to hold uint8 images, found {images.dtype}")
        self.images = _channels_last(images, f"{path}: '{images_key}'")
        self.count = len(self.images)
        if self.count == 0:
            raise DitlabError(f"{path}: '{images_key}' holds no images")
        _refuse_small(rule, str(path), min(self.images.shape[1:3]))
        labels_key = labels_key or next((key for key in ("labels", "label", "y") if key in arrays), None)
        self.labels = None
        if labels_key is not None:
            labels = _get(path, arrays, labels_key)
            if labels.shape != (self.count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
                raise DitlabError(
                    f"{path}: expected '{labels_key}' to hold {self.count} integers from 0, "
                    f"found {labels.dtype} {list(labels.shape)}"
                )
            self.labels = labels
            self.class_names = tuple(str(index) for index in range(int(labels.max()) + 1))

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        from PIL import Image

        for index in range(self.count):
            image = self.images[index]
            label = None if self.labels is None else int(self.labels[index])
            pixels = self.rule(Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image)))
            yield Item(pixels, f"image {index}", label)

    def origin(self) -> dict[str, Any]:
        """Returns the file's hash."""
        return {"sha256": hash_file(self.path).sha256}


class Mosaic(Source):
    """Images stored as square lossless mosaics, images row by row, beside a `manifest.json` with counts and labels.

    `mosaic:DIR/NAME` reads `DIR/manifest.json` and `DIR/NAME_train_00.webp`, ... , `DIR/NAME_test_00.webp`, ...; the
    pools are the set's own train and test parts.
    """

    def __init__(self, rule: CropRule, where: str) -> None:
        self.rule = rule
        path = Path(where).expanduser()
        self.folder, self.name = path.parent, path.name
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            raise DitlabError(f"mosaic source '{where}': expected {manifest}, found no such file")
        try:
            sets = json.loads(manifest.read_text())
            if self.name not in sets:
                raise unknown_name(f"mosaic set in {self.folder}:", self.name, sets)
            entry = sets[self.name]
            self.side = int(entry["size"])
            self.parts = [(part, int(entry[part]["count"]), int(entry[part]["mosaics"])) for part in ("train", "test")]
            self.labels = {part: entry[part].get("labels") for part in ("train", "test")}
            self.class_names = tuple(entry.get("label_names", ()))
        except DitlabError:
            raise
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            found = f"found {error!r} in set {self.name}"
            raise DitlabError(f"{manifest}: expected a manifest of mosaics, {found}") from None
        _refuse_small(rule, f"mosaic set {self.name}", self.side)
        self.count = sum(count for _, count, _ in self.parts)
        self.files = [self._file(part, index) for part, _, mosaics in self.parts for index in range(mosaics)]
        missing = next((file for file in self.files if not file.is_file()), None)
        if missing is not None:
            raise DitlabError(f"mosaic source: expected {missing}, found no such file")

    def _file(self, part: str, index: int) -> Path:
        return self.folder / f"{self.name}_{part}_{index:02d}.webp"

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        from PIL import Image

        for part, count, mosaics in self.parts:
            number, labels = 0, self.labels[part] if self.class_names else None
            for index in range(mosaics):
                file = self._file(part, index)
                try:
                    pixels = np.asarray(decode(file, self.rule.color))
                except UnusableImage as error:
                    cells = (1024 // self.side) ** 2
                    yield SkippedItem(file.name, str(error), error.kind)
                    number += min(cells, count - number)
                    continue
                rows, columns = pixels.shape[0] // self.side, pixels.shape[1] // self.side
                for cell in range(min(rows * columns, count - number)):
                    top, left = cell // columns * self.side, cell % columns * self.side
                    image = Image.fromarray(pixels[top : top + self.side, left : left + self.side])
                    label = None if labels is None else int(labels[number])
                    yield Item(self.rule(image), f"{file.name} cell {cell}", label, TRAIN if part == "train" else TEST)
                    number += 1

    def origin(self) -> dict[str, Any]:
        """Returns a hash of the mosaics' names and sizes."""
        return {"listing": listing_hash((file.relative_to(self.folder), file.stat().st_size) for file in self.files)}


SOURCES: dict[str, tuple[Any, bool]] = {
    "photos": (Photos, False),
    "digits": (Digits, False),
    "folder": (Folder, True),
    "hub": (Hub, True),
    "array": (Array, True),
    "mosaic": (Mosaic, True),
}
"""Kind -> (class, whether something follows the colon)."""


def _refuse_small(rule: CropRule, what: str, side: int) -> None:
    if side < rule.size and not rule.upscale:
        raise DitlabError(
            f"{what}: its images are {side} pixels high or wide, below the size of {rule.size}; "
            "choose a smaller size or allow upscaling"
        )


def _load_arrays(path: Path) -> Arrays:
    if not path.is_file():
        raise DitlabError(f"array source: expected a .npy or .npz file at {path}, found no such file")
    with path.open("rb") as file:
        magic = file.read(6)
    if magic != b"\x93NUMPY" and not magic.startswith(b"PK"):
        raise DitlabError(f"{path}: expected a .npy or .npz file, found another format (pickles are not read)")
    try:
        loaded = np.load(path, mmap_mode="r" if magic == b"\x93NUMPY" else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DitlabError(f"{path}: {_pickled_or(error)}") from None
    return {"array": loaded} if isinstance(loaded, np.ndarray) else loaded


def _pickled_or(error: Exception) -> str:
    if "pickle" in str(error).lower() or "object" in str(error).lower():
        return "expected plain numbers, found pickled objects, which ditlab never loads"
    return f"unreadable NumPy file: {error}"


def _find_key(path: Path, arrays: Arrays, usual: tuple[str, ...]) -> str:
    names = [name for name in usual if name in arrays][:1] or list(arrays)
    if len(names) == 1:
        return names[0]
    raise DitlabError(
        f"{path}: expected images under one of {', '.join(usual)} or a key given, found {', '.join(names)}"
    )


def _get(path: Path, arrays: Arrays, key: str) -> np.ndarray:
    try:
        return arrays[key]
    except KeyError:
        raise DitlabError(f"{path}: expected an array '{key}', found {', '.join(arrays)}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DitlabError(f"{path}: array '{key}': {_pickled_or(error)}") from None


def _channels_last(images: np.ndarray, what: str) -> np.ndarray:
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[-1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    raise DitlabError(
        f"{what}: expected shape [N, H, W, C], [N, C, H, W] or [N, H, W] with C 1 or 3, found {list(images.shape)}"
    )
