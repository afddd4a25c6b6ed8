"""Published weights of bias-free denoisers: BF-CNN (Mohan et al. 2020) and the UNet of Kadkhodaie et al. (2024).

The files are bare state dicts, with the names that our networks have too, behind "module." where they were trained by
torch's DataParallel. The shapes tell everything about the network but the window of the UNet's average pooling. Nothing
tells how it was trained: images in [0, 1], the noise as output, and levels as published are assumed, and a note says
so. Both networks run on images of any size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ditlab.data.manifest import hash_file
from ditlab.diffusion.blind_objective import BlindObjectiveConfig
from ditlab.diffusion.sampler_configs import HeunConfig
from ditlab.errors import DitlabError
from ditlab.interop.imported import ImportedModel, frozen
from ditlab.interop.original_files import filled
from ditlab.networks.bf_cnn import BFCNN, BFCNNConfig
from ditlab.networks.bf_unet import BFUNet, BFUNetConfig

_PARALLEL = "module."
_CNN, _UNET = "conv_layers.0.weight", "encoder.0.0.weight"
"""Names that only weights of these networks have."""

_LEVELS = {BFCNNConfig: ("100 / 255", 100 / 255), BFUNetConfig: ("1", 1.0)}
"""The highest noise level of the published training, of images in [0, 1]."""


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that they have without DataParallel."""
    return {key.removeprefix(_PARALLEL): value for key, value in state.items()}


def is_bias_free(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a bias-free CNN or UNet, by their names."""
    names = _plain(state)
    return (_CNN in names and "running_sd.0" in names) or (_UNET in names and "mid_block.0.weight" in names)


def infer_config(state: Mapping[str, Tensor], where: str) -> BFCNNConfig | BFUNetConfig:
    """The shape of the network that these weights are of; the image size is a default, for it runs at any.

    Args:
        state: the published state dict.
        where: named in errors.

    Raises:
        DitlabError: weights are missing, numbered with gaps, or of an impossible shape.
    """
    state = _plain(state)
    first = state.get(_CNN, state.get(_UNET))
    if first is None or first.ndim != 4 or not first.numel() or first.shape[2] != first.shape[3]:
        raise DitlabError(
            f"{where}: expected square kernels of a first convolution ('{_CNN}' or '{_UNET}'), found "
            f"{'none' if first is None else f'the shape {tuple(first.shape)}'}"
        )
    width, channels, kernel, _ = first.shape
    if _CNN in state:
        if kernel != 3:
            raise DitlabError(f"{where}: expected kernels of side 3 in a BF-CNN, found {kernel}")
        depth = _count(state, r"conv_layers\.(\d+)\.weight", where)
        return BFCNNConfig(channels=channels, width=width, depth=depth)
    if kernel % 2 == 0:
        raise DitlabError(f"{where}: expected kernels of an odd side in a bias-free UNet, found {kernel}")
    blocks = _count(state, r"encoder\.(\d+)\.", where)
    return BFUNetConfig(
        image_size=(max(32, 2**blocks), max(32, 2**blocks)),
        channels=channels,
        width=width,
        blocks=blocks,
        encoder_convs=_convs(state, "encoder.0."),
        middle_convs=_convs(state, "mid_block."),
        decoder_convs=_convs(state, "decoder.0."),
        kernel=kernel,
    )


def _count(state: Mapping[str, Tensor], pattern: str, where: str) -> int:
    numbers = {int(found[1]) for key in state if (found := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise DitlabError(f"{where}: expected layers numbered from 0 on, found {sorted(numbers)}")
    return len(numbers)


def _convs(state: Mapping[str, Tensor], stage: str) -> int:
    return sum(key.startswith(stage) and key.endswith(".weight") for key in state)


def bias_free_of(path: Path, state: Mapping[str, Tensor]) -> ImportedModel:
    """A published bias-free network as a denoiser.

    Args:
        path: the file, for its name and hash.
        state: the weights in it.

    Raises:
        DitlabError: they are not whole, or of another network.
    """
    where = str(path)
    state = {key: value.float() for key, value in _plain(state).items()}
    config = infer_config(state, where)
    network: BFCNN | BFUNet
    if isinstance(config, BFCNNConfig):
        network, kind = filled(BFCNN(config), state, {key: key for key in state}, where), "BF-CNN"
    else:
        network, kind = filled(BFUNet(config), state, {key: key for key in state}, where), "bias-free UNet"
    text, highest = _LEVELS[type(config)]
    trained = (
        f"{path.name} does not say how it was trained: images in [0, 1], the noise as output and noise levels up to "
        f"{text} of that range were assumed, as published for a {kind}."
    )
    notes = [trained]
    if isinstance(config, BFUNetConfig):
        notes.append(f"Its average pooling was taken to be {config.pool_window} pixels wide, which no weight tells.")
    digest = hash_file(path).sha256
    source: dict[str, Any] = {"format": f"published {kind}", "file": path.name, "sha256": digest, "notes": notes}
    objective = BlindObjectiveConfig(max_level=highest).build()
    return ImportedModel(path.stem, objective.denoiser(frozen(network)), HeunConfig(), source, digest, any_size=True)
