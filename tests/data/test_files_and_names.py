"""Files of a folder: which formats are read, which are skipped and counted, and how names stay with the images."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditlab.data import ImageSet, prepare
from ditlab.data.manifest import write_names
from ditlab.data.pixels import UnusableImage, decode
from ditlab.data.sources.base import Item, SkippedItem, count_kinds, describe_skipped
from ditlab.data.sources.files import is_source, read_source, source_name
from ditlab.errors import DitlabError
from ditlab.progress import Reporter


class Notes(Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def pixels(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def pictures(folder: Path, names: str, size: int = 8) -> Path:
    """Another picture of random pixels under each name."""
    for seed, name in enumerate(names.split()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed, size)).save(folder / name)
    return folder


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".bmp", ".TIF", ".png"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix: str):
    pictures(tmp_path, f"a{suffix} b{suffix}")
    images = prepare(f"folder:{tmp_path}", tmp_path / "set", size=8, near_duplicates=None)
    assert (images.array[0].transpose(1, 2, 0) == pixels(0)).all()


def test_jfif_is_another_ending_of_jpeg(tmp_path):
    folder = pictures(tmp_path / "files", "a.jpg")
    for name in ("b.jpeg", "c.jfif", "d.JFIF"):
        (folder / name).write_bytes((folder / "a.jpg").read_bytes())
    source = read_source(f"folder:{folder}", 8)
    assert (source.count, source.left_out) == (4, ())
    first, *others = source
    assert isinstance(first, Item)
    assert all(isinstance(item, Item) and (item.pixels == first.pixels).all() for item in others)


@pytest.mark.parametrize(("suffix", "options"), [(".gif", {}), (".tif", {}), (".webp", {"lossless": True})])
def test_the_first_frame_of_a_file_with_several_is_read(tmp_path, suffix: str, options: dict):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"several{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as opened:
        assert opened.n_frames == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert (np.asarray(decode(path, "rgb")) == [255, 0, 0]).all()


def test_transparency_of_a_gif_lies_over_white(tmp_path):
    image = Image.fromarray(np.eye(8, dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.gif", transparency=0)
    read = np.asarray(decode(tmp_path / "a.gif", "rgb"))
    assert (read[0, 0] == [0, 0, 255]).all()
    assert (read[0, 1] == [255, 255, 255]).all()


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bit_tiff_is_read_as_16_bit_png(tmp_path, byteorder: str):
    deep = np.random.default_rng(0).integers(0, 2**16, (8, 8)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    mode = "I;16" if byteorder == "<" else "I;16B"
    Image.frombytes(mode, (8, 8), deep.astype(f"{byteorder}u2").tobytes()).save(tmp_path / "a.tif")
    read = np.asarray(decode(tmp_path / "a.tif", "grey"))
    assert (read == deep // 257).all()
    assert (read == np.asarray(decode(tmp_path / "a.png", "grey"))).all()


def test_a_tiff_is_turned_upright_once(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned a quarter
    image = Image.fromarray(pixels(0))
    image.save(tmp_path / "a.tif", exif=exif)
    assert (
        np.asarray(decode(tmp_path / "a.tif", "rgb")) == np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    ).all()


def test_floating_point_samples_are_not_guessed_at(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnusableImage, match="floating-point samples, expected 8 or 16 bits"):
        decode(tmp_path / "a.tif", "rgb")


@pytest.mark.parametrize("suffix", [".tif", ".bmp", ".gif", ".png", ".webp", ".jpg"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_unusable_and_never_end_the_reading(tmp_path, suffix: str):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels(0, 16)).save(path)
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        data = bytearray(whole[: draw.integers(1, len(whole))] if trial % 3 == 0 else whole)
        for place in draw.integers(0, min(len(data), 200), 4):
            data[place] = draw.integers(0, 256)
        try:
            decode(bytes(data), "rgb")
        except UnusableImage:
            refused += 1
    assert refused > 20


def test_skipped_files_are_counted_and_named_by_kind(tmp_path):
    folder = pictures(tmp_path / "files", "ok/1.png ok/2.png ok/3.tif")
    pictures(folder, "small/a.png small/b.png", size=4)
    for name in ("1.heic", "2.HEIC", "3.heic", "caption.txt", "LICENSE", ".DS_Store", "bad.png"):
        (folder / name).write_text("text")
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    reporter = Notes()
    images = prepare(f"folder:{folder}", tmp_path / "set", size=8, reporter=reporter)
    assert len(images) == 3
    assert images.manifest.skipped_count == 9
    sentence = (
        "skipped 9 files: 3 .heic (not a readable format), 1 .txt, 2 smaller than 8x8 pixels: small/a.png, small/b.png; "
        "1 files without an ending: LICENSE; 1 not images: bad.png; 1 unreadable: gone.png"
    )
    assert reporter.notes == [sentence]
    assert ImageSet.open(tmp_path / "set").manifest.skipped_summary() == sentence
    prepare(f"folder:{folder}", tmp_path / "set", size=8, reporter=reporter)
    assert len(reporter.notes) == 1


def test_the_list_of_kinds_names_three_of_each():
    items = [SkippedItem(f"{index}.png", "not an image file", "not images") for index in range(1200)]
    items += [SkippedItem("a.txt", "not an image file", ".txt")] * 3
    assert describe_skipped(count_kinds(items), items) == "3 .txt, 1,200 not images: 0.png, 1.png, 2.png, ..."
    assert describe_skipped({}, []) == ""


def test_the_manifest_names_some_of_each_kind(tmp_path):
    folder = pictures(tmp_path / "files", "1.png 2.png")
    for index in range(300):
        (folder / f"{index}.txt").write_text("a caption")
    (folder / "z.png").write_text("text")
    manifest = prepare(f"folder:{folder}", tmp_path / "set", size=8).manifest
    assert manifest.skipped_kinds == {".txt": 300, "not images": 1}
    assert [len([s for s in manifest.skipped if s.kind == kind]) for kind in (".txt", "not images")] == [100, 1]


def test_every_image_knows_its_file(tmp_path):
    folder = pictures(tmp_path / "files", "b/2.png a/1.png a/3.png b/9.bmp")
    Image.fromarray(pixels(0)).save(folder / "b" / "copy.png")  # of b/2.png
    images = prepare(f"folder:{folder}", tmp_path / "set", size=8)
    assert images.sources == ("a/1.png", "a/3.png", "b/2.png", "b/9.bmp")
    assert [images.source_of(index) for index in (2, -1)] == ["b/2.png", "b/9.bmp"]
    for index, name in enumerate(images.sources):
        assert (images.array[index].transpose(1, 2, 0) == np.asarray(Image.open(folder / name))).all()
    assert images.manifest.duplicate_names == (("b/copy.png", "b/2.png"),)
    images.verify()


def test_names_do_not_change_the_hash_and_old_sets_open_without(tmp_path):
    first = pictures(tmp_path / "first", "1.png 2.png 3.png")
    second = pictures(tmp_path / "second", "x.png y.png z.png")
    images = [prepare(f"folder:{folder}", tmp_path / f"set-{folder.name}", size=8) for folder in (first, second)]
    assert images[0].hash == images[1].hash
    assert images[0].sources != images[1].sources
    path = images[0].path / "manifest.json"
    old = json.loads(path.read_text())
    del old["files"]["sources.json"], old["skipped_kinds"], old["duplicate_names"]
    path.write_text(json.dumps(old))
    (images[0].path / "sources.json").unlink()
    opened = ImageSet.open(images[0].path)
    assert (opened.hash, opened.source_of(1), opened.sources) == (images[0].hash, "", ())
    opened.verify()


def test_the_hash_of_a_set_is_that_of_earlier_versions(tmp_path):
    images = (
        np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
        * np.arange(1, 5, dtype=np.uint8)[:, None, None, None]
    )
    np.save(tmp_path / "x.npy", images)
    assert (
        prepare(f"array:{tmp_path}/x.npy", tmp_path / "set", size=8).hash
        == "cc01be8ae9fcf0dc8b947ce6344fa4fafe704ca3537b5ff7b59a6d42582daa83"
    )


def test_damaged_names_are_one_sentence(tmp_path):
    folder = pictures(tmp_path / "files", "1.png 2.png")
    images = prepare(folder, tmp_path / "set", size=8)
    path = images.path / "sources.json"
    path.write_text('["1.png"]')
    with pytest.raises(DitlabError, match="expected a list of 2 names"):
        ImageSet.open(images.path).source_of(0)
    path.unlink()
    with pytest.raises(DitlabError, match="expected the names of the source files"):
        ImageSet.open(images.path).source_of(0)


def test_names_outside_of_utf8_and_with_line_breaks(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for seed, name in enumerate((b"new\nline.png", "été.png".encode(), b"\xff.png")):
        Image.fromarray(pixels(seed)).save(os.fsencode(folder) + b"/" + name, format="PNG")
    images = prepare(folder, tmp_path / "set", size=8)
    assert sorted(images.sources) == ["new\nline.png", "été.png", "�.png"]


def test_a_hundred_thousand_names_are_read_quickly(tmp_path):
    images = prepare(pictures(tmp_path / "files", "1.png 2.png"), tmp_path / "set", size=8)
    names = [f"some/folder/{index:06d}.png" for index in range(100_000)]
    start = time.process_time()
    write_names(images.path, names)
    many = replace(images, array=np.zeros((100_000, 1), np.uint8))
    assert [many.source_of(index) for index in range(100_000)] == names
    assert time.process_time() - start < 2.0
    assert (images.path / "sources.json").stat().st_size < 3_000_000


def test_a_bare_path_of_pictures_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "cats", "1.png 2.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    images = prepare("cats", "sets/cats", size=8)
    assert (images.manifest.source, len(images)) == ("folder:cats", 2)
    assert [source_name(name) for name in ("cats", "sets/cats", "run", "digits")] == [
        "folder:cats",
        "sets/cats",
        "run",
        "digits",
    ]
    assert [is_source(name) for name in ("cats", "folder:x", "photos", "sets/cats", "run", "photos:x")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_folder_that_is_called_like_a_built_in_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "digits", "1.png 2.png")
    reporter = Notes()
    assert len(prepare("digits", "set", size=8, near_duplicates=None, reporter=reporter)) == 1797
    assert reporter.notes == ["'digits' is the built-in set; write 'folder:digits' for the folder of that name"]
    assert len(prepare("folder:digits", "own", size=8)) == 2


def test_without_a_folder_the_set_goes_to_image_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "My Cats_2", "1.png 2.png")
    images = prepare("My Cats_2", size=8)
    assert images.path == Path("image-sets/my-cats-2-8")
    assert prepare("My Cats_2", size=8).hash == images.hash
    assert prepare("My Cats_2", size=4, color="grey").path == Path("image-sets/my-cats-2-4-grey")
    # A set is a source of itself.
    assert prepare(images).path == prepare(str(images.path)).path == images.path
    with pytest.raises(DitlabError, match="expected images of 4 pixels, found 8"):
        prepare(images, size=4)


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(DitlabError, match=r"expected images \(\.png.*\) below .*empty, found no files"):
        read_source(f"folder:{tmp_path}/empty", 8)
    with pytest.raises(DitlabError, match=r"below .*texts, found 1 \.txt"):
        read_source(f"folder:{tmp_path}/texts", 8)
    pictures(tmp_path / "files", "open/1.png open/2.png closed/3.png")
    scandir = os.scandir
    closed = tmp_path / "files" / "closed"

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = read_source(f"folder:{tmp_path}/files", 8)
    assert [item.name for item in source.left_out] == ["closed"]
    assert describe_skipped(count_kinds(source.left_out), source.left_out) == "1 unreadable folders: closed"
    closed = tmp_path / "files"
    with pytest.raises(DitlabError, match=r"^folder source: .*files cannot be read \(Permission denied\)$"):
        read_source(f"folder:{tmp_path}/files", 8)


def test_a_set_shows_itself_in_one_line_and_in_a_notebook(tmp_path):
    images = prepare("digits", tmp_path / "a&b", size=8)
    assert repr(images) == f"ImageSet('{tmp_path}/a&b': 1,797 images of 3x8x8, 10 classes; {images.hash[:12]})"
    sheet = images.contact_sheet(count=12)
    assert sheet is not None
    assert sheet.size == (4 * 66 + 2, 3 * 66 + 2)
    png = images._repr_png_()
    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert images._repr_html_().startswith("<p>ImageSet(&#x27;")
    assert "a&amp;b" in images._repr_html_()
    assert "data:image/png;base64," in images._repr_html_()
