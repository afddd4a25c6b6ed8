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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.files import read_arrays, read_json, write_arrays, write_json, write_text
from ditlab.metrics.denoising_errors import check_levels, denoising_errors, grid_levels, own_steps
from ditlab.metrics.psnr import EXACT_DB, REDUCTIONS, Reduction, mse_floor, psnr_of
from ditlab.provenance import Provenance

Side = Literal["train", "test"]


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


@dataclass(frozen=True, eq=False)
class PSNRResult:
    """The error of every (level, image, noise draw) of both sides, and the PSNR and gaps that follow from it."""

    about: Provenance
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
        return float(min(self.train_mse.min(), self.test_mse.min())) <= mse_floor(self.peak)

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
                about=Provenance(**record["about"]),
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


def psnr_gap(
    denoiser: Denoiser,
    train_images: Float[Tensor, "n c h w"],
    test_images: Float[Tensor, "m c h w"],
    config: PSNRConfig | None = None,
    *,
    about: Provenance | None = None,
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
    about = about or Provenance(name="denoiser")
    if not denoiser.pixel_space:
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
