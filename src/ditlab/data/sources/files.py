"""The sources that a name can ask for: `photos`, `digits`, `folder:PATH`, `hub:ID`, `array:PATH`, `mosaic:PATH`."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditlab.data.pixels import Color, decode
from ditlab.data.sources.base import TEST, TRAIN, Fit, Item, Skipped, Source
from ditlab.data.sources.hub import Hub
from ditlab.data.sources.photos import Photos
from ditlab.errors import DitlabError, unknown_name

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_source(
    spec: str,
    size: int,
    *,
    color: Color = "rgb",
    upscale: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Source:
    """Opens a source by name, checking all that can be checked before the images are read.

    Args:
        spec: `photos`, `digits`, `folder:PATH`, `hub:ID`, `array:PATH`, or `mosaic:PATH`.
        size: height and width to which images are fitted, in pixels.
        color: "rgb" (3 channels) or "grey" (1 channel).
        upscale: enlarge images below `size` instead of skipping them.
        options: keyword arguments of that source's class, e.g. `{"stride": 8}` for `photos`.

    Raises:
        DitlabError: an unknown source or option, a path that does not exist, a source without images.
    """
    kind, _, where = spec.partition(":")
    if kind not in SOURCES:
        raise unknown_name("source", spec, [name + (":..." if takes else "") for name, (_, takes) in SOURCES.items()])
    make, takes_path = SOURCES[kind]
    if takes_path and not where:
        raise DitlabError(
            f"source '{spec}': expected {kind}:{'ID' if kind == 'hub' else 'PATH'}, found nothing after it"
        )
    if where and not takes_path:
        raise DitlabError(f"source '{spec}': expected just '{kind}', which takes no path")
    given = dict(options or {})
    known = set(make.__init__.__annotations__) - {"fit", "where", "return"}
    for name in given:
        if name not in known:
            raise DitlabError(f"source '{kind}' has no option '{name}' (it has: {', '.join(sorted(known)) or 'none'})")
    fit = Fit(size, color, upscale)
    return make(fit, where, **given) if takes_path else make(fit, **given)


class Digits(Source):
    """The 1,797 handwritten digits of scikit-learn (8x8, 17 grey levels), classes 0 to 9; pools are free.

    Raises:
        DitlabError: the size is above 8 and `upscale` is off.
    """

    def __init__(self, fit: Fit) -> None:
        from sklearn.datasets import load_digits

        self.fit = fit
        # Rows of 64 values from 0 to 16, which become 0 to 255.
        images, self.labels = load_digits(return_X_y=True)
        self.images = (np.asarray(images).reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.class_names = tuple(str(digit) for digit in range(10))
        self.count = len(self.images)
        _refuse_small(fit, "digits", 8)

    def __iter__(self) -> Iterator[Item | Skipped]:
        from PIL import Image

        for index, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            yield Item(self.fit(Image.fromarray(image)), f"digit {index}", int(label))


class Folder(Source):
    """Every PNG, JPEG and WebP file below a folder, in the order of their names.

    The class of an image is the subfolder it lies in (the first below the root); where some images lie in the root
    itself there are no classes. A root that holds exactly the folders `train` and `test` fixes the pools, and the
    classes are the folders below those.

    Raises:
        DitlabError: the path is missing, is not a folder, or holds no image file.
    """

    def __init__(self, fit: Fit, where: str) -> None:
        self.fit = fit
        self.root = Path(where).expanduser()
        if not self.root.exists():
            raise DitlabError(f"folder source: expected a folder at {self.root}, found nothing")
        if not self.root.is_dir():
            raise DitlabError(f"folder source: expected a folder at {self.root}, found a file")
        self.files = _image_files(self.root)
        if not self.files:
            raise DitlabError(f"folder source: no PNG, JPEG or WebP file below {self.root}")
        self.count = len(self.files)
        self.pooled = {file.parts[0] for file in self.files} == {"train", "test"}
        below = [file.parts[1:] if self.pooled else file.parts for file in self.files]
        if all(len(parts) > 1 for parts in below):
            self.class_names = tuple(sorted({parts[0] for parts in below}))
        self.classes = [parts[0] for parts in below]

    def __iter__(self) -> Iterator[Item | Skipped]:
        index_of = {name: index for index, name in enumerate(self.class_names)}
        for file, name in zip(self.files, self.classes, strict=True):
            pool = None if not self.pooled else TRAIN if file.parts[0] == "train" else TEST
            try:
                yield Item(self.fit(decode(self.root / file, self.fit.color)), str(file), index_of.get(name), pool)
            except DitlabError as error:
                yield Skipped(str(file), str(error))

    def origin(self) -> dict[str, Any]:
        """A hash of the files' names and sizes."""
        return {"files": len(self.files), "listing": _listing(self.root, self.files)}


class Array(Source):
    """A NumPy file of uint8 images, [N, H, W, C], [N, C, H, W] or [N, H, W], with C of 1 or 3; pools are free.

    Args:
        fit: size and colour.
        where: a `.npy` file, or a `.npz` with the images and perhaps labels.
        images_key: name of the images in the `.npz`; where None: `images`, `x` or `arr_0`, else the only 3-4-D array.
        labels_key: name of the labels (integers [N], from 0); where None: `labels`, `label` or `y` where present.

    Raises:
        DitlabError: no such file, not a NumPy file, pickled objects inside, another dtype or shape.
    """

    def __init__(self, fit: Fit, where: str, *, images_key: str | None = None, labels_key: str | None = None) -> None:
        self.fit = fit
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
        _refuse_small(fit, str(path), min(self.images.shape[1:3]))
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

    def __iter__(self) -> Iterator[Item | Skipped]:
        from PIL import Image

        for index in range(self.count):
            image = self.images[index]
            label = None if self.labels is None else int(self.labels[index])
            pixels = self.fit(Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image)))
            yield Item(pixels, f"image {index}", label)

    def origin(self) -> dict[str, Any]:
        """The file's hash."""
        with self.path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class Mosaic(Source):
    """Sets stored as square lossless mosaics, images row by row, beside a `manifest.json` with counts and labels.

    `mosaic:DIR/NAME` reads `DIR/manifest.json` and `DIR/NAME_train_00.webp`, ... , `DIR/NAME_test_00.webp`, ...; the
    pools are the set's own train and test parts.

    Raises:
        DitlabError: no manifest, no set of that name in it, or a mosaic file is missing.
    """

    def __init__(self, fit: Fit, where: str) -> None:
        self.fit = fit
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
            raise DitlabError(
                f"{manifest}: expected a manifest of mosaics, found {error!r} in set {self.name}"
            ) from None
        _refuse_small(fit, f"mosaic set {self.name}", self.side)
        self.count = sum(count for _, count, _ in self.parts)
        for part, _, mosaics in self.parts:
            for index in range(mosaics):
                if not self._file(part, index).is_file():
                    raise DitlabError(f"mosaic source: expected {self._file(part, index)}, found no such file")

    def _file(self, part: str, index: int) -> Path:
        return self.folder / f"{self.name}_{part}_{index:02d}.webp"

    def __iter__(self) -> Iterator[Item | Skipped]:
        from PIL import Image

        for part, count, mosaics in self.parts:
            number, labels = 0, self.labels[part] if self.class_names else None
            for index in range(mosaics):
                file = self._file(part, index)
                try:
                    pixels = np.asarray(decode(file, self.fit.color))
                except DitlabError as error:
                    cells = (1024 // self.side) ** 2
                    yield Skipped(file.name, str(error))
                    number += min(cells, count - number)
                    continue
                rows, columns = pixels.shape[0] // self.side, pixels.shape[1] // self.side
                for cell in range(min(rows * columns, count - number)):
                    top, left = cell // columns * self.side, cell % columns * self.side
                    image = Image.fromarray(pixels[top : top + self.side, left : left + self.side])
                    label = None if labels is None else int(labels[number])
                    yield Item(self.fit(image), f"{file.name} cell {cell}", label, TRAIN if part == "train" else TEST)
                    number += 1

    def origin(self) -> dict[str, Any]:
        """A hash of the mosaics' names and sizes."""
        files = [self._file(part, index) for part, _, mosaics in self.parts for index in range(mosaics)]
        return {"listing": _listing(self.folder, [file.relative_to(self.folder) for file in files])}


SOURCES: dict[str, tuple[Any, bool]] = {
    "photos": (Photos, False),
    "digits": (Digits, False),
    "folder": (Folder, True),
    "hub": (Hub, True),
    "array": (Array, True),
    "mosaic": (Mosaic, True),
}
"""Kind -> (class, whether something follows the colon)."""


def _refuse_small(fit: Fit, what: str, side: int) -> None:
    if side < fit.size and not fit.upscale:
        raise DitlabError(
            f"{what}: its images are {side} pixels high or wide, below the size of {fit.size}; "
            "choose a smaller size or allow upscaling"
        )


def _image_files(root: Path) -> list[Path]:
    # os.walk, unlike rglob, sorts folder by folder without holding the tree, and says nothing of unreadable folders.
    files = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(folder, name).relative_to(root) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(file for file in files if not file.name.startswith("."))


def _listing(root: Path, files: list[Path]) -> str:
    lines = "\n".join(f"{file.as_posix()} {(root / file).stat().st_size}" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _load_arrays(path: Path) -> dict[str, np.ndarray] | np.lib.npyio.NpzFile:
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


def _find_key(path: Path, arrays: dict[str, np.ndarray] | np.lib.npyio.NpzFile, usual: tuple[str, ...]) -> str:
    names = list(arrays)
    found = [name for name in usual if name in names]
    if found or len(names) == 1:
        return (found or names)[0]
    raise DitlabError(
        f"{path}: expected images under one of {', '.join(usual)} or a key given, found {', '.join(names)}"
    )


def _get(path: Path, arrays: dict[str, np.ndarray] | np.lib.npyio.NpzFile, key: str) -> np.ndarray:
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
