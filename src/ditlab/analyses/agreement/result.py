"""The result of an agreement analysis: `ditlab.analyses.agreement.measure` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from ditlab.analyses.agreement.config import TITLES, AgreementConfig, BaselineName
from ditlab.analyses.stored import StoredResult, config_from_json, tuples
from ditlab.diffusion.local_scores import WindowSchedule
from ditlab.provenance import Provenance

__all__ = ["AgreementResult", "BaselineAgreement", "table_row"]

_NUMBERS = ("correlation", "r2", "mse", "control", "one_step")


@dataclass(frozen=True, eq=False)
class BaselineAgreement:
    """One baseline beside the denoiser; one number for each image, unless stated otherwise."""

    name: BaselineName
    correlation: Float[np.ndarray, " n"]
    """Of the final images: cosine about their means, in [-1, 1]."""
    r2: Float[np.ndarray, " n"]
    """1 - |x - y|^2 / (n Var y) of the final images, y the denoiser's, at most 1."""
    mse: Float[np.ndarray, " n"]
    """Mean squared difference of the final images in [-1, 1]."""
    control: Float[np.ndarray, " n"]
    """Mean correlation of the denoiser's image with the baseline's images of other seeds; 0 if there is one image."""
    one_step: Float[np.ndarray, "levels trajectories"]
    """Correlation of the two estimates of the clean image, on the denoiser's trajectories, at each level."""
    windows: WindowSchedule | None = None
    """The sides of its windows by level; None for a baseline without windows."""
    calibration: Float[np.ndarray, "levels candidates trajectories"] | None = None
    """Cosine of the two scores at each level for each candidate; None if nothing was calibrated."""
    images: np.ndarray | None = None
    """Its final images, float32 [n, C, H, W]; None if only the JSON is there."""

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
        return TITLES[self.name]

    def median(self, what: str) -> float:
        """Returns the median of one of `_NUMBERS`."""
        return float(np.median(getattr(self, what)))

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the images."""
        windows = self.windows
        return {
            "name": self.name,
            **{name: getattr(self, name).tolist() for name in _NUMBERS},
            "median": {name: self.median(name) for name in _NUMBERS[:-1]},
            "windows": None if windows is None else {"levels": list(windows.levels), "sizes": list(windows.sizes)},
            "calibration": None if self.calibration is None else self.calibration.tolist(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], images: np.ndarray | None) -> BaselineAgreement:
        """Returns what `to_json` gave."""
        windows, calibration = record["windows"], record["calibration"]
        return cls(
            name=record["name"],
            **{name: np.array(record[name]) for name in _NUMBERS},
            windows=None if windows is None else WindowSchedule(tuple(windows["levels"]), tuple(windows["sizes"])),
            calibration=None if calibration is None else np.array(calibration),
            images=images,
        )


@dataclass(frozen=True, eq=False)
class AgreementResult(StoredResult):
    """A denoiser beside baselines of its training images."""

    about: Provenance
    config: AgreementConfig
    levels: tuple[float, ...]
    """Noise levels at which the sampler called the denoiser, descending."""
    baselines: tuple[BaselineAgreement, ...]
    """Stored as "references"."""
    training_images: int
    """Number of training images the baselines were made of, mirror images not counted."""
    shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    notes: tuple[str, ...] = ()
    """What a reader must know about how this was measured, one sentence each."""
    images: np.ndarray | None = None
    """The denoiser's final images, float32 [n, C, H, W]; None if only the JSON is there."""

    kind = file = "agreement"

    @property
    def best(self) -> BaselineAgreement:
        """The baseline with the highest median correlation."""
        return max(self.baselines, key=lambda baseline: baseline.median("correlation"))

    def sentences(self) -> tuple[str, ...]:
        """Returns which baseline agrees best, and the correlations with the others."""
        name, count, best = self.about.title, self.config.images, self.best
        median, plural = ("median ", "s") if count > 1 else ("", "")
        control = f"; {best.median('control'):.2f} with samples from other noise" if count > 1 else ""
        first = (
            f"{name}: the samples agree most with those of {best.title} from the same noise: {median}correlation "
            f"{best.median('correlation'):.2f}, R² {best.median('r2'):.2f} (of {count} image{plural}{control})."
        )
        others = [f"{b.title} {b.median('correlation'):.2f}" for b in self.baselines if b.name != best.name]
        return (first, *([f"{name}: correlation with the other baselines: {', '.join(others)}."] if others else []))

    def numbers(self) -> dict[str, Any]:
        return {
            "levels": list(self.levels),
            "training_images": self.training_images,
            "shape": list(self.shape),
            "notes": list(self.notes),
            "references": [baseline.to_json() for baseline in self.baselines],
            "sentences": list(self.sentences()),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the images by the name of the baseline, the denoiser's as "network"."""
        images = {"network": self.images, **{baseline.name: baseline.images for baseline in self.baselines}}
        return {name: array for name, array in images.items() if array is not None}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> AgreementResult:
        return cls(
            about=Provenance(**record["about"]),
            config=config_from_json(AgreementConfig, record["config"]),
            baselines=tuple(BaselineAgreement.from_json(p, arrays.get(p["name"])) for p in record["references"]),
            images=arrays.get("network"),
            **{name: tuples(record[name]) for name in ("levels", "training_images", "shape", "notes")},
        )


def table_row(result: AgreementResult, baseline: BaselineAgreement) -> tuple[Any, ...]:
    """Returns model, N, baseline, correlation, other noise, R², MSE, one step and window: medians over images."""
    sizes = [] if baseline.windows is None else sorted(set(baseline.windows.sizes))
    correlation, r2, mse, control, one_step = map(baseline.median, _NUMBERS)
    return (
        *(result.about.group, result.about.n, baseline.title),
        *(correlation, control if result.config.images > 1 else None, r2, f"{mse:.4f}", one_step),
        " to ".join(map(str, dict.fromkeys([sizes[0], sizes[-1]]))) if sizes else None,
    )
