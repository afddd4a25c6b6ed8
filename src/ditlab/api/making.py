"""Making image sets, latents and runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditlab.analyses.base import settings_of
from ditlab.api.calls import checked, chosen_reporter, open_images, refuse_unknown, shown
from ditlab.errors import DitlabError, InvalidConfig
from ditlab.progress import SILENT, Reporter, StopFlag
from ditlab.threads import use_threads

if TYPE_CHECKING:
    from ditlab.config import RunConfig
    from ditlab.data.encode_config import EncodeConfig
    from ditlab.data.imageset import ImageSet
    from ditlab.models.run import Run
    from ditlab.training.distributed import Device

__all__ = ["encode", "prepare", "train", "train_config"]


@checked
def prepare(
    source: str | Path | ImageSet,
    *,
    size: int | None = None,
    out: str | Path | None = None,
    held_out: str | Path | ImageSet | None = None,
    color: Literal["rgb", "grey"] = "rgb",
    upscale: bool = False,
    near_duplicates: float | None = 0.95,
    near_limit: int = 50_000,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> ImageSet:
    """Makes an image set: images of one size in one memory-mapped file, with labels, file names and hashes.

    Args:
        source: `photos`, `digits`, a folder of pictures, `folder:PATH`, `hub:ID`, `array:PATH`, `mosaic:PATH`.
        size: height and width of the images, in pixels; 32 if None.
        out: the folder to make; `image-sets/SOURCE-SIZE` in the current folder if None.
        held_out: a second source, of the images to test on; those of `source` are then only trained on.
        color: "rgb" or "grey".
        upscale: enlarge images that are smaller than the size, instead of skipping them.
        near_duplicates: correlation above which two images count as near-duplicates; None to skip the search.
        near_limit: look for near-duplicates among at most so many images.
        overwrite: replace an image set that was made from something else or with other settings.
        reporter: takes notes and progress.
        options: of one kind of source, e.g. `stride` for photos.

    Raises:
        DitlabError: the source cannot be used, or `out` is something else; nothing is left behind.
    """
    from ditlab.data import prepare as prepare_images

    return prepare_images(
        source,
        out,
        size=size,
        color=color,
        upscale=upscale,
        held_out=held_out,
        options=options,
        near_duplicates=near_duplicates,
        near_limit=near_limit,
        overwrite=overwrite,
        reporter=chosen_reporter(reporter),
    )


@checked
def encode(
    images: ImageSet | str | Path,
    codec: str,
    *,
    out: str | Path,
    kind: Literal["auto", "kl", "tiny"] = "auto",
    config: EncodeConfig | None = None,
    overwrite: bool = False,
    device: Device | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> ImageSet | None:
    """Encodes an image set as latents of an autoencoder; the same call resumes an interrupted one.

    Args:
        images: an image set of pixels, or its folder.
        codec: the autoencoder: a hub id, a diffusers folder, or a folder with files NAME_encoder and NAME_decoder.
        out: the folder to make; it appears whole or not at all.
        kind: refuse any other kind of autoencoder than this.
        config: how it is encoded; or give its fields one by one as keywords.
        overwrite: replace a set that was made from something else or with other settings.
        device: "cpu", "cuda" or "cuda:N"; CUDA if there is one and None is given.
        threads: CPU threads; torch's own choice if None.
        reporter: takes notes and progress.
        settings: fields of `ditlab.data.encode.EncodeConfig`.

    Returns:
        The set of latents; None on ranks other than 0 under torchrun.

    Raises:
        DitlabError: the autoencoder or the images cannot be used, or `out` is something else.
    """
    from contextlib import ExitStack

    from ditlab.data import ImageSet
    from ditlab.data.autoencoder import open_autoencoder
    from ditlab.data.encode import LatentEncoder
    from ditlab.data.encode_config import EncodeConfig
    from ditlab.training.distributed import init_distributed

    use_threads(threads)
    if not codec:
        raise InvalidConfig("`codec`: expected an autoencoder's hub id or folder, found nothing")
    if config is None:
        config, settings = settings_of(EncodeConfig, settings)
    refuse_unknown("encode", settings, EncodeConfig)
    pictures = images if isinstance(images, ImageSet) else ImageSet.open(images)
    with init_distributed(device) as context, ExitStack() as held:
        encoder, finished, refusal = None, None, None
        try:
            autoencoder = open_autoencoder(codec, kind).to(context.device)
            encoder = LatentEncoder(pictures, out, autoencoder, config, overwrite=overwrite)
            finished = encoder.existing()
            if finished is None and context.is_main:
                held.enter_context(encoder.locked())
        except DitlabError as error:
            refusal = error
        if not context.raise_together(refusal) or encoder is None:
            return None
        if finished is None:
            encoder.encode(context.rank, context.world, chosen_reporter(reporter) if context.is_main else SILENT)
            context.wait()
            finished = encoder.finish() if context.is_main else None
        return finished if context.is_main else None


@checked
def train(
    preset: str,
    images: ImageSet | str | Path,
    *,
    n: int | None = None,
    test: int = 300,
    seed: int = 0,
    skip: int = 0,
    size: int | None = None,
    out: str | Path | None = None,
    conditional: bool = False,
    minutes: float | None = None,
    stop: StopFlag | None = None,
    device: Device | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Run | None:
    """Trains a denoiser on N images of a set; the same call resumes an interrupted run, and opens a finished one.

    Args:
        preset: the recipe to start from, e.g. "dit-nano/2".
        images: an image set, its folder, or a source (as for `prepare`).
        n: number of training images; all but the test images if None.
        test: number of test images held out.
        seed: of the split, of the initial weights and of training.
        skip: leave out so many training images at the head of the seeded order and take the next `n`: two runs of one
            seed, with `skip` 0 and `skip` n, have disjoint training sets.
        size: side of the images in pixels, where `images` is a source.
        out: the run's folder; `runs/PRESET-DATA-nN-ATTENTION-sSEED` if None.
        conditional: give the network the image set's class labels.
        minutes: save and stop after this time (`TrainingInterrupted`); the same call resumes.
        stop: when set, the run is saved and `TrainingInterrupted` raised.
        device: "cpu", "cuda" or "cuda:N"; CUDA if there is one and None is given.
        threads: CPU threads; torch's own choice if None.
        reporter: takes notes and progress.
        settings: changes of the preset, by plain name (`steps`, `lr`, `attention`, `width`, ...), or by dotted name as
            `**{"training.lr": 1e-3}`. A plain name is looked for in the training settings first, then in those of
            network, objective, evaluation, guidance and sampler.

    Returns:
        The trained run; None on a rank other than 0 whose rank 0 refused the input.

    Raises:
        DitlabError: settings that do not exist or do not fit, or `out` is something else.
        TrainingInterrupted: it was stopped or ran out of time.

    Example:
        >>> run = ditlab.train("dit-nano/2", "sets/photos", n=30, attention="3*4", steps=2000)  # doctest: +SKIP
    """
    from dataclasses import replace

    from ditlab.config import DataConfig
    from ditlab.models.configuring import change_settings, unsized

    data = DataConfig(n=n, test=test, seed=seed, skip=skip)
    config = change_settings(replace(unsized(preset), data=data), settings, f"preset {preset}")
    usual = {"n": n, "test": test, "seed": seed, "skip": skip, "conditional": conditional, "size": size}
    chosen = {k: v for k, v in usual.items() if v or k == "test"} | settings | ({} if out is None else {"out": out})
    dotted = {k: v for k, v in chosen.items() if "." in k}
    place = str(getattr(images, "path", images))
    words = [repr(preset), repr(place), *(f"{k}={shown(v)}" for k, v in chosen.items() if k not in dotted)]
    words += [f"**{dotted!r}"] if dotted else []
    return train_config(
        config,
        images,
        size=size,
        conditional=conditional,
        keep_sigma_data=bool({"sigma_data", "objective.sigma_data"} & settings.keys()),
        out=out,
        command=f"ditlab.train({', '.join(words)})",
        minutes=minutes,
        stop=stop,
        device=device,
        threads=threads,
        reporter=reporter,
    )


@checked
def train_config(
    config: RunConfig,
    images: ImageSet | str | Path,
    *,
    size: int | None = None,
    conditional: bool = False,
    keep_sigma_data: bool = False,
    out: str | Path | None = None,
    command: str = "",
    minutes: float | None = None,
    stop: StopFlag | None = None,
    device: Device | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Run | None:
    """Trains a run of given settings, which are fitted to the images first; otherwise as `train`.

    `keep_sigma_data`: do not set EDM's sigma_data to the standard deviation of latents; `command`: how the user asked.
    """
    from ditlab.models.configuring import default_run_folder, fit_run
    from ditlab.models.creating import create_and_train
    from ditlab.training.distributed import pick_device

    use_threads(threads)
    pick_device(device)  # a device that is not there is refused before a source is prepared
    reporter = chosen_reporter(reporter)
    opened = open_images(images, size, reporter)
    fitted = fit_run(config, opened, conditional=conditional, keep_sigma_data=keep_sigma_data, reporter=reporter)
    named = str(images) if isinstance(images, str | Path) else str(opened.path)
    return create_and_train(
        fitted,
        opened,
        Path(out) if out is not None else default_run_folder(fitted, named),
        device=device,
        command=command,
        minutes=minutes,
        stop=stop,
        reporter=reporter,
    )
