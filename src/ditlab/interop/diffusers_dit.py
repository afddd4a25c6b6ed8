"""Converts the DiT of diffusers, `DiTTransformer2DModel`, into ditlab's and back.

Both compute the same up to two settings: diffusers spaces the frequencies of the time embedding differently from the
original (`time_frequencies`), and its norm before the MLP has another epsilon (`mlp_norm_eps`). In diffusers each block
has a time and label embedder; they must be equal, because ours has one for all blocks. Queries, keys and values are
three Linears there and one here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import SamplerConfig
from ditlab.errors import DitlabError
from ditlab.files import new_folder
from ditlab.interop.diffusers_models import describe, find_folder, library, load_module, load_scheduler
from ditlab.interop.imported import ImportedModel, check_portable, freeze, state_on_cpu
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.rng import torch_generator

_MODULES = {
    "embed": "pos_embed.proj",
    "final.modulation": "proj_out_1",
    "final.out": "proj_out_2",
}
_EMBEDDERS = {
    "time.hidden": "timestep_embedder.linear_1",
    "time.out": "timestep_embedder.linear_2",
    "label.table": "class_embedder.embedding_table",
}
"""In diffusers part of every block, as norm1.emb; once in ours."""
_BLOCK_MODULES = {
    "modulation": ["norm1.linear"],
    "attention.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attention.proj": ["attn1.to_out.0"],
    "mlp.hidden": ["ff.net.0.proj"],
    "mlp.out": ["ff.net.2"],
}

_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample"}


def convert_diffusers(source: str) -> tuple[ImportedModel, float]:
    """Converts a DiT of diffusers (a folder, or a hub id) into ditlab's network, on the process of its scheduler.

    Returns also the largest difference between the outputs of both networks (`largest_difference`).
    """
    folder, name = find_folder(source)
    where = f"diffusers:{name}"
    module = load_module(folder, where)
    network = freeze(from_diffusers(module, where))
    model = describe(network, module, load_scheduler(folder, where), source, name, folder)
    return model, largest_difference(network, module.eval())


def from_diffusers(module: Any, where: str) -> DiT:
    """Returns ditlab's DiT with the weights of a `DiTTransformer2DModel`.

    DitlabError for another kind of model, or what ditlab's DiT cannot express: blocks with different embedders, no
    biases in attention, another activation, norms with weights.
    """
    if type(module).__name__ != "DiTTransformer2DModel":
        raise DitlabError(
            f"{where}: expected a DiTTransformer2DModel, found a {type(module).__name__}, for which ditlab has no "
            "network; open it unconverted, as diffusers:PATH"
        )
    config = module.config
    for name, expected in (
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("norm_elementwise_affine", False),
        ("upcast_attention", False),
        ("dropout", 0.0),
    ):
        if config[name] != expected:
            raise DitlabError(f"{where}: expected {name} {expected}, found {config[name]}; ditlab's DiT has no other")
    state = module.state_dict()
    _check_embedders(state, config["num_layers"], where)
    heads, channels = config["num_attention_heads"], config["in_channels"]
    outputs = config["out_channels"] or channels
    ours = DiT(
        DiTConfig(
            image_size=(config["sample_size"], config["sample_size"]),
            channels=channels,
            patch=config["patch_size"],
            width=heads * config["attention_head_dim"],
            depth=config["num_layers"],
            heads=heads,
            num_classes=config["num_embeds_ada_norm"],
            learn_sigma=outputs == 2 * channels,
            time_frequencies="diffusers",
            mlp_norm_eps=config["norm_eps"],
        )
    )
    weights: dict[str, Tensor] = {}
    for name, keys in _names(ours).items():
        weights[name] = torch.cat([state[key] for key in keys]) if ".qkv." in name else state[keys[0]]
    ours.load_state_dict(weights)
    return ours


def to_diffusers(network: DiT) -> Any:
    """Returns a `DiTTransformer2DModel` of diffusers with the same weights and outputs.

    DitlabError for what it cannot express: other blocks, local windows, no classes, no null class, images that are not
    square, the original's time frequencies, another width of the MLP.
    """
    to, ours = "diffusers' DiT", network.config
    check_portable(ours, to)
    if ours.time_frequencies != "diffusers":
        raise DitlabError(
            f"{to} has other time frequencies (10000^(-k/127), not 10000^(-k/128)), so outputs would change; "
            "train with `network.time_frequencies` diffusers, or convert to the original format"
        )
    if not ours.null_class:
        raise DitlabError(f"{to} always has a null class, this DiT's label table has none")
    if ours.mlp_ratio != 4:
        raise DitlabError(f"{to} has MLPs of 4 times the width, this DiT of {ours.mlp_ratio:g} times")
    theirs = library().DiTTransformer2DModel(
        num_attention_heads=ours.heads,
        attention_head_dim=ours.width // ours.heads,
        in_channels=ours.channels,
        out_channels=network.outputs,
        num_layers=ours.depth,
        sample_size=ours.image_size[0],
        patch_size=ours.patch,
        num_embeds_ada_norm=ours.num_classes,
        norm_eps=ours.mlp_norm_eps,
    )
    weights: dict[str, Tensor] = {}
    names = _names(network)
    for name, value in state_on_cpu(network).items():
        parts = value.chunk(3) if ".qkv." in name else [value] * len(names[name])
        weights |= dict(zip(names[name], parts, strict=True))
    theirs.load_state_dict(weights)
    return freeze(theirs)


def write_diffusers(
    network: DiT, objective: object, out: Path, sampler: SamplerConfig | None = None, autoencoder: Any = None
) -> float:
    """Writes a DiT and its scheduler to a new folder, as transformer/ and scheduler/ of a diffusers pipeline.

    The scheduler records whether the sampler clips its estimates. With the library's `AutoencoderKL` of a network of
    latents, saved in vae/, the folder is a `DiTPipeline`. Returns `largest_difference` of both networks.
    """
    clip = autoencoder is None and bool(getattr(sampler, "clip", False))
    scheduler = scheduler_config(objective, clip=clip, pipeline=autoencoder is not None)
    theirs = to_diffusers(network)
    difference = largest_difference(network, theirs)
    with new_folder(out) as folder:
        theirs.save_pretrained(folder / "transformer")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
        if autoencoder is not None:
            autoencoder.save_pretrained(folder / "vae")
            pipeline = {
                "_class_name": "DiTPipeline",
                "_diffusers_version": library().__version__,
                "scheduler": ["diffusers", scheduler["_class_name"]],
                "transformer": ["diffusers", "DiTTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            }
            (folder / "model_index.json").write_text(json.dumps(pipeline, indent=1) + "\n")
    return difference


@torch.no_grad()
def largest_difference(ours: DiT, theirs: Any) -> float:
    """Returns the largest difference between the outputs of two networks, divided by the outputs' standard deviation.

    Measured on four random images at both ends and in the middle of the process. Rounding alone gives about 1e-5; from
    1e-3 on the conversion failed, which raises DitlabError.
    """
    generator = torch_generator(0, "conversion")
    x = torch.randn(4, *ours.in_shape, generator=generator)
    t, label = torch.tensor([0, 250, 750, 999]), torch.arange(4) % (ours.num_classes + 1)
    expected = theirs(x, t, label).sample
    difference = float((ours(x, t, label) - expected).abs().max() / expected.std().clamp(min=1e-12))
    if not difference < 1e-3:
        raise DitlabError(f"conversion: outputs differ by {difference:g} of their standard deviation; nothing was kept")
    return difference


def scheduler_config(objective: object, *, clip: bool = False, pipeline: bool = False) -> dict[str, Any]:
    """Returns the config of diffusers' `DDPMScheduler` for the process that a DiT was trained on.

    A `DiTPipeline` drops a learned variance, which that class would need: there it is a `DDIMScheduler`.
    """
    if not isinstance(objective, VPObjectiveConfig):
        raise DitlabError("diffusers' DiT knows discrete VP processes only, this DiT was trained in EDM's framework")
    if objective.rescale_time and objective.steps != 1000:
        raise DitlabError(
            f"diffusers' schedulers give the network the step t, this DiT was trained with t * 1000 / {objective.steps}"
        )
    ddim = pipeline and objective.variance == "learned-range"
    return {
        "_class_name": "DDIMScheduler" if ddim else "DDPMScheduler",
        "_diffusers_version": library().__version__,
        "num_train_timesteps": objective.steps,
        "beta_schedule": _SCHEDULES[objective.schedule],
        "beta_start": 1e-4 * 1000 / objective.steps,
        "beta_end": 0.02 * 1000 / objective.steps,
        "prediction_type": _PREDICTIONS[objective.prediction],
        **({} if ddim else {"variance_type": objective.variance.replace("-", "_")}),
        "clip_sample": clip,
    }


def _names(network: DiT) -> dict[str, list[str]]:
    """Returns our names of weights -> diffusers': one; three for q, k and v; or one for each block, of an embedder."""
    blocks = [f"transformer_blocks.{number}" for number in range(network.config.depth)]
    modules = {ours: [theirs] for ours, theirs in _MODULES.items()}
    for ours, theirs in _EMBEDDERS.items():
        modules[ours] = [f"{block}.norm1.emb.{theirs}" for block in blocks]
    for number, block in enumerate(blocks):
        modules |= {
            f"blocks.{number}.{ours}": [f"{block}.{p}" for p in parts] for ours, parts in _BLOCK_MODULES.items()
        }
    names = (name.rpartition(".") for name in network.state_dict())
    return {f"{module}.{leaf}": [f"{key}.{leaf}" for key in modules[module]] for module, _, leaf in names}


def _check_embedders(state: Mapping[str, Tensor], depth: int, where: str) -> None:
    """Raises DitlabError if the blocks have different time and label embedders."""
    for key, value in state.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(norm1\.emb\..+)", key)
        if match and not torch.equal(value, state[f"transformer_blocks.0.{match[2]}"]):
            raise DitlabError(
                f"{where}: expected one time and label embedder for all {depth} blocks, found another one in block "
                f"{int(match[1]) + 1} than in block 1; ditlab's DiT has only one, so open the model unconverted, as "
                "diffusers:PATH"
            )


__all__ = ["convert_diffusers", "from_diffusers", "to_diffusers", "write_diffusers"]
