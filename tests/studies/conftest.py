"""A study of six tiny runs, which a process of its own can be asked to run and a test to kill."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ditlab.studies.grid import Scale, Study

TINY = Study(
    name="tiny/six",
    title="Six tiny runs",
    question="Does everything work?",
    scales={
        name: Scale(
            networks={"dit-nano/1": {"network.depth": 1, "network.width": 16}},
            attention={"global": "global", "local": "3"},
            n=(10,),
            seeds=(0, 1, 2),
            data=("digits",),
            size=4,
            settings={
                "data.test": 20,
                "training.steps": 120,
                "training.batch_size": 8,
                "training.log_every": 10,
                "training.eval_every": 30,
                "training.save_every": 20,
                "evaluation.images": 5,
                "evaluation.levels": 3,
            },
            measured={"psnr-gap": {"images": 20, "points": 4}},
            cost="nothing",
        )
        for name in ("smoke", "small", "paper")
    },
    analyses=("psnr-gap",),
    asks=("falls", "lowers", "matched", "best"),
    published="an2024/fig6",
)

RUN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from conftest import TINY
from ditlab.studies.an2024 import STUDIES
from ditlab.cli.main import main
STUDIES[TINY.name] = TINY
main()
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


class Commands:
    """Verbs in processes of their own, which know the tiny study."""

    run = ("study", "run", TINY.name, "--scale", "smoke", "--out", "out")
    status = ("study", "status", TINY.name, "--scale", "smoke", "--out", "out", "--json")
    report = ("study", "report", TINY.name, "--scale", "smoke", "--out", "out", "--json")

    @staticmethod
    def start(cwd: Path, *words: object) -> subprocess.Popen[str]:
        """`ditlab WORDS`."""
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(Path(__file__).parent), *map(str, words)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> Ended:
        """Waits for a command."""
        out, err = process.communicate(timeout=300)
        return Ended(process.returncode, out, err)


@pytest.fixture(scope="session")
def tiny() -> Study:
    return TINY


@pytest.fixture(scope="session")
def commands() -> type[Commands]:
    return Commands


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> Path:
    """A folder in which the tiny study was run in one go; not to be changed. Its store is `out`."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = Commands.finish(Commands.start(folder, *Commands.run, "--json"))
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def copied(unbroken, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(unbroken, tmp_path / "copy"))


@pytest.fixture
def ditlab(in_process, monkeypatch) -> Callable[..., Any]:
    """`ditlab(folder, "study", ...)` runs a command line in this process, which knows the tiny study."""
    from ditlab.studies.an2024 import STUDIES

    monkeypatch.setitem(STUDIES, TINY.name, TINY)

    def run(folder: Path, *words: object) -> Any:
        monkeypatch.chdir(folder)
        return in_process(*words)

    return run
