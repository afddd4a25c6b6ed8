"""Running verbs as a user does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def ditlab(in_process, monkeypatch, tmp_path) -> Callable[..., Any]:
    """`ditlab("train", ...)` runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return in_process


@pytest.fixture
def refused(ditlab, place, contents, tmp_path) -> Callable[..., str]:
    """`refused("train", ...)` checks that a command ends with status 2, one sentence and not a byte written."""

    def run(*words: object) -> str:
        before = contents(place.folder), contents(tmp_path)
        done = ditlab(*words)
        assert done.status == 2, done
        assert done.out == ""
        lines = done.err.splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("ditlab: ")
        assert not set(lines[0]) & set("│╭╮╰╯─")
        assert "----" not in lines[0]
        assert (contents(place.folder), contents(tmp_path)) == before
        return lines[0].removeprefix("ditlab: ")

    return run


@pytest.fixture
def small_disk(disk_of) -> Path:
    """A disk of 400 KiB."""
    return disk_of("400k")
