"""Studies, the quickstart, and conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditlab.analyses.base import settings_of
from ditlab.api.calls import as_tuple, checked, chosen_reporter, refuse_unknown
from ditlab.errors import InvalidConfig
from ditlab.progress import Reporter

if TYPE_CHECKING:
    from ditlab.interop.formats import UNetFile
    from ditlab.models.converting import Converted
    from ditlab.studies.grid import Study
    from ditlab.studies.quickstart import QuickstartResult
    from ditlab.studies.runner import Snapshot
    from ditlab.studies.study import Images, StudyResult
    from ditlab.training.distributed import Device

__all__ = ["convert", "quickstart", "study"]


@checked
def study(
    name: str | Study,
    *,
    scale: str = "small",
    data: Images | Sequence[Images] | None = None,
    size: int | None = None,
    network: str | Sequence[str] | None = None,
    attention: str | Sequence[str] | None = None,
    n: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] | None = None,
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path = "studies",
    plan: bool = False,
    parallel: int | None = None,
    device: Device | None = None,
    command: str = "",
    show: Callable[[Snapshot], None] | None = None,
    reporter: Reporter | None = None,
) -> StudyResult:
    """Trains and measures every trial of a study that is not yet on record; the same call resumes.

    As many processes run at a time as fit. A trial that fails does not stop the others; it is in `result.failed`.

    Args:
        name: of the study, e.g. "an2024/fig6" (`ditlab.studies.study_list()`), or a study of one's own.
        scale: "smoke" (minutes), "small" (two CPU cores) or "paper" (the paper's own settings).
        data: images: sources, folders of image sets, or image sets; the scale's own if None, as for what follows.
        size: side of the images in pixels, where `data` has sources.
        network: presets.
        attention: names of the scale's attention plans, or plans.
        n: numbers of training images.
        seeds: of split and training.
        steps: training steps of each trial.
        settings: other settings of all trials by dotted name, e.g. {"training.lr": 1e-3}.
        out: the folder of trials, runs and pages; studies in one folder share their trials.
        plan: only check everything and plan; an existing plan.json stays as it is.
        parallel: processes at a time; as many as cores, free memory and GPUs allow if None.
        device: "cpu", "cuda" (all GPUs) or "cuda:N"; CUDA if there is one and None is given.
        command: how the user asked for it, for plan.json and the runs' config.json; this call if empty.
        show: called with a snapshot of all trials at each change and twice a second; None shows a bar.
        reporter: takes notes and progress.

    Returns:
        The study with `table()`, `status()`, `report()`, `failed`.

    Example:
        >>> result = ditlab.study("an2024/fig6", scale="smoke", n=(10, 50))  # doctest: +SKIP
        >>> result.report()  # doctest: +SKIP

    Raises:
        DitlabError: the study cannot be run as it is asked for; nothing was trained.
    """
    from ditlab.data import ImageSet
    from ditlab.studies.grid import Overrides
    from ditlab.studies.study import run_study

    sources = None if data is None else [data] if isinstance(data, str | Path | ImageSet) else list(data)
    images = {str(source.path): source for source in sources or () if isinstance(source, ImageSet)}
    named = None if sources is None else tuple(str(getattr(source, "path", source)) for source in sources)
    changes = {**(settings or {}), **({} if steps is None else {"training.steps": steps})}
    axes = (as_tuple(network), as_tuple(attention), as_tuple(n), as_tuple(seeds))
    chosen = {"scale": scale, "data": named, "size": size, "network": network, "attention": attention, "n": n}
    chosen |= {"seeds": seeds, "steps": steps, "settings": settings, "out": str(out)}
    words = [repr(getattr(name, "name", name)), *(f"{k}={v!r}" for k, v in chosen.items() if v is not None)]
    return run_study(
        name,
        scale,
        Overrides(named, size, *axes, changes),
        images=images,
        out=Path(out),
        plan_only=plan,
        parallel=parallel,
        device=device,
        command=command or f"ditlab.study({', '.join(words)})",
        show=show,
        reporter=chosen_reporter(reporter),
    )


@checked
def quickstart(
    out: str | Path = "quickstart",
    *,
    device: Device | None = None,
    command: str = "",
    show: Callable[[Snapshot], None] | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> QuickstartResult:
    """Trains a network with global and one with local attention on the same few images, and compares them on a page.

    Takes about ten minutes on two CPU cores. The same call resumes.

    Args:
        out: the folder of the image set, the runs and the report.
        device: "cpu", "cuda" or "cuda:N"; CUDA if there is one and None is given.
        command: how the user asked for it, for the page; this call if empty.
        show: called with a snapshot of the runs at each change and twice a second; None shows a bar.
        reporter: takes notes and progress.
        settings: n, size, preset, steps, lr, seeds, data (`ditlab.studies.quickstart_config.QuickstartConfig`).

    Raises:
        DitlabError: images or settings that cannot be used, or a training that failed.
    """
    from ditlab.studies.quickstart import run_quickstart
    from ditlab.studies.quickstart_config import QuickstartConfig

    config, unknown = settings_of(QuickstartConfig, settings)
    refuse_unknown("quickstart", unknown, QuickstartConfig)
    words = [repr(str(out)), *(f"{name}={value!r}" for name, value in settings.items())]
    call = command or f"ditlab.quickstart({', '.join(words)})"
    return run_quickstart(config, Path(out), device=device, command=call, show=show, reporter=chosen_reporter(reporter))


@checked
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Literal["ditlab", "diffusers", "original"] | None = None,
    checkpoint: int | None = None,
    raw: bool = False,
    heads: int | None = None,
    unet: UNetFile | None = None,
    codec: str | Path | None = None,
    licence: str = "",
    samples: bool = False,
    dry_run: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Converted:
    """Converts a DiT or a UNet between ditlab, diffusers and the original codes, or sends a run to the hub.

    Args:
        source: a run's folder or one of its checkpoints, a converted model's folder, an original checkpoint,
            `diffusers:PATH_OR_ID` or `hub:ID`.
        out: the file or folder to make, or `hub:ORG/NAME` to send a run there with a model card.
        to: "ditlab", "diffusers" or "original"; by the ending of `out` if None.
        checkpoint: the checkpoint of a run; the newest if None.
        raw: take the raw weights instead of the averaged ones.
        heads: attention heads of an original checkpoint, where neither its width nor its settings tell.
        unet: what else a checkpoint of improved-diffusion does not say.
        codec: to diffusers: where the autoencoder of a run on latents is now, if it was moved.
        licence: for the hub: the licence of the weights, by the hub's short name.
        samples: for the hub: show the newest samples on the card. Those of a run that memorizes are training images.
        dry_run: for the hub: write what would be sent into this new folder, and send nothing.
        reporter: takes notes.

    Raises:
        DitlabError: the source cannot be opened, the other format cannot express it, or `out` exists.
    """
    from ditlab.interop.formats import UNetFile
    from ditlab.models.converting import Conversion
    from ditlab.reporting.hub_export import send_run

    reporter, unet = chosen_reporter(reporter), unet or UNetFile()
    if str(out).startswith("hub:"):
        changes = {"to": to, "heads": heads, "unet": unet != UNetFile() or None, "raw": raw or None, "codec": codec}
        if refused := [f"`{name}`" for name, value in changes.items() if value is not None]:
            raise InvalidConfig(
                "convert: a run goes to the hub as it is; expected no `to`, `heads`, `unet`, `raw` or `codec`, "
                f"found {', '.join(refused)}"
            )
        place = None if dry_run is None else Path(dry_run)
        return send_run(
            source, str(out), checkpoint=checkpoint, licence=licence, samples=samples, dry_run=place, reporter=reporter
        )
    if licence or samples or dry_run is not None:
        raise InvalidConfig(
            "convert: `licence`, `samples` and `dry_run` are for the hub; expected `out` as hub:ORG/NAME"
        )
    return Conversion(
        str(source), str(out), to, checkpoint, raw, heads, unet, None if codec is None else str(codec)
    ).run(reporter)
