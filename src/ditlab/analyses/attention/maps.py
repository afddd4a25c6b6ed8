"""Attention maps of any denoiser whose network has attention layers, and how local they are.

The protocol of An et al. (2410.21273, Fig. 4 and Eq. 6): an image is noised, the denoiser runs, and the maps
softmax(Q K^T / sqrt(head_dim)) of its layers are read. The paper says neither at which noise level nor how heads are
put together; here both are kept apart, and figures take the mean over heads unless told otherwise.

`attention_maps` gives the maps themselves, for figures and to look at; `measure_attention` gives numbers over many
images, holding the maps of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ditlab.analyses.attention.locality import (
    Agreement,
    entropies,
    grid_part,
    masses_within,
    mean_distance,
    position_invariance,
)
from ditlab.analyses.attention.result import BY_IMAGE, RADII, AttentionConfig, LocalityResult
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.metrics.denoising_errors import chosen_levels, level_noise, own_steps
from ditlab.nn.attention import adapted_layers, capture_attention
from ditlab.nn.patterns import Grid, Pattern
from ditlab.provenance import Provenance

__all__ = [
    "AttentionConfig",
    "AttentionLayer",
    "AttentionMaps",
    "LocalityResult",
    "alike_layers",
    "attention_layers",
    "attention_maps",
    "check_heads",
    "check_layers",
    "check_token",
    "measure_attention",
    "noise_levels_of",
]

DEFAULT_STEPS = (100, 300, 500)
"""Steps of the DDPM process (T = 1000, linear) whose levels are looked at by default: sigma 0.34, 1.24 and 3.44, a
little, as much and much more noise than image."""

_DECIMALS = 7
"""Kept of each number: as many as maps in float32 carry, and the JSON stays small."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a network."""

    number: int
    """Its place, from 1."""
    pattern: Pattern
    heads: int
    grid: Grid
    """(rows, columns) of its tokens."""
    extra: int
    """Further tokens off the grid."""


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The maps of some layers for some images at one noise level, on the CPU."""

    maps: dict[int, Tensor]
    """Layer, from 1 -> float32 [B, heads, T, T]; rows are queries and sum to 1. Off-grid tokens are left out."""
    grid: Grid
    """(rows, columns) of the tokens, T = rows * columns, row by row."""
    patterns: dict[int, Pattern]
    """Layer, from 1 -> its pattern."""
    sigma: float

    def of(self, layer: int, image: int = 0, head: int | None = None) -> Float[Tensor, "T T"]:
        """One map: the mean over heads, or one head (from 1), of one image.

        Raises:
            DitlabError: a layer, image or head that is not there.
        """
        if layer not in self.maps:
            raise DitlabError(f"attention maps: expected a layer of {sorted(self.maps)}, found {layer}")
        maps = self.maps[layer]
        if not 0 <= image < len(maps):
            raise DitlabError(f"attention maps: expected an image from 0 to {len(maps) - 1}, found {image}")
        if head is None:
            return maps[image].mean(0)
        check_heads([head], maps.shape[1])
        return maps[image, head - 1]

    def token(
        self, token: tuple[int, int], layer: int, image: int = 0, head: int | None = None
    ) -> Float[Tensor, "rows columns"]:
        """What the token in this (row, column), from 0, attends to, as a picture of the grid that sums to 1.

        Raises:
            DitlabError: a token, layer, image or head that is not there.
        """
        return self.of(layer, image, head)[check_token(token, self.grid)].reshape(self.grid)


def attention_layers(denoiser: Denoiser) -> tuple[AttentionLayer, ...]:
    """The attention layers of a denoiser's network, numbered from 1.

    Raises:
        DitlabError: it has none, has layers of another kind that were not given to
            `ditlab.nn.attention.register_attention`, or was made of a plain function, into which one cannot look.
    """
    module = denoiser.module
    if module is None:
        raise DitlabError(
            f"attention: expected a denoiser made of a network, found a {type(denoiser).__name__.strip('_')} without "
            "one; give Denoiser.wrap the nn.Module itself"
        )
    found = adapted_layers(module)
    if not found:
        other = next((type(m).__name__ for m in module.modules() if "attention" in type(m).__name__.lower()), None)
        instead = "without" if other is None else f"with {other}; give each to ditlab.nn.attention.register_attention"
        raise DitlabError(
            f"attention: expected a network with attention layers, found {type(module).__name__} {instead}"
        )
    return tuple(AttentionLayer(i, v.pattern, v.heads, v.grid, v.extra) for i, (_, v) in enumerate(found, 1))


def check_layers(layers: Sequence[int], known: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
    """The layers asked for (from 1; all where none is named), ascending.

    Raises:
        DitlabError: a layer that is not there, or layers that differ in grid or heads, so that no table can hold them.
    """
    for layer in layers:
        if not 1 <= layer <= len(known):
            raise DitlabError(f"attention: expected layers from 1 to {len(known)}, found {layer}")
    chosen = [known[layer - 1] for layer in sorted(set(layers))] if layers else list(known)
    first = chosen[0]
    for other in chosen[1:]:
        if (other.grid, other.heads) != (first.grid, first.heads):
            raise DitlabError(
                f"attention: expected layers of one grid and number of heads, found {_size(first)} in layer "
                f"{first.number} and {_size(other)} in layer {other.number}; name layers that are alike"
            )
    return tuple(chosen)


def alike_layers(known: Sequence[AttentionLayer]) -> tuple[int, ...]:
    """The numbers of those layers that one table can hold: the most of one grid and number of heads, finer grids first.

    Empty where all are alike, as in a DiT; a UNet has attention on several grids.
    """
    groups: dict[tuple[Grid, int], list[int]] = {}
    for layer in known:
        groups.setdefault((layer.grid, layer.heads), []).append(layer.number)
    if len(groups) < 2:
        return ()
    return tuple(max(groups.items(), key=lambda group: (len(group[1]), group[0]))[1])


def check_heads(heads: Sequence[int], count: int) -> None:
    """Raises DitlabError for a head that is not one of 1 .. count."""
    for head in heads:
        if not 1 <= head <= count:
            raise DitlabError(f"attention: expected heads from 1 to {count}, found {head}")


def check_token(token: tuple[int, int], grid: Grid) -> int:
    """The index of the token in this (row, column), both from 0. Raises DitlabError outside the grid."""
    row, column = token
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise DitlabError(
            f"attention: expected a token from 0,0 to {grid[0] - 1},{grid[1] - 1} (row,column), found {row},{column}"
        )
    return row * grid[1] + column


def noise_levels_of(denoiser: Denoiser, config: AttentionConfig) -> tuple[float, ...]:
    """The noise levels that a config stands for on this denoiser, ascending.

    By default those of `DEFAULT_STEPS`; a denoiser with numbered steps is given its own nearest ones.

    Raises:
        DitlabError: steps that it does not have, or levels outside its range.
    """
    return chosen_levels("attention", denoiser, config.levels, config.steps, DEFAULT_STEPS)


def attention_maps(
    denoiser: Denoiser,
    images: Float[Tensor, "b c h w"],
    sigma: float,
    *,
    layers: Sequence[int] | None = None,
    noise_seed: int = 0,
    place: int = 0,
    label: Int64[Tensor, " b"] | None = None,
) -> AttentionMaps:
    """The attention maps of a denoiser on noisy images, y = x0 + sigma n.

    All maps asked for are kept: layers * B * heads * T * T * 4 bytes (201 MB an image for DiT-XS/1 on 32 x 32 tokens).

    Args:
        denoiser: one made of a network with attention, in evaluation mode.
        images: clean images in [-1, 1].
        sigma: noise level.
        layers: which, from 1; all where not given.
        noise_seed: the noise is `analysis.denoising.level_noise` of this seed, the level and each image's place.
        place: of the first image among all, so that it gets the noise that `measure_attention` gives it there.
        label: class of each image for a class-conditional denoiser.

    Raises:
        DitlabError: no attention, a layer that is not there, layers of several grids, images or a level that the
            denoiser does not know, maps that are not finite.

    Example:
        >>> from ditlab.diffusion.denoisers import EDMDenoiser
        >>> from ditlab.networks.dit import DiT, DiTConfig
        >>> network = DiT(DiTConfig(image_size=(8, 8), width=16, depth=2, heads=2, learn_sigma=False)).eval()
        >>> attention_maps(EDMDenoiser(network), torch.zeros(1, 3, 8, 8), 0.5).of(layer=2).shape
        torch.Size([64, 64])
    """
    known = check_layers(tuple(layers or ()), attention_layers(denoiser))
    maps: dict[int, Tensor] = {}

    def keep(layer: AttentionLayer, weights: Tensor) -> None:
        maps[layer.number] = weights.float().cpu()

    _look(denoiser, known, images, sigma, noise_seed, place, label, keep)
    return AttentionMaps(maps, known[0].grid, {layer.number: layer.pattern for layer in known}, float(sigma))


def measure_attention(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    config: AttentionConfig | None = None,
    *,
    labels: Int64[Tensor, " n"] | None = None,
    about: Provenance | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> LocalityResult:
    """How local a denoiser's attention is, by noise level, layer and head.

    Memory: the maps of one layer for `config.batch_size` images, and one sum of maps a layer and head.

    Args:
        denoiser: one made of a network with attention, in evaluation mode.
        images: clean images in [-1, 1]; the first `config.images` are used.
        config: the settings.
        labels: class of each image for a class-conditional denoiser.
        about: which run this is, kept with the result.
        progress: called as progress(images seen, images times levels).

    Raises:
        DitlabError: no attention, a layer or level that is not there, layers of several grids, fewer than two images,
            maps that are not finite.
    """
    config = config or AttentionConfig()
    known = attention_layers(denoiser)
    layers = check_layers(config.layers, known)
    levels = noise_levels_of(denoiser, config)
    used = images[: config.images]
    if len(used) < 2:
        raise DitlabError(f"attention: expected at least 2 images, found {len(used)}")
    single: list[dict[str, np.ndarray]] = []
    together: list[tuple[np.ndarray, np.ndarray]] = []
    for sigma in levels:
        agreements = {layer.number: Agreement() for layer in layers}
        parts = []
        for start in range(0, len(used), config.batch_size):
            some = slice(start, min(start + config.batch_size, len(used)))
            label = None if labels is None else labels[some]
            parts.append(_numbers(denoiser, layers, used[some], sigma, config.noise_seed, start, label, agreements))
            if progress is not None:
                progress(len(single) * len(used) + some.stop, len(levels) * len(used))
        single.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        same, permuted = zip(*(agreement.values() for agreement in agreements.values()), strict=True)
        together.append((_stack(same), _stack(permuted)))
    by_image = {name: np.stack([values[name] for values in single], axis=1) for name in single[0]}
    means = {name: values.mean(0).round(_DECIMALS) for name, values in by_image.items()}
    return LocalityResult(
        about=about or Provenance(name="denoiser"),
        config=config,
        levels=levels,
        timesteps=own_steps(denoiser, levels),
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
    first: int,
    label: Tensor | None,
    agreements: dict[int, Agreement],
) -> dict[str, np.ndarray]:
    """The numbers of every map of a batch, float64 [B, layers, heads] each; the maps are added to the agreements."""
    found: dict[int, dict[str, Tensor]] = {}

    def measure(layer: AttentionLayer, weights: Tensor) -> None:
        nats, normalized = entropies(weights, layer.pattern, layer.grid)
        masses = masses_within(weights, layer.grid, RADII).unbind(-1)
        found[layer.number] = {
            "distance": mean_distance(weights, layer.grid),
            "entropy": nats,
            "normalized_entropy": normalized,
            "position_invariance": position_invariance(weights),
            **{f"mass {radius}": mass for radius, mass in zip(RADII, masses, strict=True)},
        }
        agreements[layer.number].add(weights)

    _look(denoiser, layers, images, sigma, noise_seed, first, label, measure)
    return {name: _stack([found[layer.number][name] for layer in layers], 1) for name in found[layers[0].number]}


def _stack(values: Sequence[Tensor], axis: int = 0) -> np.ndarray:
    return torch.stack(list(values), axis).double().cpu().numpy().round(_DECIMALS)


@torch.no_grad()
def _look(
    denoiser: Denoiser,
    layers: Sequence[AttentionLayer],
    images: Tensor,
    sigma: float,
    noise_seed: int,
    first: int,
    label: Tensor | None,
    use: Callable[[AttentionLayer, Tensor], object],
) -> None:
    """Runs the denoiser once on noisy images and hands over the grid part of each layer's maps, [B, heads, T, T].

    Args:
        first: the place of the first of these images among all, on which its noise depends.
    """
    by_index = {layer.number - 1: layer for layer in layers}
    seen: list[int] = []

    def hand_over(index: int, weights: Tensor) -> None:
        if index in seen:
            raise DitlabError(
                f"attention: expected layer {index + 1} to run once in a pass, found it running again (shared by "
                "several blocks, or a denoiser that calls its network twice)"
            )
        seen.append(index)
        if len(weights) != len(x0):
            raise DitlabError(
                f"attention: expected the maps of {len(x0)} images, found those of {len(weights)}: a guided denoiser "
                "shows each image to its network twice; give the one without guidance"
            )
        # A row with one NaN or infinity is NaN all over, for it went through a softmax.
        if not torch.isfinite(weights[..., 0]).all():
            raise DitlabError(f"attention: the maps of layer {index + 1} at noise level {sigma:.4g} are not finite")
        use(by_index[index], grid_part(weights, by_index[index].grid))

    x0 = images.to(denoiser.device)
    if tuple(x0.shape[1:]) != tuple(denoiser.shape):
        raise DitlabError(
            f"attention: the denoiser takes images {tuple(denoiser.shape)}, found images {tuple(x0.shape[1:])}"
        )
    noise = level_noise(noise_seed, sigma, range(first, first + len(x0)), [0] * len(x0), denoiser.shape)
    module = denoiser.module
    assert isinstance(module, nn.Module)  # attention_layers has looked
    with capture_attention(module, sorted(by_index), use=hand_over):
        denoiser(x0 + sigma * noise.to(x0), sigma, None if label is None else label.to(x0.device))
    missing = sorted(set(by_index) - set(seen))
    if missing:
        raise DitlabError(f"attention: layer {missing[0] + 1} of the network did not run")


def _size(layer: AttentionLayer) -> str:
    return f"{layer.grid[0]}x{layer.grid[1]} tokens with {layer.heads} heads"
