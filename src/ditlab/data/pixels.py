"""Pixels: decoding image files, fitting them to a square, and the two number formats ditlab keeps them in.

Images rest as `uint8 [N, C, H, W]` and are worked on as `float32 [B, C, H, W]` in [-1, 1]. The fit is the centre crop
of Dhariwal and Nichol's ADM ("Diffusion Models Beat GANs on Image Synthesis", 2021): halve with a box filter while the
short side is at least twice the target, resize with a bicubic filter so that the short side is the target, crop the
middle.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from ditlab.errors import DitlabError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Color",
    "UnusableImage",
    "centre_crop",
    "channels",
    "decode",
    "flip",
    "planes",
    "to_color",
    "to_float",
    "to_uint8",
]

Color = Literal["rgb", "grey"]


def channels(color: Color) -> int:
    """Returns the number of channels of a colour format: 3 for "rgb", 1 for "grey"."""
    if color not in ("rgb", "grey"):
        raise DitlabError(f"color: expected 'rgb' or 'grey', found {color!r}")
    return 3 if color == "rgb" else 1


_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, struct.error)
"""What Pillow's decoders raise for damaged files: SyntaxError for broken PNG chunks, KeyError for unknown tags."""


class UnusableImage(DitlabError):
    """An image that cannot be used; `kind` is the short reason by which such images are counted (`reason` if empty)."""

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind or reason


def decode(source: Path | bytes, color: Color) -> Image.Image:
    """Reads the first frame of an image file, upright (EXIF) and in 8 bits, with transparency over white.

    "rgb" gives PIL mode RGB, "grey" mode L (ITU-R 601 luma). A file that is no image, is truncated, or is too large to
    be one raises UnusableImage.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()
            return to_color(ImageOps.exif_transpose(opened), color)
    except DitlabError:
        raise
    except UnidentifiedImageError:
        raise UnusableImage("not an image file", "not images") from None
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise UnusableImage(f"unreadable image: {error}", "unreadable") from None


def to_color(image: Image.Image, color: Color) -> Image.Image:
    """Returns the image in 8-bit RGB or grey: 16-bit samples scaled down, transparency composited over white.

    Floating-point samples, whose range a file does not say, raise UnusableImage.
    """
    from PIL import Image

    if image.mode == "F":
        raise UnusableImage("floating-point samples, expected 8 or 16 bits", "with floating-point samples")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels(color) == 3 else "L")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Returns ADM's centre crop: `size` x `size` from the middle, antialiased by box halvings and one bicubic step.

    An image whose short side is below `size` is enlarged.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        fitted = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        image = image.resize(fitted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def planes(image: Image.Image) -> np.ndarray:
    """Returns a PIL image (mode RGB or L) as uint8 [C, H, W]."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def flip(images: Shaped[Tensor, "b c h w"], flip_mask: Bool[Tensor, " b"]) -> Shaped[Tensor, "b c h w"]:
    """Mirrors the images whose entry in `flip_mask` is True, left to right."""
    return torch.where(flip_mask[:, None, None, None], images.flip(-1), images)


def to_float(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Converts uint8 in [0, 255] to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Converts [-1, 1] to uint8: clips, then rounds to the nearest of 256 values (so `to_uint8(to_float(x)) == x`)."""
    return images.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
