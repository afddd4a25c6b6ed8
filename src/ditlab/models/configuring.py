"""From a preset, changes and an image set to the settings of a run, and where the run goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from ditlab.config import RunConfig, differences, fit_to_images, fit_to_latents, from_json, to_json
from ditlab.data.imageset import ImageSet
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.errors import InvalidConfig, unknown_name
from ditlab.networks.base import NetworkConfig
from ditlab.presets import preset
from ditlab.progress import SILENT, Reporter

__all__ = ["change_settings", "default_run_folder", "fit_run", "unsized", "with_variance"]

_PARTS = ("training", "network", "objective", "evaluation", "guidance", "sampler")
"""Parts of a config, in the order in which a plain name is looked for in them."""


def unsized(preset_name: str) -> RunConfig:
    """Returns a preset whose network has no image size yet.

    So settings such as the patch and the windows are checked against the image set's size, not the preset's.
    """
    recipe = preset(preset_name)
    return replace(recipe, network=replace(recipe.network, image_size=(0, 0)))


def with_variance(network: Any, objective: Any) -> Any:
    """Returns a network's config with a learned variance where the objective learns one and the network can."""
    if not network.can_learn_variance:
        return network
    learned = isinstance(objective, VPObjectiveConfig) and objective.variance == "learned-range"
    return replace(network, learn_sigma=learned)


def change_settings(config: RunConfig, settings: Mapping[str, Any], where: str) -> RunConfig:
    """Returns a config with some settings changed; `where` is for errors.

    `settings` holds new values by dotted name ("training.lr") or by plain name ("lr"), which is looked for in the
    training settings first, then in those of network, objective, evaluation, guidance and sampler; or a whole part
    ("objective", "sampler") as a config object.
    """
    whole = {name: value for name, value in settings.items() if name in _PARTS and is_dataclass(value)}
    network = with_variance(whole.get("network", config.network), whole.get("objective", config.objective))
    values = to_json(replace(config, **{**whole, "network": network}))
    known = {part: [name for name in values[part] if name != "kind"] for part in _PARTS}
    for name, value in settings.items():
        if name in whole:
            continue
        part, _, last = name.rpartition(".")
        part = part or next((part for part in _PARTS if name in known[part]), "")
        if part not in known or last not in known[part]:
            names = [n for part in _PARTS for n in (*known[part], *(f"{part}.{name}" for name in known[part]))]
            raise unknown_name(f"setting of {where}", name, names)
        values[part][last] = list(value) if isinstance(value, tuple) else value
    if network.can_learn_variance:
        values["network"]["learn_sigma"] = values["objective"].get("variance") == "learned-range"
    return from_json(RunConfig, values, where)


def fit_run(
    config: RunConfig,
    images: ImageSet,
    *,
    conditional: bool = False,
    keep_sigma_data: bool = False,
    reporter: Reporter = SILENT,
) -> RunConfig:
    """Returns the config with what follows from the image set and from the other settings.

    The network gets the images' size and channels, a learned variance where the objective learns one, and the set's
    classes where it is `conditional`; EDM's sigma_data becomes the standard deviation of latents, unless it is kept.
    """
    network: NetworkConfig = config.network
    derived: dict[str, Any] = {"image_size": images.shape[1:], "channels": images.shape[0]}
    if conditional:
        if not images.num_classes:
            raise InvalidConfig(f"`conditional`: expected an image set with classes, found none in {images.path}")
        if not network.takes_labels:
            raise InvalidConfig(f"`conditional`: a {network.kind} network takes no classes")
        derived["num_classes"] = images.num_classes
    training = config.training
    if config.data.seed and not training.seed:
        training = replace(training, seed=config.data.seed)
    fitted = fit_to_images(
        replace(config, network=replace(with_variance(network, config.objective), **derived), training=training),
        images.shape,
        images.num_classes,
    )
    if keep_sigma_data or images.latents is None:
        return fitted
    config = fit_to_latents(fitted, images.latents.record.overall_std)
    for name, (_, value) in differences(fitted, config).items():
        reporter.note(f"{name} = {value:g}, the standard deviation of these latents")
    return config


def default_run_folder(config: RunConfig, data: str) -> Path:
    """Returns the folder of a run that was given none: runs/PRESET-DATA-nN-ATTENTION-sSEED."""
    plan = config.network.attention_plan.replace(",", "-").replace("*", "x").replace("@", "-")
    source = Path(data.split(":")[-1]).name or "data"
    split = config.data
    n = ("all" if split.n is None else str(split.n)) + (f"-skip{split.skip}" if split.skip else "")
    parts = [config.preset.replace("/", "-"), source, f"n{n}", plan, f"s{split.seed}"]
    return Path("runs") / "-".join(filter(None, parts))
