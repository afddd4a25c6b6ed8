"""Tiny autoencoders from two plain state dicts, an encoder's and a decoder's, whose architecture is read off the keys.

These are the distilled autoencoders of the TAESD family (Bohan 2023: TAESD, TAESDXL, TAEF1, TAEF2), each a plain chain
of layers numbered as in `torch.nn.Sequential`, working on images in [0, 1]. With f a chain of three 3x3 convolutions
with ReLU between them, s the identity or a 1x1 convolution, and, if a block has it, the branch
p = conv1x1, GroupNorm(4), ReLU, conv1x1, the layers are

    block        x -> ReLU(f(x') + s(x')),  x' = x + p(x) or x
    encoder      conv, block, then three times (conv of stride 2 without bias, blocks), conv to the latent channels
    decoder      3 tanh(z / 3), conv, ReLU, blocks, then (nearest-neighbour doubling, conv without bias, blocks), conv

Exactly the convolutions without bias change the size; the keys say the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.errors import DitlabError

__all__ = ["TinyAutoencoder"]

_BLOCK = re.compile(r"(conv\.[024]\.(weight|bias)|skip\.weight|pool\.[013]\.weight|pool\.1\.bias)")
_GROUPS = 4


class TinyAutoencoder(nn.Module):
    """A tiny autoencoder with given weights, in float32 and evaluation mode; keys like `3.conv.0.weight`."""

    def __init__(self, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], where: str) -> None:
        super().__init__()
        self.encoder, down = _chain(encoder, f"{where} encoder", decodes=False)
        self.decoder, up = _chain(decoder, f"{where} decoder", decodes=True)
        first, last, start, end = (_end(chain, place) for chain in (self.encoder, self.decoder) for place in (0, -1))
        self.latent_channels: int = last.out_channels
        self.factor = 2**down
        if (start.in_channels, end.out_channels, up) != (last.out_channels, first.in_channels, down):
            raise DitlabError(
                f"{where}: expected an encoder and a decoder that belong together, found {first.in_channels} channels "
                f"to {last.out_channels} at 1/{2**down} and {start.in_channels} to {end.out_channels} at {2**up} times"
            )
        self.image_channels: int = first.in_channels
        self.eval().requires_grad_(False)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k g v"]:
        """Returns latents of images in [0, 1]; height and width are divided by `factor`, which must divide them."""
        return self.encoder(images)

    def decode(self, latents: Float[Tensor, "b k g v"]) -> Float[Tensor, "b c h w"]:
        """Returns images of latents, about [0, 1], not clipped."""
        return self.decoder(torch.tanh(latents / 3) * 3)


class _Block(nn.Module):
    """ReLU(f(x') + s(x')), x' = x + p(x) where there is a branch p."""

    def __init__(self, into: int, out: int, pool: int, skip: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(into, out, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
        )
        self.skip = nn.Conv2d(into, out, 1, bias=False) if skip else nn.Identity()
        self.pool: nn.Sequential | None = None
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(into, pool, 1, bias=False),
                nn.GroupNorm(_GROUPS, pool),
                nn.ReLU(),
                nn.Conv2d(pool, into, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        # The keys do not say where the branch belongs. Before the convolutions TAEF2's round trip of 64-pixel faces is
        # 0.4 dB better than with the branch beside them.
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + self.skip(x))


def _chain(weights: Mapping[str, Tensor], where: str, *, decodes: bool) -> tuple[nn.Sequential, int]:
    """Returns the layers of one state dict with its weights, and how many of them change the size."""
    grouped: dict[int, dict[str, Tensor]] = {}
    for key, value in weights.items():
        number, _, rest = key.partition(".")
        if not number.isdigit() or not (rest in ("weight", "bias") or _BLOCK.fullmatch(rest)):
            raise DitlabError(f"{where}: expected the keys of a tiny autoencoder ('3.conv.0.weight'), found '{key}'")
        if not isinstance(value, Tensor):
            raise DitlabError(f"{where}: expected a tensor under '{key}', found {type(value).__name__}")
        grouped.setdefault(int(number), {})[rest] = value
    if len(grouped) < 2:
        raise DitlabError(f"{where}: expected the layers of a tiny autoencoder, found {len(grouped)}")
    layers: list[nn.Module] = []
    resizes = 0
    for place, (number, own) in enumerate(sorted(grouped.items())):
        resizing = "weight" in own and "bias" not in own
        resizes += resizing
        if resizing and decodes:
            layers.append(nn.Upsample(scale_factor=2))
        layers.append(_layer(own, 2 if resizing and not decodes else 1, f"{where}, layer {number}"))
        if place == 0 and decodes:
            layers.append(nn.ReLU())
    if not all(isinstance(end, nn.Conv2d) and end.bias is not None for end in (layers[0], layers[-1])):
        raise DitlabError(f"{where}: expected a convolution with a bias at both ends, found other layers")
    return nn.Sequential(*layers), resizes


def _layer(own: dict[str, Tensor], stride: int, where: str) -> nn.Module:
    try:
        if "weight" in own:
            out, into = own["weight"].shape[:2]
            layer = nn.Conv2d(into, out, 3, stride=stride, padding=1, bias="bias" in own)
        else:
            out, into = own["conv.0.weight"].shape[:2]
            pool = own["pool.0.weight"].shape[0] if "pool.0.weight" in own else 0
            layer = _Block(into, out, pool, "skip.weight" in own)
        layer.load_state_dict({name: value.float() for name, value in own.items()})
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DitlabError(f"{where}: expected a convolution or a block of a tiny autoencoder ({reason})") from None
    return layer


def _end(chain: nn.Sequential, place: int) -> nn.Conv2d:
    layer = chain[place]
    assert isinstance(layer, nn.Conv2d)
    return layer
