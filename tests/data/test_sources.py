"""The other sources: what they read, what they skip, what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditlab.data.sources.base import TEST, TRAIN, Item, SkippedItem
from ditlab.data.sources.files import read_source
from ditlab.errors import DitlabError


def picture(seed: int, size: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def items(spec: str, size: int = 8, **settings) -> list[Item]:
    return [item for item in read_source(spec, size, **settings) if isinstance(item, Item)]


def skipped(spec: str, size: int = 8, **settings) -> dict[str, str]:
    return {item.name: item.reason for item in read_source(spec, size, **settings) if isinstance(item, SkippedItem)}


def test_folder_reads_a_tree_with_classes_and_names_what_it_skips(tmp_path):
    save(tmp_path / "cat/a.png", picture(0))
    save(tmp_path / "cat/deep/b.JPG", picture(1))
    save(tmp_path / "dog/c.webp", picture(2))
    save(tmp_path / "dog/small.png", picture(3, size=4))
    (tmp_path / "dog/text.png").write_text("not a picture")
    (tmp_path / "dog/notes.txt").write_text("no picture either")
    cut = save(tmp_path / "dog/cut.jpeg", picture(4, size=64))
    cut.write_bytes(cut.read_bytes()[:900])
    source = read_source(f"folder:{tmp_path}", 8)
    assert source.class_names == ("cat", "dog")
    assert source.count == 6
    assert [(item.name, item.label, item.pool) for item in items(f"folder:{tmp_path}")] == [
        (str(Path("cat/a.png")), 0, None),
        (str(Path("cat/deep/b.JPG")), 0, None),
        (str(Path("dog/c.webp")), 1, None),
    ]
    found = skipped(f"folder:{tmp_path}")
    assert found["dog/small.png"] == "4x4 is smaller than 8x8"
    assert found["dog/text.png"] == "not an image file"
    assert found["dog/cut.jpeg"].startswith("unreadable image")
    assert [(item.name, item.kind) for item in source.left_out] == [("dog/notes.txt", ".txt")]
    assert "dog/small.png" in {item.name for item in items(f"folder:{tmp_path}", upscale=True)}


def test_images_in_the_root_mean_no_classes(tmp_path):
    save(tmp_path / "a.png", picture(0))
    save(tmp_path / "cat/b.png", picture(1))
    assert read_source(f"folder:{tmp_path}", 8).class_names == ()
    assert [item.label for item in items(f"folder:{tmp_path}")] == [None, None]


def test_train_and_test_folders_are_pools(tmp_path):
    save(tmp_path / "train/cat/a.png", picture(0))
    save(tmp_path / "test/cat/b.png", picture(1))
    assert [(item.pool, item.label) for item in items(f"folder:{tmp_path}")] == [(TEST, 0), (TRAIN, 0)]


def test_digits_are_grey_or_rgb_and_have_their_labels():
    grey = items("digits", color="grey")
    assert len(grey) == 1797
    assert grey[3].label == 3
    assert grey[0].pixels.shape == (1, 8, 8)
    assert max(item.pixels.max() for item in grey) == 255
    assert (items("digits")[0].pixels == grey[0].pixels).all()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_of_each_layout_give_the_same_images(tmp_path, layout: str):
    grey = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    images = {"NHWC": grey[..., None].repeat(3, 3), "NCHW": grey[:, None].repeat(3, 1), "NHW": grey}[layout]
    np.save(tmp_path / "x.npy", images)
    assert (np.stack([item.pixels for item in items(f"array:{tmp_path}/x.npy")]) == grey[:, None]).all()


def test_npz_brings_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([0, 2, 1, 2]), other=np.zeros(3))
    assert [item.label for item in items(f"array:{tmp_path}/x.npz")] == [0, 2, 1, 2]
    np.savez(tmp_path / "y.npz", pictures=images, kind=np.array([1, 1, 0, 0]))
    options = {"images_key": "pictures", "labels_key": "kind"}
    assert [item.label for item in items(f"array:{tmp_path}/y.npz", options=options)] == [1, 1, 0, 0]
    with pytest.raises(
        DitlabError, match="expected images under one of images, x, arr_0 or a key given, found pictures"
    ):
        read_source(f"array:{tmp_path}/y.npz", 8)


def test_arrays_that_cannot_be_used_are_refused_in_one_sentence(tmp_path):
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    hidden = tmp_path / "hidden.npz"
    np.savez(hidden, allow_pickle=True, images=np.array([{"a": 1}], dtype=object))
    floats = tmp_path / "floats.npy"
    np.save(floats, np.zeros((3, 8, 8, 3)))
    shape = tmp_path / "shape.npy"
    np.save(shape, np.zeros((3, 8, 8, 4), np.uint8))
    pickled = tmp_path / "pickled.npy"
    pickled.write_bytes(b"\x80\x04\x95\x00")
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.array([0, -1, 2]))
    cut = tmp_path / "cut.npy"
    np.save(cut, np.zeros((3, 8, 8, 3), np.uint8))
    cut.write_bytes(cut.read_bytes()[:200])
    for path, sentence in {
        objects: "pickled objects, which ditlab never loads",
        hidden: "pickled objects, which ditlab never loads",
        floats: "uint8 images, found float64",
        shape: r"found \[3, 8, 8, 4\]",
        pickled: "another format",
        wrong: "3 integers from 0",
        cut: "unreadable NumPy file",
        tmp_path / "absent.npy": "found no such file",
    }.items():
        with pytest.raises(DitlabError, match=sentence):
            read_source(f"array:{path}", 8)


def mosaic(folder: Path, damaged: bool = False) -> np.ndarray:
    """Six train and two test images of 4x4 in mosaics of 8x8; returns all as [N, H, W, C]."""
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)

    def write(name: str, cells: np.ndarray) -> None:
        cells = np.concatenate([cells, np.zeros((4 - len(cells), 4, 4, 3), np.uint8)])
        square = cells.reshape(2, 2, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(8, 8, 3)
        Image.fromarray(square).save(folder / name, lossless=True)

    write("tiny_train_00.webp", images[:4])
    write("tiny_train_01.webp", images[4:6])
    write("tiny_test_00.webp", images[6:])
    train = {"count": 6, "mosaics": 2, "labels": [0, 1, 0, 1, 0, 1]}
    entry = {
        "size": 4,
        "label_names": ["a", "b"],
        "train": train,
        "test": {"count": 2, "mosaics": 1, "labels": [1, 1]},
    }
    (folder / "manifest.json").write_text(json.dumps({"tiny": entry}))
    return images


def test_mosaics_give_their_images_labels_and_pools(tmp_path):
    images = mosaic(tmp_path)
    found = items(f"mosaic:{tmp_path}/tiny", 4)
    assert (np.stack([item.pixels for item in found]) == images.transpose(0, 3, 1, 2)).all()
    assert [item.label for item in found] == [0, 1, 0, 1, 0, 1, 1, 1]
    assert [item.pool for item in found] == [TRAIN] * 6 + [TEST] * 2
    (tmp_path / "tiny_test_00.webp").write_bytes(b"damaged")
    assert list(skipped(f"mosaic:{tmp_path}/tiny", 4)) == ["tiny_test_00.webp"]
    (tmp_path / "tiny_test_00.webp").unlink()
    with pytest.raises(DitlabError, match=r"tiny_test_00.webp, found no such file"):
        read_source(f"mosaic:{tmp_path}/tiny", 4)


def test_the_shared_mosaics_are_read_as_their_readme_says(shared):
    found = items(f"mosaic:{shared}/data/cifar10", 32)
    assert sum(item.pool == TRAIN for item in found) == 10_240
    assert sum(item.pool == TEST for item in found) == 1_024
    whole = np.asarray(Image.open(shared / "data/cifar10_train_03.webp").convert("RGB"))
    cells = whole.reshape(32, 32, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    assert (np.stack([item.pixels for item in found[3072:4096]]) == cells.transpose(0, 3, 1, 2)).all()


def test_unknown_and_unusable_sources_are_refused(tmp_path):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    for spec, sentence in {
        "photo": "unknown source 'photo' (nearest: photos)",
        "photos:x": "which takes no path",
        "folder:": "found nothing after it",
        f"folder:{tmp_path}/none": f"expected a folder at {tmp_path}/none, found nothing",
        f"folder:{tmp_path}/file.txt": "found a file",
        f"folder:{tmp_path}/empty": "folder source: expected images (.png, .jpg, .jpeg, .jfif, .webp, .tif, .tiff, .bmp, .gif) below",
        f"mosaic:{tmp_path}/empty/x": "found no such file",
        f"mosaic:{tmp_path}/x": "unknown mosaic set",
        f"array:{tmp_path}/file.txt": "expected a .npy or .npz file, found another format",
    }.items():
        with pytest.raises(DitlabError, match=re.escape(sentence)):
            read_source(spec, 8)
    with pytest.raises(DitlabError, match="source 'digits' has no option 'stride'"):
        read_source("digits", 8, options={"stride": 2})
    with pytest.raises(DitlabError, match="below the size of 16"):
        read_source("digits", 16)
    with pytest.raises(DitlabError, match="size: expected 2 to 4096"):
        read_source("digits", 0)
