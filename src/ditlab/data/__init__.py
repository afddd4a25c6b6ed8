"""Image sets: sources, preparation, held-out images, splits, augmentation, contact sheets.

Names are imported when they are first used, so that settings in this folder are read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditlab.data.contact_sheet import fitting_scale, image_grid
    from ditlab.data.held_out import prepare_held_out
    from ditlab.data.imageset import ImageSet
    from ditlab.data.pixels import flip, to_float, to_uint8
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

_MODULES = {
    "contact_sheet": ("fitting_scale", "image_grid"),
    "held_out": ("prepare_held_out",),
    "imageset": ("ImageSet",),
    "pixels": ("flip", "to_float", "to_uint8"),
    "preparing": ("default_folder", "prepare"),
    "sources.base": ("CropRule", "Item", "SkippedItem", "Source"),
    "sources.files": ("is_source", "read_source"),
    "splits": ("Split", "held_out_order", "make_split", "verify"),
}
"""Module -> its names."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"ditlab.data.{module}"), name)
    raise AttributeError(f"module 'ditlab.data' has no attribute '{name}'")
