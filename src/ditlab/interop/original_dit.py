"""Checkpoints of the original DiT implementation (facebookresearch/DiT), read and written.

How its files are opened safely is a matter of `ditlab.interop.original_files`.

The names were read from the published checkpoints' keys; every tensor has the same layout there and here. The shapes
tell everything about the network but its number of heads, which a file written here says in its `args`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditlab.data.manifest import hash_file
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import DDPMConfig
from ditlab.errors import DitlabError
from ditlab.interop.imported import ImportedModel, check_portable, frozen, state_on_cpu
from ditlab.interop.original_files import filled, read_state, whole, write_state
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.nn.embeddings import position_table

_NAMES = {
    "x_embedder.proj": "embed",
    "t_embedder.mlp.0": "time.hidden",
    "t_embedder.mlp.2": "time.out",
    "y_embedder.embedding_table": "label.table",
    "final_layer.linear": "final.out",
    "final_layer.adaLN_modulation.1": "final.modulation",
}
_BLOCK_NAMES = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "mlp.hidden",
    "mlp.fc2": "mlp.out",
    "adaLN_modulation.1": "modulation",
}
_THEIRS = {ours: theirs for theirs, ours in _NAMES.items()}
_BLOCK_THEIRS = {ours: theirs for theirs, ours in _BLOCK_NAMES.items()}

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width -> heads of the paper's four sizes (Peebles & Xie 2023, Table 1)."""
_SIZES = {"S": 6, "B": 12, "L": 16, "XL": 16}
"""The size in `args.model` ("DiT-XL/2") -> heads."""

_FIRST = "x_embedder.proj.weight"
"""A name that only weights of this network have."""

_TABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TABLE_DRIFT = 1e-3
"""How far a file's position table may lie from ours. Equal in training; rounding in 400,000 steps of an average with
decay 0.9999 moves the averaged copy by up to 2e-4 (measured), so this is what another table cannot pass as. On top
comes rounding of its values, which lie in [-1, 1], to the dtype that the file keeps them in."""


def renamed(key: str) -> str | None:
    """ditlab's name of one of the original's parameters; None for what ditlab recomputes or does not know."""
    return _rename(key, _NAMES, _BLOCK_NAMES)


def _rename(key: str, names: Mapping[str, str], block_names: Mapping[str, str]) -> str | None:
    stem, _, leaf = key.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{leaf}"
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if block and block[2] in block_names:
        return f"blocks.{block[1]}.{block_names[block[2]]}.{leaf}"
    return None


def from_original(state: Mapping[str, Tensor], config: DiTConfig) -> DiT:
    """A DiT with the original's weights.

    Args:
        state: the original's state dict. Its `pos_embed` is recomputed here, not read.
        config: the network's shape; the original's label table has `num_classes + 1` rows where labels were dropped.

    Raises:
        DitlabError: for a key without a counterpart, a missing one, or another shape.
    """
    named = {key: renamed(key) for key in state if key != "pos_embed"}
    return filled(DiT(config), state, named, "original DiT weights")


def to_original(network: DiT, objective: object) -> dict[str, Tensor]:
    """The state dict that the original code's `DiT.load_state_dict` takes, its position table included.

    Args:
        network: one that the original code can express: adaln-zero, global attention, classes and a null class, a
            square image.
        objective: how it was trained; the original's code samples with the linear schedule, 1,000 steps and a
            predicted noise, and its files cannot say otherwise.

    Raises:
        DitlabError: the original's format cannot express it.
    """
    config, to = network.config, "the original DiT format"
    check_portable(config, to)
    if config.time_frequencies != "original" or config.mlp_norm_eps != 1e-6:
        raise DitlabError(
            f"{to} has time frequencies 'original' and an epsilon of 1e-6 in every norm, this DiT has "
            f"'{config.time_frequencies}' and {config.mlp_norm_eps:g} before the MLP: its outputs would change"
        )
    if not config.null_class:
        raise DitlabError(
            f"{to} has a row for the null class in the label table of whatever it samples from, this DiT's has none"
        )
    plain = isinstance(objective, VPObjectiveConfig) and (
        objective.schedule,
        objective.steps,
        objective.prediction,
    ) == ("linear", 1000, "epsilon")
    if not plain:
        raise DitlabError(f"{to} knows the linear schedule with 1000 steps and a predicted noise only, found another")
    found: dict[str, Tensor] = {"pos_embed": position_table(config.grid, config.width)[None]}
    for name, value in state_on_cpu(network).items():
        key = _rename(name, _THEIRS, _BLOCK_THEIRS)
        assert key is not None, name  # an adaln-zero DiT has no other parameters
        found[key] = value
    return found


def write_original(network: DiT, objective: object, path: Path) -> None:
    """Writes `to_original` as a `.pt` file (or `.safetensors`), whole or not at all.

    The pickle is {"ema": state dict, "args": {"num_classes", "num_heads"}}: the original's sampling takes "ema" where
    it is there. Its `args` are a plain dict, so that torch's restricted unpickler reads the file without an allow-list.

    Args:
        network: ours.
        objective: how it was trained.
        path: a file that does not exist yet.

    Raises:
        DitlabError: the format cannot express the network, or the file exists already or cannot be written.
    """
    state = to_original(network, objective)
    args = {"num_classes": network.config.num_classes, "num_heads": network.config.heads}
    write_state(path, state, args, {"ema": state, "args": args})


def read_original(path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file of the original code, and what its `args` say of the training.

    Args:
        path: a `.pt`, `.pth` or `.ckpt` file, or `.safetensors` with the same names.
        ema: the averaged weights where the file has both; else those of the last step.

    Raises:
        DitlabError: no such file, a damaged one, one with code in it, or one without weights of this network.
    """
    state, args = read_state(path, ema=ema)
    if not is_dit(state):
        raise DitlabError(
            f"{path}: expected weights of the original DiT ('{_FIRST}'), found another network's "
            f"('{next(iter(state))}')"
        )
    return state, args


def is_dit(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of the original DiT, by their names."""
    return _FIRST in state


def infer_config(
    state: Mapping[str, Tensor], args: Mapping[str, Any], where: str, *, heads: int | None = None
) -> DiTConfig:
    """The shape of the network that these weights are of.

    Args:
        state: the original's state dict.
        args: `model` ("DiT-XL/2") and `num_classes` of its training script, and `num_heads` where ditlab wrote it, as
            far as they are known.
        where: named in errors.
        heads: number of heads; by default what `args` say, or that of the paper's size with this width.

    Raises:
        DitlabError: a tensor is missing or of an impossible shape, the number of heads cannot be told, or the file's
            position table is not the fixed sin-cos one.
    """
    embed, table = _tensor(state, "x_embedder.proj.weight", 4, where), _tensor(state, "pos_embed", 3, where)
    width, channels, patch, columns = embed.shape
    if patch != columns or not embed.numel():
        raise DitlabError(
            f"{where}: expected square patches of at least one pixel in 'x_embedder.proj.weight', found the shape "
            f"{tuple(embed.shape)}"
        )
    side = isqrt(table.shape[1])
    if side * side != table.shape[1] or not side:
        raise DitlabError(f"{where}: expected a square grid of tokens in 'pos_embed', found {table.shape[1]} tokens")
    outputs = len(_tensor(state, "final_layer.linear.weight", 2, where)) / patch**2
    if outputs not in (channels, 2 * channels):
        raise DitlabError(
            f"{where}: expected {channels} or {2 * channels} output channels (the noise, or noise and variance), found "
            f"{outputs:g}"
        )
    blocks = {found[1] for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    if blocks != {str(number) for number in range(len(blocks))}:
        raise DitlabError(f"{where}: expected blocks numbered from 0 on, found {len(blocks)} with gaps or doubles")
    classes, null = _classes(state, args, where)
    hidden = len(_tensor(state, "blocks.0.mlp.fc1.weight", 2, where))
    told = told_heads(args, where)
    if heads is not None and "num_heads" in args and heads != told:
        raise DitlabError(f"{where}: expected --heads {told}, as the file says, found {heads}")
    heads = heads or told or _usual_heads(width, where)
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
        # A table of NaN is not within any distance.
        or not (table[0].float() - ours).abs().max() <= _TABLE_DRIFT + torch.finfo(table.dtype).eps
    ):
        raise DitlabError(
            f"{where}: expected the fixed sin-cos table in 'pos_embed', found another, which ditlab's DiT cannot hold"
        )
    return config


def _tensor(state: Mapping[str, Tensor], key: str, dimensions: int, where: str) -> Tensor:
    if key not in state or state[key].ndim != dimensions:
        raise DitlabError(f"{where}: expected '{key}' with {dimensions} dimensions among the weights, found none")
    return state[key]


def _classes(state: Mapping[str, Tensor], args: Mapping[str, Any], where: str) -> tuple[int, bool]:
    """Number of classes, and whether the label table has a row for none."""
    if "y_embedder.embedding_table.weight" not in state:
        return 0, True
    rows = len(_tensor(state, "y_embedder.embedding_table.weight", 2, where))
    said = whole(args, "num_classes", where)
    if said is None:
        said = rows - 1  # the original trains with label dropout, which needs the further row
    if said not in (rows, rows - 1) or said < 1:
        raise DitlabError(f"{where}: expected a label table of {said} or {said + 1} rows (num_classes), found {rows}")
    return said, said == rows - 1


def told_heads(args: Mapping[str, Any], where: str) -> int | None:
    """The number of heads that a file's settings tell, by itself or by the name of a size; None where they do not.

    Raises:
        DitlabError: it is no whole number.
    """
    told = whole(args, "num_heads", where)
    if told is not None:
        return told
    named = re.match(r"DiT-(\w+)/", str(args.get("model", "")))
    return _SIZES.get(named[1]) if named else None


def _usual_heads(width: int, where: str) -> int:
    heads = _HEADS.get(width)
    if heads is None:
        raise DitlabError(
            f"{where}: its number of attention heads cannot be told from the weights (width {width}); name it: "
            "ditlab convert FILE OUT --heads H"
        )
    return heads


def open_original(path: str | Path, *, ema: bool = True, heads: int | None = None) -> ImportedModel:
    """A checkpoint of the original code as a denoiser: linear schedule, 1,000 steps, learned variance (spec: DiT).

    Args:
        path: the file.
        ema: the averaged weights where the file has both.
        heads: number of attention heads where the file does not tell.

    Raises:
        DitlabError: it cannot be read safely or whole, or is of another network.
    """
    path = Path(path)
    return dit_of(path, *read_original(path, ema=ema), ema=ema, heads=heads)


def dit_of(
    path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any], *, ema: bool = True, heads: int | None = None
) -> ImportedModel:
    """The same, of what `read_original` found in the file."""
    config = infer_config(state, args, str(path), heads=heads)
    network = frozen(from_original({key: value.float() for key, value in state.items()}, config))
    # Without a learned variance the original's sampling takes beta_t.
    objective = VPObjectiveConfig(variance="learned-range" if config.learn_sigma else "fixed-large")
    digest = hash_file(path).sha256
    source: dict[str, Any] = {"format": "original DiT", "file": path.name, "sha256": digest, "ema": ema}
    if "model" in args:
        source["model"] = str(args["model"])
    if heads is None and told_heads(args, str(path)) is None:
        note = (
            f"{path.name} does not say how many attention heads it has: {config.heads} were taken, as in the paper's "
            f"DiT of width {config.width}; with another number its outputs would be wrong (ditlab convert FILE OUT "
            "--heads H)."
        )
        source["notes"] = [note]
    return ImportedModel(path.stem, objective.build().denoiser(network), DDPMConfig(), source, digest)
