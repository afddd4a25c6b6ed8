"""Image sets: sources, preparation, splits, augmentation, contact sheets."""

from ditlab.data.augment import flip
from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.data.imageset import ImageSet, prepare
from ditlab.data.pixels import to_float, to_uint8
from ditlab.data.sources.base import Fit, Item, Skipped, Source
from ditlab.data.sources.files import read_source
from ditlab.data.splits import Split, make_split, verify

__all__ = [
    "Fit",
    "ImageSet",
    "Item",
    "Skipped",
    "Source",
    "Split",
    "fitting_scale",
    "flip",
    "image_grid",
    "make_split",
    "prepare",
    "read_source",
    "to_float",
    "to_uint8",
    "verify",
]
