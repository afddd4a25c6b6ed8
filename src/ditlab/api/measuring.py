"""Opening models, sampling and analysing them, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.analyses import analysis as find_analysis
from ditlab.analyses.base import Comparison, settings_of
from ditlab.api.calls import checked, chosen_reporter, open_set, refuse_unknown, several
from ditlab.arguments import check_type
from ditlab.models.split_config import SplitConfig
from ditlab.progress import Reporter

if TYPE_CHECKING:
    from ditlab.analyses.complexity.config import ComplexityConfig
    from ditlab.analyses.complexity.measure import Costs
    from ditlab.data.imageset import ImageSet
    from ditlab.models.comparing import Source
    from ditlab.models.model import Model
    from ditlab.reporting.report import ReportResult
    from ditlab.sampling.samples import Samples
    from ditlab.training.distributed import Device

__all__ = [
    "agreement",
    "analyze",
    "attention",
    "complexity",
    "jacobian",
    "open",
    "psnr_gap",
    "report",
    "sample",
    "swap_gap",
    "two_subsets",
]


@checked
def open(  # the name that the command line and the docs use: `ditlab.open(...)`
    source: Source,
    data: ImageSet | str | Path | None = None,
    *,
    held_out: ImageSet | str | Path | None = None,
    split: SplitConfig | None = None,
    codec: str | Path | None = None,
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
    from ditlab.models.model import Model
    from ditlab.models.opening import keep_own

    place = None if out is None else Path(out)
    if isinstance(source, Model):
        keep_own("a model that is open already", out=place)
    return open_models(
        [source], data, held_out=held_out, split=split, codec=codec, out=place, reporter=chosen_reporter(reporter)
    )[0]


@checked
def sample(
    model: Source, *, codec: str | Path | None = None, reporter: Reporter | None = None, **settings: Any
) -> Samples | None:
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

    Returns:
        The samples; None on a rank other than 0 whose rank 0 refused.

    Raises:
        DitlabError: anything that cannot be drawn or written.
    """
    from ditlab.models.opening import open_model

    return open_model(model, codec=codec).sample(reporter=reporter, **settings)


@checked
def analyze(
    name: str,
    models: Source | Sequence[Source],
    *,
    config: Any = None,
    options: Any = None,
    data: ImageSet | str | Path | None = None,
    held_out: ImageSet | str | Path | None = None,
    split: SplitConfig | None = None,
    names: str | Sequence[str] = (),
    checkpoint: int | None = None,
    raw: bool = False,
    codec: str | Path | None = None,
    device: Device | None = None,
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
        config, settings = settings_of(room.Config, settings)
    if options is None:
        options, settings = settings_of(room.Options, settings)
    check_type("config", config, room.Config)
    check_type("options", options, room.Options)
    if split is None:
        split, settings = settings_of(SplitConfig, settings)
    refuse_unknown(name, settings, room.Config, room.Options)
    chosen = several(models)
    room.check_count(len(chosen))
    place, reporter = None if out is None else Path(out), chosen_reporter(reporter)
    opened = open_set(
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


@checked
def swap_gap(first: Source, second: Source, **settings: Any) -> Comparison:
    """Measures how much better each of two models is on its own training images than the other, on the same noise.

    Args:
        first: a model.
        second: another one, without a training image in common: trained with `skip` = N.
        settings: those of `ditlab.analyses.psnr_gap.PSNRConfig`, and the keywords of `analyze`.
    """
    return analyze("swap-gap", [first, second], **settings)


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


@checked
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
    names: str | Sequence[str] = (),
    checkpoint: int | None = None,
    raw: bool = False,
    codec: str | Path | None = None,
    device: Device | None = None,
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

    for name, config in (configs or {}).items():
        check_type(f"configs['{name}']", config, find_analysis(name).Config)
    place, reporter = None if out is None else Path(out), chosen_reporter(reporter)
    opened = open_set(
        several(models),
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


@checked
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
        config, settings = settings_of(ComplexityConfig, settings)
    refuse_unknown("complexity", settings, ComplexityConfig)
    costs = measure_costs([presets] if isinstance(presets, str) else presets, config, published_fid)
    if out is not None:
        costs.files.extend(costs.save(Path(out)))
    return costs
