"""Debian's chromium, driven by Playwright; without either these tests are skipped with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium on this machine")
    with driver.sync_playwright() as playwright:
        # Without its sandbox, which containers and the root user do not allow; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page in the browser, and everything that it said or asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def opened(chromium) -> Iterator[Any]:
    """`opened(path, width=390)` opens a file, after the script `first` was run in it; at the end no page may have said anything or asked for anything else."""
    contexts, pages = [], []

    def open_(
        path: Path, *, width: int = 1000, height: int = 800, quiet: bool = True, first: str = "", **settings: Any
    ) -> Opened:
        context = chromium.new_context(viewport={"width": width, "height": height}, **settings)
        if first:
            context.add_init_script(first)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(path.resolve().as_uri())
        contexts.append(context)
        if quiet:
            pages.append((found, path.resolve().as_uri()))
        return found

    yield open_
    for context in contexts:
        context.close()
    for found, address in pages:
        assert found.said == []
        assert [url for url in found.requests if not url.startswith("data:")] == [address]
