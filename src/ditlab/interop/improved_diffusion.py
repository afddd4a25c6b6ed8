"""Checkpoints of the original UNet implementation (openai/improved-diffusion), read and written.

Its files are bare state dicts; how they are opened safely is a matter of `ditlab.interop.original_files`. The names
were read from such state dicts. Two layouts differ here: the projection to queries, keys and values is a convolution
over a row of pixels whose outputs go head by head, (heads, 3, d), and ours is a Linear whose outputs go (3, heads, d);
the projection back is such a convolution, too.

The shapes tell the network but for its attention heads and, where its levels are not the original's for a size, the
image size; and nothing of the process that it was trained on. What is not said is taken from the published recipes (the
README of the original code), and a note says so. A `.safetensors` file written here says all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor

from ditlab.data.manifest import hash_file
from ditlab.diffusion.denoisers import PredictionTarget
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import DDPMConfig
from ditlab.diffusion.schedules import ScheduleName
from ditlab.errors import DitlabError, unknown_name
from ditlab.interop.imported import ImportedModel, frozen, state_on_cpu
from ditlab.interop.original_files import filled, read_state, whole, write_state
from ditlab.networks.unet import CONDITION, UNet, UNetConfig

_SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 2, 4, 4): 256}
"""Multipliers -> image size: the original's scripts allow these three alone."""

_CLASSES = 1000
"""Number of classes of a class-conditional network that they build."""

_FIRST = "input_blocks.0.0.weight"
"""A name that only weights of this network have."""

_STAGE = {
    "in_layers.0": "norm",
    "in_layers.2": "conv",
    "emb_layers.1": "condition",
    "out_layers.0": "out_norm",
    "out_layers.3": "out_conv",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm", "qkv": "attention.qkv", "proj_out": "attention.proj"}
_ENDS = {
    "time_embed.0": "time.hidden",
    "time_embed.2": "time.out",
    "label_emb": "label.table",
    "input_blocks.0.0": "stem",
    "out.0": "norm",
    "out.2": "out",
}


@dataclass(frozen=True)
class UNetFile:
    """What a checkpoint of improved-diffusion does not say; where not given, as the published ones of its shape."""

    heads_up: int | None = None
    """Attention heads of the decoder; as many as the others' where not given."""
    size: int | None = None
    """Side of its images in pixels, where its levels are not the original's for 32, 64 or 256."""
    schedule: ScheduleName | None = None
    """Noise schedule."""
    steps: int | None = None
    """Steps of the process."""
    rescale_time: bool | None = None
    """Whether the network is told t * 1000 / T instead of t."""
    prediction: PredictionTarget | None = None
    """What it predicts; the noise where not given."""


@dataclass(frozen=True)
class UNetFacts:
    """All that the shapes do not say, under the names of the flags of the original's scripts."""

    num_heads: int = 4
    num_heads_upsample: int = -1  # as many as num_heads
    image_size: int = 0
    noise_schedule: ScheduleName = "cosine"
    diffusion_steps: int = 4000
    rescale_timesteps: bool = True
    predict_xstart: bool = False
    sigma_small: bool = False


_OURS = {
    "heads": "num_heads",
    "heads_up": "num_heads_upsample",
    "size": "image_size",
    "schedule": "noise_schedule",
    "steps": "diffusion_steps",
    "rescale_time": "rescale_timesteps",
    "prediction": "predict_xstart",
}
"""What a user names -> the original's flag."""


def is_unet(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of improved-diffusion's UNet, by their names."""
    return _FIRST in state


def _names(config: UNetConfig) -> dict[str, str]:
    """The original's module -> ours, without leaves such as ".weight"."""
    found = dict(_ENDS)

    def stage(block: int, theirs: str, attention: str = "", up: str = "") -> None:
        found.update({f"{theirs}.{name}": f"blocks.{block}.residual.{ours}" for name, ours in _STAGE.items()})
        if attention:
            found.update(
                {f"{attention}.{name}": f"blocks.{block}.attention.{ours}" for name, ours in _ATTENTION.items()}
            )
        if up:
            found[f"{up}.conv"] = f"blocks.{block}.up.conv"

    block, last = 0, len(config.widths) - 1
    for level in range(last + 1):
        for _ in range(config.res_blocks):
            theirs = f"input_blocks.{block + 1}"
            stage(block, f"{theirs}.0", f"{theirs}.1" if config.attends(level) else "")
            block += 1
        if level < last:
            found[f"input_blocks.{block + 1}.0.op"] = f"blocks.{block}.conv"
            block += 1
    stage(block, "middle_block.0", "middle_block.1")
    stage(block + 1, "middle_block.2")
    first = block = block + 2
    for level in reversed(range(last + 1)):
        for number in range(config.res_blocks + 1):
            theirs, attends = f"output_blocks.{block - first}", config.attends(level)
            up = f"{theirs}.{2 if attends else 1}" if number == config.res_blocks and level else ""
            stage(block, f"{theirs}.0", f"{theirs}.1" if attends else "", up)
            block += 1
    return found


def _heads_of(key: str, config: UNetConfig) -> int:
    """Heads of the attention that a weight of the original's belongs to."""
    return config.decoder_heads if key.startswith("output_blocks.") else config.heads


def _by_kind(value: Float[Tensor, "o ..."], heads: int) -> Float[Tensor, "o ..."]:
    """Outputs of a projection in the order (heads, 3, d) to the order (3, heads, d)."""
    return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _by_head(value: Float[Tensor, "o ..."], heads: int) -> Float[Tensor, "o ..."]:
    """The way back."""
    return value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def from_original(state: Mapping[str, Tensor], config: UNetConfig) -> UNet:
    """A UNet with the original's weights.

    Args:
        state: the original's state dict.
        config: the network's shape.

    Raises:
        DitlabError: for a key without a counterpart, a missing one, or another shape.
    """
    modules = _names(config)
    named: dict[str, str | None] = {}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        named[key] = f"{modules[stem]}.{leaf}" if stem in modules else None
        if stem.endswith((".qkv", ".proj_out")) and value.ndim == 3 and value.shape[2] == 1:
            value = value[:, :, 0]
        if stem.endswith(".qkv") and value.shape[0] % (3 * _heads_of(key, config)) == 0:
            value = _by_kind(value, _heads_of(key, config))
        found[key] = value
    return filled(UNet(config), found, named, "original UNet weights")


def to_original(network: UNet) -> dict[str, Tensor]:
    """The state dict that the original code's `UNetModel.load_state_dict` takes.

    Args:
        network: one that the original code can express: groups of 32, its own time frequencies, no null class, a square
            image.

    Raises:
        DitlabError: the original's format cannot express it.
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
    theirs = {ours: theirs for theirs, ours in _names(config).items()}
    found: dict[str, Tensor] = {}
    for name, value in state_on_cpu(network).items():
        stem, _, leaf = name.rpartition(".")
        key = f"{theirs[stem]}.{leaf}"
        if stem.endswith("attention.qkv"):
            value = _by_head(value, _heads_of(key, config))
        if stem.endswith(("attention.qkv", "attention.proj")) and leaf == "weight":
            value = value[:, :, None]
        found[key] = value.contiguous()
    return found


def _facts(config: UNetConfig, objective: object) -> UNetFacts:
    """What a file of this network cannot say by its shapes.

    Raises:
        DitlabError: it was trained in another framework than on the steps of a VP process.
    """
    if not isinstance(objective, VPObjectiveConfig):
        raise DitlabError("the format of improved-diffusion knows networks trained on a VP process only, found another")
    return UNetFacts(
        num_heads=config.heads,
        num_heads_upsample=-1 if config.heads_up is None else config.heads_up,
        image_size=config.image_size[0],
        noise_schedule=objective.schedule,
        diffusion_steps=objective.steps,
        rescale_timesteps=objective.rescale_time,
        predict_xstart=objective.prediction == "x0",
        sigma_small=objective.variance == "fixed-small",
    )


def write_improved(network: UNet, objective: object, path: Path) -> str:
    """Writes `to_original` as a `.pt` file (or `.safetensors`), whole or not at all.

    A pickle is the bare state dict, as the original's scripts want it, and says no more than the weights.

    Args:
        network: ours.
        objective: how it was trained.
        path: a file that does not exist yet.

    Returns:
        How the original code builds the network and the process, a sentence for the user.

    Raises:
        DitlabError: the format cannot express the network, or the file exists already or cannot be written.
    """
    state, config, facts = to_original(network), network.config, _facts(network.config, objective)
    write_state(path, state, asdict(facts), state)
    return _built_by(config, facts)


def _built_by(config: UNetConfig, facts: UNetFacts) -> str:
    """What the original code is told to build such a network: flags of its scripts, or else arguments of its class."""
    side = config.image_size[0]
    # An empty list is none of the scripts' values; a size larger than the image has them put attention nowhere.
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
        words = (f"--{name} {value}" for name, value in (flags | asdict(facts)).items())
        return f"flags for the original's scripts: {' '.join(words)}"
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
    words = (f"{name}={value}" for name, value in arguments.items())
    return f"no flags of the original's scripts build this network; its class does: UNetModel({', '.join(words)})"


def infer_config(state: Mapping[str, Tensor], facts: UNetFacts, where: str) -> UNetConfig:
    """The shape of the network that these weights are of.

    Args:
        state: the original's state dict.
        facts: what it does not say; an image size of 0 is not known.
        where: named in errors.

    Raises:
        DitlabError: a tensor is missing or of an impossible shape, or the image size cannot be told.
    """
    width, channels = _tensor(state, _FIRST, 4, where).shape[:2]
    outputs = len(_tensor(state, "out.2.weight", 4, where))
    if outputs not in (channels, 2 * channels) or (channels, outputs) == (6, 6):
        raise DitlabError(
            f"{where}: expected {channels} or {2 * channels} output channels (the noise, or noise and variance), found "
            f"{outputs}; upsampling models, which are given a small picture too, have no place in ditlab"
        )
    multipliers, blocks, attends = _levels(state, width, where)
    size = facts.image_size or _SIZES.get(multipliers)
    if size is None:
        raise DitlabError(
            f"{where}: its image size cannot be told from its levels ({multipliers}); name it: ditlab convert FILE OUT "
            "--unet.size SIDE"
        )
    first = _tensor(state, "input_blocks.1.0.out_layers.3.weight", 4, where)
    emb = _tensor(state, "input_blocks.1.0.emb_layers.1.weight", 2, where)
    classes = len(_tensor(state, "label_emb.weight", 2, where)) if "label_emb.weight" in state else 0
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
    """Multipliers of the levels, residual blocks of each, and the levels with attention, from the encoder's names."""
    numbers = {int(found[1]) for key in state if (found := re.match(r"input_blocks\.(\d+)\.", key))}
    levels: list[list[int]] = [[]]
    for number in range(1, max(numbers) + 1):
        key = f"input_blocks.{number}.0.out_layers.3.weight"
        if key in state:
            levels[-1].append(len(_tensor(state, key, 4, where)))
        else:  # halving, which without convolutions has no weights
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


def _tensor(state: Mapping[str, Tensor], key: str, dimensions: int, where: str) -> Tensor:
    if key not in state or state[key].ndim != dimensions or not state[key].numel():
        raise DitlabError(f"{where}: expected '{key}' with {dimensions} dimensions among the weights, found none")
    return state[key]


def _published(state: Mapping[str, Tensor], where: str) -> UNetFacts:
    """What the published checkpoint of such a shape was trained with (the README of the original code)."""
    emb = _tensor(state, "input_blocks.1.0.emb_layers.1.weight", 2, where)
    if len(emb) == len(_tensor(state, "input_blocks.1.0.out_layers.3.weight", 4, where)):
        # No scale-shift norms: the LSUN bedrooms.
        return UNetFacts(num_heads=1, noise_schedule="linear", diffusion_steps=1000, rescale_timesteps=False)
    return UNetFacts(
        rescale_timesteps="label_emb.weight" not in state
    )  # ImageNet with classes; without them, and CIFAR-10


def open_improved(
    path: str | Path, *, ema: bool = True, heads: int | None = None, told: UNetFile | None = None
) -> ImportedModel:
    """A checkpoint of the original code as a denoiser.

    Args:
        path: the file.
        ema: the averaged weights, which are all that a file has.
        heads: number of attention heads; 4, or 1 without scale-shift norms, where neither this nor the file says it.
        told: what else the file does not say.

    Raises:
        DitlabError: it cannot be read safely or whole, is of another network, or says other than what is told.
    """
    path = Path(path)
    return unet_of(path, *read_state(path, ema=ema), heads=heads, told=told)


def unet_of(
    path: Path,
    state: Mapping[str, Tensor],
    args: Mapping[str, Any],
    *,
    heads: int | None = None,
    told: UNetFile | None = None,
) -> ImportedModel:
    """The same, of what `read_state` found in the file."""
    where = str(path)
    if not is_unet(state):
        raise DitlabError(
            f"{where}: expected weights of improved-diffusion's UNet ('{_FIRST}'), found another network's "
            f"('{next(iter(state))}')"
        )
    said = _said(args, where)
    given = {"heads": heads, **asdict(told or UNetFile())}
    wanted = {_OURS[name]: value for name, value in given.items() if value is not None}
    if "predict_xstart" in wanted:
        wanted["predict_xstart"] = wanted["predict_xstart"] == "x0"
    for name in said.keys() & wanted.keys():
        if said[name] != wanted[name]:
            raise DitlabError(f"{where}: expected {name} {said[name]}, as the file says, found {wanted[name]}")
    facts = replace(_published(state, where), **(said | wanted))
    config = infer_config(state, facts, where)
    network = frozen(from_original({key: value.float() for key, value in state.items()}, config))
    fixed = "fixed-small" if facts.sigma_small else "fixed-large"
    objective = VPObjectiveConfig(
        schedule=facts.noise_schedule,
        steps=facts.diffusion_steps,
        prediction="x0" if facts.predict_xstart else "epsilon",
        variance="learned-range" if config.learn_sigma else fixed,
        rescale_time=facts.rescale_timesteps,
        label_dropout=0.0,
    )
    digest = hash_file(path).sha256
    source: dict[str, Any] = {"format": "improved-diffusion", "file": path.name, "sha256": digest}
    note = _note(path.name, config, facts, {*said, *wanted})
    if note:
        source["notes"] = [note]
    return ImportedModel(path.stem, objective.build().denoiser(network), DDPMConfig(), source, digest)


def _said(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The facts among a file's settings, checked for their kind."""
    found: dict[str, Any] = {}
    for field in fields(UNetFacts):
        if args.get(field.name) is None:
            continue
        if type(field.default) is int:
            found[field.name] = whole(args, field.name, where)
        elif type(args[field.name]) is not type(field.default):
            raise DitlabError(
                f"{where}: expected {field.name} among its settings as {type(field.default).__name__}, found "
                f"{args[field.name]!r:.50}"
            )
        else:
            found[field.name] = args[field.name]
    schedule = found.get("noise_schedule")
    if schedule is not None and schedule not in get_args(ScheduleName):
        raise DitlabError(f"{where}: {unknown_name('noise schedule', schedule, get_args(ScheduleName))}")
    return found


def _note(file: str, config: UNetConfig, facts: UNetFacts, known: set[str]) -> str:
    """What was taken for granted, one sentence; empty where nothing was."""
    taken = {
        "num_heads": f"{config.heads} attention heads",
        "image_size": f"images of {config.image_size[0]} pixels",
        "noise_schedule": f"the {facts.noise_schedule} schedule",
        "diffusion_steps": f"{facts.diffusion_steps} steps",
        "rescale_timesteps": f"time {'rescaled to 1000 steps' if facts.rescale_timesteps else 'as it is'}",
    }
    words = [text for name, text in taken.items() if name not in known]
    if not words:
        return ""
    return (
        f"{file} does not say everything: {', '.join(words)} were taken, as the published checkpoints of its shape "
        "have; with others its outputs would be wrong (ditlab convert FILE OUT with --heads and --unet.schedule, "
        "--unet.steps, --unet.rescale-time, --unet.size)."
    )


__all__ = [
    "UNetFile",
    "from_original",
    "infer_config",
    "is_unet",
    "open_improved",
    "to_original",
    "unet_of",
    "write_improved",
]
