"""Images from the Hugging Face hub, or from a local folder in the hub's layout, by the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditlab.data.sources.base import TEST, TRAIN, CropRule, Item, SkippedItem, Source
from ditlab.errors import DitlabError, unknown_name

__all__ = ["Hub"]


class Hub(Source):
    """A dataset of the hub: its first image column, and its first class column if it has any.

    With one split the pools are free. With several, `train` is the train pool and the others are the test pool.

    Args:
        where: the dataset's id, e.g. `uoft-cs/cifar10`, or a local folder that `datasets.load_dataset` understands.
        image_column: the column of images; the first one if None.
        label_column: the column of classes (`ClassLabel`, or integers from 0); the first `ClassLabel` if None.
        config: which configuration of the dataset, if it has several.
        splits: which splits to read; if None: `train` and `test` (or `validation`), or the only one.
    """

    def __init__(
        self,
        rule: CropRule,
        where: str,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        config: str | None = None,
        splits: tuple[str, ...] | None = None,
    ) -> None:
        self.rule = rule
        dataset = _load(where, config)
        names = splits or _usual_splits(list(dataset))
        for name in names:
            if name not in dataset:
                raise unknown_name(f"split of '{where}':", name, dataset)
        self.splits = {name: dataset[name] for name in names}
        features = next(iter(self.splits.values())).features
        self.image_column = _image_column(where, features, image_column)
        self.label_column = _label_column(where, features, label_column)
        self.class_names = self._class_names(features)
        self.count = sum(len(rows) for rows in self.splits.values())
        if self.count == 0:
            raise DitlabError(f"hub source '{where}': its splits {', '.join(names)} hold no rows")

    def _class_names(self, features: Any) -> tuple[str, ...]:
        from datasets import ClassLabel

        if self.label_column is None:
            return ()
        feature = features[self.label_column]
        if isinstance(feature, ClassLabel):
            return tuple(feature.names)
        labels = (label for rows in self.splits.values() for label in rows[self.label_column] if label is not None)
        return tuple(str(index) for index in range(max(labels, default=-1) + 1))

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        from datasets import Image

        for name, rows in self.splits.items():
            pool = None if len(self.splits) == 1 else TRAIN if name == "train" else TEST
            columns = [self.image_column] + ([self.label_column] if self.label_column else [])
            # Undecoded, so that a damaged file is named and skipped instead of ending the reading.
            rows = rows.select_columns(columns).cast_column(self.image_column, Image(decode=False))
            for index, row in enumerate(rows):
                cell = row[self.image_column] or {}
                where = f"{name} row {index}" + (f" ({Path(cell['path']).name})" if cell.get("path") else "")
                if not cell.get("bytes") and not cell.get("path"):
                    yield SkippedItem(where, "no image in this row", "rows without an image")
                    continue
                label = row[self.label_column] if self.label_column else None
                # The hub's convention for an unknown class is -1.
                label = None if label is None or label < 0 else int(label)
                yield self.read(cell.get("bytes") or Path(cell["path"]), where, label, pool)

    def origin(self) -> dict[str, Any]:
        """Returns the dataset's columns, its splits and the fingerprints of `datasets`."""
        prints = {name: getattr(rows, "_fingerprint", "") for name, rows in self.splits.items()}
        return {"image_column": self.image_column, "label_column": self.label_column, "splits": prints}


def _load(where: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise DitlabError("hub source: needs the package `datasets` (pip install 'ditlab[hub]')") from None

    if where.startswith((".", "/", "~")):
        path = Path(where).expanduser()
        if not path.is_dir():
            raise DitlabError(f"hub source: expected a dataset folder at {path}, found none")
        where = str(path)
    try:
        return datasets.load_dataset(where, config)
    except Exception as error:  # Loaders, download layers and file systems raise types that share no base class.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DitlabError(f"hub source '{where}': could not be loaded (is the network reachable?): {first}") from None


def _usual_splits(names: list[str]) -> tuple[str, ...]:
    if len(names) == 1 or "train" not in names:
        return tuple(names)
    held_out = next((name for name in ("test", "validation") if name in names), None)
    return ("train", held_out) if held_out else ("train",)


def _image_column(where: str, features: Any, column: str | None) -> str:
    from datasets import Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not images or (column is not None and column not in images):
        named = "" if column is None else f" '{column}'"
        raise DitlabError(f"hub source '{where}': expected an image column{named}, found columns {_listed(features)}")
    return column or images[0]


def _label_column(where: str, features: Any, column: str | None) -> str | None:
    from datasets import ClassLabel

    if column is None:
        return next((name for name, feature in features.items() if isinstance(feature, ClassLabel)), None)
    feature = features.get(column)
    if isinstance(feature, ClassLabel) or str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        return column
    raise DitlabError(f"hub source '{where}': expected a class column '{column}', found columns {_listed(features)}")


def _listed(features: Any) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
