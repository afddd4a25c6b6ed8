"""Results of `ditlab agreement` and `ditlab two-subsets` as pictures, and those that runs' folders hold for reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ditlab.analyses.agreement.result import AgreementResult
from ditlab.analyses.two_subsets.measure import TwoSubsetsResult
from ditlab.cli.copies import blanked, nearest_training, telling
from ditlab.data.pixels import to_uint8
from ditlab.diffusion.samplers import ImageNoise
from ditlab.errors import DitlabError
from ditlab.models.model import Model
from ditlab.provenance import Provenance

SHOWN = 8
"""Images that figures show, at most."""
TELLING = ("empirical-bayes", "wiener-locality")
"""References whose images are training images, or nearly so."""


def agreement_pictures(
    run: Model, result: AgreementResult, *, hide_training_images: bool = False
) -> dict[str, np.ndarray]:
    """What the images of a result look like, uint8 [n, C, H, W] by name, n at most `SHOWN`; the noise in its own space.

    Args:
        run: whose autoencoder decodes latents.
        result: with its images.
        hide_training_images: leave out the references that are `TELLING`, and blank what is nearly a training image.
    """
    assert result.images is not None
    found = {"network": result.images, **{one.name: one.images for one in result.references if one.images is not None}}
    if hide_training_images:
        found = {name: images for name, images in found.items() if name not in TELLING}
    pictures = {name: run.pixels(torch.from_numpy(images[:SHOWN])) for name, images in found.items()}
    if hide_training_images:
        hidden = telling(*nearest_training(run, np.concatenate(list(pictures.values()))))
        sides = np.split(hidden, len(pictures))
        pictures = {name: blanked(one, side) for (name, one), side in zip(pictures.items(), sides, strict=True)}
    noise = ImageNoise(range(min(SHOWN, result.config.images)), result.shape).initial() / 3
    if result.shape[0] in (1, 3) and result.shape[1:] == pictures["network"].shape[2:]:
        return {"noise": to_uint8(noise).numpy(), **pictures}
    # Noise of latents has no picture of its own: the mean over its channels, as large as a picture.
    grey = to_uint8(noise.mean(1, keepdim=True) * noise.shape[1] ** 0.5)
    large = torch.nn.functional.interpolate(grey.float(), pictures["network"].shape[2:]).byte().numpy()
    return {"noise": np.broadcast_to(large, pictures["network"].shape), **pictures}


def closest_pictures(one: Model, two: Model, result: TwoSubsetsResult) -> tuple[np.ndarray, np.ndarray]:
    """The training images that are most like the kept samples of both runs, uint8 [k, C, H, W] each."""
    assert result.pictures is not None
    count = result.pictures.shape[1]

    def pictures(run: Model, side: int) -> np.ndarray:
        found = result.nearest[side]
        images = run.pixels_at(run.split.train[found.index[:count]])
        return np.where(found.mirrored[:count, None, None, None], images[..., ::-1], images)

    return pictures(one, 0), pictures(two, 1)


def without_copies(result: TwoSubsetsResult) -> TwoSubsetsResult:
    """A result whose pictures of samples that are nearly a training image are blank."""
    assert result.pictures is not None
    hidden = result.telling[:, : result.pictures.shape[1]]
    return replace(result, pictures=blanked(result.pictures, hidden))


@dataclass(frozen=True, eq=False)
class Left:
    """Results of the newest checkpoints of the runs on a page."""

    agreements: Sequence[tuple[Model, AgreementResult]] = ()
    subsets: Sequence[TwoSubsetsResult] = ()
    """Of runs on the page and others that are not: a page compares no runs of one N and seed on different images."""

    def drawings(self, *, hide_training_images: bool) -> dict[str, tuple[Any, str, str]]:
        """File name -> (drawing of a theme, alt text, caption)."""
        from ditlab.analyses.agreement.figures import agreement_curves, agreement_images
        from ditlab.analyses.two_subsets.figures import two_subsets_histograms, two_subsets_pairs

        found: dict[str, tuple[Any, str, str]] = {}
        for number, (run, result) in enumerate(self.agreements, 1):
            name = result.about.name
            drawn = f"{name} and closed-form denoisers of its training images"
            if result.images is not None:
                pictures = agreement_pictures(run, result, hide_training_images=hide_training_images)
                found[f"agreement-images-{number}"] = (
                    lambda theme, result=result, pictures=pictures: agreement_images(result, pictures, theme=theme),
                    f"Rows of images: noise, what {name} draws from it, and what closed-form denoisers draw.",
                    f"From equal noise, {drawn}; below each image its correlation with the run's.",
                )
            found[f"agreement-{number}"] = (
                lambda theme, result=result: agreement_curves(result, theme=theme),
                f"Correlations of {name} with closed-form denoisers: of final images, and by noise level.",
                "Dots are images, bars their medians; single estimates are compared on the network's own path.",
            )
        for number, result in enumerate(self.subsets, 1):
            names = f"{result.about[0].name} and {result.about[1].name}"
            found[f"two-subsets-{number}"] = (
                lambda theme, result=result: two_subsets_histograms(result, theme=theme),
                f"Histograms of cosines: pairs of samples of {names}, samples and training images, and the control.",
                "Broken lines are means.",
            )
            if result.pictures is not None:
                shown = without_copies(result) if hide_training_images else result
                found[f"two-subsets-pairs-{number}"] = (
                    lambda theme, result=shown: two_subsets_pairs(result, theme=theme),
                    f"Rows of images: samples of {names} from equal noise.",
                    "Below each first sample its cosine with the second; below that the second's with its closest.",
                )
        return found


def left_behind(runs: Sequence[Model], labels: Sequence[str], names: Sequence[str]) -> Left:
    """Reads the results that belong to the newest checkpoints of these runs; others are passed over.

    Args:
        runs: on the page.
        labels: their kinds.
        names: what the page calls them.
    """

    def called(facts: Provenance, place: int) -> Provenance:
        return replace(facts, name=names[place], label=labels[place])

    agreements, subsets = [], []
    for place, run in enumerate(runs):
        folder = run.path / "analysis"
        alone = _read(AgreementResult, folder / "agreement.json")
        if alone is not None and _newest(alone.about, run):
            agreements.append((run, replace(alone, about=called(alone.about, place))))
        pair = _read(TwoSubsetsResult, folder / "two-subsets.json")
        if pair is not None and _newest(pair.about[0], run):
            subsets.append(replace(pair, about=(called(pair.about[0], place), pair.about[1])))
    return Left(agreements, subsets)


def _read(kind: Any, path: Any) -> Any:
    """A result, or None where there is none that can be read."""
    try:
        return kind.load(path) if path.is_file() else None
    except DitlabError:
        return None


def _newest(facts: Provenance, run: Model) -> bool:
    """Whether these facts are of the newest averaged weights of a run."""
    return bool(facts.ema) and facts.split_hash == run.split_record.hash and facts.step == run.newest_step
