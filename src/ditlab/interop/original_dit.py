"""Reads and writes checkpoints of the original DiT implementation (facebookresearch/DiT).

`ditlab.interop.original_files` opens its files safely. The parameter names were read from the published checkpoints;
every tensor has the same layout there and here. The shapes determine the network except its number of heads, which a
file written here contains in its `args`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import DDPMConfig
from ditlab.errors import DitlabError
from ditlab.interop.imported import ImportedModel, check_portable, freeze, state_on_cpu
from ditlab.interop.original_files import load_weights, model_of_file, original_name, setting, tensor_of, write_state
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.nn.embeddings import position_table

_MODULES = {
    "embed": "x_embedder.proj",
    "time.hidden": "t_embedder.mlp.0",
    "time.out": "t_embedder.mlp.2",
    "label.table": "y_embedder.embedding_table",
    "final.out": "final_layer.linear",
    "final.modulation": "final_layer.adaLN_modulation.1",
}
_BLOCK_MODULES = {
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "mlp.hidden": "mlp.fc1",
    "mlp.out": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width -> heads of the paper's four sizes (Peebles & Xie 2023, Table 1)."""
_SIZES = {"S": 6, "B": 12, "L": 16, "XL": 16}
"""Size in `args.model` ("DiT-XL/2") -> heads."""

_TABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TABLE_DRIFT = 1e-3
"""Largest accepted difference between a file's position table and ours. The tables are equal in training; rounding in
400,000 steps of an average with decay 0.9999 moves the averaged copy by up to 2e-4 (measured). Rounding of its values,
which are in [-1, 1], to the file's dtype is added."""


def modules_of(depth: int) -> dict[str, str]:
    """Returns our name -> the original's of every module with weights of an adaln-zero DiT."""
    blocks = {f"blocks.{n}.{ours}": f"blocks.{n}.{name}" for n in range(depth) for ours, name in _BLOCK_MODULES.items()}
    return _MODULES | blocks


def from_original(state: Mapping[str, Tensor], config: DiTConfig) -> DiT:
    """Returns a DiT with the original's weights.

    Args:
        state: the original's state dict. Its `pos_embed` is recomputed, not read.
        config: config of the network; the original's label table has `num_classes + 1` rows with label dropout.

    Raises:
        DitlabError: for an unknown or missing parameter, or another shape.
    """
    weights = {key: value for key, value in state.items() if key != "pos_embed"}
    return load_weights(DiT(config), weights, "original DiT weights", modules_of(config.depth))


def to_original(network: DiT, objective: object) -> dict[str, Tensor]:
    """Returns the state dict for the original code's `DiT.load_state_dict`, with its position table.

    Args:
        network: a DiT that the original code can express: adaln-zero, global attention, classes and a null class,
            square images.
        objective: config of the objective that it was trained with. The original samples with the linear schedule,
            1,000 steps and a predicted noise only.
    """
    config, to = network.config, "the original DiT format"
    check_portable(config, to)
    if config.time_frequencies != "original" or config.mlp_norm_eps != 1e-6:
        raise DitlabError(
            f"{to} has time frequencies 'original' and an epsilon of 1e-6 in every norm, this DiT has "
            f"'{config.time_frequencies}' and {config.mlp_norm_eps:g} before the MLP: its outputs would change"
        )
    if not config.null_class:
        raise DitlabError(f"{to} needs a row for the null class in the label table for sampling, this DiT's has none")
    process = isinstance(objective, VPObjectiveConfig) and (objective.schedule, objective.steps, objective.prediction)
    if process != ("linear", 1000, "epsilon"):
        raise DitlabError(f"{to} knows the linear schedule with 1000 steps and a predicted noise only, found another")
    modules = modules_of(config.depth)
    weights = {original_name(name, modules): value for name, value in state_on_cpu(network).items()}
    return {"pos_embed": position_table(config.grid, config.width)[None], **weights}


def write_original(network: DiT, objective: object, path: Path) -> None:
    """Writes the original's format to a `.pt` (or `.safetensors`) file, which is complete or does not appear.

    A `.pt` file is {"ema": state dict, "args": {"num_classes", "num_heads"}}; the original's sampling reads "ema" if
    present. `args` is a plain dict, so torch's restricted unpickler reads the file without an allow-list.
    """
    state = to_original(network, objective)
    args = {"num_classes": network.config.num_classes, "num_heads": network.config.heads}
    write_state(path, state, args, {"ema": state, "args": args})


def is_dit(state: Mapping[str, Tensor]) -> bool:
    """Whether the parameter names are those of the original DiT."""
    return "x_embedder.proj.weight" in state


def infer_config(
    state: Mapping[str, Tensor], args: Mapping[str, Any], where: str, *, heads: int | None = None
) -> DiTConfig:
    """Infers the config of a network from its weights and a file's settings.

    Args:
        state: the original's state dict.
        args: `model` ("DiT-XL/2") and `num_classes` of its training script, and `num_heads` if ditlab wrote the file.
        where: named in errors.
        heads: number of heads; by default that of `args`, or of the paper's size with this width.
    """
    embed, table = tensor_of(state, "x_embedder.proj.weight", 4, where), tensor_of(state, "pos_embed", 3, where)
    width, channels, patch, columns = embed.shape
    if patch != columns:
        raise DitlabError(
            f"{where}: expected square patches in 'x_embedder.proj.weight', found the shape {tuple(embed.shape)}"
        )
    side = isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise DitlabError(f"{where}: expected a square grid of tokens in 'pos_embed', found {table.shape[1]} tokens")
    outputs = len(tensor_of(state, "final_layer.linear.weight", 2, where)) / patch**2
    if outputs not in (channels, 2 * channels):
        raise DitlabError(
            f"{where}: expected {channels} or {2 * channels} output channels (the noise, or noise and variance), found "
            f"{outputs:g}"
        )
    blocks = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    if blocks != {str(number) for number in range(len(blocks))}:
        raise DitlabError(f"{where}: expected blocks numbered from 0, found {len(blocks)} with gaps or duplicates")
    classes, null = _classes(state, args, where)
    hidden = len(tensor_of(state, "blocks.0.mlp.fc1.weight", 2, where))
    file_heads = heads_from_args(args, where)
    if heads is not None and "num_heads" in args and heads != file_heads:
        raise DitlabError(f"{where}: expected `heads` {file_heads}, as the file says, found {heads}")
    heads = heads or file_heads or _HEADS.get(width)
    if heads is None:
        raise DitlabError(
            f"{where}: the weights (width {width}) do not determine the number of attention heads; convert it with "
            "`heads`"
        )
    try:
        config = DiTConfig(
            image_size=(side * patch, side * patch),
            channels=channels,
            patch=patch,
            width=width,
            depth=len(blocks),
            heads=heads,
            mlp_ratio=hidden / width,
            num_classes=classes,
            null_class=null,
            learn_sigma=outputs == 2 * channels,
        )
    except DitlabError as error:
        raise DitlabError(f"{where}: {error}") from None
    ours = position_table(config.grid, config.width)
    if (
        table.shape[0] != 1
        or table.shape[2] != width
        or table.dtype not in _TABLE_DTYPES
        # `not <=` also refuses a table with NaN.
        or not (table[0].float() - ours).abs().max() <= _TABLE_DRIFT + torch.finfo(table.dtype).eps
    ):
        raise DitlabError(
            f"{where}: expected the fixed sin-cos table in 'pos_embed', found another, which ditlab does not support"
        )
    return config


def _classes(state: Mapping[str, Tensor], args: Mapping[str, Any], where: str) -> tuple[int, bool]:
    """Returns the number of classes, and whether the label table has a row for "no class"."""
    if "y_embedder.embedding_table.weight" not in state:
        return 0, True
    rows = len(tensor_of(state, "y_embedder.embedding_table.weight", 2, where))
    classes = setting(args, "num_classes", int, where)
    if classes is None:
        classes = rows - 1  # the original trains with label dropout, which needs a row for "no class"
    if classes not in (rows, rows - 1) or classes < 1:
        raise DitlabError(
            f"{where}: expected a label table of {classes} or {classes + 1} rows (num_classes), found {rows}"
        )
    return classes, classes == rows - 1


def heads_from_args(args: Mapping[str, Any], where: str) -> int | None:
    """Returns the number of heads in a file's settings, given directly or by the name of a size; None without."""
    heads = setting(args, "num_heads", int, where)
    if heads is not None:
        return heads
    named = re.match(r"DiT-(\w+)/", str(args.get("model", "")))
    return _SIZES.get(named[1]) if named else None


def build_dit(
    path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any], *, ema: bool = True, heads: int | None = None
) -> ImportedModel:
    """Builds the denoiser of a file's weights; `state` and `args` are the result of `read_state`."""
    config = infer_config(state, args, str(path), heads=heads)
    network = freeze(from_original({key: value.float() for key, value in state.items()}, config))
    # Without a learned variance the original samples with beta_t.
    objective = VPObjectiveConfig(variance="learned-range" if config.learn_sigma else "fixed-large")
    known = {"ema": ema} | ({"model": str(args["model"])} if "model" in args else {})
    notes = []
    if heads is None and heads_from_args(args, str(path)) is None:
        notes.append(
            f"{path.name} does not say how many attention heads it has: {config.heads} were assumed, as in the paper's "
            f"DiT of width {config.width}. If this is wrong, its outputs are wrong; convert it with other `heads`."
        )
    denoiser = objective.build().denoiser(network)
    return model_of_file(path, "original DiT", denoiser, DDPMConfig(), notes=notes, known=known)


__all__ = ["build_dit", "from_original", "infer_config", "is_dit", "modules_of", "to_original", "write_original"]
