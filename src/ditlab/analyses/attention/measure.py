"""How local attention is, measured: of one denoiser, or of models with their images.

`measure_attention` holds the maps of one layer at a time. `measure_models` checks all models before the first one is
measured, and takes from the cache what was measured before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analyses.attention.comparison import same_levels
from ditlab.analyses.attention.config import AttentionConfig, AttentionOptions, ImagesFrom
from ditlab.analyses.attention.locality import (
    MapConsistency,
    entropies,
    masses_within,
    mean_distance,
    position_invariance,
)
from ditlab.analyses.attention.maps import (
    AttentionLayer,
    attention_layers,
    check_heads,
    check_layers,
    check_token,
    forward_with_maps,
    noise_levels_of,
)
from ditlab.analyses.attention.result import BY_IMAGE, RADII, LocalityResult
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError, Incompatible, InvalidConfig
from ditlab.metrics.denoising_errors import own_steps
from ditlab.models.comparing import OpenedModel
from ditlab.progress import SILENT, Bar, Reporter
from ditlab.provenance import Provenance, check_groups
from ditlab.sampling.draw import draw, with_guidance
from ditlab.sampling.sampler_choice import quick_sampler

if TYPE_CHECKING:
    from ditlab.analyses.attention import Attention

__all__ = ["images_of", "measure_attention", "measure_models"]

_DECIMALS = 7
"""Decimals kept of each number: the precision of maps in float32, which keeps the JSON small."""


def measure_models(
    analysis: Attention,
    models: Sequence[OpenedModel],
    config: AttentionConfig,
    options: AttentionOptions,
    reporter: Reporter = SILENT,
) -> list[LocalityResult]:
    """Measures models that are not in the cache, all on the same number of images; returns one result for each.

    All are checked before the first is measured.
    """
    source = options.images_from
    models = [_with_source(opened, source) for opened in models]
    _check_models(models, config, options)
    available = [
        config.images if source == "samples" else len(opened.model.batch(source, config.images)[0]) for opened in models
    ]
    count = min(available)
    if count < 2:
        raise DitlabError(f"attention: expected at least 2 images, found {count}")
    if options.image >= count:
        raise InvalidConfig(
            f"attention: `image` must be from 0 to {count - 1}, one of the `images`, found {options.image}"
        )
    results = []
    for opened, mine in zip(models, available, strict=True):
        # The one with the fewest images keeps the number that was asked for, so that its result says what is missing.
        settings = config if mine == count else replace(config, images=count)

        def measure(opened: OpenedModel = opened, settings: AttentionConfig = settings) -> LocalityResult:
            images, labels = images_of(opened, source, range(count), reporter)
            with reporter.bar(f"attention of {opened.name}") as bar:
                return measure_attention(
                    opened.denoiser, images, settings, labels=labels, about=opened.provenance, bar=bar
                )

        results.append(analysis.cached(opened, settings, measure, reporter))
    return results


def images_of(
    opened: OpenedModel, source: ImagesFrom, places: range, reporter: Reporter = SILENT
) -> tuple[Tensor, Tensor | None]:
    """Returns the images in these places that exist, float32 [B, C, H, W], and their classes, int64 [B], if any.

    Of samples that in place k has seed k, and class k % classes.
    """
    if source != "samples":
        images, labels = opened.model.batch(source, places.stop)
        return images[places.start :], None if labels is None else labels[places.start :]
    classes = opened.denoiser.num_classes
    label = torch.arange(places.start, places.stop) % classes if classes else None
    denoiser = with_guidance(opened.model, opened.denoiser)
    with reporter.bar(f"samples of {opened.name}") as bar:
        return draw(denoiser, quick_sampler(opened.model), places, label=label, bar=bar), label


def _with_source(opened: OpenedModel, source: ImagesFrom) -> OpenedModel:
    """Returns the model with a provenance that says on which images it is measured."""
    settings = {**opened.provenance.settings, "images_from": source}
    if source == "samples":
        settings["sampler"] = asdict(quick_sampler(opened.model))
        settings["guidance"] = asdict(opened.model.guidance)
    return replace(opened, provenance=replace(opened.provenance, settings=settings))


def _check_models(models: Sequence[OpenedModel], config: AttentionConfig, options: AttentionOptions) -> None:
    """Checks that models can be measured and compared."""
    check_groups([opened.provenance for opened in models], "attention")
    checked: list[tuple[OpenedModel, tuple[AttentionLayer, ...], tuple[float, ...]]] = []
    for opened in models:
        try:
            layers = check_layers(config.layers, attention_layers(opened.denoiser))
            sigmas = noise_levels_of(opened.denoiser, config)
        except DitlabError as error:
            raise Incompatible(f"model {opened.name}: {error}") from None
        check_heads(options.heads, layers[0].heads)
        checked.append((opened, layers, sigmas))
    first, first_layers, first_sigmas = checked[0]
    for opened, layers, sigmas in checked[1:]:
        if not same_levels(sigmas, first_sigmas):
            raise Incompatible(
                f"attention: expected models with the same noise levels, found others in {first.name} and "
                f"{opened.name}; give `sigmas`"
            )
        mine, theirs = _shape(first_layers), _shape(layers)
        if mine != theirs:
            raise Incompatible(
                f"attention: expected models with the same layers and grid, found {mine} in {first.name} and {theirs} "
                f"in {opened.name}; name common `layers`"
            )
    if options.place is not None:
        check_token(options.place, first_layers[0].grid)


def _shape(layers: Sequence[AttentionLayer]) -> str:
    """Names layers of one grid."""
    numbers = ", ".join(str(layer.number) for layer in layers)
    return f"layers {numbers} over {layers[0].grid[0]}x{layers[0].grid[1]} tokens"


def measure_attention(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    config: AttentionConfig | None = None,
    *,
    labels: Int64[Tensor, " n"] | None = None,
    about: Provenance | None = None,
    bar: Bar | None = None,
) -> LocalityResult:
    """Measures how local a denoiser's attention is, by noise level, layer and head.

    In memory are the maps of one layer for `config.batch_size` images, and one sum of maps for each layer and head.

    Args:
        denoiser: one made of a network with attention, in evaluation mode.
        images: clean images in [-1, 1]; the first `config.images` are used.
        config: the settings.
        labels: class of each image for a class-conditional denoiser.
        about: which model this is, kept with the result.
        bar: shows how many of images times levels are done.

    Raises:
        DitlabError: no attention, a layer or level that does not exist, layers of several grids or of a single token,
            fewer than two images, maps that are not finite.
    """
    config = config or AttentionConfig()
    known = attention_layers(denoiser)
    layers = check_layers(config.layers, known)
    sigmas = noise_levels_of(denoiser, config)
    used = images[: config.images]
    if len(used) < 2:
        raise DitlabError(f"attention: expected at least 2 images, found {len(used)}")
    by_level: list[dict[str, np.ndarray]] = []
    together: list[tuple[np.ndarray, np.ndarray]] = []
    for sigma in sigmas:
        consistencies = {layer.number: MapConsistency() for layer in layers}
        parts = []
        for start in range(0, len(used), config.batch_size):
            batch = slice(start, min(start + config.batch_size, len(used)))
            label = None if labels is None else labels[batch]
            parts.append(_numbers(denoiser, layers, used[batch], sigma, config.noise_seed, start, label, consistencies))
            if bar is not None:
                bar(len(by_level) * len(used) + batch.stop, len(sigmas) * len(used))
        by_level.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        same, permuted = zip(*(consistency.values() for consistency in consistencies.values()), strict=True)
        together.append((_stack(same), _stack(permuted)))
    by_image = {name: np.stack([values[name] for values in by_level], axis=1) for name in by_level[0]}
    means = {name: values.mean(0).round(_DECIMALS) for name, values in by_image.items()}
    return LocalityResult(
        about=about or Provenance(name="denoiser"),
        config=config,
        levels=sigmas,
        timesteps=own_steps(denoiser, sigmas),
        layers=tuple(layer.number for layer in layers),
        depth=len(known),
        heads=layers[0].heads,
        grid=layers[0].grid,
        patch=denoiser.shape[1] / layers[0].grid[0],
        patterns=tuple(layer.pattern for layer in layers),
        images=len(used),
        **{name: means[name] for name in (*BY_IMAGE, "normalized_entropy")},
        consistency=np.stack([same for same, _ in together]),
        consistency_control=np.stack([permuted for _, permuted in together]),
        mass={radius: means[f"mass {radius}"] for radius in RADII},
        extra=max(layer.extra for layer in layers),
        by_image={name: by_image[name].astype(np.float32) for name in BY_IMAGE},
    )


def _numbers(
    denoiser: Denoiser,
    layers: Sequence[AttentionLayer],
    images: Tensor,
    sigma: float,
    noise_seed: int,
    place: int,
    label: Tensor | None,
    consistencies: dict[int, MapConsistency],
) -> dict[str, np.ndarray]:
    """Returns the numbers of every map of a batch, float64 [B, layers, heads] each; adds the maps to consistencies."""
    numbers: dict[int, dict[str, Tensor]] = {}

    def use(layer: AttentionLayer, weights: Tensor) -> None:
        nats, normalized = entropies(weights, layer.pattern, layer.grid)
        masses = masses_within(weights, layer.grid, RADII).unbind(-1)
        numbers[layer.number] = {
            "distance": mean_distance(weights, layer.grid),
            "entropy": nats,
            "normalized_entropy": normalized,
            "position_invariance": position_invariance(weights),
            **{f"mass {radius}": mass for radius, mass in zip(RADII, masses, strict=True)},
        }
        consistencies[layer.number].add(weights)

    forward_with_maps(denoiser, layers, images, sigma, use, noise_seed=noise_seed, place=place, label=label)
    names = numbers[layers[0].number]
    return {name: _stack([numbers[layer.number][name] for layer in layers], 1) for name in names}


def _stack(values: Sequence[Tensor], axis: int = 0) -> np.ndarray:
    return torch.stack(list(values), axis).double().cpu().numpy().round(_DECIMALS)
