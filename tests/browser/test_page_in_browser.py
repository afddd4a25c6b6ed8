"""The report in a real browser: the token picker, both themes, a phone, paper; no errors, no network."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditlab.nn.patterns import Global, Window
from ditlab.pages.page import PageData, RunCard, Section, Table, ThemedFigure, save_page
from ditlab.pages.theme import DARK, LIGHT
from ditlab.pages.token_picker import AttentionPicker, pack_run

GRID = (4, 6)
TOKENS = 24
WORDS = "a long heading of a column"


def png(color: str, width: int = 900) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 200), color).save(buffer, "PNG")
    return buffer.getvalue()


def shift(by: int) -> np.ndarray:
    """Every token attends to the one `by` places on, and to nothing else."""
    return np.roll(np.eye(TOKENS), by, axis=1)


def attention(level: int, layer: int) -> np.ndarray:
    """Two heads that are told apart: at level 0 the token itself and the next one, at level 1 all tokens alike."""
    if level == 1:
        return np.full((2, TOKENS, TOKENS), 1 / TOKENS)
    return np.stack([shift(0), shift(1 if layer == 1 else 2)])


def local(level: int, layer: int) -> np.ndarray:
    mask = Window(3).mask(GRID).numpy().astype(float)
    return (mask / mask.sum(1, keepdims=True))[None]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    image = np.zeros((8, 12, 3), np.uint8)
    image[..., 0] = np.arange(96).reshape(8, 12)
    runs = [
        pack_run("global", {1: Global(), 2: Global()}, GRID, 2, attention),
        pack_run("local", {1: Window(3), 2: Window(3)}, GRID, 2, local),
    ]
    picker = AttentionPicker("N = 10", image, [image, 255 - image], ["σ = 0.5", "σ = 2"], GRID, runs)
    wide = Table(("run", *(f"{WORDS} {i}" for i in range(12))), [("global", *range(12))], "A table wider than a phone")
    picture = ThemedFigure(png(LIGHT.background), png(DARK.background), "An empty figure", "Nothing to see.")
    data = PageData(
        "A page",
        ["It is shown."],
        [
            Section("numbers", "Numbers", tables=[wide], pictures=[picture], data={"numbers.json": {"a": [1, 2]}}),
            Section("attention", "Where a token attends", pickers=[picker]),
        ],
        runs=[RunCard("g", "global", {"x": 1}), RunCard("l", "local", {"x": 2})],
        commands=[("all", "ditlab report " + "runs/a-very-long-name-of-a-run " * 12)],
    )
    return save_page(data, tmp_path_factory.mktemp("page") / "report.html")


def expect():
    return pytest.importorskip("playwright.sync_api").expect


def ready(found):
    found.page.locator(".picker").scroll_into_view_if_needed()
    expect()(found.page.locator(".picker-said")).to_contain_text("Token in row")
    return found.page


def choose(page, name: str, value: str) -> None:
    page.select_option(f"select[name={name}]", value)
    expect()(page.locator(".picker-maps")).to_have_attribute("aria-busy", "false")


def at(page, row: int, column: int, *, which: str = "clean") -> dict[str, float]:
    """Where on the canvas the middle of a token is."""
    box = page.locator(f".picker-image[data-which={which}]").bounding_box()
    return {"x": (column + 0.5) / GRID[1] * box["width"], "y": (row + 0.5) / GRID[0] * box["height"]}


def hover(page, row: int, column: int) -> None:
    page.locator(".picker-image[data-which=clean]").hover(position=at(page, row, column))


def said(page) -> str:
    return page.locator(".picker-said").text_content()


def shades(page, number: int) -> np.ndarray:
    """The middle pixel of each token of a map's canvas, [rows, columns, 3]."""
    shown = page.locator(".picker-maps canvas").nth(number).evaluate("canvas => canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(shown.split(",")[1]))) as opened_image:
        pixels = np.asarray(opened_image.convert("RGB"))
    height, width = pixels.shape[0] // GRID[0], pixels.shape[1] // GRID[1]
    return pixels[height // 2 :: height, width // 2 :: width].astype(int)


def darkest(page, number: int) -> tuple[int, int]:
    """(row, column) of the token with the largest weight in the light theme."""
    row, column = divmod(int(shades(page, number).sum(-1).argmin()), GRID[1])
    return row, column


def test_hovering_shows_where_a_token_attends(opened, path):
    page = ready(opened(path, color_scheme="light"))
    choose(page, "level", "0")
    choose(page, "head", "2")
    hover(page, 1, 2)
    # Layer 1 looks one token on, layer 2 two; the local run has one head, which stands for all.
    assert page.locator(".picker-maps canvas").count() == 4
    assert darkest(page, 0) == (1, 3)
    assert darkest(page, 1) == (1, 4)
    assert said(page).startswith("Token in row 1, column 2")
    hover(page, 3, 0)
    assert darkest(page, 0) == (3, 1)
    assert said(page).startswith("Token in row 3, column 0")


def test_the_numbers_are_those_of_the_maps(opened, path):
    page = ready(opened(path))
    choose(page, "level", "0")
    choose(page, "layer", "2")
    choose(page, "head", "1")
    hover(page, 1, 2)
    assert "global gives 100 % of its weight to the 3×3 tokens around it, at a mean distance of 0.0 tokens" in said(
        page
    )
    choose(page, "head", "2")
    assert "global gives 0.0 % of its weight to the 3×3 tokens around it, at a mean distance of 2.0 tokens" in said(
        page
    )
    choose(page, "head", "0")
    assert "global gives 50 % of its weight to the 3×3 tokens around it, at a mean distance of 1.0 tokens" in said(page)
    choose(page, "level", "1")
    expect()(page.locator(".picker-said")).to_contain_text("38 %")  # 9 of 24 tokens
    page.locator(".picker-maps canvas").first.hover(position={"x": 5, "y": 5})
    assert said(page) == "global, layer 2, mean over heads: token (1, 2) gives token (0, 0) a weight of 0.042."


def test_layers_heads_and_levels_can_be_chosen(opened, path):
    page = ready(opened(path))
    maps = page.locator(".picker-maps canvas")
    assert maps.count() == 4
    choose(page, "head", "all")
    expect()(maps).to_have_count(6)
    names = [c.get_attribute("aria-label") for c in maps.all()]
    assert names[1].startswith("global, layer 1 (global), head 2: 3×3: ")
    assert names[5].startswith("local, layer 2 (window 3), its head: 3×3: ")
    choose(page, "layer", "2")
    expect()(maps).to_have_count(3)
    assert {c.get_attribute("data-layer") for c in maps.all()} == {"2"}
    noisy = page.locator(".picker-image[data-which=noisy]")
    before = noisy.evaluate("c => c.toDataURL()")
    choose(page, "level", "0")
    expect()(page.locator(".picker-maps .note").last).to_contain_text("max: 0.1")
    assert noisy.evaluate("c => c.toDataURL()") != before


def test_one_scale_for_all_maps(opened, path):
    page = ready(opened(path, color_scheme="light"))
    choose(page, "level", "1")
    hover(page, 0, 0)
    # By default colours are relative to uniform attention over 24 tokens; a quarter of all weight is as dark as can be.
    assert shades(page, 0).sum(-1).min() > 400
    assert shades(page, 2)[0, 0].sum() < 150
    # Uniform attention is as dark as it can be on its own scale, and pale beside a window of 4 tokens.
    choose(page, "scale", "own")
    own = shades(page, 0)
    assert own.sum(-1).max() < 150
    choose(page, "scale", "same")
    assert shades(page, 0)[3, 5].sum() > own[3, 5].sum() + 200
    assert (shades(page, 2)[0, 0] == own[0, 0]).all()


def test_the_keyboard_moves_the_token(opened, path):
    page = ready(opened(path))
    page.locator(".picker-image[data-which=clean]").focus()
    start = said(page)
    assert start.startswith("Token in row 2, column 3")
    for key, expected in (
        ("ArrowRight", "row 2, column 4"),
        ("ArrowUp", "row 1, column 4"),
        ("Home", "row 1, column 0"),
        ("ArrowLeft", "row 1, column 0"),
        ("End", "row 1, column 5"),
        ("PageDown", "row 3, column 5"),
        ("ArrowDown", "row 3, column 5"),
    ):
        page.keyboard.press(key)
        assert said(page).startswith(f"Token in {expected}"), key
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") != "picker-image"


def test_a_click_holds_the_token(opened, path):
    page = ready(opened(path))
    image = page.locator(".picker-image[data-which=clean]")
    image.click(position=at(page, 1, 1))
    hover(page, 3, 3)
    assert said(page).startswith("Token in row 1, column 1, held")
    image.click(position=at(page, 3, 3))
    hover(page, 2, 2)
    assert said(page).startswith("Token in row 2, column 2:")


def test_a_tap_picks_a_token_on_a_phone(opened, path):
    page = ready(opened(path, width=390, height=844, has_touch=True, is_mobile=True))
    image = page.locator(".picker-image[data-which=clean]")
    image.tap(position=at(page, 3, 1))
    assert said(page).startswith("Token in row 3, column 1:")
    image.tap(position=at(page, 0, 5))
    assert said(page).startswith("Token in row 0, column 5:")


@pytest.mark.parametrize("width", [320, 390, 1000])
def test_nothing_is_wider_than_the_screen(opened, path, width):
    page = ready(opened(path, width=width))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider scrolls in its own frame, also by keyboard.
    scrolls = page.evaluate(
        "[...document.querySelectorAll('.table')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.tabIndex)"
    )
    assert scrolls
    assert set(scrolls) == {0}


def rgb(color: str) -> str:
    return f"rgb({int(color[1:3], 16)}, {int(color[3:5], 16)}, {int(color[5:7], 16)})"


def ground(page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def shown(page) -> str:
    """Which of the two figures is shown, by its colour."""
    source = page.evaluate("document.querySelector('picture img').currentSrc")
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
        red, green, blue = image.convert("RGB").getpixel((0, 0))
    return f"rgb({red}, {green}, {blue})"


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_page_follows_the_system_and_the_button(opened, path, theme):
    other = DARK if theme is LIGHT else LIGHT
    page = ready(opened(path, color_scheme=theme.name))
    choose(page, "level", "0")
    choose(page, "head", "1")
    hover(page, 0, 0)
    assert ground(page) == shown(page) == rgb(theme.background)
    # A weight of zero has the colour of the ground.
    assert (shades(page, 0)[3, 5] == [int(theme.background[i : i + 2], 16) for i in (1, 3, 5)]).all()
    page.click("#theme")
    assert ground(page) == shown(page) == rgb(other.background)
    assert (shades(page, 0)[3, 5] == [int(other.background[i : i + 2], 16) for i in (1, 3, 5)]).all()
    page.click("#theme")
    assert ground(page) == shown(page) == rgb(theme.background)


def test_words_can_be_read_in_both_themes(opened, path):
    """Contrast of at least 4.5 to 1 (WCAG 2, AA) of text and small print."""

    def light(color: str) -> float:
        parts = [int(part) / 255 for part in color[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in ("light", "dark"):
        page = opened(path, color_scheme=theme).page
        for where in ("body", ".picker .note", "nav a", "thead th"):
            color = page.locator(where).first.evaluate("e => getComputedStyle(e).color")
            pair = sorted([light(color), light(ground(page))])
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (theme, where)


def test_on_paper(opened, path):
    page = ready(opened(path, color_scheme="dark"))
    page.emulate_media(media="print", color_scheme="dark")
    # A picture changes a moment after its media.
    image = page.locator("picture img").first
    expect()(image).to_have_js_property("currentSrc", image.get_attribute("src"))
    assert ground(page) == shown(page) == rgb(LIGHT.background)
    for gone in ("nav", "#theme", ".picker-controls"):
        assert not page.locator(gone).first.is_visible()
    assert page.locator(".picker-maps canvas").first.is_visible()
    assert page.pdf().startswith(b"%PDF")


@pytest.fixture(scope="module")
def far(path, tmp_path_factory) -> Path:
    """The page with its picker many screens below the top."""
    words = "".join(f"<p>Paragraph {i} of a long section.</p>" for i in range(400))
    html = path.read_text(encoding="utf-8").replace("<main>", f"<main>{words}")
    target = tmp_path_factory.mktemp("far") / "report.html"
    target.write_text(html, encoding="utf-8")
    return target


def test_maps_are_printed_that_nobody_scrolled_to(opened, far):
    page = opened(far).page
    maps = page.locator(".picker-maps canvas")
    expect()(maps).to_have_count(4)
    assert page.evaluate("scrollY") == 0
    page.emulate_media(media="print")
    assert maps.first.is_visible()
    assert not page.locator(".picker-idle").is_visible()
    # Two images and four maps; a page without the picker holds its single figure.
    pictures = page.pdf().count(b"/Subtype /Image")
    page.evaluate("document.querySelector('.picker').remove()")
    assert pictures >= page.pdf().count(b"/Subtype /Image") + 6


@pytest.mark.parametrize("missing", ["DecompressionStream", "OffscreenCanvas"])
def test_an_old_browser_is_told_so(opened, path, missing):
    page = opened(path, first=f"delete window.{missing}").page
    page.locator(".picker").scroll_into_view_if_needed()
    expect()(page.locator(".picker-idle")).to_contain_text("needs a newer browser")
    page.wait_for_timeout(300)
    assert page.locator(".picker-idle").is_visible()
    assert not page.locator(".picker-live").is_visible()
    page.pdf()
    page.click("#theme")


def test_files_can_be_saved(opened, path, tmp_path):
    page = opened(path).page
    with page.expect_download() as download:
        page.locator("#numbers details summary").click()
        page.click("text=numbers.json")
    assert download.value.suggested_filename == "numbers.json"
    download.value.save_as(tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"a": [1, 2]}


def test_no_other_script_runs(opened, path):
    found = opened(path, quiet=False)
    found.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.stranger = 1'; document.body.append(s); }"
    )
    assert found.page.evaluate("window.stranger") is None
    assert any("Content Security Policy" in text for text in found.said)
    # Nor can a page that was tampered with call home.
    failures = []
    found.page.on("requestfailed", lambda request: failures.append((request.url, request.failure)))
    with found.page.expect_event("requestfailed"):
        found.page.evaluate("() => { new Image().src = 'http://127.0.0.1:9/x.png'; }")
    assert failures == [("http://127.0.0.1:9/x.png", "csp")]


def test_without_scripts_the_page_says_so(opened, path):
    page = opened(path, java_script_enabled=False).page
    assert page.locator("text=Picking a token needs JavaScript").is_visible()
    assert not page.locator("#theme").is_visible()
    assert page.locator("picture img").is_visible()
