"""Image sets: sources, preparation, held-out images, splits, augmentation, contact sheets."""

from ditlab.data.augment import flip
from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.data.held_out import prepare_held_out
from ditlab.data.imageset import ImageSet
from ditlab.data.pixels import to_float, to_uint8
from ditlab.data.preparing import default_folder, prepare
from ditlab.data.sources.base import CropRule, Item, SkippedItem, Source
from ditlab.data.sources.files import is_source, read_source
from ditlab.data.splits import Split, held_out_order, make_split, verify

__all__ = [
    "CropRule",
    "ImageSet",
    "Item",
    "SkippedItem",
    "Source",
    "Split",
    "default_folder",
    "fitting_scale",
    "flip",
    "held_out_order",
    "image_grid",
    "is_source",
    "make_split",
    "prepare",
    "prepare_held_out",
    "read_source",
    "to_float",
    "to_uint8",
    "verify",
]
