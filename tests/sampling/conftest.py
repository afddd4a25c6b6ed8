"""Tiny trained runs that several tests share."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditlab.config import DataConfig, fit_to_images
from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.errors import DitlabError
from ditlab.models.creating import start, train_run
from ditlab.models.run import Run
from ditlab.networks.dit_config import DiTConfig
from ditlab.presets import preset
from ditlab.progress import Reporter
from ditlab.sampling.draw import draw_batch
from ditlab.sampling.samples import Samples
from ditlab.training.distributed import init_distributed


class Runs:
    """An image set and runs trained on it, made when they are first needed; not to be changed by a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: ImageSet = prepare("digits", folder / "digits", size=8)
        self._copies = 0

    def trained(
        self, name: str, *, guidance: GuidanceConfig | None = None, objective: Any = None, **network: Any
    ) -> Run:
        """Returns a run of six steps."""
        out = self.folder / "runs" / name
        if out.exists():
            return Run.open(out)
        recipe = preset("dit-nano/1")
        config = replace(
            recipe,
            data=DataConfig(n=20, test=20),
            network=DiTConfig(**{"width": 16, "depth": 2, "heads": 2, "image_size": (8, 8), **network}),
            objective=replace(recipe.objective, **(objective or {})),
            training=replace(recipe.training, steps=6, batch_size=8, save_every=2, eval_every=6),
            evaluation=replace(recipe.evaluation, images=4, levels=2),
            guidance=guidance or GuidanceConfig(),
        )
        config = fit_to_images(config, self.images.shape, self.images.num_classes)
        with init_distributed("cpu") as context:
            train_run(start(out, config, self.images, device=context.device), context)
        return Run.open(out)

    def copy(self, run: Run) -> Run:
        """Returns a copy of a run, at the same distance from its image set, that a test may change."""
        self._copies += 1
        return Run.open(shutil.copytree(run.path, self.folder / "runs" / f"copy{self._copies}"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sampling"))


@pytest.fixture
def plain(runs) -> Run:
    """Unconditional."""
    return runs.trained("plain")


@pytest.fixture
def conditional(runs) -> Run:
    """With ten classes."""
    return runs.trained("conditional", num_classes=10)


def _snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(runs, tmp_path, monkeypatch) -> Callable[..., str]:
    """`refused(model, seeds=..., ...)` checks that samples are refused with one sentence and not a byte written."""
    monkeypatch.chdir(tmp_path)

    def run(model: Any, **settings: Any) -> str:
        before = _snapshot(runs.folder), _snapshot(tmp_path)
        with pytest.raises(DitlabError) as caught:
            model.sample(**{"out": True, **settings})
        assert (_snapshot(runs.folder), _snapshot(tmp_path)) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


@pytest.fixture
def cut_short(monkeypatch) -> Callable[..., Path]:
    """`cut_short(model, after=2, out=..., ...)` ends a job after so many batches; returns its hidden folder.

    `instead` replaces the drawing of the next batch; by default it is interrupted.
    """

    def interrupt(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    def run(model: Any, *, after: int, out: Path, instead: Callable[..., Any] = interrupt, **settings: Any) -> Path:
        drawn: list[object] = []

        def some(*args: Any, **more: Any) -> Any:
            if len(drawn) == after:
                return instead(*args, **more)
            drawn.append(draw_batch(*args, **more))
            return drawn[-1]

        with monkeypatch.context() as patch:
            patch.setattr("ditlab.sampling.job.draw_batch", some)
            with pytest.raises((KeyboardInterrupt, DitlabError)):
                model.sample(out=out, **settings)
        (folder,) = out.parent.glob(f".{out.name}.unfinished-*")
        return folder

    return run


@pytest.fixture
def with_notes() -> Callable[..., tuple[Samples, list[str]]]:
    """`with_notes(model, ...)` samples with a reporter, and returns the samples and the notes."""

    class Recorder(Reporter):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, sentence: str) -> None:
            self.notes.append(sentence)

    def run(model: Any, **settings: Any) -> tuple[Samples, list[str]]:
        reporter = Recorder()
        return model.sample(reporter=reporter, **settings), reporter.notes

    return run
