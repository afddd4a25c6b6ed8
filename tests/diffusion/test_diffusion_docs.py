"""The Python in the two pages about diffusion runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["denoisers.md", "samplers.md"])
def test_the_code_in_a_page_runs(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})
    # The claim of the page: memory is far better on its own images, and only there.
    printed = [float(value) for value in re.findall(r"([\d.]+) dB", capsys.readouterr().out)]
    if printed:
        memory_train, memory_test, _, _ = printed
        assert memory_train > memory_test + 10
