"""Reads and writes checkpoints of the original UNet implementation (openai/improved-diffusion), bare state dicts.

The parameter names were read from such state dicts. Two layouts differ: the original's projection to queries, keys and
values is a convolution over a row of pixels with outputs in the order (heads, 3, d), ours a Linear with outputs in the
order (3, heads, d); the projection back is such a convolution, too.

The shapes say neither the attention heads, nor the image size if the levels are not the original's for a size, nor the
process. What is missing is taken from the published recipes (the README of the original code), and a note says so. A
`.safetensors` file written here contains all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from ditlab.diffusion.choices import ScheduleName
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import DDPMConfig
from ditlab.errors import DitlabError, unknown_name
from ditlab.interop.formats import UNetFile
from ditlab.interop.imported import ImportedModel, freeze, state_on_cpu
from ditlab.interop.original_files import load_weights, model_of_file, original_name, setting, tensor_of, write_state
from ditlab.networks.unet import UNet
from ditlab.networks.unet_blocks import CONDITION
from ditlab.networks.unet_config import UNetConfig

_SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 2, 4, 4): 256}
"""Multipliers -> image size: the three that the original's scripts allow."""

_CLASSES = 1000
"""Number of classes of the class-conditional networks of the original's scripts."""

_FIRST = "input_blocks.0.0.weight"
"""A parameter name that only this network has."""

_ENDS = {
    "time.hidden": "time_embed.0",
    "time.out": "time_embed.2",
    "label.table": "label_emb",
    "stem": "input_blocks.0.0",
    "norm": "out.0",
    "out": "out.2",
}
_BLOCK = {
    "residual.norm": "0.in_layers.0",
    "residual.conv": "0.in_layers.2",
    "residual.condition": "0.emb_layers.1",
    "residual.out_norm": "0.out_layers.0",
    "residual.out_conv": "0.out_layers.3",
    "residual.skip": "0.skip_connection",
    "attention.norm": "1.norm",
    "attention.attention.qkv": "1.qkv",
    "attention.attention.proj": "1.proj_out",
    "conv": "0.op",
}
"""Our name of a module in a block -> the original's, as far as a block has it."""


@dataclass(frozen=True)
class UNetFacts:
    """All settings that the shapes do not determine, named as the flags of the original's scripts."""

    num_heads: int = 4
    num_heads_upsample: int = -1  # the same as num_heads
    image_size: int = 0
    noise_schedule: ScheduleName = "cosine"
    diffusion_steps: int = 4000
    rescale_timesteps: bool = True
    predict_xstart: bool = False
    sigma_small: bool = False


def is_unet(state: Mapping[str, Tensor]) -> bool:
    """Whether the parameter names are those of improved-diffusion's UNet."""
    return _FIRST in state


def _modules(config: UNetConfig) -> dict[str, str]:
    """Returns our name -> the original's of every module with weights, and of some that this network lacks."""
    last, decoder = len(config.widths) - 1, len(config.widths) * (config.res_blocks + 1)
    encoder = [f"input_blocks.{number}" for number in range(1, decoder)]
    places = [*encoder, "middle_block", "middle_block", *(f"output_blocks.{number}" for number in range(decoder))]
    modules = dict(_ENDS)
    for block, place in enumerate(places):
        modules |= {f"blocks.{block}.{ours}": f"{place}.{theirs}" for ours, theirs in _BLOCK.items()}
        if block == decoder:  # the second residual block in the middle comes after the attention
            modules |= {f"blocks.{block}.{ours}": f"{place}.2{theirs[1:]}" for ours, theirs in _BLOCK.items()}
        if block > decoder:
            level = last - (block - decoder - 1) // (config.res_blocks + 1)
            modules[f"blocks.{block}.up.conv"] = f"{place}.{2 if config.attends(level) else 1}.conv"
    return modules


def _heads_of(key: str, config: UNetConfig) -> int:
    """Returns the heads of the attention layer that a weight of the original belongs to."""
    return config.decoder_heads if key.startswith("output_blocks.") else config.heads


def from_original(state: Mapping[str, Tensor], config: UNetConfig) -> UNet:
    """Returns a UNet with the original's weights; DitlabError for an unknown or missing one, or another shape."""
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, heads = key.rpartition(".")[0], _heads_of(key, config)
        if stem.endswith((".qkv", ".proj_out")) and value.ndim == 3 and value.shape[2] == 1:
            value = value[:, :, 0]
        if stem.endswith(".qkv") and value.shape[0] % (3 * heads) == 0:
            value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        weights[key] = value
    return load_weights(UNet(config), weights, "original UNet weights", _modules(config))


def to_original(network: UNet) -> dict[str, Tensor]:
    """Returns the state dict for the original code's `UNetModel.load_state_dict`.

    DitlabError for what it cannot express: not 32 groups, other time frequencies, a null class, images not square.
    """
    config, to = network.config, "the format of improved-diffusion"
    if config.groups != 32 or config.time_frequencies != "original":
        raise DitlabError(
            f"{to} has 32 groups in every norm and time frequencies 'original', this UNet has {config.groups} and "
            f"'{config.time_frequencies}': its outputs would change"
        )
    if config.num_classes and config.null_class:
        raise DitlabError(f"{to} has no row for a null class in the label table, this UNet's has one")
    if config.image_size[0] != config.image_size[1]:
        rows, columns = config.image_size
        raise DitlabError(f"{to} knows square images only, this UNet is for {rows}x{columns} pixels")
    modules = _modules(config)
    state: dict[str, Tensor] = {}
    for name, value in state_on_cpu(network).items():
        stem, _, leaf = name.rpartition(".")
        key = original_name(name, modules)
        if stem.endswith("attention.qkv"):
            value = value.unflatten(0, (3, _heads_of(key, config), -1)).transpose(0, 1).flatten(0, 2)
        if stem.endswith(("attention.qkv", "attention.proj")) and leaf == "weight":
            value = value[:, :, None]
        state[key] = value.contiguous()
    return state


def write_improved(network: UNet, objective: object, path: Path) -> str:
    """Writes the original's format to a `.pt` (or `.safetensors`) file, which is complete or does not appear.

    A `.pt` file is the bare state dict that the original's scripts read; it contains the weights only. Returns a
    sentence that says how the original code builds the network and the process.
    """
    config, state = network.config, to_original(network)
    if not isinstance(objective, VPObjectiveConfig):
        raise DitlabError("the format of improved-diffusion knows networks trained on a VP process only, found another")
    facts = UNetFacts(
        num_heads=config.heads,
        num_heads_upsample=-1 if config.heads_up is None else config.heads_up,
        image_size=config.image_size[0],
        noise_schedule=objective.schedule,
        diffusion_steps=objective.steps,
        rescale_timesteps=objective.rescale_time,
        predict_xstart=objective.prediction == "x0",
        sigma_small=objective.variance == "fixed-small",
    )
    write_state(path, state, asdict(facts), state)
    return _built_by(config, facts)


def _built_by(config: UNetConfig, facts: UNetFacts) -> str:
    """Returns how the original code builds such a network: flags of its scripts, or arguments of its class."""
    side = config.image_size[0]
    # The scripts do not accept an empty list; with a size larger than the image they add no attention.
    flags: dict[str, object] = {
        "num_channels": config.width,
        "num_res_blocks": config.res_blocks,
        "attention_resolutions": ",".join(map(str, config.attention_at)) or str(2 * side),
        "learn_sigma": config.learn_sigma,
        "class_cond": bool(config.num_classes),
        "use_scale_shift_norm": config.scale_shift,
    }
    usual = (config.channels, config.conv_resample) == (3, True) and config.num_classes in (0, _CLASSES)
    if usual and _SIZES.get(config.multipliers) == side:
        texts = (f"--{name} {value}" for name, value in (flags | asdict(facts)).items())
        return f"flags for the original's scripts: {' '.join(texts)}"
    arguments: dict[str, object] = {
        "in_channels": config.channels,
        "model_channels": config.width,
        "out_channels": config.channels * (2 if config.learn_sigma else 1),
        "num_res_blocks": config.res_blocks,
        "attention_resolutions": tuple(2**level for level in range(len(config.multipliers)) if config.attends(level)),
        "channel_mult": config.multipliers,
        "conv_resample": config.conv_resample,
        "num_classes": config.num_classes or None,
        "num_heads": facts.num_heads,
        "num_heads_upsample": facts.num_heads_upsample,
        "use_scale_shift_norm": config.scale_shift,
    }
    texts = (f"{name}={value}" for name, value in arguments.items())
    return f"no flags of the original's scripts build this network; its class does: UNetModel({', '.join(texts)})"


def infer_config(state: Mapping[str, Tensor], facts: UNetFacts, where: str) -> UNetConfig:
    """Infers the config of a network from its weights and from what they do not say; an image size of 0 is unknown."""
    width, channels = tensor_of(state, _FIRST, 4, where).shape[:2]
    outputs = len(tensor_of(state, "out.2.weight", 4, where))
    if outputs not in (channels, 2 * channels) or (channels, outputs) == (6, 6):
        raise DitlabError(
            f"{where}: expected {channels} or {2 * channels} output channels (the noise, or noise and variance), found "
            f"{outputs}; upsampling models, whose input includes a small image, are not supported"
        )
    multipliers, blocks, attends = _levels(state, width, where)
    size = facts.image_size or _SIZES.get(multipliers)
    if size is None:
        raise DitlabError(
            f"{where}: its levels ({multipliers}) do not determine its image size; convert it with `unet.size`"
        )
    first = tensor_of(state, "input_blocks.1.0.out_layers.3.weight", 4, where)
    emb = tensor_of(state, "input_blocks.1.0.emb_layers.1.weight", 2, where)
    classes = len(tensor_of(state, "label_emb.weight", 2, where)) if "label_emb.weight" in state else 0
    try:
        config = UNetConfig(
            image_size=(size, size),
            channels=channels,
            width=width,
            res_blocks=blocks,
            multipliers=multipliers,
            attention_at=tuple(size >> level for level in attends),
            heads=facts.num_heads,
            heads_up=None if facts.num_heads_upsample == -1 else facts.num_heads_upsample,
            conv_resample=any(key.endswith(".op.weight") for key in state) or len(multipliers) == 1,
            scale_shift=len(emb) == 2 * len(first),
            num_classes=classes,
            learn_sigma=outputs == 2 * channels,
        )
    except DitlabError as error:
        raise DitlabError(f"{where}: {error}") from None
    if len(emb.T) != CONDITION * width:
        raise DitlabError(f"{where}: expected a condition of {CONDITION * width} channels, found {len(emb.T)}")
    return config


def _levels(state: Mapping[str, Tensor], width: int, where: str) -> tuple[tuple[int, ...], int, list[int]]:
    """Returns multipliers, residual blocks of each level, and levels with attention, from the encoder's names."""
    numbers = {int(match[1]) for key in state if (match := re.match(r"input_blocks\.(\d+)\.", key))}
    levels: list[list[int]] = [[]]
    for number in range(1, max(numbers) + 1):
        key = f"input_blocks.{number}.0.out_layers.3.weight"
        if key in state:
            levels[-1].append(len(tensor_of(state, key, 4, where)))
        else:  # downsampling, which has no weights without convolutions
            levels.append([])
    counts = {len(level) for level in levels}
    if len(counts) != 1 or 0 in counts or any(len({*level}) > 1 or level[0] % width for level in levels):
        raise DitlabError(
            f"{where}: expected levels of equally many residual blocks whose channels are multiples of {width}, found "
            f"channels {levels}"
        )
    blocks = counts.pop()
    starts = [1 + level * (blocks + 1) for level in range(len(levels))]
    attends = [level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in state]
    return tuple(level[0] // width for level in levels), blocks, attends


def _published(state: Mapping[str, Tensor], where: str) -> UNetFacts:
    """Returns the settings of the published checkpoint of such a shape (README of the original code)."""
    emb = tensor_of(state, "input_blocks.1.0.emb_layers.1.weight", 2, where)
    if len(emb) == len(tensor_of(state, "input_blocks.1.0.out_layers.3.weight", 4, where)):
        # Without scale-shift norms: LSUN bedrooms.
        return UNetFacts(num_heads=1, noise_schedule="linear", diffusion_steps=1000, rescale_timesteps=False)
    # With classes: ImageNet 64x64, conditional. Without: ImageNet 64x64 and CIFAR-10.
    return UNetFacts(rescale_timesteps="label_emb.weight" not in state)


def build_unet(
    path: Path,
    state: Mapping[str, Tensor],
    args: Mapping[str, Any],
    *,
    heads: int | None = None,
    settings: UNetFile | None = None,
) -> ImportedModel:
    """Builds the denoiser of a file's weights; `state` and `args` are the result of `read_state`."""
    where = str(path)
    from_file = _file_args(args, where)
    user = settings or UNetFile()
    flags = {
        "num_heads": heads,
        "num_heads_upsample": user.heads_up,
        "image_size": user.size,
        "noise_schedule": user.schedule,
        "diffusion_steps": user.steps,
        "rescale_timesteps": user.rescale_time,
        "predict_xstart": None if user.prediction is None else user.prediction == "x0",
    }
    from_user: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    for name in from_file.keys() & from_user.keys():
        if from_file[name] != from_user[name]:
            raise DitlabError(f"{where}: expected {name} {from_file[name]}, as the file says, found {from_user[name]}")
    facts = replace(_published(state, where), **(from_file | from_user))
    config = infer_config(state, facts, where)
    network = freeze(from_original({key: value.float() for key, value in state.items()}, config))
    fixed = "fixed-small" if facts.sigma_small else "fixed-large"
    objective = VPObjectiveConfig(
        schedule=facts.noise_schedule,
        steps=facts.diffusion_steps,
        prediction="x0" if facts.predict_xstart else "epsilon",
        variance="learned-range" if config.learn_sigma else fixed,
        rescale_time=facts.rescale_timesteps,
        label_dropout=0.0,
    )
    notes = _notes(path.name, config, facts, {*from_file, *from_user})
    return model_of_file(path, "improved-diffusion", objective.build().denoiser(network), DDPMConfig(), notes=notes)


def _file_args(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the settings in a file, with their types checked."""
    values = {field.name: setting(args, field.name, type(field.default), where) for field in fields(UNetFacts)}
    settings = {name: value for name, value in values.items() if value is not None}
    schedule = settings.get("noise_schedule")
    if schedule is not None and schedule not in get_args(ScheduleName):
        raise DitlabError(f"{where}: {unknown_name('noise schedule', schedule, get_args(ScheduleName))}")
    return settings


def _notes(file: str, config: UNetConfig, facts: UNetFacts, known: set[str]) -> list[str]:
    """Returns a sentence that lists the assumed settings, if there are any."""
    assumed = {
        "num_heads": f"{config.heads} attention heads",
        "image_size": f"images of {config.image_size[0]} pixels",
        "noise_schedule": f"the {facts.noise_schedule} schedule",
        "diffusion_steps": f"{facts.diffusion_steps} steps",
        "rescale_timesteps": f"time {'rescaled to 1000 steps' if facts.rescale_timesteps else 'as it is'}",
    }
    texts = [text for name, text in assumed.items() if name not in known]
    if not texts:
        return []
    note = (
        f"{file} does not say everything: {', '.join(texts)} were assumed, as in the published checkpoints of its "
        "shape. If this is wrong, its outputs are wrong; convert it with other `heads`, `unet.schedule`, `unet.steps`, "
        "`unet.rescale_time` or `unet.size`."
    )
    return [note]


__all__ = [
    "UNetFile",
    "build_unet",
    "from_original",
    "infer_config",
    "is_unet",
    "to_original",
    "write_improved",
]
