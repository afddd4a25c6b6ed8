"""What several verbs share: opening image sets by name, threads, signals, progress."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import default_folder, prepare
from ditlab.data.sources.files import SOURCES, is_source
from ditlab.errors import DitlabError
from ditlab.progress import Reporter


def use_threads(threads: int | None) -> None:
    """Limits torch's CPU threads; None leaves torch's own choice (all cores)."""
    if threads is not None:
        import torch

        if threads < 1:
            raise DitlabError(f"--threads: expected at least 1, found {threads}")
        torch.set_num_threads(threads)


def check_out(out: Path | None) -> None:
    """Raises DitlabError where a folder of results cannot be made or written to; said before the work."""
    if out is None:
        return
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise DitlabError(f"--out {out}: expected a folder, found a file at {place}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DitlabError(f"--out {out}: expected a folder that can be written to, found {place}, which cannot")


def open_images(data: str, size: int, console: Console) -> ImageSet:
    """An image set from a --data value: a prepared set's folder, or a source, which is prepared first.

    A source's set is kept in `image-sets/` of the current folder and used again next time.
    """
    if not data:
        names = ", ".join(name + ":" * takes_path for name, (_, takes_path) in SOURCES.items())
        raise DitlabError(f"--data: expected an image set's folder or a source ({names}), found nothing")
    if not is_source(data):
        return ImageSet.open(data)
    folder = default_folder(data, size)
    if not folder.exists():
        console.print(f"preparing {data} at {size}x{size} pixels in {folder}")
    return prepare(data, folder, size=size, reporter=NoteReporter(console))


class NoteReporter(Reporter):
    """Prints notes; draws no bars."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, sentence: str) -> None:
        """Prints the sentence as a note."""
        noting(self.console)(sentence)


class TrainingBar:
    """A training run's progress: a bar with rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, title: str, steps: int, batch: int) -> None:
        self._console, self._title, self._steps, self._batch = console, title, steps, batch
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start: tuple[float, int] | None = None
        self._said = time.monotonic()
        self._loss = float("nan")

    def __enter__(self) -> TrainingBar:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} images/s  loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._steps, rate="-", loss="-")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: int, loss: float) -> None:
        """Shows that `step` steps are done; a loss of NaN means "no news"."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, step)
        if loss == loss:
            self._loss = loss
        rate = (step - self._start[1]) * self._batch / max(now - self._start[0], 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, rate=f"{rate:,.0f}", loss=f"{self._loss:.4f}")
        elif now - self._said > 30:
            self._said = now
            left = (self._steps - step) * self._batch / rate if rate > 0 else float("inf")
            self._console.print(
                f"{self._title}: step {step} of {self._steps}, {rate:,.0f} images/s, loss {self._loss:.4f}, "
                f"{left:,.0f} s left"
            )


def noting(console: Console) -> Callable[[str], None]:
    """What prints a sentence as a note."""
    return lambda sentence: console.print(f"note: {sentence}", markup=False)


@contextmanager
def counting(console: Console, title: str) -> Iterator[Any]:
    """A progress bar for work that is counted; yields `progress(done, total)`.

    Where the program that started this one has ended (`parent_gone`), counting ends this one too, as Ctrl-C would.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None)

        def progress(done: int, total: int) -> None:
            if parent_gone():
                raise KeyboardInterrupt
            bar.update(task, completed=done, total=total)

        yield progress


@contextmanager
def stopping(flag: Any) -> Iterator[None]:
    """Within the block Ctrl-C (or SIGTERM) sets a flag instead of ending the program; a second one ends it."""

    def handle(number: int, frame: Any) -> None:
        if flag.set:
            raise KeyboardInterrupt
        flag.set = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def run_lock(folder: Path, wait: float = 30.0) -> Iterator[None]:
    """Only one process at a time trains a run; the lock goes with the process, however it ends.

    Args:
        folder: the run's folder, which exists.
        wait: seconds to wait for another process that is just ending.

    Raises:
        DitlabError: when another process still trains the run after that time.
    """
    try:
        import fcntl
    except ImportError:  # no such lock on Windows; there two processes on one run are the user's own care
        yield
        return
    with (folder / ".lock").open("w") as file:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise DitlabError(f"run {folder}: another process is training it") from None
                time.sleep(0.2)
        yield


def command_line(verb: str) -> str:
    """The command as the user typed it, for config.json and reports."""
    import shlex

    return shlex.join(["ditlab", verb, *sys.argv[2:]])


def parent_gone() -> bool:
    """Whether the process that started this one for its own sake (DITLAB_PARENT) has ended."""
    parent = os.environ.get("DITLAB_PARENT")
    return parent is not None and os.getppid() != int(parent)
