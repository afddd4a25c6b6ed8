"""Commands and Python of the README and the docs run as they stand, page by page, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ditlab.cli.main import _split, main, verb_class, verbs
from ditlab.cli.parsing import parse
from ditlab.networks.dit import DiT
from ditlab.networks.registry import network_class
from ditlab.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {("denoisers.md", "python"), ("samplers.md", "python"), ("data.md", "sh")}
"""Blocks that tests/diffusion/test_diffusion_docs.py and tests/cli/test_cli_data.py run."""
BEFORE = {"data.md": "ditlab data prepare photos sets/photos --size 16"}
"""What a page's Python needs of its commands where those run elsewhere."""
SLOW = {"cli.md", "latents.md"}


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    reason: str
    """Why it is not run; empty where it is."""

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(page: Path) -> list[Block]:
    pattern = r"^(?:<!-- not run: (.*?) -->\n+)?^```(\w+)\n(.*?)^```$"
    found = re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(kind, text, reason) for reason, kind, text in found if (page.name, kind) not in ELSEWHERE]


def run(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    """Exit status and standard error of one `ditlab` command line."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    return end.value.code, capsys.readouterr().err


def check(words: list[str]) -> None:
    """A command that is not run here: its flags, its make target or its file must exist."""
    if words[0] == "torchrun":
        words = words[words.index("ditlab") :]
    if words[0] == "ditlab":
        verb, rest = _split(words[1:])
        parse(verb_class(verb), verb, rest)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in ("pip", "."), f"what should be checked of {words}?"


def runnable(page: Path) -> bool:
    return any(block.kind in ("sh", "python", "console") for block in blocks(page))


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in SLOW else []) for p in PAGES if runnable(p)],
)
def test_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if page.name in BEFORE:
        assert run(shlex.split(BEFORE[page.name]), capsys, monkeypatch)[0] == 0
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.kind == "sh":
            for words in block.commands:
                if block.reason or words[0] != "ditlab":
                    check(words)
                else:
                    status, said = run(words, capsys, monkeypatch)
                    assert status == 0, f"{shlex.join(words)}: {said}"
        elif block.kind == "python" and not block.reason:
            exec(compile(block.text, page.name, "exec", dont_inherit=True), names)
        elif block.kind == "console":
            for command, *expected in (part.splitlines() for part in block.text.split("$ ")[1:]):
                status, said = run(shlex.split(command), capsys, monkeypatch)
                assert (status, said.splitlines()) == (2, expected), command


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"^  - .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site(page):
    # mkdocs checks those of the site.
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def table_rows(page: str, start: str) -> list[list[str]]:
    """Cells of the lines whose first cell is a name with that start, and nothing else."""
    table = page.split("| parameters | depth x width x heads |")[1]  # the one before it is of minutes
    lines = re.findall(rf"^\| `{start}[^`]*` \|.*$", table, re.MULTILINE)
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_of_presets():
    page = (ROOT / "docs" / "training.md").read_text()
    rows = table_rows(page, "dit-")
    assert {row[0] for row in rows} == {n for n in PRESETS if n.startswith("dit-") and not n.endswith("-edm")}
    for name, parameters, shape, tokens, steps, batch, lr in rows:
        network, training = PRESETS[name].network, PRESETS[name].training
        with torch.device("meta"):
            count = sum(p.numel() for p in DiT(network).parameters())
        rows_, columns = network.grid
        assert [f"{count / 1e6:.2f} M", f"{network.depth} x {network.width} x {network.heads}"] == [parameters, shape]
        assert [f"{rows_ * columns}", f"{training.steps:,}"] == [tokens, steps]
        assert [f"{training.batch_size}", f"{training.lr:g}"] == [batch, lr]


@pytest.mark.parametrize(("start", "twins"), [("bf-", ("-vp", "-edm")), ("unet-", "-edm")])
def test_the_table_of_other_presets(start, twins):
    page = (ROOT / "docs" / "training.md").read_text()
    rows = table_rows(page, start)
    assert {row[0] for row in rows} == {n for n in PRESETS if n.startswith(start) and not n.endswith(twins)}
    for name, parameters, _, steps, batch, lr in rows:
        network, training = PRESETS[name].network, PRESETS[name].training
        with torch.device("meta"):
            count = sum(p.numel() for p in network_class(type(network))(network).parameters())
        assert [f"{count / 1e6:.2f} M", f"{training.steps:,}"] == [parameters, steps]
        assert [f"{training.batch_size}", f"{training.lr:g}"] == [batch, lr]


def test_the_table_of_verbs():
    table = re.findall(r"^\| `ditlab ([a-z -]+?)(?: [A-Z.]+)*` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(verbs())
