"""From a source string to a model.

a run's folder, or one of its checkpoints   made by `ditlab train`
a converted model's folder                  made by `ditlab convert` (`ditlab.interop.converted`)
a .pt, .pth, .ckpt or .safetensors file     weights of an original code (`ditlab.interop.checkpoints`)
diffusers:PATH or diffusers:ORG/NAME        a model of the diffusers library, in a folder or on the hub
hub:ORG/NAME                                on the hub: an exported run, a converted model or a diffusers model
package.module:NAME or FILE.py:NAME         one's own denoiser, network or model, or a function that makes it
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ditlab.arguments import checks_arguments
from ditlab.data.imageset import ImageSet
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError, InvalidConfig, NotFound
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.interop.converted import RECORD, is_converted, open_converted
from ditlab.interop.diffusers_models import open_diffusers
from ditlab.interop.hub import download
from ditlab.interop.original_files import SUFFIXES
from ditlab.models.external import ExternalModel
from ditlab.models.model import RESULTS, Model
from ditlab.models.run import Run
from ditlab.models.split_config import SplitConfig
from ditlab.progress import SILENT, Reporter
from ditlab.training.distributed import Device, pick_device

__all__ = ["keep_own", "load", "open_model"]

_OBJECT = re.compile(r"(?P<place>[\w./\\-]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)")


def open_model(
    source: str | Path | Model,
    data: ImageSet | str | Path | None = None,
    *,
    codec: str | Path | None = None,
    split: SplitConfig | None = None,
    out: Path | None = None,
) -> Model:
    """Opens what a source string names; see the module. A model is returned as it is, and takes no other images.

    `data`, `codec`: where a run's image set and autoencoder are now, if they were moved; those of any other model.
    `split`: which images stand for the training images of a model that is not a run.
    `out`: the folder for results of models that have no folder of their own, each under its name.
    """
    if isinstance(source, Model):
        keep_own("a model that is open already", data=data, codec=codec, split=split, out=out)
        return source
    text, path = str(source), Path(source)
    external = partial(ExternalModel, data=data, codec=codec, split=split, out=out)
    if text.startswith("diffusers:"):
        return external(open_diffusers(text.removeprefix("diffusers:")))
    if text.startswith("hub:"):
        name = text.removeprefix("hub:")
        listing = download(name, ["*.json"])
        if _is_run(listing):
            return Run.open(download(name), data, codec, results=(out or RESULTS) / name.replace("/", "--"))
        if is_converted(listing):
            return external(replace(open_converted(download(name)), name=name.replace("/", "--")))
        return external(open_diffusers(name))
    if (named := _OBJECT.fullmatch(text)) is not None and not path.exists():
        return _open_object(named["place"], named["name"], data, split, out)
    if path.suffix in SUFFIXES and not path.is_dir():
        return external(open_checkpoint(path), read_raw=lambda: open_checkpoint(path, ema=False))
    if path.is_dir() and is_converted(path):
        return external(open_converted(path), path)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return Run.open(path.parent.parent, data, codec, step=int(path.name))
    if path.is_dir() and (path / "model_index.json").is_file():
        raise NotFound(f"{path}: expected a run's folder, found a diffusers model; name it diffusers:{path}")
    return Run.open(path, data, codec)


def keep_own(what: str, **settings: Any) -> None:
    """Raises InvalidConfig where a setting is not None: a model that is an object already keeps its own."""
    for name, value in settings.items():
        if value is not None:
            raise InvalidConfig(f"`{name}`: expected None for {what}, found {value!r:.80}")


@checks_arguments({})
def load(
    source: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    device: Device = "cpu",
    reporter: Reporter = SILENT,
) -> Denoiser:
    """Loads the denoiser of a trained network.

    Args:
        source: a source string; see the module.
        step: of which checkpoint of a run; the newest whole one where None.
        ema: the averaged weights (usual), or the raw ones.
        device: where it computes.
        reporter: told when a damaged checkpoint is passed over.

    Example:
        >>> denoiser = ditlab.load("runs/global")  # doctest: +SKIP
        >>> x0 = denoiser(y, sigma=0.3)  # doctest: +SKIP

    Raises:
        DitlabError: for anything that is not a whole model of a known kind.
    """
    return open_model(source).denoiser(step=step, ema=ema, device=pick_device(device), reporter=reporter)


def _open_object(
    place: str, name: str, data: ImageSet | str | Path | None, split: SplitConfig | None, out: Path | None
) -> Model:
    """Opens an object of the user's own code: a model, a denoiser, a network, or a function that returns one."""
    where = f"{place}:{name}"
    value: Any = _import(place)
    for part in name.split("."):
        if not hasattr(value, part):
            raise NotFound(f"{where}: expected the name '{part}' in {place}, found no such name")
        value = getattr(value, part)
    if callable(value) and not isinstance(value, Denoiser | nn.Module) and _takes_nothing(value):
        with _own_code(where):
            value = value()
    split = split or SplitConfig()
    if isinstance(value, Model):
        keep_own(f"the model of {where}, which has its own", data=data, split=None if split == SplitConfig() else split)
        return value
    if not isinstance(value, Denoiser):
        if not callable(value):
            raise InvalidConfig(f"{where}: expected a model, a denoiser or a network, found {type(value).__name__}")
        if data is None:
            raise InvalidConfig(
                f"{where}: the shape of its images is not known; give an image set as `data`, or return "
                "Denoiser.wrap(network, shape)"
            )
        data = data if isinstance(data, ImageSet) else ImageSet.open(data)
        value = Denoiser.wrap(cast(Callable[..., Tensor], value), shape=data.shape)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    model = Model(value, data, n=split.n, test=split.test, seed=split.split_seed, own_split=split.own_split, name=slug)
    if out is not None:
        model.path = out / model.path.name
    return model


def _import(place: str) -> Any:
    """Imports a module by its name, with the current folder importable, or a file by its path."""
    if not place.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        with _own_code(place):
            try:
                return importlib.import_module(place)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                    raise
                raise NotFound(f"{place}: expected a Python module, found none ({error})") from None
    file = Path(place)
    if not file.is_file():
        raise NotFound(f"{file}: expected a Python file, found nothing")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    new = sys.modules.setdefault(file.stem, module) is module
    try:
        with _own_code(place):
            spec.loader.exec_module(module)
    except BaseException:
        if new:
            del sys.modules[file.stem]
        raise
    return module


@contextmanager
def _own_code(where: str) -> Iterator[None]:
    """Turns an error of a user's own code into a sentence that says where it was raised."""
    try:
        yield
    except DitlabError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        file, line, text = last.filename, last.lineno, str(error)
        if isinstance(error, SyntaxError):
            file, line, text = error.filename, error.lineno, error.msg
        raise InvalidConfig(
            f"{where}: expected code that runs, found {type(error).__name__} in {file}, line {line}: {text}"
        ) from error


def _takes_nothing(function: Any) -> bool:
    """Whether a function can be called without arguments, and so makes what it returns."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return not needed


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a run's config.json, and not the config.json of another kind of model."""
    file = folder / "config.json"
    return file.is_file() and '"split"' in file.read_text(errors="replace") and not (folder / RECORD).is_file()
