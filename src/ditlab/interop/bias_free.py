"""Published weights of bias-free denoisers: BF-CNN (Mohan et al. 2020) and the UNet of Kadkhodaie et al. (2024).

The files are bare state dicts with the parameter names of our networks, after the prefix "module." if torch's
DataParallel trained them. The shapes determine the network except the window of the UNet's average pooling. The files
do not say how it was trained: images in [0, 1], the noise as output and the published noise levels are assumed, and a
note says so. Both networks run on images of any size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ditlab.diffusion.objective_configs import BlindObjectiveConfig
from ditlab.diffusion.sampler_configs import HeunConfig
from ditlab.errors import DitlabError
from ditlab.interop.imported import ImportedModel, freeze
from ditlab.interop.original_files import load_weights, model_of_file, tensor_of
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.networks.registry import build_network

_PARALLEL = "module."
_CNN, _UNET = "conv_layers.0.weight", "encoder.0.0.weight"
"""Parameter names that only these networks have."""

_PUBLISHED = {BFCNNConfig: ("BF-CNN", "100 / 255", 100 / 255), BFUNetConfig: ("bias-free UNet", "1", 1.0)}
"""Name, and highest noise level of the published training, for images in [0, 1]."""


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights without the prefix of DataParallel."""
    return {key.removeprefix(_PARALLEL): value for key, value in state.items()}


def is_bias_free(state: Mapping[str, Tensor]) -> bool:
    """Whether the parameter names are those of a bias-free CNN or UNet."""
    names = _plain(state)
    return (_CNN in names and "running_sd.0" in names) or (_UNET in names and "mid_block.0.weight" in names)


def infer_config(state: Mapping[str, Tensor], where: str) -> BFCNNConfig | BFUNetConfig:
    """Infers the config of a network from its weights; the image size is a default, because it runs at any size."""
    state = _plain(state)
    name = _CNN if _CNN in state else _UNET
    width, channels, kernel, columns = shape = tuple(tensor_of(state, name, 4, where).shape)
    if kernel != columns:
        raise DitlabError(f"{where}: expected square kernels in '{name}', found the shape {shape}")
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
    numbers = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise DitlabError(f"{where}: expected layers numbered from 0, found {sorted(numbers)}")
    return len(numbers)


def _convs(state: Mapping[str, Tensor], stage: str) -> int:
    return sum(key.startswith(stage) and key.endswith(".weight") for key in state)


def build_bias_free(path: Path, state: Mapping[str, Tensor]) -> ImportedModel:
    """Builds the denoiser of a published bias-free network from the weights in a file."""
    where = str(path)
    state = {key: value.float() for key, value in _plain(state).items()}
    config = infer_config(state, where)
    kind, text, highest = _PUBLISHED[type(config)]
    training = (
        f"{path.name} does not say how it was trained: images in [0, 1], the noise as output and noise levels up to "
        f"{text} of that range were assumed, as published for a {kind}."
    )
    notes = [training]
    if isinstance(config, BFUNetConfig):
        notes.append(f"Average pooling over {config.pool_window} pixels was assumed, which the weights do not say.")
    network = freeze(load_weights(build_network(config), state, where))
    denoiser = BlindObjectiveConfig(max_level=highest).build().denoiser(network)
    return model_of_file(path, f"published {kind}", denoiser, HeunConfig(), notes=notes, any_size=True)


__all__ = ["build_bias_free", "infer_config", "is_bias_free"]
