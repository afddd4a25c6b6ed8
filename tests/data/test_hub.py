"""The hub source, on small local datasets read by the same loader; nothing here touches a network."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as Pictures

from ditlab.data.sources.base import TEST, TRAIN, Item, SkippedItem
from ditlab.data.sources.files import read_source
from ditlab.errors import DitlabError

datasets = pytest.importorskip("datasets", reason="the hub source needs the package `datasets`")

# The library leaves file handles to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Pictures.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path):
    """A dataset of two splits, with a damaged and an empty image, and a label that is unknown."""
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "group": datasets.Value("int64"),
        }
    )
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    for split, seeds in {"train": [0, 1, 2], "test": [3, 4]}.items():
        rows = {
            "id": seeds,
            "picture": [{"bytes": b"damaged" if seed == 2 else png(seed), "path": None} for seed in seeds],
            "kind": [seed % 2 for seed in seeds],
            "group": [seed % 3 for seed in seeds],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(data / f"{split}-00000-of-00001.parquet")
    return tmp_path / "set"


def test_columns_splits_and_classes_are_found(parquet):
    source = read_source(f"hub:{parquet}", 8)
    found = list(source)
    kept = [item for item in found if isinstance(item, Item)]
    assert source.class_names == ("cat", "dog")
    assert source.count == 5
    assert [(item.label, item.pool) for item in kept] == [(0, TRAIN), (1, TRAIN), (1, TEST), (0, TEST)]
    assert [item.name for item in found if isinstance(item, SkippedItem)] == ["train row 2"]
    assert kept[0].pixels.shape == (3, 8, 8)


def test_columns_and_splits_can_be_given(parquet):
    source = read_source(f"hub:{parquet}", 8, options={"label_column": "group", "splits": ("train",)})
    assert source.class_names == ("0", "1", "2")
    assert [(item.label, item.pool) for item in source if isinstance(item, Item)] == [(0, None), (1, None)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_column": "id"}, "expected an image column 'id', found columns id"),
        ({"label_column": "picture"}, "expected a class column 'picture'"),
        ({"splits": ("trains",)}, r"unknown split .* 'trains' \(nearest: train\)"),
    ],
)
def test_what_is_not_there_is_named(parquet, options: dict, sentence: str):
    with pytest.raises(DitlabError, match=sentence):
        read_source(f"hub:{parquet}", 8, options=options)


def test_a_folder_of_images_is_read_by_the_same_loader(tmp_path):
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "a.png").write_bytes(png(index))
    source = read_source(f"hub:{tmp_path}/pictures", 8)
    assert source.class_names == ("cat", "dog")
    assert [(item.label, item.pool) for item in source if isinstance(item, Item)] == [(0, None), (1, None)]


def test_without_a_network_there_is_one_sentence(tmp_path):
    with pytest.raises(DitlabError, match=r"hub source 'nobody/nothing': could not be loaded \(is the network"):
        read_source("hub:nobody/nothing", 8)
    with pytest.raises(DitlabError, match="expected a dataset folder at"):
        read_source(f"hub:{tmp_path}/none", 8)
