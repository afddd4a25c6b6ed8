"""The PSNR gap: how much better a denoiser is on the images it was trained on than on others of the same kind.

The protocol of An et al. (2410.21273), Eq. 2-4: K training and K held-out images are noised at each level of a grid,
denoised, and the peak signal-to-noise ratio of the estimates is compared,

    PSNR(sigma) = 10 log10(M^2 / ((1/K) sum_k MSE_k)),     gap(sigma) = max(PSNR_train - PSNR_test, 0),

with M the intensity range (2 for images in [-1, 1], and by convention for latents, which have none: M moves both
curves alike and leaves the gap as it is). The reported number is the mean over levels of the truncated gap:
the truncation comes first, which is the only reading under which the paper's Fig. 2 adds up. Kadkhodaie et al.
(2310.02557) average the PSNR of each image instead; both reductions are computed from the same kept errors.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analysis.denoising import check_levels, denoising_errors, grid_levels, own_steps
from ditlab.analysis.store import read_arrays, read_json, write_arrays, write_json, write_text
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError

Reduction = Literal["mse_mean", "psnr_mean"]
Side = Literal["train", "test"]
REDUCTIONS: tuple[Reduction, ...] = ("mse_mean", "psnr_mean")

EXACT_DB = 100.0
"""An estimate nearer than this many dB is counted as exactly this near. Only a denoiser that returns a stored training
image gets there (8-bit images are themselves rounded at 59 dB), and without a bound its average would be infinite."""


@dataclass(frozen=True)
class PSNRConfig:
    """How the gap is measured (An et al. Sec. 3; the defaults are the paper's where it states them)."""

    images: int = 300
    """Images per side (the paper's K). Where fewer exist, all are used, each with several noise draws."""
    points: int = 50
    """Noise levels, spread evenly over the steps of the denoiser's own grid, from its first to its last."""
    levels: tuple[float, ...] | None = None
    """Noise levels (sigma) to use instead of the grid."""
    reduction: Reduction = "mse_mean"
    """The reported number: PSNR of the mean error (An et al.) or mean of the images' PSNR (Kadkhodaie et al.)."""
    draws: int = 1
    """Noise draws per image and level (at least; more where there are fewer images than asked for)."""
    noise_seed: int = 0
    """Seed of the noise. Equal seeds give every denoiser the same noise."""
    clip: bool = False
    """Clip estimates to [-1, 1] first. Matters only at the highest levels. Estimates of latents are never clipped."""
    batch_size: int = 100
    """Images denoised at once. Does not change the result beyond float rounding."""

    def __post_init__(self) -> None:
        for name in ("images", "points", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise DitlabError(f"psnr-gap: {name} must be at least 1, found {getattr(self, name)}")
        if self.reduction not in REDUCTIONS:
            raise DitlabError(f"psnr-gap: reduction must be one of {', '.join(REDUCTIONS)}, found '{self.reduction}'")
        if self.levels is not None:
            check_levels(self.levels)


@dataclass(frozen=True)
class RunFacts:
    """Which denoiser was measured, trained on what. A result without these cannot be compared honestly."""

    name: str
    """The run's name, or the reference's ("empirical Bayes")."""
    label: str = ""
    """What runs that differ only in seed and N share ("global"); the name where empty. Curves and bars go by it."""
    n: int | None = None
    """Number of training images."""
    seed: int = 0
    """Seed of the run (and of its dataset shuffle)."""
    step: int | None = None
    """Training step of the weights; None for a closed form."""
    ema: bool | None = None
    """Whether the averaged weights were measured; None for a closed form."""
    split_family: str = ""
    """Hash of (image set, seed, test images): equal for nested training sets. Only equal families are comparable."""
    split_hash: str = ""
    """Hash that also covers the training images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping with the numbers; must be JSON."""

    @property
    def group(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


@dataclass(frozen=True, eq=False)
class PSNRResult:
    """The error of every (level, image, noise draw) of both sides, and the PSNR and gaps that follow from it."""

    about: RunFacts
    config: PSNRConfig
    levels: tuple[float, ...]
    """Noise levels sigma [L], ascending."""
    timesteps: tuple[int, ...] | None
    """The denoiser's own steps with these levels [L], or None where it has no discrete grid."""
    peak: float
    train_mse: np.ndarray
    """Mean squared error, float64 [L, images, draws], over all pixels and channels, of the training images."""
    test_mse: np.ndarray
    """The same of held-out images."""

    kind = "psnr-gap"
    version = 1

    def mse(self, side: Side) -> np.ndarray:
        """The kept errors of one side, float64 [L, images, draws]."""
        return self.train_mse if side == "train" else self.test_mse

    def curve(self, side: Side, reduction: Reduction | None = None) -> np.ndarray:
        """PSNR in dB at each level, float64 [L] (An et al. Eq. 4 for "mse_mean")."""
        return psnr_of(self.mse(side), self.peak, reduction or self.config.reduction)

    def gap(self, reduction: Reduction | None = None, *, truncated: bool = True) -> np.ndarray:
        """PSNR_train - PSNR_test in dB at each level, float64 [L]; not below zero if truncated (An et al. Eq. 2)."""
        difference = self.curve("train", reduction) - self.curve("test", reduction)
        return np.maximum(difference, 0.0) if truncated else difference

    def average(self, what: Side | Literal["gap", "gap_untruncated"], reduction: Reduction | None = None) -> float:
        """Mean over the levels, in dB, of a side's PSNR or of the gap (truncated at each level before averaging)."""
        if what in ("train", "test"):
            return float(self.curve(what, reduction).mean())
        return float(self.gap(reduction, truncated=what == "gap").mean())

    @property
    def average_gap(self) -> float:
        """The reported number: the mean over levels of the truncated gap, in dB."""
        return self.average("gap")

    @property
    def input_psnr(self) -> np.ndarray:
        """PSNR of the noisy input itself, 10 log10(M^2 / sigma^2) in dB, float64 [L]."""
        return 20 * np.log10(self.peak / np.asarray(self.levels))

    @property
    def bounded(self) -> bool:
        """Whether an estimate was exact to `EXACT_DB`, so that averages depend on that bound."""
        return float(min(self.train_mse.min(), self.test_mse.min())) <= _mse_floor(self.peak)

    @property
    def latents(self) -> bool:
        """Whether the errors are those of latents, not of pixels."""
        return self.about.settings.get("space") == "latents"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know about how this was measured, one sentence each."""
        notes = []
        if self.latents:
            notes.append(
                f"PSNRs are those of latents, with M = {self.peak:g} by convention, not of pictures; the gap does not "
                "depend on M."
            )
        for side, mse in (("training", self.train_mse), ("test", self.test_mse)):
            _, images, draws = mse.shape
            if images < self.config.images:
                notes.append(
                    f"Only {images} {side} images exist where {self.config.images} were asked for: all of them were "
                    f"used, each with {draws} noise draw{'s' if draws > 1 else ''} a level."
                )
        if self.config.clip:
            notes.append("Estimates were clipped to [-1, 1].")
        if self.bounded:
            notes.append(f"Estimates nearer than {EXACT_DB:.0f} dB were counted as {EXACT_DB:.0f} dB.")
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-image errors: facts, settings, curves and averages of both reductions."""
        sides: tuple[Side, ...] = ("train", "test")
        return {
            "kind": self.kind,
            "version": self.version,
            "about": asdict(self.about) | {"settings": dict(self.about.settings)},
            "config": asdict(self.config),
            "levels": list(self.levels),
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "peak": self.peak,
            "images": {s: self.mse(s).shape[1] for s in sides},
            "draws": {s: self.mse(s).shape[2] for s in sides},
            "notes": list(self.notes),
            "averages": {
                r: {what: self.average(what, r) for what in ("train", "test", "gap", "gap_untruncated")}
                for r in REDUCTIONS
            },
            "curves": {
                r: {s: self.curve(s, r).tolist() for s in sides} | {"gap": self.gap(r).tolist()} for r in REDUCTIONS
            },
            "input_psnr": self.input_psnr.tolist(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PSNRResult:
        """The result again, from `to_json()` and the two error arrays (`train_mse`, `test_mse`).

        Raises:
            DitlabError: a field is missing or unknown, or the arrays do not belong to the record.
        """
        try:
            config = dict(record["config"])
            config["levels"] = None if config["levels"] is None else tuple(config["levels"])
            steps = record["timesteps"]
            result = cls(
                about=RunFacts(**record["about"]),
                config=PSNRConfig(**config),
                levels=tuple(record["levels"]),
                timesteps=None if steps is None else tuple(steps),
                peak=record["peak"],
                train_mse=arrays["train_mse"],
                test_mse=arrays["test_mse"],
            )
            for side in ("train", "test"):
                expected = (len(result.levels), record["images"][side], record["draws"][side])
                if result.mse(side).shape != expected:
                    raise DitlabError(
                        f"psnr-gap result: expected {side}_mse of shape {expected}, found {result.mse(side).shape}"
                    )
        except (KeyError, TypeError) as error:
            raise DitlabError(f"psnr-gap result: a field is missing or unknown ({error})") from error
        return result

    def to_csv(self) -> str:
        """One line a level: sigma, the step, the input's PSNR, and train, test and gap of both reductions, in dB."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        columns = [f"{what}_{r}" for r in REDUCTIONS for what in ("train", "test", "gap")]
        table.writerow(["sigma", "timestep", "input", *columns])
        values = [v for r in REDUCTIONS for v in (self.curve("train", r), self.curve("test", r), self.gap(r))]
        for i, sigma in enumerate(self.levels):
            step = "" if self.timesteps is None else self.timesteps[i]
            table.writerow([f"{sigma:.8g}", step, f"{self.input_psnr[i]:.4f}", *(f"{v[i]:.4f}" for v in values)])
        return text.getvalue()

    def save(self, folder: Path | str, name: str = "psnr-gap") -> Path:
        """Writes NAME.npz, NAME.csv and then NAME.json into the folder; returns the JSON's path."""
        folder = Path(folder)
        write_arrays(folder / f"{name}.npz", {"train_mse": self.train_mse, "test_mse": self.test_mse})
        write_text(folder / f"{name}.csv", self.to_csv())
        return write_json(folder / f"{name}.json", self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> PSNRResult:
        """Reads what `save` wrote, from the JSON's path (the .npz must lie beside it).

        Raises:
            DitlabError: a file is absent or damaged, or is another kind of result.
        """
        path = Path(path)
        record = read_json(path, cls.kind, cls.version)
        arrays = read_arrays(path.with_suffix(".npz"), ("train_mse", "test_mse"))
        return cls.from_json(record, arrays)


def _mse_floor(peak: float) -> float:
    return peak**2 * 10 ** (-EXACT_DB / 10)


def psnr_of(mse: np.ndarray, peak: float, reduction: Reduction = "mse_mean") -> np.ndarray:
    """PSNR in dB at each level from per-image errors.

    Args:
        mse: float64 [L, images, draws], mean squared errors.
        peak: the intensity range M.
        reduction: "mse_mean" takes the mean error inside the logarithm (An et al. Eq. 4), "psnr_mean" the mean of the
            logarithms (Kadkhodaie et al.); by Jensen's inequality the first is never above the second.

    Returns:
        float64 [L], not above `EXACT_DB`.
    """
    floor = _mse_floor(peak)
    if reduction == "mse_mean":
        return 10 * np.log10(peak**2 / np.maximum(mse.mean(axis=(1, 2)), floor))
    return (10 * np.log10(peak**2 / np.maximum(mse, floor))).mean(axis=(1, 2))


def average_psnr(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    levels: Sequence[float],
    noise_seed: int = 0,
    *,
    labels: Int64[Tensor, " n"] | None = None,
    reduction: Reduction = "mse_mean",
    batch_size: int = 100,
) -> float:
    """PSNR in dB of one set of images averaged over levels, one noise draw: the light form for use during training.

    Arguments as `denoising_errors`. For the gap, call it on train and on test images: equal seeds share the noise.
    """
    errors = denoising_errors(denoiser, images, levels, noise_seed=noise_seed, labels=labels, batch_size=batch_size)
    return float(psnr_of(errors, denoiser.peak, reduction).mean())


@dataclass(frozen=True)
class PSNRPoint:
    """One point of a training trajectory: averages over levels, in dB."""

    train: float
    test: float
    gap: float
    """Mean of the gap truncated at each level; at least train - test."""


def psnr_point(
    denoiser: Denoiser,
    train_images: Float[Tensor, "n c h w"],
    test_images: Float[Tensor, "m c h w"],
    levels: Sequence[float],
    noise_seed: int = 0,
    *,
    train_labels: Int64[Tensor, " n"] | None = None,
    test_labels: Int64[Tensor, " m"] | None = None,
    reduction: Reduction = "mse_mean",
    batch_size: int = 100,
) -> PSNRPoint:
    """Train and test PSNR and their gap averaged over a few levels, one noise draw: what a training run logs.

    Arguments as `average_psnr`. Cost: one forward pass per image and level.
    """
    curves = [
        psnr_of(
            denoising_errors(denoiser, images, levels, noise_seed=noise_seed, labels=labels, batch_size=batch_size),
            denoiser.peak,
            reduction,
        )
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    ]
    train, test = curves
    return PSNRPoint(float(train.mean()), float(test.mean()), float(np.maximum(train - test, 0.0).mean()))


def psnr_gap(
    denoiser: Denoiser,
    train_images: Float[Tensor, "n c h w"],
    test_images: Float[Tensor, "m c h w"],
    config: PSNRConfig | None = None,
    *,
    about: RunFacts | None = None,
    train_labels: Int64[Tensor, " n"] | None = None,
    test_labels: Int64[Tensor, " m"] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> PSNRResult:
    """Measures train and test PSNR by noise level and their gap (An et al. Eq. 2-4).

    The first `config.images` of each side are used. Where a side has fewer, all of them are used, each with so many
    noise draws that there are at least as many estimates; the result's `notes` say so.

    Args:
        denoiser: the contract (ours, a reference, or one made by `Denoiser.wrap`).
        train_images: float32 [N, C, H, W] in [-1, 1] (or scaled latents), images it was trained on.
        test_images: float32 [M, C, H, W] in [-1, 1], images it was not trained on.
        config: the settings; the paper's where None.
        about: which run this is, kept with the result.
        train_labels: int64 [N] for a class-conditional denoiser.
        test_labels: int64 [M].
        progress: called as progress(images denoised, images in all).

    Raises:
        DitlabError: a side is empty, shapes disagree, no level lies in the denoiser's range, an estimate is not finite.
    """
    config = config or PSNRConfig()
    levels = config.levels or grid_levels(denoiser, config.points)
    if not levels:
        raise DitlabError("psnr-gap: none of the default noise levels lies in the denoiser's range; give levels")
    sides = []
    for name, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        if len(images) == 0:
            raise DitlabError(f"psnr-gap: expected {name} images, found none")
        used = images[: config.images]
        draws = config.draws * math.ceil(config.images / len(used))
        sides.append((used, None if labels is None else labels[: config.images], draws))
    total = sum(len(used) * draws for used, _, draws in sides) * len(levels)
    errors, before = [], 0
    for used, labels, draws in sides:
        errors.append(
            denoising_errors(
                denoiser,
                used,
                levels,
                noise_seed=config.noise_seed,
                draws=draws,
                labels=labels,
                clip=config.clip,
                batch_size=config.batch_size,
                progress=None if progress is None else lambda done, before=before: progress(before + done, total),
            )
        )
        before += len(used) * draws * len(levels)
    about = about or RunFacts(name="denoiser")
    if not denoiser.bounded:
        about = replace(about, settings={**about.settings, "space": "latents"})
    return PSNRResult(
        about=about,
        config=config,
        levels=tuple(float(s) for s in levels),
        timesteps=own_steps(denoiser, levels),
        peak=float(denoiser.peak),
        train_mse=errors[0],
        test_mse=errors[1],
    )
