"""Who imports whom (DESIGN section 3), and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ditlab

PACKAGE = Path(ditlab.__file__).parent
GUIDE = Path(__file__).parents[1] / "docs" / "contributing.md"
LAYERS = (
    {"errors", "rng", "files", "memory", "progress", "provenance", "threads"},
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
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, inside: bool = True) -> set[str]:
    """Dotted names that a file imports; `inside`: also within its functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module or "")
            if node.module == "ditlab":
                found |= {f"ditlab.{alias.name}" for alias in node.names}
    return found


def parts(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_module_imports_only_what_stands_below(path):
    mine = parts(path)
    if mine == "__init__":
        return
    assert mine in LEVEL, f"{mine} has no place in the order"
    for name in imports(path):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top == "ditlab" and other in LEVEL and other != mine:
            # Only lower layers; the two lowest modules may use each other, siblings of other layers may not.
            allowed = LEVEL[other] < LEVEL[mine] or (LEVEL[other] == LEVEL[mine] == 0)
            assert allowed, f"{mine} imports {name}"


def test_the_guide_tells_the_same_order():
    line = re.search(r"^errors, rng, .* < cli$", GUIDE.read_text(), re.MULTILINE)
    assert line is not None
    assert [{part.strip() for part in step.split(",")} for step in line[0].split("<")] == list(LAYERS[:-1])


def test_the_order_has_no_package_that_is_gone():
    assert LEVEL.keys() == {parts(path) for path in MODULES} - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, inside=False)} & HEAVY


def test_no_file_is_long():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert max(lengths.values()) <= 520, max(lengths, key=lambda name: lengths[name])


def loaded(statement: str) -> set[str]:
    """Top-level modules that are there after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_importing_ditlab_costs_nothing():
    assert not loaded("import ditlab; ditlab.__version__") & {*HEAVY, "torch", "numpy", "pydantic", "tyro", "rich"}


def test_a_training_job_needs_little():
    found = loaded("import ditlab.models.run, ditlab.training.trainer, ditlab.cli.train")
    assert "torch" in found
    assert not found & HEAVY


def test_what_the_package_offers():
    assert set(ditlab.__all__) <= {*dir(ditlab), "Denoiser", "DitlabError", "load"}
    for name in ditlab.__all__:
        assert getattr(ditlab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ditlab.nonsense
