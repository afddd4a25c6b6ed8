"""Exporting a run to the hub: its folder, and a model card with its own numbers and figures.

The export holds no image of the training set: no pictures of real images, no image set, no page. Samples go along only
where they are asked for, since those of a model that memorizes are training images.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ditlab
from ditlab.analyses import analysis as find_analysis
from ditlab.analyses.attention.result import LocalityResult
from ditlab.analyses.cache import find_results
from ditlab.analyses.psnr_gap.comparison import compare
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.analyses.trajectory.comparison import trajectory_of
from ditlab.config import to_json
from ditlab.errors import DitlabError, Incompatible, InvalidConfig
from ditlab.files import new_folder, write_json
from ditlab.interop.hub import upload
from ditlab.models.comparing import Source
from ditlab.models.converting import Converted
from ditlab.models.opening import open_model
from ditlab.models.run import Run
from ditlab.progress import SILENT, Reporter
from ditlab.provenance import Provenance

FIGURES = "figures"
_RESULTS = ("psnr-gap", "attention")
"""Results that are exported: numbers alone, and no image."""
_IMAGES = {"test": "held-out images", "train": "training images", "samples": "its own samples"}
"""What attention was measured on, in words."""


def export_run(
    run: Run,
    out: Path,
    repo: str,
    *,
    step: int | None = None,
    licence: str = "",
    samples: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    """Writes the folder that the hub gets: config.json, one checkpoint, log, results, figures of them, README.md.

    Args:
        run: the run.
        out: a folder that does not exist yet; it appears whole or not at all.
        repo: ORG/NAME, for the sentences on how to load it.
        step: of which checkpoint; the newest whole one if None.
        licence: by the hub's short name such as apache-2.0.
        samples: take along the grid of the newest samples.
        reporter: told of damaged checkpoints and results, which are passed over.

    Raises:
        DitlabError: there is no such checkpoint, or no samples that were asked for, or the folder cannot be written.
    """
    checkpoint = run.checkpoint(step, reporter)
    grid = _newest_grid(run) if samples else None
    # Results of other weights or images than the exported ones belong to another model.
    about = replace(run.provenance(checkpoint.step), weights=checkpoint.weights_hash())
    stored = {name: _stored(name, run, about, reporter) for name in _RESULTS}
    results = {name: result for name, result in stored.items() if result is not None}
    parameters = sum(value.numel() for value in checkpoint.ema.values())
    with new_folder(out) as folder:
        _write_config(run, folder)
        shutil.copytree(checkpoint.path, folder / "checkpoints" / checkpoint.path.name)
        if run.log:
            shutil.copy(run.home / "log.jsonl", folder / "log.jsonl")
        for name, result in results.items():
            result.save(folder / "analysis", name)
        figures = _save_figures(run, results, folder / FIGURES)
        if grid is not None:
            (folder / FIGURES).mkdir(exist_ok=True)
            shutil.copy(grid, folder / FIGURES / "samples.png")
            figures["samples.png"] = "Samples that it drew."
        card = _model_card(run, checkpoint.step, parameters, results, figures, repo, licence)
        (folder / "README.md").write_text(card)
    return out


def send_run(
    source: Source,
    out: str,
    *,
    checkpoint: int | None = None,
    licence: str = "",
    samples: bool = False,
    dry_run: Path | None = None,
    reporter: Reporter = SILENT,
) -> Converted:
    """Exports a run (`export_run`) and sends it to `out`, hub:ORG/NAME; or writes it into `dry_run` and sends nothing.

    Raises:
        DitlabError: the source is not a run, `out` is no repository's name, or as `export_run`.
    """
    run = open_model(source)
    if not isinstance(run, Run):
        raise Incompatible(f"convert: expected a run of ditlab to send to the hub, found {source}")
    repo = out.removeprefix("hub:")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise InvalidConfig(f"convert: expected `out` as hub:ORG/NAME, found '{out}'")
    if not licence:
        reporter.note("no `licence` was given, so the card names none")
    export = partial(export_run, run, repo=repo, step=checkpoint, licence=licence, samples=samples, reporter=reporter)
    if dry_run is not None:
        return Converted(str(export(dry_run)), "hub", f"what would be sent to {out}", sent=False)
    with tempfile.TemporaryDirectory() as temporary:
        address = upload(export(Path(temporary) / "export"), repo)
    return Converted(address, "hub", "the run with a model card", sent=True)


def _stored(name: str, run: Run, about: Provenance, reporter: Reporter) -> Any | None:
    """The newest result of these weights, on held-out images if there is one."""
    results = [
        result
        for result in find_results(find_analysis(name), run, reporter)
        if result.about.same_model(about) and not result.outdated
    ]
    return min(results, key=lambda result: _images_of(result) != "test", default=None)


def _images_of(result: Any) -> str:
    return result.about.settings.get("images_from", "test")


_CARD = """\
---
library_name: ditlab
{head}tags:
- diffusion
- {network}
- {kind}-image-generation
---

# {name}

{summary}

## Use it

```python
import ditlab

denoiser = ditlab.load("hub:{repo}")  # x0 = denoiser(y, sigma)
```

```sh
ditlab sample hub:{repo}
ditlab psnr-gap hub:{repo} --data SET
```

SET is the image set with the hash {imageset}, which does not come with it.

## Numbers

| | |
|---|---|
{numbers}

{figures}## Training

{command}All settings are in config.json; the environment was:

{environment}

## Licence

{terms}
"""


def _model_card(
    run: Run,
    step: int,
    parameters: int,
    results: Mapping[str, Any],
    figures: Mapping[str, str],
    repo: str,
    licence: str,
) -> str:
    """README.md of an exported run; `figures` are the files in figures/ and what they show."""
    config, split = run.config, run.record.split
    kind = "class-conditional" if run.conditional else "unconditional"
    side = "x".join(map(str, config.network.image_size))
    version = run.environment.get("ditlab", ditlab.__version__)
    summary = (
        f"A diffusion denoiser ({kind}) of {config.network.channels}x{side} "
        f"{'latents' if run.record.codec else 'pixels'}, trained with ditlab {version} on {split.train:,} images "
        f"(preset {config.preset or 'none'}, {parameters:,} parameters)."
    )
    return _CARD.format(
        head=f"license: {licence}\n" if licence else "",
        network=config.network.kind,
        kind=kind,
        name=repo.rpartition("/")[2],
        summary=summary,
        repo=repo,
        imageset=split.imageset[:12],
        numbers="\n".join(f"| {name} | {value} |" for name, value in _numbers(run, step, results).items()),
        figures="".join(f"![{shows}]({FIGURES}/{file})\n\n{shows}\n\n" for file, shows in figures.items()),
        command=f"```sh\n{run.command}\n```\n\n" if run.command else "",
        environment="\n".join(f"- {name}: {value}" for name, value in run.environment.items()),
        terms=f"The weights are under the licence {licence}." if licence else "The exporter named no licence.",
    )


def _numbers(run: Run, step: int, results: Mapping[str, Any]) -> dict[str, str]:
    """What is known of these weights, by name."""
    numbers = {"training images": f"{run.record.split.train:,}", "steps": f"{step:,}"}
    numbers["images in a step"] = f"{run.config.training.batch_size}"
    for line in run.log:
        for key, name in (("train_loss", "loss on training images"), ("test_loss", "loss on held-out images")):
            if line["step"] <= step and line.get(key) is not None:
                numbers[name] = f"{line[key]:.4f}"
    gap: PSNRResult | None = results.get("psnr-gap")
    if gap is not None:
        numbers["PSNR on training images"] = f"{gap.average('train'):.2f} dB"
        numbers["PSNR on held-out images"] = f"{gap.average('test'):.2f} dB"
        numbers["PSNR gap"] = f"{gap.average_gap:.2f} dB, the mean over {len(gap.levels)} noise levels"
    attention: LocalityResult | None = results.get("attention")
    if attention is not None:
        distance = float(attention.values("distance").mean())
        where = f"on {attention.grid[0]}x{attention.grid[1]}, of {_IMAGES[_images_of(attention)]}"
        numbers["mean attention distance"] = f"{distance:.2f} tokens {where}"
    return numbers


def _save_figures(run: Run, results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draws the results and the log; file -> what it shows."""
    from ditlab.analyses.attention.figures import locality_curves
    from ditlab.analyses.psnr_gap.figures import psnr_curves
    from ditlab.analyses.trajectory.figures import gap_along_training, loss_curves
    from ditlab.pages.theme import save

    drawn: dict[str, tuple[Any, str]] = {}
    if "psnr-gap" in results:
        about = replace(results["psnr-gap"].about, label=run.name)
        comparison = compare([replace(results["psnr-gap"], about=about)])
        drawn["psnr-curves.png"] = psnr_curves(comparison), "PSNR on training and held-out images by noise level."
    if trajectory := trajectory_of(run, run.name):
        drawn["gap-along-training.png"] = gap_along_training([trajectory]), "The PSNR gap along its training."
    if any("loss" in line or "train_loss" in line for line in run.log):
        drawn["losses.png"] = loss_curves({run.name: run.log}), "Losses along its training."
    if "attention" in results:
        attention = results["attention"]
        shows = f"How far its attention reaches, on {_IMAGES[_images_of(attention)]}."
        drawn["attention-locality.png"] = locality_curves([attention]), shows
    for file, (figure, _) in drawn.items():
        save(figure, folder / file)
    return {file: caption for file, (_, caption) in drawn.items()}


def _write_config(run: Run, folder: Path) -> None:
    """config.json without the place of the image set, which is another one wherever the run goes."""
    config = replace(run.config, data=replace(run.config.data, path=""))
    write_json(folder / "config.json", to_json(replace(run.record, config=config)))


def _newest_grid(run: Run) -> Path:
    grids = sorted((run.path / "samples").glob("*/grid.png"), key=lambda path: path.stat().st_mtime)
    if not grids:
        raise DitlabError(f"run {run.path}: expected samples to show, found none; draw some with `ditlab sample`")
    return grids[-1]
