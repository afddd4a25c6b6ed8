"""Who imports whom (DESIGN section 3), what an import costs, and how long files and functions are."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ditlab
from ditlab.analyses import analysis_names
from ditlab.cli.main import _AFTER, _BEFORE

PACKAGE = Path(ditlab.__file__).parent
GUIDE = Path(__file__).parents[1] / "docs" / "contributing.md"
LAYERS = (
    {"errors", "arguments", "rng", "files", "memory", "progress", "provenance", "threads"},
    {"nn", "data"},
    {"networks"},
    {"diffusion"},
    {"metrics"},
    {"training"},
    {"config"},
    {"presets", "interop"},
    {"pages"},
    {"sampling"},
    {"models"},
    {"analyses"},
    {"reporting"},
    {"studies"},
    {"api"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"matplotlib", "datasets", "skimage", "sklearn", "jinja2", "scipy", "PIL", "diffusers"}
NOT_FOR_HELP = {*HEAVY, "torch", "numpy"}
MODULES = sorted(PACKAGE.rglob("*.py"))
CLI = [path for path in MODULES if path.parent.name == "cli"]
LEAN = (
    "ditlab.config",
    "ditlab.presets",
    "ditlab.networks.registry",
    "ditlab.networks",
    "ditlab.data",
    "ditlab.diffusion",
    "ditlab.nn.attention_plan",
    "ditlab.diffusion.sampler_configs",
    "ditlab.analyses.base",
    "ditlab.files",
    "ditlab.progress",
    "ditlab.provenance",
    "ditlab.api",
)
"""Modules that help texts and settings need."""


def imports(path: Path, *, inside: bool = True) -> set[str]:
    """Dotted names that a file imports; `inside`: also within its functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside else iter(tree.body)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module or "")
            if node.module == "ditlab":
                names |= {f"ditlab.{alias.name}" for alias in node.names}
    return names


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_each_module_imports_only_what_stands_below(path):
    mine = layer_of(path)
    if mine == "__init__":
        return
    assert mine in LEVEL, f"{mine} has no place in the order"
    for name in imports(path):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top == "ditlab" and other in LEVEL and other != mine:
            # Only lower layers; the lowest modules may use each other, siblings of other layers may not.
            allowed = LEVEL[other] < LEVEL[mine] or (LEVEL[other] == LEVEL[mine] == 0)
            assert allowed, f"{mine} imports {name}"


def test_the_guide_tells_the_same_order():
    line = re.search(r"^errors, arguments, .* < cli$", GUIDE.read_text(), re.MULTILINE)
    assert line is not None
    assert [{part.strip() for part in step.split(",")} for step in line[0].split("<")] == list(LAYERS[:-1])


def test_the_order_has_no_package_that_is_gone():
    assert LEVEL.keys() == {layer_of(path) for path in MODULES} - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_below_the_command_line_imports_it(path):
    if layer_of(path) in ("cli", "__main__"):
        return
    assert not {name for name in imports(path) if name == "ditlab.cli" or name.startswith("ditlab.cli.")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, inside=False)} & HEAVY


@pytest.mark.parametrize("path", CLI, ids=name_of)
def test_a_file_of_the_command_line_is_short_and_computes_nothing(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "numpy"}
    assert len(path.read_text().splitlines()) <= 150


def test_the_command_line_is_thin():
    assert sum(len(path.read_text().splitlines()) for path in CLI) <= 2500


def test_no_file_is_long():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert max(lengths.values()) <= 520, max(lengths, key=lambda name: lengths[name])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_is_long(path):
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    assert not {name: length for name, length in lengths.items() if length > 80}


def loaded(statement: str) -> set[str]:
    """Top-level modules that are there after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_importing_ditlab_costs_nothing():
    assert not loaded("import ditlab; ditlab.__version__") & {*NOT_FOR_HELP, "pydantic", "tyro", "rich"}


def test_settings_and_registries_need_no_arrays():
    assert sorted(loaded(f"import {', '.join(LEAN)}") & NOT_FOR_HELP) == []


def test_a_training_job_needs_little():
    modules = loaded("import ditlab.models.run, ditlab.training.trainer, ditlab.cli.train")
    assert "torch" in modules
    assert not modules & HEAVY


HELP = """
import json, os, sys
from ditlab.cli.parsing import parse
from ditlab.cli.main import main, verb_class

def show(verb):
    try:
        if verb:
            parse(verb_class(verb), verb, ["--help"])
        else:
            main(["--help"])
    except SystemExit as ended:
        return ended.code
    except BaseException as error:
        return repr(error)

for verb in json.loads(sys.argv[1]):
    if os.fork() == 0:
        printed, sys.stdout = sys.stdout, open(os.devnull, "w")
        answer = [verb, show(verb), sorted({name.split(".")[0] for name in sys.modules})]
        print(json.dumps(answer), file=printed, flush=True)
        os._exit(0)
    os.wait()
"""
"""Shows the help of each verb in a process of its own, and prints [verb, exit status, modules] for each."""
VERBS = ("", *_BEFORE, *analysis_names(), *_AFTER)
"""Every verb, the analyses that have none included; "" is `ditlab --help`."""


@pytest.fixture(scope="module")
def helps():
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(VERBS)], capture_output=True, text=True, timeout=300, check=True
    )
    return {verb: (status, set(modules)) for verb, status, modules in map(json.loads, done.stdout.splitlines())}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_neither_arrays_nor_pictures(verb, helps):
    status, modules = helps[verb]
    assert status == 0
    assert sorted(modules & NOT_FOR_HELP) == []
