"""The studies at scale `smoke`, from nothing to their pages, and those pages in the browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ditlab.studies import study_report

pytestmark = pytest.mark.slow


def ditlab(folder: Path, *words: str) -> str:
    """What a command says; it must end well."""
    done = subprocess.run([sys.executable, "-m", "ditlab", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """A folder in which both studies were run at `smoke`."""
    folder = tmp_path_factory.mktemp("smoke")
    ditlab(folder, "study", "run", "an2024/fig6", "--scale", "smoke", "--device", "cpu")
    said = ditlab(folder, "study", "run", "an2024/fig4", "--scale", "smoke", "--device", "cpu")
    assert "2 trials, 2 on record, 0 to do" in said
    for study in ("an2024/fig4", "an2024/fig6"):
        study_report(study, ("smoke",), out=folder / "studies")
    return folder


def states(page: str) -> list[str]:
    return re.findall(r"<td[^>]*>(empty|partial|failed|trained)</td>", page)


def test_the_page_is_the_same_when_runs_and_images_are_gone(smoke, tmp_path):
    """Maps need weights: they are then those that were drawn before."""
    folder = Path(shutil.copytree(smoke, tmp_path / "smoke"))
    shutil.rmtree(folder / "studies" / "runs")
    shutil.rmtree(folder / "image-sets")
    said = ditlab(folder, "study", "report", "an2024/fig6", "--scale", "smoke")
    assert "attention maps of local attention are those drawn before" in said
    page = Path("studies") / "an2024-fig6-smoke" / "report.html"
    after, before = (folder / page).read_text(), (smoke / page).read_text()
    assert states(after) == states(before) == []
    assert after.count("<img") == before.count("<img") > 8
    assert len(before) < 10e6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_phone(smoke, opened, scheme):
    page = opened(smoke / "studies" / "an2024-fig6-smoke" / "report.html", width=390, color_scheme=scheme).page
    assert page.title() == "PSNR gap of global and local attention (An et al., Figs. 2 and 6)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#cells td").count() >= 4
    assert page.locator("#maps img").count() == 2
    # The token pickers of the smallest and the largest N work here as in a report.
    assert page.locator("#maps .picker").count() == 2
    page.locator("#maps .picker").first.scroll_into_view_if_needed()
    page.locator("#maps .picker .picker-live").first.wait_for(state="visible")
    assert page.locator("#maps .picker canvas").count() > 4
    for image in page.locator("img").all():
        assert image.get_attribute("alt")
        assert image.evaluate("image => image.naturalWidth") > 100


def test_the_page_of_fig4(smoke, opened):
    page = opened(smoke / "studies" / "an2024-fig4-smoke" / "report.html").page
    assert "2 of 2 trials are on record" in page.locator("header").inner_text()
    assert page.locator("#maps img").count() == 1
    assert page.locator("#published").count() == 0
