"""Running verbs as a user does, and tiny trained runs that several tests share."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from ditlab.cli.main import main

TINY = [
    "--test",
    "20",
    "--network.width",
    "16",
    "--network.heads",
    "2",
    "--network.depth",
    "2",
    "--training.batch-size",
    "8",
    "--training.log-every",
    "2",
    "--training.eval-every",
    "3",
    "--training.save-every",
    "2",
    "--evaluation.images",
    "4",
    "--evaluation.levels",
    "2",
    "--device",
    "cpu",
    "--threads",
    "1",
]


@pytest.fixture
def ditlab(in_process, monkeypatch, tmp_path) -> Callable[..., Any]:
    """`ditlab("train", ...)` runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return in_process


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder, hidden ones too, and what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(ditlab, place, tmp_path) -> Callable[..., str]:
    """`refused("train", ...)` checks that a command ends with status 2, one sentence and not a byte written."""

    def run(*words: object) -> str:
        before = snapshot(place.folder), snapshot(tmp_path)
        done = ditlab(*words)
        assert done.status == 2, done
        lines = done.err.splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("ditlab: ")
        assert (snapshot(place.folder), snapshot(tmp_path)) == before
        return lines[0].removeprefix("ditlab: ")

    return run


class Place:
    """An image set and runs trained on it, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "digits"
        self._copies = 0
        self._made: dict[str, list[str]] = {}
        self._quietly("data", "prepare", "digits", self.images, "--size", "8")

    def _quietly(self, *words: object) -> None:
        with redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 0

    def words(self, out: Path, *more: object, preset: str = "dit-nano/1", steps: int = 6) -> list[str]:
        """The command line that trains a tiny run."""
        words = ["train", preset, "--data", self.images, "--n", 20, "--out", out, "--training.steps", steps]
        return [*map(str, words), *TINY, *map(str, more)]

    def trained(self, name: str, *more: object, preset: str = "dit-nano/1", steps: int = 6) -> Path:
        """A trained run; not to be changed by a test."""
        out = self.folder / "runs" / name
        words = self.words(out, *more, preset=preset, steps=steps)
        if not out.exists():
            self._quietly(*words)
            self._made[name] = words
        assert self._made[name] == words, f"two kinds of runs are called {name}"
        return out

    def copy(self, run: Path) -> Path:
        """A copy of a run, at the same distance from its image set, that a test may damage."""
        self._copies += 1
        return shutil.copytree(run, self.folder / "runs" / f"copy{self._copies}")


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def plain(place) -> Path:
    """Six steps, unconditional, global attention; not to be changed."""
    return place.trained("plain")


@pytest.fixture
def conditional(place) -> Path:
    """Six steps, with classes; not to be changed."""
    return place.trained("conditional", "--conditional")


@pytest.fixture
def small_disk(disk_of) -> Path:
    """A disk of 400 KiB."""
    return disk_of("400k")
