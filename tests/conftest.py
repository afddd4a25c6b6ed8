"""Shared by all tests: shape checks at run time, one thread, the golden numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Every shape annotation of the package is checked while tests run (the hook must come before the first import).
install_import_hook("ditlab", "beartype.beartype")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

GOLDENS = Path(__file__).parent / "data" / "goldens"
SHARED = Path(__file__).parents[2] / "shared"


@dataclass(frozen=True)
class Golden:
    """Outputs of an original implementation: its config, notes, and tensors by key."""

    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def weights(self) -> dict[str, torch.Tensor]:
        """The original's state dict."""
        return {key.removeprefix("w."): value for key, value in self.tensors.items() if key.startswith("w.")}


@pytest.fixture(scope="session")
def golden():
    """`golden("01_dit_a")` reads a fixture."""

    def read(name: str) -> Golden:
        return Golden(json.loads((GOLDENS / f"{name}.json").read_text()), load_file(GOLDENS / f"{name}.safetensors"))

    return read


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared images and weights beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the checkout")
    return SHARED


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def in_process(capsys, monkeypatch) -> Callable[..., Done]:
    """`in_process("train", ...)` runs a command line of ditlab in this process."""
    from ditlab.cli import main

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["ditlab", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, said.out, said.err)

    return run


@pytest.fixture
def disk_of(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """`disk_of("400k")` makes a disk of that size."""
    made: list[Path] = []

    def mount(size: str) -> Path:
        if sys.platform != "linux" or shutil.which("mount") is None:
            pytest.skip("a small disk needs Linux's tmpfs")
        folder = tmp_path_factory.mktemp("disk")
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Draws that a test makes without a generator of its own are the same in every run, whatever ran before it."""
    torch.manual_seed(0)
