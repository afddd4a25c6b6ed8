"""Attention maps of any denoiser whose network has attention layers.

The protocol of An et al. (2410.21273, Fig. 4 and Eq. 6): an image is noised, the denoiser runs, and the maps
softmax(Q K^T / sqrt(head_dim)) of its layers are read. The paper says neither at which noise level nor how heads are
combined; here both are kept apart, and figures show the mean over heads by default.

`ditlab.analyses.attention.measure` takes numbers from the maps of many images, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.attention.locality import grid_part
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.metrics.denoising_errors import chosen_levels, level_noise
from ditlab.nn.attention import adapted_layers, capture_attention
from ditlab.nn.patterns import Grid, Pattern

__all__ = ["AttentionLayer", "AttentionMaps", "attention_layers", "attention_maps"]

DEFAULT_TIMESTEPS = (100, 300, 500)
"""Steps of the DDPM process (T = 1000, linear) whose noise levels are the default: sigma 0.34, 1.24 and 3.44, where the
noise is weaker than the image, about as strong, and much stronger."""


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
        """Returns one map: the mean over heads, or one head (from 1), of one image. Raises DitlabError for others."""
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
        """Returns the weights of the token in this (row, column), from 0, on the grid; they sum to 1."""
        return self.of(layer, image, head)[check_token(token, self.grid)].reshape(self.grid)


def attention_layers(denoiser: Denoiser) -> tuple[AttentionLayer, ...]:
    """Returns the attention layers of a denoiser's network.

    Raises:
        DitlabError: it has none, has layers of another kind that were not given to
            `ditlab.nn.attention.register_attention`, or was made of a plain function, whose layers cannot be read.
    """
    module = denoiser.module
    if module is None:
        raise DitlabError(
            f"attention: expected a denoiser made of a network, found a {type(denoiser).__name__.strip('_')} without "
            "one; give Denoiser.wrap the nn.Module itself"
        )
    adapted = adapted_layers(module)
    if not adapted:
        other = next((type(m).__name__ for m in module.modules() if "attention" in type(m).__name__.lower()), None)
        instead = "without" if other is None else f"with {other}; give each to ditlab.nn.attention.register_attention"
        raise DitlabError(
            f"attention: expected a network with attention layers, found {type(module).__name__} {instead}"
        )
    return tuple(AttentionLayer(i, v.pattern, v.heads, v.grid, v.extra) for i, (_, v) in enumerate(adapted, 1))


def has_attention(denoiser: Denoiser) -> bool:
    """Returns whether a denoiser has an attention layer whose map can be read and has more than one token."""
    module = denoiser.module
    return module is not None and any(adapter.grid != (1, 1) for _, adapter in adapted_layers(module))


def check_layers(layers: Sequence[int], known: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
    """Returns the layers with these numbers (from 1; all if none is named), ascending.

    Raises DitlabError for layers of a single token, and for layers of several grids or heads: no table can hold both.
    """
    for layer in layers:
        if not 1 <= layer <= len(known):
            raise DitlabError(f"attention: expected `layers` from 1 to {len(known)}, found {layer}")
    first, *others = chosen = [known[layer - 1] for layer in sorted(set(layers))] if layers else list(known)
    for other in others:
        if (other.grid, other.heads) != (first.grid, first.heads):
            mine, theirs = (
                f"{layer.grid[0]}x{layer.grid[1]} tokens with {layer.heads} heads in layer {layer.number}"
                for layer in (first, other)
            )
            alike = ", ".join(map(str, uniform_grid_layers(known)))
            raise DitlabError(
                f"attention: expected `layers` of one grid and number of heads, found {mine} and {theirs}; layers "
                f"{alike} are alike"
            )
    if first.grid == (1, 1):
        raise DitlabError("attention: expected layers with at least 2 tokens, found 1x1 tokens, whose maps are all 1")
    return tuple(chosen)


def uniform_grid_layers(known: Sequence[AttentionLayer]) -> tuple[int, ...]:
    """Returns the numbers of the largest group of layers with one grid and number of heads, the finer grid if two tie.

    Empty where all layers are alike, as in a DiT; a UNet has attention on several grids. Layers of a single token are
    not counted.
    """
    groups: dict[tuple[Grid, int], list[int]] = {}
    for layer in known:
        groups.setdefault((layer.grid, layer.heads), []).append(layer.number)
    if len(groups) < 2:
        return ()
    several = [(group, numbers) for group, numbers in groups.items() if group[0] != (1, 1)]
    return tuple(max(several, key=lambda entry: (len(entry[1]), entry[0]), default=((), ()))[1])


def check_heads(heads: Sequence[int], count: int) -> None:
    """Raises DitlabError for a head that is not one of 1 .. count."""
    for head in heads:
        if not 1 <= head <= count:
            raise DitlabError(f"attention: expected `heads` from 1 to {count}, found {head}")


def check_token(token: tuple[int, int], grid: Grid) -> int:
    """Returns the index of the token in this (row, column), both from 0. Raises DitlabError outside the grid."""
    row, column = token
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise DitlabError(
            f"attention: expected a `token` from 0,0 to {grid[0] - 1},{grid[1] - 1} (row,column), found {row},{column}"
        )
    return row * grid[1] + column


def noise_levels_of(denoiser: Denoiser, config: AttentionConfig) -> tuple[float, ...]:
    """Returns the noise levels of a config for this denoiser, ascending (see `chosen_levels`)."""
    return chosen_levels("attention", denoiser, config.sigmas, config.timesteps, DEFAULT_TIMESTEPS)


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
    """Returns the attention maps of a denoiser on noisy images, y = x0 + sigma n.

    All of them are in memory at once: layers * B * heads * T * T * 4 bytes (201 MB an image for DiT-XS/1 on 32 x 32
    tokens).

    Args:
        denoiser: one made of a network with attention, in evaluation mode.
        images: clean images in [-1, 1].
        sigma: noise level.
        layers: which, from 1; all if None.
        noise_seed: the noise is `metrics.denoising_errors.level_noise` of this seed, the level and each image's place.
        place: of the first image among all, so that it gets the same noise as in `measure_attention`.
        label: class of each image for a class-conditional denoiser.

    Raises:
        DitlabError: no attention, layers that do not exist, are of several grids, or run twice or never in a pass,
            images or a level that the denoiser does not take, guidance, maps that are not finite.

    Example:
        >>> from ditlab.diffusion.denoisers import EDMDenoiser
        >>> from ditlab.networks.dit import DiT
        >>> from ditlab.networks.dit_config import DiTConfig
        >>> network = DiT(DiTConfig(image_size=(8, 8), width=16, depth=2, heads=2, learn_sigma=False)).eval()
        >>> attention_maps(EDMDenoiser(network), torch.zeros(1, 3, 8, 8), 0.5).of(layer=2).shape
        torch.Size([64, 64])
    """
    known = check_layers(layers or (), attention_layers(denoiser))
    maps: dict[int, Tensor] = {}

    def use(layer: AttentionLayer, weights: Tensor) -> None:
        maps[layer.number] = weights.float().cpu()

    forward_with_maps(denoiser, known, images, sigma, use, noise_seed=noise_seed, place=place, label=label)
    return AttentionMaps(maps, known[0].grid, {layer.number: layer.pattern for layer in known}, float(sigma))


@torch.no_grad()
def forward_with_maps(
    denoiser: Denoiser,
    layers: Sequence[AttentionLayer],
    images: Tensor,
    sigma: float,
    use: Callable[[AttentionLayer, Tensor], object],
    *,
    noise_seed: int = 0,
    place: int = 0,
    label: Tensor | None = None,
) -> None:
    """Runs the denoiser once on noisy images and calls `use(layer, maps)` for each layer as soon as it has run.

    Maps are [B, heads, T, T] over the tokens of the grid, on the denoiser's device, and may be dropped after the call.
    The other arguments and the errors are those of `attention_maps`.
    """
    by_index = {layer.number - 1: layer for layer in layers}
    done: set[int] = set()

    def check(index: int, weights: Tensor) -> None:
        if index in done:
            raise DitlabError(
                f"attention: expected layer {index + 1} to run once in a pass, found it running again (shared by "
                "several blocks, or a denoiser that calls its network twice)"
            )
        done.add(index)
        if len(weights) != len(x0):
            raise DitlabError(
                f"attention: expected the maps of {len(x0)} images, found those of {len(weights)}: a guided denoiser "
                "passes each image to its network twice; use the denoiser without guidance"
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
    noise = level_noise(noise_seed, sigma, range(place, place + len(x0)), [0] * len(x0), denoiser.shape)
    assert denoiser.module is not None  # attention_layers has checked it
    with capture_attention(denoiser.module, sorted(by_index), use=check):
        denoiser(x0 + sigma * noise.to(x0), sigma, None if label is None else label.to(x0.device))
    missing = sorted(set(by_index) - done)
    if missing:
        raise DitlabError(f"attention: layer {missing[0] + 1} of the network did not run")
