"""The result of an agreement analysis: `ditlab.analyses.agreement.measure` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from ditlab.diffusion.local_scores import WindowSchedule
from ditlab.errors import DitlabError, unknown_name
from ditlab.files import read_arrays, read_json, write_arrays, write_json
from ditlab.provenance import Provenance

Reference = Literal["empirical-bayes", "wiener", "ls", "els", "bbels", "wiener-locality"]
DeterministicSampler = Literal["ddim", "euler", "heun"]

REFERENCES: tuple[Reference, ...] = get_args(Reference)
WORDS: Mapping[Reference, str] = {
    "empirical-bayes": "empirical Bayes",
    "wiener": "Wiener",
    "ls": "LS",
    "els": "ELS",
    "bbels": "bbELS",
    "wiener-locality": "Wiener locality",
}
"""What tables and figures call them."""


@dataclass(frozen=True)
class AgreementConfig:
    """How a denoiser is compared with references."""

    references: tuple[Reference, ...] = REFERENCES
    """Which: the optimal denoiser of the training images, the optimal linear one, Kamb and Ganguli's local (ls), local
    and shift-equivariant (els) machines and that which sees the border (bbels), and Lukoianov et al.'s."""
    images: int = 8
    """Images that all of them draw from equal noise, of the seeds 0, 1, ..."""
    sampler: DeterministicSampler = "ddim"
    """How; without fresh noise, on the network's own levels."""
    sampler_steps: int = 20
    """Its steps."""
    window: int | None = None
    """Side of the windows of ls, els and bbels in pixels, at all levels; calibrated by level where not given."""
    candidates: tuple[int, ...] = (3, 5, 7, 9, 11, 13, 15, 17)
    """Sides to choose from, odd, ascending; those above the image's side are left out."""
    trajectories: int = 4
    """Of how many of the images the network's path from noise is looked at, level by level: windows are calibrated on
    it, and single estimates compared."""
    training_images: int | None = None
    """References are made of the first so many training images; of all where not given."""

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        if not self.references or len(set(self.references)) < len(self.references):
            raise DitlabError(f"agreement --references: expected different ones, found {list(self.references)}")
        for name in self.references:
            if name not in REFERENCES:
                raise unknown_name("reference", name, REFERENCES)
        for name in ("images", "sampler_steps", "trajectories"):
            if getattr(self, name) < 1:
                raise DitlabError(f"agreement: {name} must be at least 1, found {getattr(self, name)}")
        if self.training_images is not None and self.training_images < 1:
            raise DitlabError(f"agreement: training_images must be at least 1, found {self.training_images}")
        if not self.candidates or any(b <= a for a, b in pairwise(self.candidates)):
            raise DitlabError(f"agreement: candidates must be ascending, at least one, found {list(self.candidates)}")
        for size in (*self.candidates, *([] if self.window is None else [self.window])):
            WindowSchedule.of(size)


@dataclass(frozen=True, eq=False)
class ReferenceAgreement:
    """One reference beside the denoiser; one number an image, unless said otherwise."""

    name: Reference
    correlation: Float[np.ndarray, " n"]
    """Of the final images: cosine about their means, in [-1, 1]."""
    r2: Float[np.ndarray, " n"]
    """1 - |x - y|^2 / (n Var y) of the final images, y the denoiser's, at most 1."""
    mse: Float[np.ndarray, " n"]
    """Mean squared difference of the final images in [-1, 1]."""
    control: Float[np.ndarray, " n"]
    """Mean correlation of the denoiser's image with the reference's images of other seeds; 0 where there is none."""
    one_step: Float[np.ndarray, "levels trajectories"]
    """Correlation of both estimates of the clean image, on the denoiser's path, at each level."""
    windows: WindowSchedule | None = None
    """The sides of its windows by level; None for a reference without."""
    calibration: Float[np.ndarray, "levels candidates trajectories"] | None = None
    """Cosine of both scores at each level for each candidate; None where the windows were given, or there are none."""
    images: np.ndarray | None = None
    """Its final images, float32 [n, C, H, W]; None where only the JSON was kept."""

    @property
    def word(self) -> str:
        """What tables and figures call it."""
        return WORDS[self.name]

    def to_json(self) -> dict[str, Any]:
        """Everything but the images."""
        names = ("correlation", "r2", "mse", "control", "one_step")
        return {
            "name": self.name,
            **{name: getattr(self, name).tolist() for name in names},
            "median": {name: float(np.median(getattr(self, name))) for name in names[:-1]},
            "windows": None if self.windows is None else _lists(asdict(self.windows)),
            "calibration": None if self.calibration is None else self.calibration.tolist(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], images: np.ndarray | None) -> ReferenceAgreement:
        """Again, from `to_json()`."""
        windows, calibration = record["windows"], record["calibration"]
        return cls(
            name=record["name"],
            **{name: np.array(record[name]) for name in ("correlation", "r2", "mse", "control", "one_step")},
            windows=None if windows is None else WindowSchedule(tuple(windows["levels"]), tuple(windows["sizes"])),
            calibration=None if calibration is None else np.array(calibration),
            images=images,
        )


@dataclass(frozen=True, eq=False)
class AgreementResult:
    """A denoiser beside closed-form references of its training images."""

    about: Provenance
    config: AgreementConfig
    levels: tuple[float, ...]
    """Noise levels at which the sampler called the denoiser, descending."""
    references: tuple[ReferenceAgreement, ...]
    training_images: int
    """How many training images the references were made of, mirrored twins not counted."""
    shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    notes: tuple[str, ...] = ()
    """What a reader must know about how this was measured, one sentence each."""
    images: np.ndarray | None = field(default=None)
    """The denoiser's final images, float32 [n, C, H, W]; None where only the JSON was kept."""

    kind = "agreement"
    version = 1

    @property
    def best(self) -> ReferenceAgreement:
        """The reference with the highest median correlation."""
        return max(self.references, key=lambda one: float(np.median(one.correlation)))

    def sentences(self) -> tuple[str, ...]:
        """What was found, one sentence each."""
        name = self.about.group if self.about.n is None else f"{self.about.group}, N = {self.about.n}"
        count, best = self.config.images, self.best
        drawn = f"of {count} images from equal noise" if count > 1 else "of one image from equal noise"
        words = f"{name}: the images are most like those of {best.word}, median correlation "
        words += f"{np.median(best.correlation):.2f}, R² {np.median(best.r2):.2f} {drawn}"
        if count > 1:
            words += f" ({np.median(best.control):.2f} with the images of other noise)"
        others = ", ".join(
            f"{one.word} {np.median(one.correlation):.2f}" for one in self.references if one.name != best.name
        )
        return (f"{words}.", *([f"{name}: correlation with the other references: {others}."] if others else []))

    def to_json(self) -> dict[str, Any]:
        """Everything but the images."""
        return {
            "kind": self.kind,
            "version": self.version,
            "about": asdict(self.about) | {"settings": dict(self.about.settings)},
            "config": _lists(asdict(self.config)),
            "levels": list(self.levels),
            "training_images": self.training_images,
            "shape": list(self.shape),
            "notes": list(self.notes),
            "references": [one.to_json() for one in self.references],
            "sentences": list(self.sentences()),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], images: Mapping[str, np.ndarray] | None = None) -> AgreementResult:
        """The result again, from `to_json()`; images by reference's name, the denoiser's as "network".

        Raises:
            DitlabError: a field is missing or unknown.
        """
        kept = {} if images is None else images
        try:
            config: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in record["config"].items()
            }
            return cls(
                about=Provenance(**record["about"]),
                config=AgreementConfig(**config),
                levels=tuple(record["levels"]),
                references=tuple(
                    ReferenceAgreement.from_json(one, kept.get(one["name"])) for one in record["references"]
                ),
                training_images=record["training_images"],
                shape=(record["shape"][0], record["shape"][1], record["shape"][2]),
                notes=tuple(record["notes"]),
                images=kept.get("network"),
            )
        except DitlabError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DitlabError(f"agreement result: a field is missing or unknown ({error})") from error

    def save(self, folder: Path | str, name: str = "agreement") -> Path:
        """Writes NAME.npz (where there are images) and then NAME.json; returns the JSON's path."""
        folder = Path(folder)
        if self.images is not None:
            images = {one.name: one.images for one in self.references if one.images is not None}
            write_arrays(folder / f"{name}.npz", {"network": self.images, **images})
        return write_json(folder / f"{name}.json", self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> AgreementResult:
        """Reads what `save` wrote, from the JSON's path; the .npz need not lie beside it.

        Raises:
            DitlabError: a file is damaged, or is another kind of result.
        """
        path = Path(path)
        record = read_json(path, cls.kind, cls.version)
        beside = path.with_suffix(".npz")
        if not beside.exists():
            return cls.from_json(record)
        names = ("network", *(one["name"] for one in record.get("references", ())))
        return cls.from_json(record, read_arrays(beside, names))


def _lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
