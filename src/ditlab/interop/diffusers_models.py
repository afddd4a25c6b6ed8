"""Opens models of the diffusers library as denoisers, unconverted: the library's module computes, in float32.

Supported are `UNet2DModel` (Ho et al. 2020's network, such as `google/ddpm-cifar10-32`) and `DiTTransformer2DModel`
(Peebles & Xie 2023), with the noise schedule of their scheduler: any scheduler of a discrete VP process. A folder is
that of a pipeline (model_index.json; unet/ or transformer/, scheduler/, vae/), or flat.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditlab.data.autoencoder import weights_hash
from ditlab.diffusion.choices import PredictionTarget, Variance
from ditlab.diffusion.denoisers import Prediction
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, SamplerConfig
from ditlab.errors import DitlabError
from ditlab.interop.hub import download
from ditlab.interop.imported import ImportedModel, freeze, match_schedule
from ditlab.nn.attention_adapters import QKBias, register_attention

_PARTS = ("transformer", "unet")
_WEIGHTS = ("*.json", "*.safetensors")
_VARIANCES: dict[str, Variance] = {
    "fixed_small": "fixed-small",
    "fixed_small_log": "fixed-small",
    "fixed_large": "fixed-large",
    "fixed_large_log": "fixed-large",
    "learned_range": "learned-range",
}


class DiffusersNetwork(nn.Module):
    """A `UNet2DModel` or `DiTTransformer2DModel` with ditlab's signature, `(x, t, label=None) -> raw output`.

    `in_shape` is (C, H, W) of its images, `num_classes` 0 without a label table, `null` whether the table has a row
    `num_classes` for "no class", and `whole_steps` whether it has a table of the steps t, and so takes no others.
    """

    def __init__(self, model: Any, where: str) -> None:
        super().__init__()
        self.model = model
        self.in_shape, self.num_classes, self.null = _shape(model.config, where)
        self.whole_steps = model.config.get("time_embedding_type") == "learned"
        _register_attention_layers(model, self.in_shape)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, *, augment: Tensor | None = None) -> Tensor:
        """Runs the model; x is `[B, C, H, W]`, t and label are `[B]`."""
        if augment is not None:
            raise DitlabError("diffusers model: augmentation labels are not supported by this network")
        if self.num_classes and label is None:
            if not self.null:
                raise DitlabError("diffusers model: it has no null class, so every image needs a label; found none")
            label = torch.full((len(x),), self.num_classes, device=x.device)
        named = {"class_labels": label} if self.num_classes else {}
        return self.model(x, t.round().long() if self.whole_steps else t, return_dict=False, **named)[0]


class VelocityDenoiser(VPDenoiser):
    """A network that predicts v = sqrt(abar_t) n - sqrt(1 - abar_t) x0 (Salimans & Ho 2022, section 4).

    With y = x0 + sigma n, abar_t = 1 / (1 + sigma^2): x0 = (y - sigma sqrt(1 + sigma^2) v) / (1 + sigma^2).
    """

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        _, velocity, learned = super().estimate(y, sigma, label)  # the raw output, read as noise
        square = 1 + sigma * sigma
        x0 = (y - sigma * square**0.5 * velocity) / square
        return Prediction(x0, (y - x0) / sigma, learned)


_PREDICTIONS: dict[str, tuple[type[VPDenoiser], PredictionTarget]] = {
    "epsilon": (VPDenoiser, "epsilon"),
    "sample": (VPDenoiser, "x0"),
    "v_prediction": (VelocityDenoiser, "epsilon"),
}
"""Scheduler's name of the prediction -> class of the denoiser and its prediction target."""


def open_diffusers(source: str) -> ImportedModel:
    """Opens a diffusers model as a denoiser: a folder, or a hub id ORGANIZATION/NAME, which is downloaded."""
    folder, name = find_folder(source)
    where = f"diffusers:{name}"
    module = load_module(folder, where)
    network = freeze(DiffusersNetwork(module, where))
    return describe(network, module, load_scheduler(folder, where), source, name, folder)


def import_diffusers(module: nn.Module, scheduler: Any, name: str = "diffusers") -> ImportedModel:
    """Returns a model of diffusers in memory, and its scheduler of a discrete VP process, as a denoiser.

    The module, a `UNet2DModel` or a `DiTTransformer2DModel`, is put in evaluation mode; results call it `name`.
    """
    library()
    where = f"diffusers:{name}"
    _check_kind(type(module).__name__, where)
    return describe(DiffusersNetwork(module, where).eval(), module, scheduler, "memory", name)


def describe(
    network: nn.Module, module: Any, scheduler: Any, source: str, name: str, folder: Path | None = None
) -> ImportedModel:
    """Returns the record of a network on the process of a scheduler of diffusers.

    The network is the library's module as a `DiffusersNetwork`, or the one that it was converted into; `source` is what
    the user named, `folder` where the files are, perhaps with a vae/; None for a model in memory.
    """
    vae = None if folder is None or not (folder / "vae").is_dir() else folder / "vae"
    denoiser = _denoiser(network, scheduler, module.config, f"diffusers:{name}")
    notes = _unsupported_clipping(scheduler, name)
    origin = {
        "format": f"diffusers {type(module).__name__}",
        "reference": source,
        "scheduler": type(scheduler).__name__,
        **({"notes": notes} if notes else {}),
    }
    sampler = _sampler(scheduler, latent=vae is not None)
    return ImportedModel(name.replace("/", "--"), denoiser, sampler, origin, _digest(module, scheduler), vae)


def _digest(module: Any, scheduler: Any) -> str:
    """Returns the SHA-256 of the weights and both configs, without entries that name paths and versions."""
    digest = hashlib.sha256(weights_hash(module.state_dict()).encode())
    for part in (module, scheduler):
        config = {key: value for key, value in part.config.items() if not key.startswith("_")}
        digest.update(json.dumps([type(part).__name__, config], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _unsupported_clipping(scheduler: Any, name: str) -> list[str]:
    """Returns a sentence for each clipping of a scheduler that no sampler of ditlab does."""
    config, notes = scheduler.config, []
    if config.get("thresholding"):
        notes.append(
            f"The scheduler of {name} clips its estimates by dynamic thresholding, which ditlab's samplers do not do, "
            "so their samples differ from diffusers' own."
        )
    if config.get("clip_sample") and config.get("clip_sample_range", 1.0) != 1.0:
        notes.append(
            f"The scheduler of {name} clips its estimates to +-{config['clip_sample_range']:g}, which ditlab's "
            "samplers do not do (theirs is +-1), so their samples differ from diffusers' own."
        )
    return notes


def library() -> Any:
    """Imports and returns the diffusers package."""
    try:
        import diffusers
    except ImportError:
        raise DitlabError('diffusers models need the package diffusers: pip install "ditlab[diffusers]"') from None
    return diffusers


def find_folder(source: str) -> tuple[Path, str]:
    """Returns the folder of a model's files, downloaded if necessary, and the model's name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        actual = "a file" if path.exists() else "nothing"
        raise DitlabError(f"diffusers:{source}: expected a model's folder or a hub id, found {actual}")
    folder = download(source, _WEIGHTS)
    if not any(_part(folder).glob("*.safetensors")):
        # Older repositories contain only pickles, which diffusers reads with weights_only.
        folder = download(source, (*_WEIGHTS, "*.bin"))
    return folder, source


def load_module(folder: Path, where: str) -> nn.Module:
    """Loads the network in a folder, with all its weights."""
    diffusers, part = library(), _part(folder)
    config = _json(part / "config.json", where, "a model's config.json")
    kind = str(config.get("_class_name"))
    if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        kind = "DiTTransformer2DModel"  # Transformer2DModel was its first name
    _check_kind(kind, where)
    with _quiet(diffusers, f"{where}: its {kind} could not be read"):
        module, report = getattr(diffusers, kind).from_pretrained(
            part, torch_dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True
        )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:  # diffusers itself would initialize missing weights randomly
        raise DitlabError(
            f"{where}: its weights and its config.json do not belong together ({len(wrong)} differ, the first "
            f"'{wrong[0]}')"
        )
    return module


def _check_kind(kind: str, where: str) -> None:
    if kind not in ("UNet2DModel", "DiTTransformer2DModel"):
        raise DitlabError(f"{where}: expected a UNet2DModel or a DiTTransformer2DModel, found {kind}")


def load_scheduler(folder: Path, where: str) -> Any:
    """Loads the scheduler of a discrete VP process with finite levels, which the network gets as steps."""
    diffusers = library()
    inside = folder / "scheduler"
    file = (inside if inside.is_dir() else folder) / "scheduler_config.json"
    config = _json(file, where, "the scheduler's config, without which its noise levels are not known")
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = inspect.signature(kind.__init__).parameters if isinstance(kind, type) else {}
    # snr_shift_scale shifts the levels that betas give.
    if "beta_schedule" not in parameters or "snr_shift_scale" in parameters:
        raise DitlabError(
            f"{where}: expected a scheduler of a discrete VP process such as DDPMScheduler, found "
            f"{config.get('_class_name')}"
        )
    if config.get("rescale_betas_zero_snr"):
        raise DitlabError(
            f"{where}: its scheduler leaves no signal at the last step (rescale_betas_zero_snr), whose noise "
            "level is infinite; such models are not supported"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise DitlabError(
            f"{where}: expected a scheduler that gives the network the step, found timestep_type "
            f"'{config['timestep_type']}', which gives it log(sigma) / 4"
        )
    if config.get("use_flow_sigmas"):
        raise DitlabError(f"{where}: expected the levels of a VP process, found use_flow_sigmas")
    with _quiet(diffusers, f"{file}: could not be used"):
        return kind.from_config(config)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def _denoiser(network: nn.Module, scheduler: Any, config: Mapping[str, Any], where: str) -> VPDenoiser:
    """Returns the denoiser of a network on the process of its scheduler; `config` is the library's module's."""
    settings = scheduler.config
    prediction_type = str(settings.get("prediction_type", "epsilon"))
    if prediction_type not in _PREDICTIONS:
        raise DitlabError(f"{where}: expected a prediction_type of {', '.join(_PREDICTIONS)}, found {prediction_type}")
    inputs, outputs = int(config["in_channels"]), int(config["out_channels"] or config["in_channels"])
    if outputs not in (inputs, 2 * inputs):
        raise DitlabError(f"{where}: expected {inputs} or {2 * inputs} output channels, found {outputs}")
    variance_type = str(settings.get("variance_type") or "fixed_small")
    variance = _VARIANCES.get(variance_type)
    if variance is None or (variance == "learned-range" and outputs == inputs):
        raise DitlabError(
            f"{where}: expected a variance_type of {', '.join(_VARIANCES)}, found {variance_type} with "
            f"{outputs} output channels for {inputs}"
        )
    if outputs == 2 * inputs:
        variance = "learned-range"  # as in all DiTs; schedulers such as DDIM's do not say
    _, schedule = match_schedule(scheduler.betas.double().numpy())
    between = "round" if getattr(network, "whole_steps", False) else "interpolate"
    kind, prediction = _PREDICTIONS[prediction_type]
    denoiser = kind(network, schedule, prediction, variance, between=between)
    denoiser.null_class = bool(getattr(network, "null", denoiser.null_class))
    return denoiser


def _part(folder: Path) -> Path:
    """Returns the subfolder of the network."""
    return next((folder / name for name in _PARTS if (folder / name / "config.json").is_file()), folder)


def _json(file: Path, where: str, what: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise DitlabError(f"{where}: expected {what}, found no {file}") from None
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise DitlabError(f"{where}: expected {what} as JSON in {file}, found something else")
    return values


def _shape(config: Mapping[str, Any], where: str) -> tuple[tuple[int, int, int], int, bool]:
    """Returns (C, H, W) of the images, the number of classes, and whether there is a null class."""
    size = config["sample_size"]
    if size is None:
        raise DitlabError(f"{where}: expected a sample_size in its config.json, found none")
    height, width = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    shape = (int(config["in_channels"]), height, width)
    dit = "patch_size" in config
    step = int(config["patch_size"]) if dit else 2 ** (len(config["block_out_channels"]) - 1)
    if height % step or width % step:
        raise DitlabError(
            f"{where}: expected images whose sides are multiples of {step} (its "
            f"{'patch' if dit else 'halvings'}), found {height}x{width} in its config.json"
        )
    if dit:
        return shape, int(config["num_embeds_ada_norm"]), True
    if config.get("time_embedding_type") not in ("positional", "learned"):
        raise DitlabError(
            f"{where}: expected a network that gets the step (time_embedding_type positional or learned), "
            f"found '{config.get('time_embedding_type')}'"
        )
    if config.get("class_embed_type") is not None:
        raise DitlabError(
            f"{where}: expected classes by a table or none, found class_embed_type '{config['class_embed_type']}'"
        )
    return shape, int(config.get("num_class_embeds") or 0), False


def _sampler(scheduler: Any, *, latent: bool) -> SamplerConfig:
    """Returns ancestral sampling for DDPM's scheduler, else DDIM; clips estimates if the scheduler does."""
    config = scheduler.config
    clip = bool(config.get("clip_sample")) and config.get("clip_sample_range", 1.0) == 1.0 and not latent
    steps = len(scheduler.betas)
    if type(scheduler).__name__.startswith("DDPM"):
        return DDPMConfig(steps=str(min(250, steps)), clip=clip)
    return DDIMConfig(steps=str(min(50, steps)), clip=clip)


def _register_attention_layers(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Registers the self-attention layers of a model for analyses; their places in it determine their grids."""
    config: Any = module.config
    for name, layer in module.named_modules():
        if type(layer).__name__ != "Attention" or not _plain(layer):
            continue
        dit = "patch_size" in config
        step = int(config["patch_size"]) if dit else 2 ** _depth(name, len(config["block_out_channels"]))
        register_attention(
            layer,
            (shape[1] // step, shape[2] // step),
            heads=layer.heads,  # pyright: ignore[reportArgumentType]
            read=partial(_queries_and_keys, layer),
        )


def _depth(name: str, levels: int) -> int:
    """Returns how often the image is halved at this layer of a UNet."""
    part, number, *_ = [*name.split("."), "0"]
    if part == "down_blocks":
        return int(number)
    return levels - 1 - int(number) if part == "up_blocks" else levels - 1


def _plain(layer: Any) -> bool:
    """Whether a layer of diffusers computes softmax(q k^T / sqrt(head_dim)) over its input."""
    return (
        not layer.is_cross_attention
        and layer.spatial_norm is None
        and layer.scale_qk
        and not layer.is_causal
        and layer.inner_kv_dim == layer.inner_dim
        and type(layer.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
    )


def _queries_and_keys(layer: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> QKBias:
    """Returns queries and keys of a layer of diffusers, computed by its norm and projections."""
    x = args[0] if args else named["hidden_states"]
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if layer.group_norm is not None:
        x = layer.group_norm(x.transpose(1, 2)).transpose(1, 2)
    q, k = (project(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for project in (layer.to_q, layer.to_k))
    if layer.norm_q is not None:
        q = layer.norm_q(q)
    if layer.norm_k is not None:
        k = layer.norm_k(k)
    return QKBias(q, k)


@contextmanager
def _quiet(diffusers: Any, failure: str) -> Iterator[None]:
    """Silences warnings of diffusers (what matters of them is checked here), and begins its errors with `failure`."""
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # Readers of weights and of configs raise types that share no base class.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DitlabError(f"{failure}: {reason:.200}") from None
    finally:
        logging.set_verbosity(before)


__all__ = ["DiffusersNetwork", "VelocityDenoiser", "import_diffusers", "open_diffusers"]
