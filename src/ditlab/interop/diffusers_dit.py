"""The DiT of diffusers, `DiTTransformer2DModel`, converted into ditlab's and back.

The two compute the same, but for what a config says: diffusers spaces the frequencies of the time embedding otherwise
than the original (`time_frequencies`), and its norm before the MLP has an epsilon of its own (`mlp_norm_eps`). Its
blocks hold a time and label embedder each, which must be equal for ours to hold them once; its queries, keys and
values are three Linears, ours are one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import SamplerConfig
from ditlab.errors import DitlabError
from ditlab.files import atomic_folder
from ditlab.interop.diffusers_models import described, find_folder, library, load_module, load_scheduler, make_denoiser
from ditlab.interop.imported import ImportedModel, check_portable, frozen, state_on_cpu
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.rng import torch_generator

_NAMES = {
    "embed": "pos_embed.proj",
    "final.modulation": "proj_out_1",
    "final.out": "proj_out_2",
}
_EMBEDDERS = {
    "time.hidden": "timestep_embedder.linear_1",
    "time.out": "timestep_embedder.linear_2",
    "label.table": "class_embedder.embedding_table",
}
"""In every block of diffusers, under norm1.emb; once in ours."""
_BLOCK_NAMES = {
    "modulation": "norm1.linear",
    "attention.proj": "attn1.to_out.0",
    "mlp.hidden": "ff.net.0.proj",
    "mlp.out": "ff.net.2",
}
_QKV = tuple(f"attn1.to_{part}" for part in "qkv")

_VARIANCES = {"learned-range": "learned_range", "fixed-small": "fixed_small", "fixed-large": "fixed_large"}
_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample"}


def convert_diffusers(reference: str) -> tuple[ImportedModel, float]:
    """A DiT of diffusers as ditlab's own network, with the process of its scheduler.

    Args:
        reference: a folder, or a hub id.

    Returns:
        The model, and the largest difference of the two networks' outputs (`largest_difference`).

    Raises:
        DitlabError: it cannot be read, or has something that ditlab's DiT cannot hold.
    """
    folder, name = find_folder(reference)
    module, config, _ = load_module(folder, name)
    network = frozen(from_diffusers(module, config, f"diffusers:{name}"))
    scheduler = load_scheduler(folder, name)
    denoiser = make_denoiser(network, scheduler, config, name)
    model = described(denoiser, module, scheduler, folder, reference, name)
    return model, largest_difference(network, module.eval())


def from_diffusers(module: nn.Module, config: Mapping[str, Any], where: str) -> DiT:
    """ditlab's DiT with the weights of diffusers'.

    Args:
        module: a `DiTTransformer2DModel`.
        config: its config.
        where: named in errors.

    Raises:
        DitlabError: another kind of model, or one that ditlab's DiT cannot hold: blocks with unequal embedders, no
            biases in attention, another activation, norms with weights.
    """
    if type(module).__name__ != "DiTTransformer2DModel":
        raise DitlabError(
            f"{where}: expected a DiTTransformer2DModel, found a {type(module).__name__}, for which ditlab has no "
            "network; use it as it is, by diffusers:PATH"
        )
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
    ours.load_state_dict({name: _taken(state, name) for name in ours.state_dict()})
    return ours


def to_diffusers(network: DiT) -> Any:
    """A `DiTTransformer2DModel` of diffusers with the same weights and the same outputs.

    Raises:
        DitlabError: diffusers' DiT cannot express it: another block, local windows, no classes, no null class, no
            square image, the original's time frequencies, another width of the MLP.
    """
    to, ours = "diffusers' DiT", network.config
    check_portable(ours, to)
    if ours.time_frequencies != "diffusers":
        raise DitlabError(
            f"{to} spaces its time frequencies otherwise (10000^(-k/127), not 10000^(-k/128)) and cannot be told to do "
            "else, so this DiT's outputs would change; train with --network.time-frequencies diffusers, or convert to "
            "the original format"
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
    for name, value in state_on_cpu(network).items():
        keys = _keys(name, ours.depth)
        parts = value.chunk(3) if len(keys) == 3 and ".attention.qkv." in name else [value] * len(keys)
        weights |= dict(zip(keys, parts, strict=True))
    theirs.load_state_dict(weights)
    return frozen(theirs)


def write_diffusers(
    network: DiT, objective: object, out: Path, sampler: SamplerConfig | None = None, autoencoder: Any = None
) -> float:
    """Writes `to_diffusers` and its scheduler as the folders transformer/ and scheduler/ of a diffusers pipeline.

    Args:
        network: ours.
        objective: how it was trained.
        out: a folder that does not exist yet; it appears whole or not at all.
        sampler: how samples are drawn by default: whether its estimates are clipped goes into the scheduler.
        autoencoder: the library's own `AutoencoderKL` for a network of its latents: it goes into vae/, and all is a
            `DiTPipeline`.

    Returns:
        The largest difference of the two networks' outputs (`largest_difference`).

    Raises:
        DitlabError: diffusers cannot express the network or how it was trained, or the folder cannot be written.
    """
    clip = autoencoder is None and bool(getattr(sampler, "clip", False))
    scheduler = scheduler_config(objective, clip=clip, pipeline=autoencoder is not None)
    theirs = to_diffusers(network)
    found = largest_difference(network, theirs)
    try:
        with atomic_folder(out) as folder:
            theirs.save_pretrained(folder / "transformer")
            (folder / "scheduler").mkdir()
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
            if autoencoder is not None:
                autoencoder.save_pretrained(folder / "vae")
                (folder / "model_index.json").write_text(
                    json.dumps(_pipeline(scheduler["_class_name"]), indent=1) + "\n"
                )
    except FileExistsError:
        raise DitlabError(f"{out}: expected a new folder, found something there") from None
    except OSError as error:
        raise DitlabError(f"{out}: could not be written ({error.strerror or error}); nothing was kept") from None
    return found


@torch.no_grad()
def largest_difference(ours: DiT, theirs: Any) -> float:
    """How far the outputs of two networks that should be equal lie apart, over the standard deviation of the outputs.

    Measured on four random images of both ends and the middle of the process. Rounding alone gives about 1e-5.

    Raises:
        DitlabError: more than that, so that the conversion went wrong.
    """
    generator = torch_generator(0, "conversion")
    x = torch.randn(4, *ours.in_shape, generator=generator)
    t, label = torch.tensor([0, 250, 750, 999]), torch.arange(4) % (ours.num_classes + 1)
    expected = theirs(x, t, label).sample
    found = float((ours(x, t, label) - expected).abs().max() / expected.std().clamp(min=1e-12))
    if not found < 1e-3:
        raise DitlabError(f"conversion: outputs differ by {found:g} of their standard deviation; nothing was kept")
    return found


def scheduler_config(objective: object, *, clip: bool = False, pipeline: bool = False) -> dict[str, Any]:
    """The config of diffusers' `DDPMScheduler` for the process that a DiT was trained on.

    Args:
        objective: how it was trained.
        clip: whether samplers clip each estimate of the clean image to [-1, 1].
        pipeline: whether a `DiTPipeline` uses it. That drops a learned variance, without which a `DDPMScheduler` that
            was told of it fails, so it gets a `DDIMScheduler` then.

    Raises:
        DitlabError: a process that it cannot express.
    """
    if not isinstance(objective, VPObjectiveConfig):
        raise DitlabError("diffusers' DiT knows discrete VP processes only, this DiT was trained in EDM's framework")
    if objective.rescale_time and objective.steps != 1000:
        raise DitlabError(
            f"diffusers' schedulers tell the network the step itself, this DiT was told t * 1000 / {objective.steps}"
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
        **({} if ddim else {"variance_type": _VARIANCES[objective.variance]}),
        "clip_sample": clip,
    }


def _pipeline(scheduler: str) -> dict[str, Any]:
    """model_index.json of a pipeline of latents with a scheduler of this class."""
    return {
        "_class_name": "DiTPipeline",
        "_diffusers_version": library().__version__,
        "scheduler": ["diffusers", scheduler],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _keys(name: str, depth: int) -> list[str]:
    """diffusers' names of one of our weights: one, three of q, k and v, or one in each block."""
    stem, _, leaf = name.rpartition(".")
    if stem in _NAMES:
        return [f"{_NAMES[stem]}.{leaf}"]
    if stem in _EMBEDDERS:
        return [f"transformer_blocks.{block}.norm1.emb.{_EMBEDDERS[stem]}.{leaf}" for block in range(depth)]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    assert found is not None, name  # an adaln-zero DiT has no other parameters
    inside = _QKV if found[2] == "attention.qkv" else (_BLOCK_NAMES[found[2]],)
    return [f"transformer_blocks.{found[1]}.{part}.{leaf}" for part in inside]


def _taken(state: Mapping[str, Tensor], name: str) -> Tensor:
    """One of our weights, from diffusers' state; of equal embedders that of the first block."""
    keys = _keys(name, 1)
    return torch.cat([state[key] for key in keys])


def _check_embedders(state: Mapping[str, Tensor], depth: int, where: str) -> None:
    """Raises DitlabError where the blocks do not share one time and label embedder."""
    for key, value in state.items():
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(norm1\.emb\..+)", key)
        if found and not torch.equal(value, state[f"transformer_blocks.0.{found[2]}"]):
            raise DitlabError(
                f"{where}: expected one time and label embedder for all {depth} blocks, found another one in block "
                f"{int(found[1]) + 1} than in block 1; ditlab's DiT holds one only, so use the model as it is, by "
                "diffusers:PATH"
            )
