"""Image sets: written whole or not at all, opened with checks, the same every time."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditlab.data.duplicates import area_weights, find_near_duplicates, thumbnails
from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare
from ditlab.errors import DitlabError


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "digits"
    prepare("digits", out, size=8, color="grey")
    return out


@pytest.fixture
def copied(digits, tmp_path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "digits"))


def noise(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def array(path: Path, images: np.ndarray) -> str:
    np.save(path, images)
    return f"array:{path}"


def test_a_set_holds_what_its_source_gave(digits):
    from sklearn.datasets import load_digits

    opened = ImageSet.open(digits)
    raw = load_digits()
    assert len(opened) == 1797
    assert opened.shape == (1, 8, 8)
    assert opened.num_classes == 10
    assert opened.pool is None
    assert (opened.labels == raw.target).all()
    assert (opened.array[:, 0] == np.round(raw.images * 255 / 16)).all()
    assert (np.load(digits / "images.npy") == opened.array).all()
    opened.verify()


def test_batches_are_floats_in_the_usual_range(digits):
    opened = ImageSet.open(digits)
    indices = np.array([5, 0, 1796, 5])
    batch, labels = opened.batch(indices), opened.batch_labels(indices)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.from_numpy(opened.array[indices]).float() / 127.5 - 1)
    assert labels is not None
    assert labels.tolist() == [5, 0, 8, 5]
    assert (opened.take(indices) == opened.array[indices]).all()


def test_the_same_source_gives_the_same_bytes(digits, tmp_path):
    again = prepare("digits", tmp_path / "again", size=8, color="grey")
    assert again.hash == ImageSet.open(digits).hash
    assert (again.path / "manifest.json").read_bytes() == (digits / "manifest.json").read_bytes()


def test_another_process_opens_the_file_instead_of_getting_a_copy(digits):
    opened = ImageSet.open(digits)
    sent = pickle.dumps(opened)
    assert len(sent) < 1000
    assert pickle.loads(sent).hash == opened.hash


def test_exact_duplicates_are_dropped_and_near_ones_counted(tmp_path):
    images = noise(6)
    nearly = (images[0].astype(int) + 3).clip(0, 255).astype(np.uint8)
    spec = array(tmp_path / "x.npy", np.concatenate([images, images[:2], nearly[None]]))
    made = prepare(spec, tmp_path / "set", size=8)
    near = made.manifest.near_duplicates
    assert len(made) == 7
    assert made.manifest.exact_duplicates == 2
    assert near is not None
    assert (near.pairs, near.images, near.searched) == (1, 2, 7)
    assert near.examples[0][:2] == (0, 6)


def test_a_test_image_that_is_also_a_train_image_is_dropped(tmp_path):
    for name, seed in {"train/0": 0, "train/1": 1, "test/0": 1, "test/1": 2}.items():
        path = tmp_path / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    made = prepare(f"folder:{tmp_path}/pictures", tmp_path / "set", size=8)
    assert made.manifest.exact_duplicates == 1
    assert made.manifest.pools["train"] + made.manifest.pools["test"] == 3


def test_near_duplicates_equal_a_plain_double_loop():
    base = noise(40, 24).transpose(0, 3, 1, 2)
    images = np.concatenate([base, np.clip(base[:9].astype(int) // 2 + 40, 0, 255).astype(np.uint8), base[:1] * 0 + 7])
    pool = (np.arange(50) % 2).astype(np.uint8)
    rows = area_weights(24, 20)
    expected = set()
    small = [(rows @ image.mean(0) @ rows.T).ravel() for image in images]
    for i in range(50):
        for j in range(i + 1, 50):
            a, b = small[i] - small[i].mean(), small[j] - small[j].mean()
            if np.linalg.norm(a) * np.linalg.norm(b) > 1 and a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9:
                expected.add((i, j))
    found = find_near_duplicates(images, pool, threshold=0.9, limit=1000)
    assert {pair[:2] for pair in found.examples} == expected
    assert found.pairs == len(expected) == 9
    assert found.across_pools == sum(pool[i] != pool[j] for i, j in expected)
    assert find_near_duplicates(images, pool, threshold=0.9, limit=45).searched == 45
    assert not thumbnails(images)[-1].any()


def test_tiles_of_the_search_leave_no_pair_out(monkeypatch):
    images = np.tile(noise(7).transpose(0, 3, 1, 2), (5, 1, 1, 1))
    whole = find_near_duplicates(images, None, threshold=0.9, limit=1000)
    monkeypatch.setattr("ditlab.data.duplicates.ROWS", 4)
    monkeypatch.setattr("ditlab.data.duplicates.COLUMNS", 6)
    tiled = find_near_duplicates(images, None, threshold=0.9, limit=1000)
    assert (tiled.pairs, tiled.images) == (whole.pairs, whole.images) == (70, 35)


def test_skipped_images_are_named_in_the_manifest(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(noise(3)):
        Image.fromarray(image).save(folder / f"{index}.png")
    (folder / "bad.png").write_text("text")
    made = prepare(f"folder:{folder}", tmp_path / "set", size=8)
    assert len(made) == 3
    assert [(item.name, item.reason) for item in made.manifest.skipped] == [("bad.png", "not an image file")]


def test_the_same_command_again_opens_what_is_there(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(noise(3)):
        Image.fromarray(image).save(folder / f"{index}.png")
    out = tmp_path / "set"
    prepare(f"folder:{folder}", out, size=8)
    before = (out / "images.npy").stat().st_mtime_ns
    prepare(f"folder:{folder}", out, size=8)
    assert (out / "images.npy").stat().st_mtime_ns == before
    with pytest.raises(DitlabError, match="already holds an image set made otherwise"):
        prepare(f"folder:{folder}", out, size=4)
    Image.fromarray(noise(4)[3]).save(folder / "new.png")
    with pytest.raises(DitlabError, match="before that changed"):
        prepare(f"folder:{folder}", out, size=8)
    assert len(prepare(f"folder:{folder}", out, size=8, overwrite=True)) == 4
    assert names_in(tmp_path) == ["pictures", "set"]


def test_a_folder_that_is_no_set_is_never_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DitlabError, match="is not an image set that can be reused"):
            prepare("digits", tmp_path / "set", size=8, overwrite=overwrite)
    assert (tmp_path / "set" / "thesis.tex").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_an_error_and_leave_nothing(tmp_path, count: int):
    spec = array(tmp_path / "x.npy", noise(count))
    with pytest.raises(DitlabError, match="holds no images" if count == 0 else "at least 2 images"):
        prepare(spec, tmp_path / "deep/er/set", size=8)
    assert names_in(tmp_path) == ["x.npy"]


def test_images_that_are_all_unusable_are_an_error_and_leave_nothing(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.png").write_text("text")
    with pytest.raises(DitlabError, match=r"found 0 \(skipped 3 not images: a.png, b.png, c.png; 0 exact"):
        prepare(f"folder:{folder}", tmp_path / "deep/set", size=8)
    assert names_in(tmp_path) == ["pictures"]


def test_a_disk_without_room_is_an_error_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DitlabError, match=r"needs 0.12 MB, found 0.00 MB free"):
        prepare("digits", tmp_path / "set", size=8, color="grey")
    assert names_in(tmp_path) == []


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(DitlabError, match=r"could not be written \(File too large\); nothing was kept"):
            prepare("digits", tmp_path / "deep/set", size=8, color="grey")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        with pytest.raises(DitlabError, match=r"needs 0.12 MB, found 0.07 MB free"):
            prepare("digits", mount / "set", size=8, color="grey")
        # Room for the images alone, so that the manifest and labels no longer fit.
        (mount / "filler").write_bytes(b"x" * 20_000)
        with pytest.raises(DitlabError, match="No space left on device"):
            prepare(array(tmp_path / "x.npy", noise(220)), mount / "set", size=8)
        assert names_in(mount) == ["filler"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_killed_writer_leaves_no_set_and_the_next_one_cleans_up(tmp_path):
    out = tmp_path / "set"
    script = f"""
import os, signal
from ditlab.data import preparing
def killed(*_): os.kill(os.getpid(), signal.SIGKILL)
preparing.hash_files = killed
preparing.prepare("digits", {str(out)!r}, size=8, color="grey")
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [name.startswith(".set.partial-") for name in names_in(tmp_path)] == [True]
    prepare("digits", out, size=8, color="grey")
    assert names_in(tmp_path) == ["set"]


def test_several_writers_of_one_set_all_get_it(tmp_path):
    def make(_: int) -> str:
        return prepare("digits", tmp_path / "set", size=8, color="grey", near_duplicates=None).hash

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(make, range(4)))) == 1
    assert names_in(tmp_path) == ["set"]


def rewrite(folder: Path, **fields) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_set_that_is_not_what_its_manifest_says_is_refused(copied, tmp_path):
    with pytest.raises(DitlabError, match=r"expected a folder at .*none, found nothing"):
        ImageSet.open(tmp_path / "none")
    with pytest.raises(DitlabError, match=r"expected .*manifest\.json, found no such file"):
        ImageSet.open(tmp_path)
    original = (copied / "manifest.json").read_text()
    for fields, sentence in (
        ({"version": 2}, "expected version 1 of the format, found 2"),
        ({"format": "other"}, "found something else"),
        ({"shape": [1797, 1, 8]}, "field 'shape"),
        ({"shape": [1700, 1, 8, 8]}, r"expected uint8 \[1700, 1, 8, 8\], found uint8 \[1797, 1, 8, 8\]"),
        ({"class_names": ["a"]}, "expected the hash"),
        ({"surplus": 1}, "field 'surplus'"),
    ):
        rewrite(copied, **fields)
        with pytest.raises(DitlabError, match=sentence):
            ImageSet.open(copied)
        (copied / "manifest.json").write_text(original)
    (copied / "manifest.json").write_text(original[:100])
    with pytest.raises(DitlabError, match="damaged file"):
        ImageSet.open(copied)


def test_changed_files_are_found(copied):
    path = copied / "images.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DitlabError, match="was changed after the set was made"):
        ImageSet.open(copied).verify()
    path.write_bytes(data[:-5])
    with pytest.raises(DitlabError, match=r"expected 115136 bytes, found 115131"):
        ImageSet.open(copied)
    path.unlink()
    with pytest.raises(DitlabError, match="found no such file"):
        ImageSet.open(copied)
