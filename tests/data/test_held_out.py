"""A second folder of held-out pictures: prepared with the first, or later and exactly as the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditlab.data import ImageSet, held_out_order, make_split, prepare, prepare_held_out
from ditlab.data.autoencoder import Autoencoder
from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.encode import encode_images
from ditlab.data.encode_config import EncodeConfig
from ditlab.data.sources.base import TEST, TRAIN
from ditlab.errors import DitlabError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def pictures(folder: str, names: str, size: int = 12, first: int = 0) -> str:
    """Another picture of random pixels under each name; equal seeds give equal pictures."""
    for seed, name in enumerate(names.split(), first):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return f"folder:{folder}"


@pytest.fixture
def train() -> str:
    return pictures("A", "1.png 2.png 3.png 4.png")


@pytest.fixture
def second() -> str:
    return pictures("B", "1.png 2.png 3.png", first=10)


def test_the_second_source_becomes_the_test_pool(train, second):
    images = prepare(train, "set", size=8, held_out=second)
    assert images.pool is not None
    assert images.pool.tolist() == [TRAIN] * 4 + [TEST] * 3
    assert images.sources == ("1.png", "2.png", "3.png", "4.png", "1.png", "2.png", "3.png")
    assert images.manifest.pools == {"train": 4, "test": 3, "free": 0}
    split = make_split(images, n=3, test=2, seed=0)
    assert (set(split.train) < set(range(4)), set(split.test) < {4, 5, 6}) == (True, True)
    # It is the same set as that of one folder with the subfolders train and test.
    pictures("C/train", "1.png 2.png 3.png 4.png")
    pictures("C/test", "1.png 2.png 3.png", first=10)
    joint = prepare("C", "joint", size=8)
    assert {image.tobytes() for image in joint.array[joint.pool == TEST]} == {
        image.tobytes() for image in images.array[4:]
    }


def test_the_joined_set_is_opened_again_until_a_source_changes(train, second):
    images = prepare(train, size=8, held_out=second)
    assert images.path == Path("image-sets/a-held-out-b-8")
    assert prepare(train, size=8, held_out=second).hash == images.hash
    with pytest.raises(DitlabError, match="made otherwise"):
        prepare(train, images.path, size=8)
    pictures("B", "4.png", first=20)
    with pytest.raises(DitlabError, match="before that changed"):
        prepare(train, size=8, held_out=second)


def test_a_prepared_set_gets_held_out_pictures_too(train, second):
    first = prepare(train, "first", size=8)
    joined = prepare(first, "joined", held_out="B")
    assert joined.hash == prepare(train, "other", size=8, held_out=second).hash
    assert joined.sources[3:5] == ("4.png", "1.png")
    assert prepare("first", "again", held_out=prepare(second, "second", size=8)).hash == joined.hash


def test_classes_of_both_sources_are_joined_by_name():
    pictures("A", "cat/1.png dog/2.png")
    pictures("B", "dog/1.png emu/2.png", first=10)
    images = prepare("A", "set", size=8, held_out="B")
    assert images.class_names == ("cat", "dog", "emu")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1, 2]
    pictures("D", "1.png 2.png", first=20)
    assert prepare("A", "unlabelled", size=8, held_out="D").labels is None


def test_pictures_in_both_sources_are_named(train):
    pictures("B", "new.png", first=10)
    pictures("B", "x/copy.png", first=1)  # the picture of A/2.png
    sentence = (
        r"^held_out 'folder:B': expected images that 'folder:A' does not have, found 1 in both "
        r"\(x/copy.png is 2.png\); remove them from one of the two$"
    )
    with pytest.raises(DitlabError, match=sentence):
        prepare(train, "set", size=8, held_out="folder:B")
    assert not Path("set").exists()
    images = prepare(train, "set", size=8)
    with pytest.raises(DitlabError, match=sentence):
        prepare_held_out(images, "folder:B")
    # Only training images count: a run may have been trained on some of them alone.
    assert len(prepare_held_out(images, "folder:B", train=[0, 2, 3])) == 2


@pytest.mark.parametrize("later", [False, True])
def test_held_out_pictures_that_cannot_be_used(train, later: bool):
    def use(held_out: str) -> ImageSet:
        if later:
            return prepare_held_out(prepare(train, "set", size=8), held_out)
        return prepare(train, "joined", size=8, held_out=held_out)

    pictures("B", "a.png b.png", size=4)
    with pytest.raises(
        DitlabError,
        match=r"^held_out 'folder:B': expected an image that can be used at 8x8 pixels, found none "
        r"\(skipped 2 smaller than 8x8 pixels: a.png, b.png\)$",
    ):
        use("B")
    Path("empty").mkdir()
    with pytest.raises(DitlabError, match="below empty, found no files"):
        use("empty")
    with pytest.raises(DitlabError, match="unknown source 'absent'"):
        use("absent")
    pictures("C/train", "1.png", first=30)
    pictures("C/test", "1.png", first=31)
    with pytest.raises(
        DitlabError, match="expected held-out images alone, found images that the source gives for train"
    ):
        use("C")


def test_a_source_that_holds_images_out_itself_takes_no_others(second):
    with pytest.raises(DitlabError, match="source 'photos': expected training images alone beside held_out 'folder:B'"):
        prepare("photos", "set", size=8, held_out=second)


def test_held_out_pictures_come_later_just_as_the_set_was_prepared(train, second):
    images = prepare(train, "set", size=16, color="grey", upscale=True)
    held_out = prepare_held_out(images, second)
    assert held_out.path.parent == Path("image-sets")
    assert (held_out.shape, len(held_out), held_out.sources) == ((1, 16, 16), 3, ("1.png", "2.png", "3.png"))
    joined = prepare(train, "joined", size=16, color="grey", upscale=True, held_out=second)
    assert (held_out.array == joined.array[4:]).all()
    assert held_out.pool is not None
    assert held_out.pool.tolist() == [TEST] * 3
    assert sorted(held_out_order(held_out, 0)) == [0, 1, 2]
    assert (held_out_order(joined, 7)[:2] == make_split(joined, None, 2, 7).test).all()


def test_the_later_set_is_kept_until_its_source_changes(train, second):
    images = prepare(train, "set", size=8)
    held_out = prepare_held_out(images, second)
    before = (held_out.path / "images.npy").stat().st_mtime_ns
    again = prepare_held_out(images, second)
    assert (again.path / "images.npy").stat().st_mtime_ns == before
    pictures("B", "4.png", first=20)
    grown = prepare_held_out(images, second)
    assert (len(grown), len(ImageSet.open(held_out.path))) == (4, 3)
    assert prepare_held_out(images, second, "chosen").path == Path("chosen")


def test_later_pictures_get_the_labels_of_the_set():
    pictures("A", "cat/1.png dog/2.png")
    pictures("B", "dog/1.png dog/2.png", first=10)
    images = prepare("A", "set", size=8)
    held_out = prepare_held_out(images, "B")
    assert held_out.labels is not None
    assert (held_out.class_names, held_out.labels.tolist()) == (("cat", "dog"), [1, 1])
    pictures("B", "emu/1.png", first=20)
    other = prepare_held_out(images, "B")
    assert other.labels is None
    assert other.manifest.notes == ("1 images have no label, so the set has none",)


def test_the_test_pool_of_the_set_may_share_pictures(train, second):
    joined = prepare(train, "joined", size=8, held_out=second)
    assert len(prepare_held_out(joined, second)) == 3


class Halves(Autoencoder):
    """Latents are every second pixel."""

    def __init__(self, scale: float = 0.5) -> None:
        self.record = AutoencoderRecord("tiny", "halves", "", "0" * 64, 3, 3, 2, scale, 0.0)

    def moments(self, pictures):
        return pictures[..., ::2, ::2], None

    def decode(self, latents, batch=64):
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_latents_are_made_by_the_same_autoencoder(train, second, monkeypatch):
    images = encode_images(prepare(train, "set", size=8), Halves(), "latents", EncodeConfig(mirrored=True))
    asked = []
    monkeypatch.setattr(
        "ditlab.data.held_out.reopen_autoencoder",
        lambda record, folder, codec: asked.append((record, codec)) or Halves(),
    )
    held_out = prepare_held_out(images, second, codec="moved/there")
    assert images.latents is not None
    assert asked == [(images.latents.record.codec, "moved/there")]
    assert held_out.latents is not None
    assert held_out.latents.mirrored is not None
    assert (held_out.shape, held_out.sources) == ((3, 4, 4), ("1.png", "2.png", "3.png"))
    pixels = prepare(second, "pixels", size=8).batch([2])
    torch.testing.assert_close(held_out.batch([2]), pixels[..., ::2, ::2] / 2, atol=1e-3, rtol=0)
    # Finished latents are used as they are, if they are of the same autoencoder.
    assert prepare_held_out(images, held_out).hash == held_out.hash
    other = encode_images(prepare(second, "pixels", size=8), Halves(scale=2.0), "others")
    with pytest.raises(DitlabError, match=r"held_out others: expected an autoencoder with scale 0.5, found 2.0"):
        prepare_held_out(images, other)
    with pytest.raises(DitlabError, match="expected pixels as in set, found latents"):
        prepare_held_out(prepare(train, "set", size=8), other)
    small = encode_images(prepare(second, "small", size=4), Halves(), "small-latents")
    with pytest.raises(DitlabError, match=r"expected latents of pictures 3x8x8 .*, found latents of pictures 3x4x4"):
        prepare_held_out(images, small)


def test_latents_with_a_picture_in_both(train, monkeypatch):
    monkeypatch.setattr("ditlab.data.held_out.reopen_autoencoder", lambda *_: Halves())
    pictures("B", "copy.png", first=3)
    pictures("B", "new.png", first=10)
    images = encode_images(prepare(train, "set", size=8), Halves(), "latents")
    with pytest.raises(DitlabError, match=r"found 1 in both \(copy.png is 4.png\)"):
        prepare_held_out(images, "B")
    assert len(prepare_held_out(replace(images), "B", train=[0, 1])) == 2
