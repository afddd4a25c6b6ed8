"""`ditlab data prepare` and `ditlab data info`."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from rich.console import Console

from ditlab.cli.data import Info, Prepare
from ditlab.data.imageset import ImageSet
from ditlab.errors import DitlabError


def run(verb, *args: str) -> tuple[dict, str]:
    console = Console(file=io.StringIO(), width=160)
    result = tyro.cli(verb, args=args).run(console)
    return json.loads(json.dumps(result)), console.file.getvalue()


def test_prepare_then_info(tmp_path):
    out = tmp_path / "photos"
    result, printed = run(Prepare, "photos", str(out), "--size", "16", "--scales", "4", "--stride", "8")
    assert result["images"] == len(ImageSet.open(out)) > 500
    assert result["classes"].keys() >= {"astronaut", "china"}
    assert "only to test" in printed
    info, printed = run(Info, str(out), "--verify", "--count", "30")
    assert info["verified"]
    assert {key: info[key] for key in result} == result
    assert "contact sheet" in printed
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (6 * 66 + 2, 5 * 66 + 2)
    ImageSet.open(out).verify()


def test_names_of_files_are_not_taken_for_markup(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    (folder / "[red].png").write_text("text")
    _, printed = run(Prepare, f"folder:{folder}", str(tmp_path / "set"), "--size", "8")
    assert "[red].png: not an image file" in printed


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(DitlabError, match="found nothing"):
        run(Prepare, f"folder:{tmp_path}/none", str(tmp_path / "set"))
    with pytest.raises(DitlabError, match="found no such file"):
        run(Info, str(tmp_path))
    run(Prepare, "digits", str(tmp_path / "digits"), "--size", "8")
    with pytest.raises(DitlabError, match="could not write"):
        run(Info, str(tmp_path / "digits"), "--sheet", str(tmp_path / "digits"))
    with pytest.raises(DitlabError, match="at least 1 image"):
        run(Info, str(tmp_path / "digits"), "--count", "0")


def test_the_commands_of_the_docs_run(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="one of the commands reads a dataset of the hub's layout")
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    for index, image in enumerate(noise):
        for root in ("pictures", "hub-folder"):
            path = Path(root) / ("cat" if index % 2 else "dog") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    np.savez("pictures.npz", images=noise, labels=np.arange(6))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for command in commands:
        program, data, verb, *args = shlex.split(command)
        assert (program, data) == ("ditlab", "data")
        run({"prepare": Prepare, "info": Info}[verb], *args)
    assert len(commands) == 6
    assert {len(ImageSet.open(f"sets/{name}")) for name in ("pictures", "arrays", "hub")} == {6}


def test_the_table_of_photographs_in_the_docs_is_true(tmp_path):
    from ditlab.data.sources.base import TEST, TRAIN, CropRule
    from ditlab.data.sources.photos import Photos

    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.M)
    assert len(rows) == 5
    for size, scales, train, test in rows:
        source = Photos(CropRule(int(size)))
        pools = [crop.pool for _, crop, _ in source.crops]
        assert scales == ", ".join(map(str, source.scales))
        assert (train, test) == (f"{pools.count(TRAIN):,}", f"{pools.count(TEST):,}")
