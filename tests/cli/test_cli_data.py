"""`ditlab data prepare` and `ditlab data info`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditlab.data.imageset import ImageSet


def test_prepare_then_info(ditlab, tmp_path):
    out = tmp_path / "photos"
    words = ["data", "prepare", "photos", out, "--size", 16, "--scales", 4, "--stride", 8]
    done = ditlab(*words, "--json")
    result, printed = json.loads(done.out), done.err
    assert result["images"] == len(ImageSet.open(out)) > 500
    assert result["classes"].keys() >= {"astronaut", "china"}
    assert "for test only" in printed
    done = ditlab("data", "info", out, "--verify", "--count", 30, "--json")
    info, printed = json.loads(done.out), done.err
    assert info["verified"]
    assert {key: info[key] for key in result} == result
    assert "contact sheet" in printed
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (6 * 66 + 2, 5 * 66 + 2)
    ImageSet.open(out).verify()


def test_names_of_files_are_not_taken_for_markup(ditlab, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    (folder / "[red].png").write_text("text")
    done = ditlab("data", "prepare", f"folder:{folder}", "set", "--size", 8)
    assert "[red].png: not an image file" in done.out
    assert "Look at it with: ditlab data info set" in done.out


def test_bad_input(refused, place, tmp_path):
    assert "found nothing" in refused("data", "prepare", f"folder:{tmp_path}/none", "set")
    assert "found no such file" in refused("data", "info", tmp_path)
    says = refused("data", "info", place.images, "--sheet", place.images)
    assert "could not be written" in says or "could not write" in says
    assert "at least 1 image" in refused("data", "info", place.images, "--count", 0)


def test_the_commands_of_the_docs_run(ditlab, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="one of the commands reads a dataset of the hub's layout")
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    for index, image in enumerate(noise):
        for root in ("pictures", "hub-folder"):
            path = Path(root) / ("cat" if index % 2 else "dog") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    np.savez("pictures.npz", images=noise, labels=np.arange(6))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for command in commands:
        program, *words = shlex.split(command)
        assert (program, words[0]) == ("ditlab", "data")
        done = ditlab(*words)
        assert done.status == 0, (command, done.err)
    assert len(commands) == 6
    assert {len(ImageSet.open(f"sets/{name}")) for name in ("pictures", "arrays", "hub")} == {6}
