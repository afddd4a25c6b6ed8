"""Pins: what ditlab writes and prints today, on small fixed runs, whatever the source tree looks like.

The tests of this folder see ditlab through its command line and its files. What they import of it stands in the four
functions below ("The adapter"); a rearranged tree needs changes there and nowhere else.

Expected values are JSON files in `data/`. `DITLAB_UPDATE_PINS=1 pytest tests/pins` rewrites them; say in the commit
why they changed. The old runs in `data/old` are never written again, nor are their numbers (`old-*.json`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------------------------------------------------------------
# The adapter
# ---------------------------------------------------------------------------------------------------------------------


def run_ditlab(folder: Path, *words: object) -> tuple[int, str, str]:
    """Runs one command line in a folder; returns its exit status, standard output and standard error."""
    from ditlab.cli.main import main

    texts = [str(word) for word in words]
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["ditlab", *texts]
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main(texts)
    finally:
        sys.argv = argv
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


def trial_hash(config: Mapping[str, Any], imageset: str) -> str:
    """Returns the hash of a trial of a study from its config as JSON values and the hash of its image set."""
    from ditlab.config import RunConfig, from_json
    from ditlab.studies.trial import trial_hash as hash_of

    return hash_of(from_json(RunConfig, config, "pinned config"), imageset)


def preset_configs() -> dict[str, dict[str, Any]]:
    """Returns the whole config of every preset as JSON values."""
    from ditlab.config import to_json
    from ditlab.presets import PRESETS, preset

    return {name: to_json(preset(name)) for name in PRESETS}


def load_result(path: Path) -> dict[str, Any]:
    """Loads the result of an analysis and returns it as JSON values; its arrays lie beside it where they are kept."""
    from ditlab.analyses import analysis, analysis_names

    names = {"attention-locality": "attention"}
    kind = json.loads(path.read_text())["kind"]
    name = names.get(kind, kind)
    assert name in analysis_names()
    record = analysis(name).result_class().load(path).to_json()
    return json.loads(json.dumps(record))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------

FREE = frozenset(
    (
        *("environment", "command", "seconds", "cpu_seconds", "step_seconds", "training_seconds", "memory_bytes"),
        *("weights", "sha256", "sentences", "notes"),
    )
)
"""Keys whose values depend on the machine, or are prose: pinned is only that they are there, and their types."""

EXACT = frozenset(
    ("config", "settings", "sampler", "guidance", "levels", "sigma", "sigmas", "lr", "split", "analyses", "axes")
)
"""Keys below which floats are settings, not outputs of a network: pinned as they are."""


def shape(value: Any) -> dict[str, list[Any]]:
    """Returns every key path of JSON values with what stands there.

    Integers, booleans and texts are pinned as they are, floats by type unless they are settings (`EXACT`), and nothing
    below a key of `FREE` by more than its type. "a[]" is an element of the list a, "a.#" its length; what differs
    between elements stands side by side.
    """
    paths: dict[str, list[Any]] = {}

    def note(path: str, entry: Any) -> None:
        entries = paths.setdefault(path, [])
        if entry not in entries:
            entries.append(entry)

    def walk(value: Any, path: str, free: bool, exact: bool) -> None:
        if isinstance(value, Mapping):
            if not value:
                note(path, "<empty>")
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key, free or key in FREE, exact or key in EXACT)
        elif isinstance(value, list):
            if not free:
                note(f"{path}.#", len(value))
            if value and not free and all(_pinned(inner, exact) for inner in value):
                note(path, value)
                return
            for inner in value:
                walk(inner, f"{path}[]", free, exact)
        else:
            note(path, value if not free and _pinned(value, exact) else f"<{type(value).__name__}>")

    walk(value, "", False, False)
    return dict(sorted(paths.items()))


def _pinned(value: Any, exact: bool) -> bool:
    if isinstance(value, float):
        return exact
    return not isinstance(value, Mapping | list)


def differences(expected: Any, actual: Any, tolerance: float, path: str = "") -> list[str]:
    """Returns a line for each place where JSON values differ by more than a tolerance (of numbers)."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        lines = [f"{path}.{key}: gone (was {expected[key]!r})" for key in expected if key not in actual]
        lines += [f"{path}.{key}: new ({actual[key]!r})" for key in actual if key not in expected]
        for key in expected.keys() & actual.keys():
            lines += differences(expected[key], actual[key], tolerance, f"{path}.{key}")
        return lines
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = enumerate(zip(expected, actual, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, tolerance, f"{path}[{i}]")]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (expected, actual))
    if numbers and type(expected) is type(actual):
        alike = abs(expected - actual) <= tolerance * max(1.0, abs(expected))
    else:
        alike = type(expected) is type(actual) and expected == actual
    return [] if alike else [f"{path}: expected {expected!r}, found {actual!r}"]


def check_pin(name: str, actual: Any, tolerance: float = 1e-9) -> None:
    """Compares JSON values with `data/NAME.json`, or writes that file where DITLAB_UPDATE_PINS is set.

    Args:
        name: of the file.
        actual: what the code gives now.
        tolerance: of numbers: absolute up to 1, relative above.
    """
    path = DATA / f"{name}.json"
    actual = json.loads(json.dumps(actual))
    if os.environ.get("DITLAB_UPDATE_PINS") and not (name.startswith("old-") and path.exists()):
        path.write_text(json.dumps(actual, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    lines = sorted(differences(json.loads(path.read_text(encoding="utf-8")), actual, tolerance))
    assert not lines, f"{path.name}: {len(lines)} differences\n" + "\n".join(lines[:40])


def arrays(path: Path) -> dict[str, str]:
    """Returns name, type and shape of each array in an .npz file."""
    with np.load(path, allow_pickle=False) as file:
        return {name: f"{file[name].dtype} {list(file[name].shape)}" for name in sorted(file.files)}


def files(folder: Path) -> list[str]:
    """Returns all files below a folder but locks, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock")
    return sorted(set_aside(path.relative_to(folder).as_posix()) for path in paths)


def set_aside(path: str) -> str:
    """Returns the path of a result that was set aside without the hash of its weights, which the machine decides."""
    return re.sub(r"\.[0-9a-f]{8}\.", ".HASH.", path)


class Pins:
    """What the tests of this folder use: the adapter and the comparisons (fixture `pins`)."""

    data, root = DATA, ROOT
    trial_hash = staticmethod(trial_hash)
    preset_configs = staticmethod(preset_configs)
    load_result = staticmethod(load_result)
    shape = staticmethod(shape)
    check = staticmethod(check_pin)
    differences = staticmethod(differences)
    arrays = staticmethod(arrays)
    files = staticmethod(files)
    set_aside = staticmethod(set_aside)

    @staticmethod
    def run(folder: Path, *words: object) -> Any:
        """Runs a command line with --json in a folder and returns the JSON that it prints; it must succeed."""
        status, out, err = run_ditlab(folder, *words, "--json")
        assert status == 0, err
        return json.loads(out)


@pytest.fixture(scope="session")
def pins() -> Pins:
    """The adapter and the comparisons."""
    return Pins()


# ---------------------------------------------------------------------------------------------------------------------
# The small runs
# ---------------------------------------------------------------------------------------------------------------------

TINY = (
    *("--n", 20, "--test", 10, "--training.steps", 20, "--network.depth", 2),
    *("--network.width", 16, "--network.heads", 2),
    *("--training.batch-size", 8, "--training.log-every", 5, "--training.eval-every", 10, "--training.save-every", 10),
    *("--evaluation.images", 4, "--evaluation.levels", 2, "--device", "cpu", "--threads", 1),
)


class Small:
    """Four tiny runs on one image set, and all that the verbs have printed of them.

    `global` and `local` differ in attention, `other` is `global` on the next 20 images, `classes` is conditional.
    """

    def __init__(self, folder: Path, write_pair: Callable[[Path], Path]) -> None:
        self.folder = folder
        self.printed: dict[str, Any] = {}
        self._do("data prepare", "photos", "sets/photos", "--size", 8)
        self._do("data info", "sets/photos", "--count", 9)
        self._train("global", "--network.attention", "g*2")
        self._train("local", "--network.attention", "3*2")
        self._train("other", "--network.attention", "g*2", "--skip", 20)
        self._train("classes", "--conditional")
        pair, cpu = ("runs/global", "runs/local"), ("--device", "cpu", "--threads", 1)
        self._do("sample", "runs/global", "--seeds", "0-3", "--sampler", "ddim", "--steps", 4, "--strip", 1, *cpu)
        sweep = ("--seeds", "0-1", "--sampler", "heun", "--steps", 3, "--guidance-sweep", 1, 2, "--out", "sweep")
        self._do("sample", "runs/classes", *sweep, *cpu, name="sample-sweep")
        self._do("psnr-gap", *pair, "--images", 4, "--points", 3, "--out", "gaps", *cpu)
        self._do("attention", *pair, "--images", 2, "--levels", 0.3, 1, "--out", "maps", *cpu)
        self._do("jacobian", *pair, "--show", 0, 1, "--top", 4, "--out", "directions", *cpu)
        closed = ("--references", "wiener", "ls", "--images", 2, "--sampler-steps", 2, "--window", 3)
        self._do("agreement", "runs/global", *closed, "--trajectories", 1, *cpu)
        drawing = ("--seeds", "0-3", "--sampler", "ddim", "--sampler-steps", 3)
        self._do("two-subsets", "runs/global", "runs/other", *drawing, *cpu)
        self._do("complexity", "dit-nano/2", "unet-nano", "--size", 8, "--out", "costs")
        self._do("convert", "runs/classes", "classes.pt")
        self._do("convert", "classes.pt", "models/classes", "--heads", 2, name="convert-back")
        self._do("convert", "runs/classes", "hub:me/classes", "--dry-run", "export", name="convert-hub")
        write_pair(folder / "codec")
        self._do("data encode", "sets/photos", "sets/latents", "--codec", "codec", *cpu)
        self._do("report", *pair, "--samples", 2, "--out", "two/report.html", *cpu)
        self._do("report", "runs/global", "--samples", 0, "--out", "one/report.html", *cpu, name="report-one")

    def _do(self, verb: str, *words: object, name: str | None = None) -> None:
        self.printed[name or verb.replace(" ", "-")] = Pins.run(self.folder, *verb.split(), *words)

    def _train(self, name: str, *words: object) -> None:
        words = ("dit-nano/2", "--data", "sets/photos", "--out", f"runs/{name}", *TINY, *words)
        self._do("train", *words, name=f"train-{name}")


@pytest.fixture(scope="session")
def small(tmp_path_factory, write_pair) -> Small:
    """The small runs; not to be changed by a test."""
    return Small(tmp_path_factory.mktemp("small"), write_pair)
