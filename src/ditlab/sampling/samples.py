"""Samples of a model: drawn in memory, or in a folder by a job that resumes after a kill."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ditlab.arguments import check_fields, checks_arguments, plain
from ditlab.errors import DitlabError, InvalidConfig, NotFound, unknown_name
from ditlab.files import atomic_folder
from ditlab.progress import SILENT, Reporter, default_reporter
from ditlab.sampling.batch_store import BatchStore, MemoryBatches, first_images
from ditlab.sampling.job import SamplingJob, make_job
from ditlab.sampling.options import GuidanceFlags, SampleConfig
from ditlab.sampling.outputs import overview_png
from ditlab.sampling.seeds import seed_list, seeds_text
from ditlab.threads import use_threads
from ditlab.training.distributed import Device, DistributedContext, init_distributed, pick_device

if TYPE_CHECKING:
    from ditlab.sampling.model import Sampled

__all__ = ["Samples", "sample_model"]


class Samples:
    """Images of a model; a notebook shows them.

    Attributes:
        seeds: seed of each image; of a sweep, of each column.
        classes: class of each image, int64 [N]; None for an unconditional model.
        settings: what samples.json says: everything that decides the images, their number and the time.
        folder: where they are, if they were drawn into a folder.
        drawn: whether this call drew them; False if the folder had them already.
    """

    def __init__(
        self,
        job: SamplingJob,
        settings: Mapping[str, Any],
        *,
        batches: MemoryBatches | None = None,
        folder: Path | None = None,
        drawn: bool = True,
    ) -> None:
        """Made by `sample_model`, of batches in memory or of a folder."""
        self._job, self._batches = job, batches
        self.settings, self.folder, self.drawn = settings, folder, drawn
        self.seeds, self.classes = list(job.seeds), job.classes

    def __len__(self) -> int:
        return self._job.count

    def __repr__(self) -> str:
        place = "in memory" if self.folder is None else f"in {str(self.folder)!r}"
        sampler, model = self.settings["sampler"], self.settings["run"]
        return f"<{len(self)} samples of {model!r}, {sampler['kind']} in {sampler['steps']} steps, {place}>"

    def _repr_png_(self) -> bytes:
        if self._batches is not None:
            return overview_png(self._job, self._batches)
        assert self.folder is not None
        return (self.folder / ("sweep.png" if self._job.sweep else "grid.png")).read_bytes()

    @cached_property
    def images(self) -> np.ndarray:
        """The images, uint8 [N, H, W, C], in the order of the seeds; of a sweep, guidance scale by guidance scale.

        Raises:
            NotFound: a sweep that was drawn into a folder without a PNG of each image.
        """
        if self._batches is not None:
            return first_images(self._batches, self._job.count)
        assert self.folder is not None
        if not self._job.sweep:
            with np.load(self.folder / "samples.npz") as arrays:
                return arrays["arr_0"]
        if not self._job.settings.images:
            raise NotFound(f"{self.folder}: a sweep without `images` has one picture only, {self.folder / 'sweep.png'}")
        scales = [self.folder / "images" / f"scale-{guidance.scale:g}" for guidance in self._job.guidances]
        return np.stack([_read_png(scale / f"{seed:06d}.png") for scale in scales for seed in self.seeds])

    def save(self, folder: str | Path) -> Path:
        """Writes the files that a job with `out` writes: samples.npz, grid.png, images/, samples.json.

        Args:
            folder: a new or empty folder, or one that holds exactly these samples, which is left alone.

        Raises:
            DitlabError: the folder holds something else, or cannot be written.
        """
        out, job = Path(folder), self._job
        if self._batches is None:
            assert self.folder is not None
            if out.resolve() != self.folder.resolve() and job.stored(out) is None:
                with atomic_folder(out) as copy:
                    shutil.copytree(self.folder, copy, dirs_exist_ok=True)
        elif job.stored(out) is None:
            store = job.store(out)
            with store.locked(restart=True):
                for batch in self._batches.done():
                    job.save_batch(store, batch, self._batches.arrays[batch])
                job.finish(store)
        return out


@checks_arguments({"Sampled": "ditlab.sampling.model"})
def sample_model(
    model: Sampled,
    config: SampleConfig | None = None,
    *,
    out: str | Path | Literal[True] | None = None,
    device: Device | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Samples | None:
    """Draws images from a model. Each depends on its own seed and class alone, whatever the batch size.

    With `out` the batches are kept on disk: the same call resumes after a kill, and returns at once when all is done.
    Several processes that `torchrun` started share the batches; if rank 0 refuses the job, the others return None.

    Args:
        model: a model that `ditlab.open` returned, or one's own.
        config: the settings; fields that are also in `settings` are replaced.
        out: the folder to write; True for MODEL/samples/STEP-SAMPLER-SEEDS...; None to draw in memory.
        device: "cpu", "cuda" or "cuda:N"; CUDA if there is one and None is given.
        threads: CPU threads; torch's own choice if None.
        reporter: takes notes and progress; bars in a notebook and nothing elsewhere if None.
        settings: fields of `ditlab.sampling.options.SampleConfig`, by name. `seeds` also takes a seed or a sequence of
            seeds, `classes` a class, `guidance` a scale; `steps` is short for `sampler_steps`.

    Example:
        >>> samples = run.sample(seeds=range(4), sampler="ddim", steps=10)  # doctest: +SKIP
        >>> samples.images.shape  # doctest: +SKIP
        (4, 32, 32, 3)

    Raises:
        DitlabError: anything that cannot be drawn or written, before the first image where that can be known.
    """
    use_threads(threads)
    reporter = default_reporter() if reporter is None else reporter
    config = replace(SampleConfig() if config is None else config, **_fields(settings))
    if out is not None and out is not False:
        with init_distributed(device) as context:
            return _draw_in_folder(model, config, True if isinstance(out, bool) else Path(out), context, reporter)
    job = make_job(model, config, pick_device(device), reporter)
    batches = MemoryBatches()
    with reporter.bar("sampling") as bar:
        batches.arrays.update(job.draw(job.missing(batches), bar))
    return Samples(job, job.record(batches), batches=batches)


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as the fields of `SampleConfig` have them."""
    values = dict(settings)
    if "steps" in values:
        if "sampler_steps" in values:
            raise InvalidConfig("expected `steps` or `sampler_steps`, found both")
        values["sampler_steps"] = values.pop("steps")
    known = SampleConfig.__dataclass_fields__
    if unknown := [name for name in values if name not in known]:
        raise unknown_name("setting of sample", unknown[0], known)
    if values.get("seeds") is not None:
        values["seeds"] = seeds_text(seed_list(values["seeds"]))
    if values.get("sampler_steps") is not None:
        values["sampler_steps"] = str(values["sampler_steps"])
    for name, kind in (("classes", operator.index), ("guidance_sweep", float)):
        if values.get(name) is not None:
            values[name] = _converted(name, values[name], kind)
    guidance = values.get("guidance", GuidanceFlags())
    if guidance is None:
        values["guidance"] = GuidanceFlags()
    elif not isinstance(guidance, GuidanceFlags):
        values["guidance"] = GuidanceFlags(scale=_converted("guidance", guidance, float)[0])
    values = {name: plain(value) for name, value in values.items()}
    check_fields(SampleConfig, values)
    return values


def _converted(name: str, value: Any, kind: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Returns a number, or several, as a tuple."""
    try:
        return tuple(kind(number) for number in value) if isinstance(value, Iterable) else (kind(value),)
    except (TypeError, ValueError):
        raise InvalidConfig(f"`{name}`: expected numbers, found {value!r}") from None


def _draw_in_folder(
    model: Sampled,
    config: SampleConfig,
    out: Path | Literal[True],
    context: DistributedContext,
    reporter: Reporter,
) -> Samples | None:
    """Draws what is missing from a folder, this process its share; None where rank 0 refuses and this is not it."""
    with ExitStack() as locks:
        job, error = None, None
        if context.is_main:
            try:
                job = make_job(model, config, context.device, reporter)
                folder = _folder(job, out)
                if job.stored(folder) is None:
                    locks.enter_context(job.store(folder).locked(restart=not job.resumable))
            except DitlabError as refusal:
                error = refusal
        if not context.raise_together(error):
            return None
        job = make_job(model, config, context.device) if job is None else job
        folder = _folder(job, out)
        store = job.store(folder)
        if context.is_main:
            for other, count in store.other_settings().items():
                reporter.note(f"{count} unfinished images with other settings are in {other}")
        settings, complete = job.stored(folder), store.complete
        context.wait()  # rank 0 publishes the folder only after all have seen whether it was there
        if settings is not None:
            return Samples(job, settings, folder=folder, drawn=False)
        if not complete:
            _draw_share(job, store, context, reporter)
        if context.is_main:
            try:
                settings = job.finish(store)
            except DitlabError as refusal:
                error = refusal
        if not context.raise_together(error):
            return None
        settings = job.stored(folder) if settings is None else settings
        assert settings is not None
        return Samples(job, settings, folder=folder)


def _folder(job: SamplingJob, out: Path | Literal[True]) -> Path:
    return job.model.path / "samples" / job.name if out is True else out


def _draw_share(job: SamplingJob, store: BatchStore, context: DistributedContext, reporter: Reporter) -> None:
    """Draws and saves this process's share of the missing batches."""
    context.wait()
    missing, finished = job.missing(store), len(store.done())
    context.wait()  # nobody begins before all have seen what is missing
    if context.is_main and finished:
        reporter.note(f"resuming: {finished} of {finished + len(missing)} batches are finished")
    title = "sampling" + (f", rank 0 of {context.world}" if context.world > 1 else "")
    with (reporter if context.is_main else SILENT).bar(title) as bar:
        for batch, arrays in job.draw(missing[context.rank :: context.world], bar):
            job.save_batch(store, batch, arrays)
    context.wait()


def _read_png(path: Path) -> np.ndarray:
    """Returns a PNG as uint8 [H, W, C]."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
