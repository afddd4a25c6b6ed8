"""Decoding, the ADM centre crop, and the two number formats."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ditlab.data.pixels import centre_crop, decode, to_float, to_uint8
from ditlab.errors import DitlabError


def _noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _png(image: Image.Image, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix)
    return buffer.getvalue()


def test_crop_of_a_power_of_two_square_is_repeated_2x2_averaging():
    pixels = _noise(64, 64)
    expected = pixels.astype(int)
    for _ in range(3):
        # Pillow filters rows, rounds, then filters columns and rounds; halves go up.
        rows = (expected[:, ::2] + expected[:, 1::2] + 1) // 2
        expected = (rows[::2] + rows[1::2] + 1) // 2
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 8)) == expected).all()


def test_an_image_of_the_right_height_is_only_cropped_in_the_middle():
    pixels = _noise(16, 31)
    found = np.asarray(centre_crop(Image.fromarray(pixels), 16))
    assert (found == pixels[:, 7:23]).all()


def test_halving_stops_below_twice_the_size_and_bicubic_does_the_rest():
    image = Image.fromarray(_noise(100, 70))
    halved = image.resize((35, 50), Image.Resampling.BOX)
    expected = halved.resize((32, 46), Image.Resampling.BICUBIC).crop((0, 7, 32, 39))
    assert (np.asarray(centre_crop(image, 32)) == np.asarray(expected)).all()


@pytest.mark.parametrize(("width", "height"), [(3, 200), (200, 3), (33, 97), (8, 8), (7, 9)])
def test_any_shape_comes_out_square(width: int, height: int):
    assert centre_crop(Image.fromarray(_noise(height, width)), 8).size == (8, 8)


def test_transparency_is_white_and_sixteen_bits_become_eight(tmp_path):
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (np.asarray(decode(_png(transparent), "rgb")) == 255).all()
    deep = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    assert (np.asarray(decode(_png(deep), "grey")) == 100).all()


def test_orientation_of_a_camera_is_applied():
    image = Image.fromarray(_noise(4, 6))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert decode(buffer.getvalue(), "rgb").size == (4, 6)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP"])
def test_a_cut_file_is_an_error_that_says_so(suffix: str):
    data = _png(Image.fromarray(_noise(64, 64)), suffix)
    with pytest.raises(DitlabError, match=r"unreadable image|not an image"):
        decode(data[: len(data) // 2], "rgb")


def test_text_is_not_an_image():
    with pytest.raises(DitlabError, match="not an image"):
        decode(b"hello", "rgb")


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = to_float(values)
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(images, values.float() / 127.5 - 1)
    assert torch.equal(to_uint8(images), values)
    assert torch.equal(to_uint8(images * 3), (images * 3).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8))
