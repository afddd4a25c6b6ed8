"""Models of the diffusers library as denoisers, just as they are: its own module computes, in float32.

Read are `UNet2DModel` (Ho et al. 2020's network; `google/ddpm-cifar10-32` and its like) and `DiTTransformer2DModel`
(Peebles & Xie 2023), with the noise schedule of the scheduler that lies beside them: any scheduler of a discrete VP
process. A folder may be a pipeline's (model_index.json; unet/ or transformer/, scheduler/, vae/), or flat.
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
from ditlab.diffusion.denoisers import Prediction, PredictionTarget, Variance
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, SamplerConfig
from ditlab.errors import DitlabError
from ditlab.interop.hub import download
from ditlab.interop.imported import ImportedModel, frozen, known_schedule
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
    """A model of diffusers behind ditlab's signature, `(x, t, label=None) -> raw output`.

    Args:
        model: a `UNet2DModel` or `DiTTransformer2DModel`.
        shape: (C, H, W) of the images.
        num_classes: classes of its label table; 0 without one.
        null: whether the label `num_classes` is there too and means "no class".
        whole_steps: whether it takes only whole steps t, for which it has a table.
    """

    def __init__(
        self, model: Any, shape: tuple[int, int, int], num_classes: int = 0, *, null: bool, whole_steps: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.in_shape, self.num_classes, self.null, self.whole_steps = shape, num_classes, null, whole_steps

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, *, augment: Tensor | None = None) -> Tensor:
        """See the class; x `[B, C, H, W]`, t and label `[B]`.

        Raises:
            DitlabError: augmentation labels, or no label where there is no null class.
        """
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
        _, velocity, learned = super().estimate(y, sigma, label)  # as if it were the noise
        square = 1 + sigma * sigma
        x0 = (y - sigma * square**0.5 * velocity) / square
        return Prediction(x0, (y - x0) / sigma, learned)


_PREDICTIONS: dict[str, tuple[type[VPDenoiser], PredictionTarget]] = {
    "epsilon": (VPDenoiser, "epsilon"),
    "sample": (VPDenoiser, "x0"),
    "v_prediction": (VelocityDenoiser, "epsilon"),
}
"""What a scheduler calls the prediction -> the denoiser that is made of it."""


def open_diffusers(reference: str) -> ImportedModel:
    """A diffusers model as a denoiser.

    Args:
        reference: a folder, or a hub id ORGANIZATION/NAME, whose files are fetched into the hub's cache.

    Raises:
        DitlabError: diffusers is missing, there is no such model, it is of another kind or process, or damaged.
    """
    folder, name = find_folder(reference)
    module, config, _ = load_module(folder, name)
    shape, classes, null = _shape(config, name)
    network = frozen(DiffusersNetwork(module, shape, classes, null=null, whole_steps=_whole_steps(config)))
    scheduler = load_scheduler(folder, name)
    denoiser = make_denoiser(network, scheduler, config, name)
    _register_attention_layers(module, config)
    return described(denoiser, module, scheduler, folder, reference, name)


def described(
    denoiser: VPDenoiser, module: nn.Module, scheduler: Any, folder: Path, reference: str, name: str
) -> ImportedModel:
    """A denoiser with all else that a folder of diffusers says.

    Args:
        denoiser: made of the module, or of what it was converted into.
        module: the library's.
        scheduler: the library's.
        folder: where both lie, and a vae/ where there is one.
        reference: as the user gave it.
        name: what the model is called.
    """
    vae = folder / "vae"
    notes = _unheeded(scheduler, name)
    source = {
        "format": f"diffusers {type(module).__name__}",
        "reference": reference,
        "scheduler": type(scheduler).__name__,
        **({"notes": notes} if notes else {}),
    }
    return ImportedModel(
        name=name.replace("/", "--"),
        denoiser=denoiser,
        sampler=_sampler(scheduler, latent=vae.is_dir()),
        source=source,
        digest=_digest(module, scheduler),
        decoder=vae if vae.is_dir() else None,
    )


def _digest(module: Any, scheduler: Any) -> str:
    """SHA-256 of weights and of both configs but for what names places and versions."""
    digest = hashlib.sha256(weights_hash(module.state_dict()).encode())
    for part in (module, scheduler):
        config = {key: value for key, value in part.config.items() if not key.startswith("_")}
        digest.update(json.dumps([type(part).__name__, config], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _unheeded(scheduler: Any, name: str) -> list[str]:
    """What a scheduler does to its estimates that no sampler of ditlab does, one sentence each."""
    said, found = scheduler.config, []
    if said.get("thresholding"):
        found.append(
            f"The scheduler of {name} clips its estimates by dynamic thresholding, which ditlab's samplers do not do, "
            "so their samples differ from diffusers' own."
        )
    if said.get("clip_sample") and said.get("clip_sample_range", 1.0) != 1.0:
        found.append(
            f"The scheduler of {name} clips its estimates to +-{said['clip_sample_range']:g}, which ditlab's samplers "
            "do not do (theirs is +-1), so their samples differ from diffusers' own."
        )
    return found


def library() -> Any:
    """The diffusers package.

    Raises:
        DitlabError: it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise DitlabError('diffusers models need the package diffusers: pip install "ditlab[diffusers]"') from None
    return diffusers


def find_folder(reference: str) -> tuple[Path, str]:
    """Where a model's files lie, fetched if need be, and what it is called.

    Raises:
        DitlabError: there is no such folder or repository.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.exists() or reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        found = "a file" if path.exists() else "nothing"
        raise DitlabError(f"diffusers:{reference}: expected a model's folder or a hub id, found {found}")
    folder = download(reference, _WEIGHTS)
    part = _part(folder)
    if not any(part.glob("*.safetensors")):
        # Older repositories hold pickles only; diffusers reads them with weights_only.
        folder = download(reference, (*_WEIGHTS, "*.bin"))
    return folder, reference


def load_module(folder: Path, name: str) -> tuple[nn.Module, Mapping[str, Any], Path]:
    """The network in a folder, its config, and the folder of its own.

    Raises:
        DitlabError: there is none, of another kind than the two known ones, or damaged.
    """
    diffusers = library()
    part = _part(folder)
    kind = _class_of(part, name)
    with _quiet(diffusers):
        try:
            module, told = getattr(diffusers, kind).from_pretrained(
                part,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # Readers of weights and of configs raise types that share no base class.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DitlabError(f"diffusers:{name}: its {kind} could not be read: {reason:.200}") from None
    wrong = [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
    if wrong:  # diffusers itself would go on, with random values for what is missing
        raise DitlabError(
            f"diffusers:{name}: its weights and its config.json do not belong together ({len(wrong)} differ, the first "
            f"'{wrong[0]}')"
        )
    return module, dict(module.config), part


def load_scheduler(folder: Path, name: str) -> Any:
    """The scheduler that lies beside a model.

    Raises:
        DitlabError: there is none, or not of a discrete VP process with finite levels, told to the network as steps.
    """
    diffusers = library()
    inside = folder / "scheduler"
    file = (inside if inside.is_dir() else folder) / "scheduler_config.json"
    config = _json(file, name, "the scheduler's config, without which its noise levels are not known")
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    known = inspect.signature(kind.__init__).parameters if isinstance(kind, type) else {}
    if "beta_schedule" not in known or "snr_shift_scale" in known:  # the latter shifts the levels that betas give
        raise DitlabError(
            f"diffusers:{name}: expected a scheduler of a discrete VP process such as DDPMScheduler, found "
            f"{config.get('_class_name')}"
        )
    if config.get("rescale_betas_zero_snr"):
        raise DitlabError(
            f"diffusers:{name}: its scheduler leaves no signal at the last step (rescale_betas_zero_snr), whose noise "
            "level is infinite; such models are not supported"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise DitlabError(
            f"diffusers:{name}: expected a scheduler that tells the network the step, found timestep_type "
            f"'{config['timestep_type']}', where it tells it log(sigma) / 4"
        )
    if config.get("use_flow_sigmas"):
        raise DitlabError(f"diffusers:{name}: expected the levels of a VP process, found use_flow_sigmas")
    with _quiet(diffusers):
        try:
            return kind.from_config(config)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        except Exception as error:  # as above
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DitlabError(f"{file}: could not be used: {reason:.200}") from None


def make_denoiser(network: nn.Module, scheduler: Any, config: Mapping[str, Any], name: str) -> VPDenoiser:
    """The denoiser of a network and the process in its scheduler's config.

    Args:
        network: with `in_shape`.
        scheduler: of diffusers.
        config: the model's own config, which says how many channels it puts out.
        name: named in errors.

    Raises:
        DitlabError: a prediction, variance or number of channels that is not known.
    """
    said = scheduler.config
    found = _PREDICTIONS.get(str(said.get("prediction_type", "epsilon")))
    if found is None:
        raise DitlabError(
            f"diffusers:{name}: expected a prediction_type of {', '.join(_PREDICTIONS)}, found "
            f"{said['prediction_type']}"
        )
    given, put = int(config["in_channels"]), int(config["out_channels"] or config["in_channels"])
    if put not in (given, 2 * given):
        raise DitlabError(f"diffusers:{name}: expected {given} or {2 * given} output channels, found {put}")
    word = str(said.get("variance_type") or "fixed_small")
    variance = _VARIANCES.get(word)
    if variance is None or (variance == "learned-range" and put == given):
        raise DitlabError(
            f"diffusers:{name}: expected a variance_type of {', '.join(_VARIANCES)}, found {word} with {put} output "
            f"channels for {given}"
        )
    if put == 2 * given:
        variance = "learned-range"  # as all DiTs have it; schedulers such as DDIM's do not say
    _, schedule = known_schedule(scheduler.betas.double().numpy())
    whole = bool(getattr(network, "whole_steps", False))
    kind, prediction = found
    denoiser = kind(network, schedule, prediction, variance, between="round" if whole else "interpolate")
    denoiser.null_class = bool(getattr(network, "null", denoiser.null_class))
    return denoiser


def _part(folder: Path) -> Path:
    """The folder of the network itself."""
    return next((folder / name for name in _PARTS if (folder / name / "config.json").is_file()), folder)


def _class_of(part: Path, name: str) -> str:
    config = _json(part / "config.json", name, "a model's config.json")
    kind = str(config.get("_class_name"))
    if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"  # what diffusers called it at first
    if kind not in ("UNet2DModel", "DiTTransformer2DModel"):
        raise DitlabError(f"diffusers:{name}: expected a UNet2DModel or a DiTTransformer2DModel, found {kind}")
    return kind


def _json(file: Path, name: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise DitlabError(f"diffusers:{name}: expected {what}, found no {file}") from None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DitlabError(f"diffusers:{name}: expected {what} as JSON in {file}, found something else")
    return found


def _shape(config: Mapping[str, Any], name: str) -> tuple[tuple[int, int, int], int, bool]:
    """(C, H, W) of the images, number of classes, whether there is a null class."""
    size = config["sample_size"]
    if size is None:
        raise DitlabError(f"diffusers:{name}: expected a sample_size in its config.json, found none")
    height, width = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    shape = (int(config["in_channels"]), height, width)
    dit = "patch_size" in config
    step = int(config["patch_size"]) if dit else 2 ** (len(config["block_out_channels"]) - 1)
    if height % step or width % step:
        raise DitlabError(
            f"diffusers:{name}: expected images whose sides are multiples of {step} (its "
            f"{'patch' if dit else 'halvings'}), found {height}x{width} in its config.json"
        )
    if dit:
        return shape, int(config["num_embeds_ada_norm"]), True
    if config.get("time_embedding_type") not in ("positional", "learned"):
        raise DitlabError(
            f"diffusers:{name}: expected a network that is told the step (time_embedding_type positional or learned), "
            f"found '{config.get('time_embedding_type')}'"
        )
    if config.get("class_embed_type") is not None:
        raise DitlabError(
            f"diffusers:{name}: expected classes by a table or none, found class_embed_type "
            f"'{config['class_embed_type']}'"
        )
    return shape, int(config.get("num_class_embeds") or 0), False


def _whole_steps(config: Mapping[str, Any]) -> bool:
    return config.get("time_embedding_type") == "learned"


def _sampler(scheduler: Any, *, latent: bool) -> SamplerConfig:
    """Ancestral sampling where the scheduler is DDPM's, else DDIM; estimates are clipped where it does so."""
    said = scheduler.config
    clip = bool(said.get("clip_sample")) and said.get("clip_sample_range", 1.0) == 1.0 and not latent
    steps = len(scheduler.betas)
    if type(scheduler).__name__.startswith("DDPM"):
        return DDPMConfig(steps=str(min(250, steps)), clip=clip)
    return DDIMConfig(steps=str(min(50, steps)), clip=clip)


def _register_attention_layers(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Lets analyses look into the self-attention layers of a model, whose grids follow from where they stand."""
    _, height, width = _shape(config, "")[0]
    for name, layer in module.named_modules():
        if type(layer).__name__ != "Attention" or not _plain(layer):
            continue
        if "patch_size" in config:
            step = int(config["patch_size"])
        else:
            step = 2 ** _depth(name, len(config["block_out_channels"]))
        register_attention(
            layer,
            (height // step, width // step),
            heads=layer.heads,  # pyright: ignore[reportArgumentType]
            read=partial(_scores, layer),
        )


def _depth(name: str, levels: int) -> int:
    """How often the image was halved where this layer of a UNet stands."""
    part, number, *_ = [*name.split("."), "0"]
    if part == "down_blocks":
        return int(number)
    return levels - 1 - int(number) if part == "up_blocks" else levels - 1


def _plain(layer: Any) -> bool:
    """Whether a layer of diffusers is softmax(q k^T / sqrt(head_dim)) over its own input."""
    return (
        not layer.is_cross_attention
        and layer.spatial_norm is None
        and layer.scale_qk
        and not layer.is_causal
        and layer.inner_kv_dim == layer.inner_dim
        and type(layer.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
    )


def _scores(layer: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> QKBias:
    """Queries and keys of a layer of diffusers, from its own norm and projections."""
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
def _quiet(diffusers: Any) -> Iterator[None]:
    """Within it diffusers logs errors only: what it warns of is either checked here or no concern of a reader."""
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
