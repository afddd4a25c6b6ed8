"""The result of a PSNR gap: the errors of all images, and the curves and averages that follow from them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.stored import StoredResult, config_from_json, tuples
from ditlab.errors import Damaged
from ditlab.files import write_text
from ditlab.metrics.bands import Band, places_by_band
from ditlab.metrics.psnr import EXACT_DB, mse_floor, psnr_of, resampled_psnr, resampling_weights
from ditlab.metrics.reduction import REDUCTIONS, Reduction
from ditlab.provenance import Provenance

__all__ = ["PSNRResult", "Quantity", "Side"]

Side = Literal["train", "test"]
Quantity = Literal["train", "test", "gap", "gap_untruncated"]
FLOOR = "floor"
"""Name of the baseline that saw neither side."""


@dataclass(frozen=True, eq=False)
class PSNRResult(StoredResult):
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

    kind = file = "psnr-gap"
    needs_arrays = True

    def mse(self, side: Side) -> np.ndarray:
        """The errors of one side, float64 [L, images, draws]."""
        return self.train_mse if side == "train" else self.test_mse

    def curve(self, side: Side, reduction: Reduction | None = None) -> np.ndarray:
        """PSNR in dB at each level, float64 [L] (An et al. Eq. 4 for "mse_mean")."""
        return psnr_of(self.mse(side), self.peak, reduction or self.config.reduction)

    def gap(self, reduction: Reduction | None = None, *, truncated: bool = True) -> np.ndarray:
        """PSNR_train - PSNR_test in dB at each level, float64 [L]; not below zero if truncated (An et al. Eq. 2)."""
        difference = self.curve("train", reduction) - self.curve("test", reduction)
        return np.maximum(difference, 0.0) if truncated else difference

    def average(self, what: Quantity, reduction: Reduction | None = None) -> float:
        """Mean over the levels, in dB, of a side's PSNR or of the gap (truncated at each level before averaging)."""
        if what in ("train", "test"):
            return float(self.curve(what, reduction).mean())
        return float(self.gap(reduction, truncated=what == "gap").mean())

    def by_band(self) -> dict[Band, PSNRResult]:
        """Returns the same result at the levels of each band that has any (`config.bands`)."""
        places_in = places_by_band(self.config.bands, self.levels)
        return {band: self.at(places) for band, places in places_in.items()}

    def at(self, places: Sequence[int]) -> PSNRResult:
        """Returns the same result at some of its levels."""
        return replace(
            self,
            levels=tuple(self.levels[i] for i in places),
            timesteps=None if self.timesteps is None else tuple(self.timesteps[i] for i in places),
            train_mse=self.train_mse[places],
            test_mse=self.test_mse[places],
        )

    @property
    def average_gap(self) -> float:
        """The reported number: the mean over levels of the truncated gap, in dB."""
        return self.average("gap")

    def interval(
        self, what: Quantity, confidence: float = 0.95, reduction: Reduction | None = None
    ) -> tuple[float, float] | None:
        """Returns the interval of `average(what)` over images, in dB: what other images of the same kind might give.

        A percentile bootstrap: the images of each side are drawn again with replacement, the same images at all levels,
        `RESAMPLES` times from a fixed seed. It says nothing of another seed of training. None for a side of one image.
        """
        if reduction not in (None, self.config.reduction):
            return replace(self, config=replace(self.config, reduction=reduction)).interval(what, confidence)
        if min(self.train_mse.shape[1], self.test_mse.shape[1]) < 2:
            return None
        tail = 50 * (1 - confidence)
        low, high = np.percentile(self._bootstrap[what], [tail, 100 - tail])
        return float(low), float(high)

    @cached_property
    def _bootstrap(self) -> dict[str, np.ndarray]:
        """Each average for resampled images, float64 [RESAMPLES]."""
        rng = np.random.default_rng(0)
        train, test = (
            resampled_psnr(mse, resampling_weights(mse.shape[1], rng), self.peak, self.config.reduction)
            for mse in (self.train_mse, self.test_mse)
        )
        gap = train - test
        curves = {"train": train, "test": test, "gap": np.maximum(gap, 0.0), "gap_untruncated": gap}
        return {what: curve.mean(1) for what, curve in curves.items()}

    @property
    def input_psnr(self) -> np.ndarray:
        """PSNR of the noisy input itself, 10 log10(M^2 / sigma^2) in dB, float64 [L]."""
        return 20 * np.log10(self.peak / np.asarray(self.levels))

    @property
    def baseline(self) -> bool:
        """Whether a closed-form denoiser was measured, not a trained one."""
        return bool(self.about.settings.get("baseline", False))

    @property
    def floor(self) -> int:
        """Of how many images on neither side the floor's denoiser was made; 0 for any other result."""
        return int(self.about.settings.get("floor", 0))

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
        if self.floor:
            notes.append(
                f"a Wiener denoiser of {self.floor:,} images on neither side. Its gap is what the difficulty of the "
                "images alone gives, so a gap of this size is no sign of memorization."
            )
        if self.latents:
            notes.append(
                f"PSNRs are those of latents, with M = {self.peak:g} by convention, not of pictures; the gap does not "
                "depend on M."
            )
        for side, (_, images, draws) in (("training", self.train_mse.shape), ("test", self.test_mse.shape)):
            if images < self.config.images:
                notes.append(
                    f"Only {images} {side} images exist, {self.config.images} were asked for: all were used, each with "
                    f"{draws} noise draw{'s' if draws > 1 else ''} a level."
                )
        if self.config.clip:
            notes.append("Estimates were clipped to [-1, 1].")
        if self.bounded:
            notes.append(f"Estimates nearer than {EXACT_DB:.0f} dB were counted as {EXACT_DB:.0f} dB.")
        return tuple(notes)

    def numbers(self) -> dict[str, Any]:
        sides: tuple[Side, ...] = ("train", "test")
        return {
            "levels": list(self.levels),
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "peak": self.peak,
            "images": {s: self.mse(s).shape[1] for s in sides},
            "draws": {s: self.mse(s).shape[2] for s in sides},
            "notes": list(self.notes),
            "averages": self._averages(),
            "bands": [
                {**band.facts(self.levels), "averages": result._averages()} for band, result in self.by_band().items()
            ],
            "curves": {
                r: {s: self.curve(s, r).tolist() for s in sides} | {"gap": self.gap(r).tolist()} for r in REDUCTIONS
            },
            "input_psnr": self.input_psnr.tolist(),
        }

    def _averages(self) -> dict[str, dict[str, float]]:
        return {r: {what: self.average(what, r) for what in get_args(Quantity)} for r in REDUCTIONS}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"train_mse": self.train_mse, "test_mse": self.test_mse}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PSNRResult:
        about, config = Provenance(**record["about"]), config_from_json(PSNRConfig, record["config"])
        levels, timesteps = tuples(record["levels"]), tuples(record["timesteps"])
        result = cls(about, config, levels, timesteps, record["peak"], arrays["train_mse"], arrays["test_mse"])
        for side in ("train", "test"):
            expected, found = (len(levels), record["images"][side], record["draws"][side]), result.mse(side).shape
            if found != expected:
                raise Damaged(f"psnr-gap result: expected {side}_mse of shape {expected}, found {found}")
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

    def save(self, folder: Path | str, name: str = "") -> Path:
        """Writes NAME.csv, NAME.npz and then NAME.json into the folder; returns the JSON's path."""
        write_text(Path(folder) / f"{name or self.file}.csv", self.to_csv())
        return super().save(folder, name)
