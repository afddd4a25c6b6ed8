"""What `import ditlab` offers: one function for each verb of the command line, with the same settings.

Functions take models or the strings that name them, return objects that show themselves in a notebook, print nothing,
and raise `DitlabError` for input that cannot be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.analyses import analysis as find_analysis
from ditlab.analyses.base import Comparison, settings_of
from ditlab.errors import unknown_name
from ditlab.models.split_config import SplitConfig
from ditlab.progress import Reporter, default_reporter
from ditlab.threads import use_threads

if TYPE_CHECKING:
    from ditlab.data.imageset import ImageSet
    from ditlab.models.comparing import ModelSet, Source
    from ditlab.models.model import Model
    from ditlab.sampling.samples import Samples

__all__ = [
    "agreement",
    "analyze",
    "attention",
    "jacobian",
    "open",
    "psnr_gap",
    "sample",
    "two_subsets",
]


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
    if settings:
        known = [*room.Config.__dataclass_fields__, *room.Options.__dataclass_fields__]
        raise unknown_name(f"setting of {name}", next(iter(settings)), known)
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
        settings: those of `ditlab.analyses.two_subsets.TwoSubsetsConfig`, and the keywords of `analyze`.
    """
    return analyze("two-subsets", [first, second], **settings)


def _several(models: Source | Sequence[Source]) -> list[Source]:
    from ditlab.models.model import Model

    return [models] if isinstance(models, str | Path | Model) else list(models)


def _reporter(reporter: Reporter | None) -> Reporter:
    return default_reporter() if reporter is None else reporter


def _open_set(sources: Sequence[Source], data: Any, **keywords: Any) -> ModelSet:
    """Opens models on the device that was asked for, with the threads that were asked for."""
    from ditlab.models.comparing import open_models
    from ditlab.training.distributed import pick_device

    use_threads(keywords.pop("threads"))
    return open_models(sources, data, **{**keywords, "device": pick_device(keywords["device"])})
