"""What `import ditlab` offers: one function for each verb of the command line, with the same settings.

Functions take models or the strings that name them, return objects that show themselves in a notebook, print nothing,
and raise `DitlabError` for input that cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditlab.analyses import analysis as find_analysis
from ditlab.analyses.base import Comparison, settings_of
from ditlab.errors import DitlabError, InvalidConfig, unknown_name
from ditlab.models.split_config import SplitConfig
from ditlab.progress import SILENT, Reporter, StopFlag, default_reporter
from ditlab.threads import use_threads

if TYPE_CHECKING:
    from ditlab.analyses.complexity.config import ComplexityConfig
    from ditlab.analyses.complexity.measure import Costs
    from ditlab.config import RunConfig
    from ditlab.data.encode import EncodeConfig
    from ditlab.data.imageset import ImageSet
    from ditlab.interop.improved_diffusion import UNetFile
    from ditlab.models.comparing import ModelSet, Source
    from ditlab.models.converting import Converted
    from ditlab.models.model import Model
    from ditlab.models.run import Run
    from ditlab.reporting.report import ReportResult
    from ditlab.sampling.samples import Samples
    from ditlab.studies.grid import Study
    from ditlab.studies.quickstart import QuickstartResult
    from ditlab.studies.runner import Snapshot
    from ditlab.studies.study import Images, StudyResult

__all__ = [
    "agreement",
    "analyze",
    "attention",
    "complexity",
    "convert",
    "encode",
    "jacobian",
    "open",
    "prepare",
    "psnr_gap",
    "quickstart",
    "report",
    "sample",
    "study",
    "train",
    "two_subsets",
]


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
        reporter=_reporter(reporter),
    )


def encode(
    images: ImageSet | str | Path,
    codec: str,
    *,
    out: str | Path,
    kind: Literal["auto", "kl", "tiny"] = "auto",
    config: EncodeConfig | None = None,
    overwrite: bool = False,
    device: str | None = None,
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
    from ditlab.data.encode import EncodeConfig, LatentEncoder
    from ditlab.training.distributed import init_distributed

    use_threads(threads)
    if not codec:
        raise InvalidConfig("`codec`: expected an autoencoder's hub id or folder, found nothing")
    if config is None:
        config, settings = settings_of(EncodeConfig, settings, "encode")
    _refuse_unknown("encode", settings, EncodeConfig)
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
            encoder.encode(context.rank, context.world, _reporter(reporter) if context.is_main else SILENT)
            context.wait()
            finished = encoder.finish() if context.is_main else None
        return finished if context.is_main else None


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
    device: str | None = None,
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
    chosen = {"n": n, "test": test, "seed": seed, "skip": skip, "conditional": conditional, **settings, "out": out}
    place = str(getattr(images, "path", images))
    words = [repr(preset), repr(place), *(f"{k}={_repr(v)}" for k, v in chosen.items() if v)]
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
    device: str | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Run | None:
    """Trains a run of given settings, which are fitted to the images first; otherwise as `train`.

    Args:
        config: all settings.
        images: an image set, its folder, or a source.
        size: side of the images in pixels, where `images` is a source.
        conditional: give the network the image set's class labels.
        keep_sigma_data: do not set EDM's sigma_data to the standard deviation of latents.
        out: the run's folder; `runs/PRESET-DATA-nN-ATTENTION-sSEED` if None.
        command: how the user asked for it, for config.json.
        minutes: save and stop after this time.
        stop: when set, the run is saved and `TrainingInterrupted` raised.
        device: where it computes.
        threads: CPU threads.
        reporter: takes notes and progress.
    """
    from ditlab.models.configuring import default_run_folder, fit_run
    from ditlab.models.creating import create_and_train
    from ditlab.training.distributed import pick_device

    use_threads(threads)
    pick_device(device)  # a device that is not there is refused before a source is prepared
    reporter = _reporter(reporter)
    opened = _image_set(images, size, reporter)
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


def open(  # the name that the command line and the docs use: `ditlab.open(...)`
    source: Source,
    data: ImageSet | str | Path | None = None,
    *,
    held_out: ImageSet | str | Path | None = None,
    split: SplitConfig | None = None,
    codec: str | None = None,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Model:
    """Opens a model.

    Args:
        source: a run's folder or one of its checkpoints, a converted model's folder, a published checkpoint,
            `diffusers:PATH_OR_ID`, `hub:ID`, or `package.module:NAME`.
        data: where a run's image set is now, if it was moved; the image set, or a source of one, to measure any other
            model on.
        held_out: an image set or a source whose images take the place of the test images.
        split: which images stand for the training images of a model that is not a run.
        codec: where the autoencoder of a model of latents is now, if it was moved.
        out: the folder for results of a model that has no folder of its own.
        reporter: takes notes and progress.

    Raises:
        DitlabError: there is nothing of that name, or it cannot be used.
    """
    from ditlab.models.comparing import open_models

    place = None if out is None else Path(out)
    return open_models(
        [source], data, held_out=held_out, split=split, codec=codec, out=place, reporter=_reporter(reporter)
    )[0]


def sample(
    model: Source, *, codec: str | Path | None = None, reporter: Reporter | None = None, **settings: Any
) -> Samples:
    """Draws images from a model, in memory or into a folder (`out`), where the same call resumes after a kill.

    Args:
        model: a model, or a string that names one.
        codec: where the autoencoder of a model of latents is now, if it was moved.
        reporter: takes notes and progress; bars in a notebook and nothing elsewhere if None.
        settings: those of `ditlab.sampling.samples.sample_model`: seeds, sampler, steps, classes, guidance, out, ...

    Example:
        >>> samples = ditlab.sample("runs/global", seeds="0-63", out="samples")  # doctest: +SKIP
        >>> samples.images.shape  # doctest: +SKIP
        (64, 32, 32, 3)

    Raises:
        DitlabError: anything that cannot be drawn or written.
    """
    from ditlab.models.opening import open_model

    return open_model(model, codec=codec).sample(reporter=reporter, **settings)


def analyze(
    name: str,
    models: Source | Sequence[Source],
    *,
    config: Any = None,
    options: Any = None,
    data: ImageSet | str | Path | None = None,
    held_out: ImageSet | str | Path | None = None,
    split: SplitConfig | None = None,
    names: Sequence[str] = (),
    checkpoint: int | None = None,
    raw: bool = False,
    codec: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Comparison:
    """Runs an analysis on models, writes the results into their folders, and returns the comparison.

    Results of the same weights, images and settings that are already in a model's folder are used again.

    Args:
        name: of the analysis, e.g. "psnr-gap"; `ditlab.analyses.analysis_names()` lists them.
        models: models, or strings that name them; one or several.
        config: the settings; or give them one by one as keywords.
        options: what else the analysis takes; or give it one by one as keywords.
        data: where the runs' image set is now, if it was moved; the image set, or a source of one, to measure other
            models on.
        held_out: an image set or a source whose images take the place of the test images.
        split: which images stand for the training images of models that are not runs.
        names: the kind of each model; found from the settings that differ if empty.
        checkpoint: the step of the checkpoint of runs; the newest of each if None.
        raw: use the raw weights instead of the averaged ones.
        codec: where the autoencoder of models of latents is now, if it was moved.
        device: "cpu", "cuda" or "cuda:N"; CUDA if there is one and None is given.
        threads: CPU threads; torch's own choice if None.
        out: the folder for figures and the comparison; the first model's analysis folder if None.
        reporter: takes notes and progress; bars in a notebook and nothing elsewhere if None.
        settings: fields of the analysis's `Config` and `Options`, by name.

    Example:
        >>> gap = ditlab.analyze("psnr-gap", ["runs/global", "runs/local"], images=300)  # doctest: +SKIP
        >>> print(gap.table())  # doctest: +SKIP

    Raises:
        DitlabError: models that cannot be opened or compared, settings that do not exist or do not fit.
    """
    room = find_analysis(name)
    if config is None:
        config, settings = settings_of(room.Config, settings, name)
    if options is None:
        options, settings = settings_of(room.Options, settings, name)
    if split is None:
        split, settings = settings_of(SplitConfig, settings, name)
    _refuse_unknown(name, settings, room.Config, room.Options)
    chosen = _several(models)
    room.check_count(len(chosen))
    place, reporter = None if out is None else Path(out), _reporter(reporter)
    opened = _open_set(
        chosen,
        data,
        held_out=held_out,
        split=split,
        names=names,
        step=checkpoint,
        ema=not raw,
        codec=codec,
        device=device,
        threads=threads,
        out=place,
        reporter=reporter,
    )
    return room.run(opened, config, options, out=place, reporter=reporter)


def psnr_gap(models: Source | Sequence[Source], **settings: Any) -> Comparison:
    """Measures train and test PSNR by noise level, and the gap between them (An et al. 2410.21273, Eqs. 2-4).

    Args:
        models: one or several; runs that differ only in seed are averaged.
        settings: those of `ditlab.analyses.psnr_gap.PSNRConfig` (images, points, sigmas, reduction, draws, ...), of
            `PSNROptions` (baselines), and the keywords of `analyze`.

    Example:
        >>> gap = ditlab.psnr_gap(["runs/global", "runs/local"], images=300)  # doctest: +SKIP
        >>> gap.average_gap  # doctest: +SKIP
    """
    return analyze("psnr-gap", models, **settings)


def attention(models: Source | Sequence[Source], **settings: Any) -> Comparison:
    """Measures how local attention is, and draws attention maps (An et al., Figs. 4 and 5).

    Args:
        models: one or several, with attention.
        settings: those of `ditlab.analyses.attention.AttentionConfig` and `AttentionOptions`, and the keywords of
            `analyze`.
    """
    return analyze("attention", models, **settings)


def jacobian(models: Source | Sequence[Source], **settings: Any) -> Comparison:
    """Takes the Jacobian of denoisers at noisy images: its spectrum and vectors (An et al., Figs. 1-3).

    Args:
        models: one or several, of images of one size.
        settings: those of `ditlab.analyses.jacobian.JacobianConfig` (sigmas, images, top, decomposition, ...) and
            `JacobianOptions`, and the keywords of `analyze`.
    """
    return analyze("jacobian", models, **settings)


def agreement(model: Source, **settings: Any) -> Comparison:
    """Compares a model's samples with those of closed-form denoisers of its training images, from the same noise.

    Args:
        model: one.
        settings: those of `ditlab.analyses.agreement.AgreementConfig`, and the keywords of `analyze`.
    """
    return analyze("agreement", model, **settings)


def two_subsets(first: Source, second: Source, **settings: Any) -> Comparison:
    """Compares the samples of two runs that were trained on disjoint images, from the same noise (Kadkhodaie et al.).

    Args:
        first: a run.
        second: the other one, trained with the same settings and `skip` = N.
        settings: those of `ditlab.analyses.two_subsets.TwoSubsetsConfig` (`seeds` may also be a sequence), and the
            keywords of `analyze`.
    """
    from ditlab.sampling.seeds import seed_list, seeds_text

    if "seeds" in settings:
        settings["seeds"] = seeds_text(seed_list(settings["seeds"]))
    return analyze("two-subsets", [first, second], **settings)


def report(
    models: Source | Sequence[Source],
    *,
    out: str | Path | None = None,
    title: str | None = None,
    samples: int = 16,
    hide_training_images: bool = False,
    jacobian: bool = False,
    configs: Mapping[str, Any] | None = None,
    commands: Sequence[tuple[str, str]] = (),
    foreword: Sequence[str] = (),
    data: ImageSet | str | Path | None = None,
    held_out: ImageSet | str | Path | None = None,
    split: SplitConfig | None = None,
    names: Sequence[str] = (),
    checkpoint: int | None = None,
    raw: bool = False,
    codec: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> ReportResult:
    """Writes one HTML page about models: a verdict, a table and a figure, then a section for each analysis.

    What was measured before is used; the PSNR gap and attention are measured where they are missing.

    Args:
        models: models, or strings that name them; one or several.
        out: the page; report.html in the first model's folder if None. Its figures go into figures/ beside it.
        title: the model's name, or the names of the kinds, if None.
        samples: images to draw of each kind of model at each N, at most 64.
        hide_training_images: show no picture of a real image, nor a sample that is nearly one.
        jacobian: also measure Jacobians of models that have none, which takes minutes.
        configs: analysis -> the settings to measure it with, instead of its defaults.
        commands: (what it does, the exact command line), shown before the commands that trained the models.
        foreword: sentences under the verdict.
        data: as for `analyze`, like all that follow.

    Example:
        >>> ditlab.report(["runs/global", "runs/local"], out="report.html")  # doctest: +SKIP

    Raises:
        DitlabError: models that cannot be opened or compared, or a page that cannot be written.
    """
    from ditlab.reporting.report import write_report

    place, reporter = None if out is None else Path(out), _reporter(reporter)
    opened = _open_set(
        _several(models),
        data,
        held_out=held_out,
        split=split,
        names=names,
        step=checkpoint,
        ema=not raw,
        codec=codec,
        device=device,
        threads=threads,
        out=None if place is None else place.parent,
        reporter=reporter,
    )
    return write_report(
        opened,
        opened[0].path / "report.html" if place is None else place,
        title=title,
        samples=samples,
        hide_training_images=hide_training_images,
        jacobian=jacobian,
        configs=configs,
        commands=commands,
        foreword=foreword,
        reporter=reporter,
    )


def complexity(
    presets: str | Sequence[str],
    *,
    config: ComplexityConfig | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> Costs:
    """Counts what networks cost: parameters, operations, memory, training compute.

    Args:
        presets: one or several, e.g. "dit-s/2".
        config: the images, and changes of the networks; or give them one by one as keywords.
        out: a folder for complexity.json and complexity.png; nothing is written if None.
        settings: fields of `ditlab.analyses.complexity.config.ComplexityConfig`.

    Raises:
        DitlabError: an unknown preset, or settings that a network does not have.
    """
    from ditlab.analyses.complexity.config import ComplexityConfig
    from ditlab.analyses.complexity.measure import measure_costs
    from ditlab.studies.published import published_fid

    if config is None:
        config, settings = settings_of(ComplexityConfig, settings, "complexity")
    _refuse_unknown("complexity", settings, ComplexityConfig)
    costs = measure_costs([presets] if isinstance(presets, str) else presets, config, published_fid)
    if out is not None:
        costs.files.extend(costs.save(Path(out)))
    return costs


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
    device: str | None = None,
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
    axes = (_tuple(network), _tuple(attention), _tuple(n), _tuple(seeds))
    chosen = {
        "scale": scale,
        "data": named,
        "size": size,
        "network": network,
        "attention": attention,
        "n": n,
        "seeds": seeds,
        "steps": steps,
        "settings": settings,
        "out": str(out),
    }
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
        reporter=_reporter(reporter),
    )


def quickstart(
    out: str | Path = "quickstart",
    *,
    device: str | None = None,
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

    config, unknown = settings_of(QuickstartConfig, settings, "quickstart")
    _refuse_unknown("quickstart", unknown, QuickstartConfig)
    words = [repr(str(out)), *(f"{name}={value!r}" for name, value in settings.items())]
    call = command or f"ditlab.quickstart({', '.join(words)})"
    return run_quickstart(config, Path(out), device=device, command=call, show=show, reporter=_reporter(reporter))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Literal["ditlab", "diffusers", "original"] | None = None,
    checkpoint: int | None = None,
    raw: bool = False,
    heads: int | None = None,
    unet: UNetFile | None = None,
    codec: str | None = None,
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
    from ditlab.interop.improved_diffusion import UNetFile
    from ditlab.models.converting import Conversion
    from ditlab.reporting.hub_export import send_run

    reporter, unet = _reporter(reporter), unet or UNetFile()
    if str(out).startswith("hub:"):
        if to is not None or heads is not None or unet != UNetFile() or raw or codec is not None:
            raise InvalidConfig(
                "convert: a run goes to the hub as it is; expected no `to`, `heads`, `unet`, `raw` or `codec`, "
                "found some"
            )
        place = None if dry_run is None else Path(dry_run)
        return send_run(
            source, str(out), checkpoint=checkpoint, licence=licence, samples=samples, dry_run=place, reporter=reporter
        )
    if licence or samples or dry_run is not None:
        raise InvalidConfig(
            "convert: `licence`, `samples` and `dry_run` are for the hub; expected `out` as hub:ORG/NAME"
        )
    return Conversion(str(source), str(out), to, checkpoint, raw, heads, unet, codec).run(reporter)


def _several(models: Source | Sequence[Source]) -> list[Source]:
    from ditlab.models.model import Model

    return [models] if isinstance(models, str | Path | Model) else list(models)


def _image_set(images: ImageSet | str | Path, size: int | None, reporter: Reporter) -> ImageSet:
    """Opens an image set, or prepares the one of a source."""
    from ditlab.data import ImageSet, is_source
    from ditlab.data import prepare as prepare_images

    if isinstance(images, ImageSet):
        return images
    if not str(images):
        raise InvalidConfig("`data`: expected an image set's folder or a source of images, found nothing")
    if is_source(str(images)):
        return prepare_images(str(images), size=size, reporter=reporter)
    return ImageSet.open(images)


def _tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else (values,) if isinstance(values, str | int) else tuple(values)


def _repr(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Path) else repr(value)


def _refuse_unknown(call: str, settings: Mapping[str, Any], *kinds: Any) -> None:
    if settings:
        known = [name for kind in kinds for name in kind.__dataclass_fields__]
        raise unknown_name(f"setting of {call}", next(iter(settings)), known)


def _reporter(reporter: Reporter | None) -> Reporter:
    return default_reporter() if reporter is None else reporter


def _open_set(sources: Sequence[Source], data: Any, **keywords: Any) -> ModelSet:
    """Opens models on the device that was asked for, with the threads that were asked for."""
    from ditlab.models.comparing import open_models
    from ditlab.training.distributed import pick_device

    use_threads(keywords.pop("threads"))
    return open_models(sources, data, **{**keywords, "device": pick_device(keywords["device"])})
