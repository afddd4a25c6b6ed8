"""A sampling job: which images are drawn of which model, batch by batch, and the files they become."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import ditlab
from ditlab.config import differing_settings
from ditlab.diffusion.denoisers import Denoiser, hash_of_weights
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.samplers import SamplerConfig, SamplerStep, evaluations
from ditlab.errors import AlreadyExists, Damaged, DitlabError, InvalidConfig
from ditlab.files import flush, write_json
from ditlab.progress import SILENT, Bar, Reporter
from ditlab.sampling.batch_store import Batch, Batches, BatchStore
from ditlab.sampling.draw import draw_batch, with_guidance
from ditlab.sampling.options import SampleConfig
from ditlab.sampling.outputs import TrajectoryRecorder, write_outputs, write_pngs
from ditlab.sampling.sampler_choice import sampler_config, sampler_name
from ditlab.sampling.seeds import parse_seeds, seeds_text

if TYPE_CHECKING:
    from ditlab.sampling.model import Sampled

__all__ = ["SamplingJob", "about_sampler", "make_job"]

MAX_SWEEP_SEEDS = 16
"""Columns of the picture of a guidance sweep, at most."""


@dataclass(frozen=True, eq=False)
class SamplingJob:
    """Images of some seeds, with one guidance or several (a sweep)."""

    model: Sampled
    denoisers: Sequence[Denoiser]
    """The model's denoiser, once for each guidance."""
    guidances: Sequence[GuidanceConfig]
    config: SamplerConfig
    seeds: Sequence[int]
    classes: np.ndarray | None
    """Class of each image, int64 [len(seeds)]; None for an unconditional model."""
    settings: SampleConfig
    """What was asked for: `batch`, `strip` and `images` among it."""
    about: Mapping[str, Any]
    """Everything that decides the images and the files, as JSON values; samples.json begins with it."""
    name: str
    """Name of the folder in the model's `samples` folder: what tells samples apart."""

    @property
    def sweep(self) -> bool:
        """Whether it compares guidance scales."""
        return len(self.guidances) > 1

    @property
    def count(self) -> int:
        """Number of images: each seed with each guidance, guidance by guidance."""
        return len(self.seeds) * len(self.guidances)

    @property
    def resumable(self) -> bool:
        """Whether earlier images can be known to be of the same weights; a function of a user's own has no hash."""
        return bool(self.about["weights"])

    def store(self, out: Path) -> BatchStore:
        """Returns the store of finished batches beside an output folder."""
        # Unfinished batches of earlier versions resume as long as these names and their order stay.
        settings = {
            name: value for name, value in self.model.settings.items() if name.startswith(("network.", "objec"))
        }
        versions = [ditlab.__version__, torch.__version__]
        parts = [dict(self.about), settings, self.denoisers[0].device.type, versions]
        text = json.dumps(parts, sort_keys=True, default=str)
        return BatchStore(out, hashlib.sha256(text.encode()).hexdigest())

    def stored(self, out: Path) -> dict[str, Any] | None:
        """Returns samples.json of a folder that holds exactly these samples; None if there is no such folder."""
        file = out / "samples.json"
        if not file.is_file():
            if out.exists() and not (out.is_dir() and not any(out.iterdir())):
                raise AlreadyExists(f"`out` {out}: expected a new folder or one of samples, found something else")
            return None
        if not self.resumable:
            raise AlreadyExists(
                f"`out` {out}: expected a new folder, since {self.model.name} has no weights to compare"
            )
        try:
            record = json.loads(file.read_text())
        except ValueError:
            raise Damaged(f"{file}: expected JSON, found something else") from None
        changed = differing_settings({name: record.get(name) for name in self.about}, self.about)
        if changed:
            name, (before, now) = next(iter(changed.items()))
            raise AlreadyExists(
                f"`out` {out}: it holds samples with {name} = {_short(before)}, now {_short(now)} is requested; "
                "give another `out`, or the same settings"
            )
        return record

    def missing(self, batches: Batches) -> list[Batch]:
        """Returns the batches that are still to be drawn: what the finished ones, of any size, leave out."""
        missing, place = [], 0
        for start, size in [*batches.done(), Batch(self.count, 0)]:
            while place < start:
                of_this_guidance = len(self.seeds) - place % len(self.seeds)
                missing.append(Batch(place, min(self.settings.batch, start - place, of_this_guidance)))
                place += missing[-1].size
            place = start + size
        return missing

    def draw(self, batches: Sequence[Batch], bar: Bar) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Draws batches; `bar` shows how many images are done.

        Yields each with its arrays: images uint8 [b, H, W, C], seconds, the batch size of the job, and what
        `TrajectoryRecorder` recorded. Raises DitlabError where an image is not finite.
        """
        total, done = sum(batch.size for batch in batches), 0
        for batch in batches:
            which, start = divmod(batch.start, len(self.seeds))
            places = slice(start, start + batch.size)
            label = None if self.classes is None else torch.from_numpy(self.classes[places])
            recorder = TrajectoryRecorder(self.model, max(0, min(batch.size, self.settings.strip - batch.start)))

            def after(
                step: SamplerStep,
                done: int = done,
                batch: Batch = batch,
                recorder: TrajectoryRecorder = recorder,
            ) -> None:
                recorder(step)
                bar(done + batch.size * (step.index + 1) // step.steps, total)

            began = time.perf_counter()
            drawn = draw_batch(self.denoisers[which], self.config, self.seeds[places], label=label, callback=after)
            _check_finite(drawn, self.seeds[places])
            images = np.ascontiguousarray(self.model.decode(drawn).transpose(0, 2, 3, 1))
            seconds = np.asarray(time.perf_counter() - began)
            yield (
                batch,
                {"images": images, "seconds": seconds, "batch": np.asarray(self.settings.batch), **recorder.arrays()},
            )
            done += batch.size
            bar(done, total)

    def save_batch(self, store: BatchStore, batch: Batch, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a batch that `draw` yielded, and its PNGs; batches that were saved before are kept if it cannot be."""
        which, start = divmod(batch.start, len(self.seeds))
        with store.writing():
            if self.settings.images:
                folder = f"scale-{self.guidances[which].scale:g}" if self.sweep else ""
                seeds = self.seeds[start : start + batch.size]
                write_pngs(store.folder / "images" / folder, arrays["images"], seeds)
            store.add(batch.start, **arrays)

    def record(self, batches: Batches) -> dict[str, Any]:
        """Returns what samples.json says when all batches are finished."""
        costs = [evaluations(self.config, denoiser) for denoiser in self.denoisers]
        done = batches.done()
        seconds = sum(float(batches.array(batch, "seconds")) for batch in done)
        return {
            **self.about,
            "count": self.count,
            "nfe": costs[0].nfe,
            "passes": [cost.passes for cost in costs] if self.sweep else costs[0].passes,
            "seconds": round(seconds, 3),
            "seconds_per_image": round(seconds / self.count, 6),
            "batch": sorted({int(batches.array(batch, "batch")) for batch in done}),
            "device": str(self.denoisers[0].device),
        }

    def finish(self, store: BatchStore) -> dict[str, Any]:
        """Writes the files that are made of all batches, publishes the folder, and returns what samples.json says."""
        with store.writing():
            if not store.complete:
                write_outputs(self, store, store.folder)
                flush(store.folder)
                write_json(store.folder / "samples.json", self.record(store))
            record = json.loads((store.folder / "samples.json").read_text())
            store.publish()
        return record

    def image_label(self, place: int) -> str:
        """Returns the label of an image in pictures: its seed and its class."""
        if self.classes is None:
            return f"seed {self.seeds[place]}"
        number = int(self.classes[place])
        return f"seed {self.seeds[place]}\n" + self._class_names.get(number, f"class {number}")

    @cached_property
    def _class_names(self) -> dict[int, str]:
        """Names of the classes, as far as the image set is there."""
        names: tuple[str, ...] = ()
        with suppress(DitlabError):  # sampling needs no images
            names = self.model.class_names
        return {**dict(enumerate(names)), self.denoisers[0].num_classes: "no class"}


def make_job(
    model: Sampled, config: SampleConfig, device: torch.device | str, reporter: Reporter = SILENT
) -> SamplingJob:
    """Returns the job for a model and settings; raises DitlabError for anything that cannot be drawn."""
    if config.batch < 1:
        raise InvalidConfig(f"`batch`: expected at least 1, found {config.batch}")
    seeds = parse_seeds(config.seeds if config.seeds is not None else "0-7" if config.guidance_sweep else "0-63")
    if not 0 <= config.strip <= len(seeds):
        raise InvalidConfig(f"`strip`: expected 0 to {len(seeds)}, the number of images, found {config.strip}")
    _check_sweep(config, len(seeds))
    denoiser, provenance = model.denoiser_and_provenance(
        step=config.checkpoint, ema=not config.raw, device=device, reporter=reporter
    )
    sampler = sampler_config(model, config.sampler, config.sampler_steps, config.schedule)
    labels = _labels(config.classes, denoiser)
    guidance = config.guidance.apply_to(model.guidance)
    guidances = [replace(guidance, scale=scale) for scale in config.guidance_sweep] or [guidance]
    denoisers = [with_guidance(model, denoiser, guidance) for guidance in guidances]
    evaluations(sampler, denoiser)  # refuses steps that the sampler cannot take
    about = {
        "run": model.name,
        "step": provenance.step,
        "ema": not config.raw,
        "weights": _hash_of_images(model, denoiser),
        "sampler": about_sampler(sampler),
        "guidance": _about_guidance(guidances, denoiser.shape[0]),
        "guidance_sweep": list(config.guidance_sweep) or None,
        "seeds": seeds_text(seeds),
        "labels": labels,
        "strip": config.strip,
        "images": config.images,
    }
    return SamplingJob(
        model=model,
        denoisers=denoisers,
        guidances=guidances,
        config=sampler,
        seeds=seeds,
        classes=None if labels is None else np.array([labels[seed % len(labels)] for seed in seeds]),
        settings=config,
        about=about,
        name=_folder_name(config, provenance.step, sampler, guidances[0], seeds_text(seeds), denoiser.shape[0]),
    )


def _check_sweep(config: SampleConfig, count: int) -> None:
    """Raises InvalidConfig for scales that cannot be compared in one picture of `count` seeds."""
    scales = config.guidance_sweep
    if not scales:
        return
    if len(scales) < 2 or len(set(scales)) < len(scales):
        raise InvalidConfig(f"`guidance_sweep`: expected different scales, at least 2, found {_list(scales)}")
    if config.guidance.scale is not None:
        raise InvalidConfig("`guidance_sweep` gives the scales; expected no `guidance.scale` beside it")
    if config.strip:
        raise InvalidConfig("expected `strip` or `guidance_sweep`, found both")
    if count > MAX_SWEEP_SEEDS:
        raise InvalidConfig(f"`guidance_sweep`: expected at most {MAX_SWEEP_SEEDS} seeds, found {count}")


def _labels(classes: Sequence[int] | None, denoiser: Denoiser) -> list[int] | None:
    """Returns the classes to draw in turn; None for an unconditional denoiser."""
    if not denoiser.num_classes:
        if classes is not None:
            raise InvalidConfig("`classes`: the model is unconditional; expected no classes")
        return None
    if not classes:
        return list(range(denoiser.num_classes))
    last = denoiser.num_classes - 1
    for number in classes:
        if not 0 <= number <= last + denoiser.null_class:
            none = f" (or {last + 1} for none)" if denoiser.null_class else ""
            raise InvalidConfig(f"`classes`: expected classes 0..{last}{none}, found {number}")
    return list(classes)


def _folder_name(
    config: SampleConfig,
    step: int | None,
    sampler: SamplerConfig,
    guidance: GuidanceConfig,
    seeds: str,
    channels: int,
) -> str:
    words = ["weights" if step is None else f"{step:09d}", f"{sampler_name(sampler)}{sampler.steps}", f"seeds{seeds}"]
    if config.schedule is not None:
        words[1] += f"-{config.schedule}"
    if config.classes:
        words.append(f"labels{_list(config.classes)}")
    if config.guidance_sweep:
        words.append(f"sweep{_list(config.guidance_sweep)}")
    elif guidance.on:
        words.append(f"w{guidance.scale:g}")
    if config.guidance_sweep or guidance.on:
        if guidance.schedule != "constant":
            words.append(f"{guidance.schedule}{guidance.power:g}")
        if guidance.interval is not None:
            words.append("from{:g}to{:g}".format(*guidance.interval))
        if guidance.channels is not None:
            words.append(f"channels{guidance.guided_channels(channels)}")
    if config.raw:
        words.append("raw")
    return "-".join(word if len(word) <= 60 else word[:57] + "..." for word in words)


def about_sampler(config: SamplerConfig) -> dict[str, Any]:
    """Returns a sampler's settings as JSON values."""
    return {"kind": config.kind, **asdict(config)}


def _about_guidance(configs: Sequence[GuidanceConfig], channels: int) -> dict[str, Any] | None:
    """Returns the settings of a guidance as JSON values, with the number of channels that it guides; None for none.

    Those of a sweep are without the scale, the only setting in which they differ.
    """
    config = next((config for config in configs if config.on), None)
    if config is None:
        return None
    interval = None if config.interval is None else list(config.interval)
    about = {**asdict(config), "interval": interval, "channels": config.guided_channels(channels)}
    if len(configs) > 1:
        del about["scale"]
    return about


def _hash_of_images(model: Sampled, denoiser: Denoiser) -> str:
    """Returns 16 hexadecimal digits of the weights and settings of the denoiser, without guidance, and of the codec.

    "" for a function of a user's own, which has no weights to hash.
    """
    codec = {k: v for k, v in asdict(model.autoencoder_record).items() if k not in ("source", "place")}
    return hash_of_weights(denoiser, codec)[:16]


def _check_finite(drawn: Tensor, seeds: Sequence[int]) -> None:
    """Raises DitlabError for images [b, C, H, W] with NaN or infinity, which would be saved as black or white."""
    finite = drawn.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise DitlabError(
            f"samples: expected finite images, found NaN or infinite values in {finite.count(False)} of the "
            f"{len(finite)} images of a batch, the first of them of seed {seeds[finite.index(False)]}; nothing of this "
            "batch was kept"
        )


def _list(values: Sequence[int | float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
