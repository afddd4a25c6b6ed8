"""The report page: self-contained, complete, escaped, small enough, and empty parts left out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ditlab.analyses.psnr_gap.comparison import compare
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.figures import gap_bars
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global
from ditlab.pages import page as page_module
from ditlab.pages.grids import sample_grid
from ditlab.pages.page import (
    EXACT_BYTES,
    PAGE_BYTES,
    PageData,
    RunCard,
    Section,
    Table,
    ThemedFigure,
    build_page,
    fit_page,
    page_size,
    save_page,
    with_pickers,
)
from ditlab.pages.token_picker import BUDGET, AttentionPicker, pack_run
from ditlab.provenance import Provenance

pytestmark = pytest.mark.usefixtures("both_themes")


def result(label: str, gap_db: float, seed: int) -> PSNRResult:
    mse = np.full((3, 4, 1), 0.1)
    about = Provenance(f"{label}-{seed}", label, 50, seed, 9, True, f"f{seed}", f"h{seed}")
    return PSNRResult(about, PSNRConfig(images=8), (0.1, 0.5, 2.0), None, 2.0, mse / 10 ** (gap_db / 10), mse)


def picker(label: str = "global", tokens: int = 4, budget: int = BUDGET, layers: int = 1) -> AttentionPicker:
    side = int(np.sqrt(tokens))
    rng = np.random.default_rng(0)
    run = pack_run(
        label,
        {n: Global() for n in range(1, layers + 1)},
        (side, side),
        1,
        lambda level, layer: rng.random((4, tokens, tokens)),
        budget,
    )
    image = np.zeros((side, side, 3), np.uint8)
    return AttentionPicker("</script><b>", image, [image], ["σ = 1"], (side, side), [run])


@pytest.fixture(scope="module")
def data() -> PageData:
    results = [result(k, g + s / 10, s) for k, g in (("global", 3.0), ("local", 2.0)) for s in (0, 1)]
    comparison = compare(results)
    picture = ThemedFigure.draw(
        lambda theme: gap_bars(comparison, theme=theme), "Two bars <of> gap", "The gap & its spread."
    )
    table = Table(("model", "N", "gap, dB"), [("global", 50, "3.05\n2.41–3.69"), ("local", 50, "2.05\n1.41–2.69")])
    seeds = Section("seeds", "Seed by seed", tables=[table], data={"seeds.json": {"a": 1}}, folded=True)
    return PageData(
        title="Global & local <attention>",
        summary=[comparison.verdict(), "Two kinds were trained."],
        tables=[table],
        pictures=[picture, picture],
        notes=["Beneath: intervals over seeds."],
        sections=[
            Section("psnr", "PSNR", pictures=[picture], data={"psnr-gap.json": results[0].to_json()}),
            Section(
                "gap",
                "PSNR gap",
                verdict="The gap is smaller.",
                tables=[table, Table(("a",), [(1,)], folded="More numbers")],
                notes=list(dict.fromkeys(note for r in results for note in r.notes)),
                parts=[seeds],
            ),
            Section("attention", "Attention", pickers=[picker()], pictures=[picture]),
        ],
        runs=[
            RunCard(
                r.about.name, r.about.group, {"network.attention": r.about.group, "training.steps": 20_000, "ema": True}
            )
            for r in results
        ],
        labels=comparison.labels,
        commands=[("Measure", "ditlab psnr-gap runs/global-0 runs/local-0")],
        environment={"torch": "2.13.0"},
        downloads={"all.json": {"a": 1}},
    )


class Reader(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset({"meta", "img", "source", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and "type" not in self.found[-1][1]:
            self.scripts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_whole_and_asks_nothing_of_the_network(data):
    html = build_page(data)
    reader = Reader(html)
    assert reader.open == []
    for _, attributes in reader.found:
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert str(attributes[name]).startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    for word in ("http://", "https://", "url(", "@import", "fetch(", "XMLHttpRequest"):
        assert word not in html


def test_only_the_pages_own_script_may_run(data):
    reader = Reader(build_page(data))
    (script,) = reader.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a for a in reader.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(part.split(maxsplit=1) for part in str(policy["content"]).split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert [a.get("type") for a in reader.all("script")] == ["application/json", None]


def test_every_picture_has_both_themes_and_words(data):
    reader = Reader(build_page(data))
    assert len(reader.all("img")) == len(reader.all("source")) == 4
    for image, dark in zip(reader.all("img"), reader.all("source"), strict=True):
        assert image["alt"] == "Two bars <of> gap"
        assert dark["media"] == "screen and (prefers-color-scheme: dark)"
        for content in (image["src"], dark["srcset"]):
            assert base64.b64decode(str(content).split(",", 1)[1]).startswith(b"\x89PNG")
        assert image["src"] != dark["srcset"]


def test_links_lead_to_sections(data):
    reader = Reader(build_page(data))
    ids = [a["id"] for a in reader.all("section")]
    top = ["psnr", "gap", "attention", "settings", "commands", "environment", "files"]
    assert ids == [*top[:2], "seeds", *top[2:]]
    assert [str(a["href"])[1:] for a in reader.all("a") if str(a["href"]).startswith("#")] == top
    assert len({a["id"] for _, a in reader.found if "id" in a}) == len([a for _, a in reader.found if "id" in a])


def test_numbers_settings_and_words_are_there(data):
    html = build_page(data)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    for expected in (
        "Global &amp; local &lt;attention&gt;",
        "The gap &amp; its spread.",
        "Only 4 training images exist, 8 were asked for",
        "ditlab psnr-gap runs/global-0 runs/local-0",
        "Settings that all runs share (2)",
        "20,000",
        "local is lower",
        "The gap is smaller.",
        "Beneath: intervals over seeds.",
        "More numbers",
    ):
        assert expected in text, expected
    settings = html[html.index('id="settings"') :]
    differing = settings[: settings.index("<details>")]
    assert "network.attention" in differing
    assert "training.steps" not in differing


def test_the_first_screen_comes_before_the_sections(data):
    html = build_page(data)
    head = html[html.index("<h1>") : html.index("<main>")]
    places = [head.index(words) for words in (data.summary[0][:20], "<table>", "first-figure", "first-images", "<nav")]
    assert places == sorted(places)
    assert "3.05<br><small>2.41–3.69</small>" in head


def test_details_are_folded_away(data):
    """What is folded can only be read after its summary was opened."""
    html = build_page(data)
    folded = re.findall(r"<details[^>]*><summary>(.*?)</summary>(.*?)</details>", html, re.DOTALL)
    summaries = dict(folded)
    assert {"Seed by seed", "More numbers", "Notes", "Data", "Settings that all runs share (2)"} <= set(summaries)
    assert "Only 4 training images exist" in summaries["Notes"]
    assert "training.steps" in summaries["Settings that all runs share (2)"]


def test_the_settings_of_one_run_are_folded_at_the_end():
    run = RunCard("a", "a", {f"setting.{i}": i for i in range(54)})
    page = build_page(PageData("a", ["y"], [Section("b", "B", ["words"])], runs=[run]))
    assert page.index('id="b"') < page.index('id="settings"') < page.index("<summary>All settings (54)</summary>")
    assert page.index("<summary>All settings") < page.index("setting.0")


def test_pickers_are_added_to_a_section_that_was_made_smaller():
    kept, smaller = noise(40), noise(20)
    whole = Section("a", "A", ["no room"], pictures=[kept], parts=[Section("b", "B", pictures=[kept])])
    fitted = Section("a", "A", ["no room"], notes=["left out"], pictures=[smaller], parts=[Section("b", "B")])
    made = Section("a", "A", ["a map"], notes=["a note"], pickers=[picker()], pictures=[kept], parts=whole.parts)
    section = with_pickers(fitted, made)
    assert (section.paragraphs, section.notes) == (["a map"], ["a note", "left out"])
    assert section.pickers == made.pickers
    assert section.pictures == [smaller]
    assert section.parts[0].pictures == ()


def test_downloads_hold_the_results(data):
    links = {str(a["download"]): str(a["href"]) for a in Reader(build_page(data)).all("a") if "download" in a}
    assert list(links) == ["psnr-gap.json", "seeds.json", "all.json"]
    for name, expected in (("psnr-gap.json", data.sections[0].data["psnr-gap.json"]), ("all.json", {"a": 1})):
        content = json.loads(base64.b64decode(links[name].split(",", 1)[1]))
        assert content == json.loads(json.dumps(expected))


def test_data_cannot_end_the_script_that_holds_it():
    html = build_page(PageData("x", ["y"], [Section("a", "A", pickers=[picker("</script><img src=x>")])]))
    reader = Reader(html)
    assert reader.open == []
    assert not reader.all("img")
    assert "</script><b>" not in html


def test_tables_set_numbers_to_the_right_and_colours_beside_labels():
    rows = [("global", 1234567, 1.005, "1.2 ± 0.3", True, None), ("local", None, -2.0, "≥ 4", False, "3*4 minus g")]
    page = PageData("x", ["y"], [Section("a", "A", tables=[Table(list("abcdef"), rows)])], labels=["local", "global"])
    html = build_page(page)
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    cells = re.findall(r"<t[hd]( scope=\"row\")?( class=\"number\")?>(.*?)</t[hd]>", body)
    assert [bool(number) for _, number, _ in cells[:6]] == [False, True, True, True, False, False]
    assert [re.sub("<.*?>", "", words) for _, _, words in cells] == [
        *("global", "1,234,567", "1.00", "1.2 ± 0.3", "yes", "–"),
        *("local", "–", "-2.00", "≥ 4", "no", "3*4 minus g"),
    ]
    assert 'class="swatch s1"' in cells[0][2]
    assert 'class="swatch s0"' in cells[6][2]


def test_backticks_are_code_and_nothing_else_is_markup():
    html = build_page(PageData("x", ["A `b <c>` & <d>"]))
    assert "<p>A <code>b &lt;c&gt;</code> &amp; &lt;d&gt;</p>" in html


def test_empty_parts_are_left_out():
    empty = Section("nothing", "Nothing", parts=[Section("less", "Less", notes=["small print of nothing"])])
    html = build_page(
        PageData(title="One run", summary=["Model."], sections=[empty], runs=[RunCard("a", "a", {"x": None})])
    )
    assert [a["id"] for a in Reader(html).all("section")] == ["settings"]


def test_the_same_data_make_the_same_page(data, tmp_path):
    assert save_page(data, tmp_path / "report.html").read_text(encoding="utf-8") == build_page(data)


def test_large_figures_shrink_and_those_of_photographs_stay_exact(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [("noise", rng.integers(0, 256, (80, 3, 32, 32), np.uint8))]
    exact, small = (
        ThemedFigure.draw(lambda theme: sample_grid(rows, theme=theme), "a", "b", exact=exact)
        for exact in (True, False)
    )
    assert len(exact.light) > 200_000
    assert len(small.light) < 0.6 * len(exact.light)
    assert small.width == exact.width
    assert len(exact.light) < EXACT_BYTES
    monkeypatch.setattr(page_module, "EXACT_BYTES", len(exact.light) - 1)
    large = ThemedFigure.draw(lambda theme: sample_grid(rows, theme=theme), "a", "b", exact=True)
    for picture in (small, large):
        with Image.open(io.BytesIO(picture.light)) as image:
            assert image.mode == "P"


def noise(side: int, seed: int = 0) -> ThemedFigure:
    """A figure of photographs at its worst: nothing of it can be compressed."""
    themes = np.random.default_rng(seed).integers(0, 256, (2, side, side, 3), np.uint8)
    buffers = []
    for pixels in themes:
        buffers.append(io.BytesIO())
        Image.fromarray(pixels).save(buffers[-1], "PNG")
    return ThemedFigure(buffers[0].getvalue(), buffers[1].getvalue(), "a", "b")


def test_a_page_that_is_too_large_is_made_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "PAGE_BYTES", 1_000_000)
    plain = ThemedFigure.draw(
        lambda theme: sample_grid([("x", np.zeros((2, 3, 4, 4), np.uint8))], theme=theme), "a", "b"
    )
    inner = Section("inner", "Inner", pictures=[noise(430)], data={"c.json": {"c": "x" * 1000}})
    sections = [Section("a", "A", pictures=[plain, noise(160)], data={"a.json": {"a": "x" * 1000}}, parts=[inner])]
    data = PageData("x", ["y"], sections, downloads={"all.json": {"a": 1}})
    assert page_size(data) > 1_500_000
    path = save_page(data, tmp_path / "report.html")
    assert path.stat().st_size <= 1_000_000
    fitted = fit_page(data)
    assert path.read_text(encoding="utf-8") == build_page(fitted)
    reader = Reader(build_page(fitted))
    assert not [a for a in reader.all("a") if "download" in a]
    assert build_page(fitted).count("they are stored next to the results") == 3
    # The small ones are as they were, and what is smaller takes as much room on the page.
    assert fitted.sections[0].pictures[0] == plain
    (large,) = fitted.sections[0].parts[0].pictures
    assert large.size < inner.pictures[0].size / 2
    assert large.width == inner.pictures[0].width
    # Nothing is taken from a page that fits.
    small = PageData("x", ["y"], [Section("a", "A", pictures=[plain], data={"a.json": {"a": 1}})])
    assert fit_page(small) is small
    assert fit_page(small, 999_990) is not small


def test_more_is_taken_only_where_it_must_be(monkeypatch):
    picture = noise(400)
    data = PageData("x", ["y"], [Section("a", "A", pictures=[picture])])
    whole, seen = page_size(data), []
    for share in (0.9, 0.3, 0.15, 0.11, 0.045):
        monkeypatch.setattr(page_module, "PAGE_BYTES", int(share * whole))
        fitted = fit_page(data)
        assert page_size(fitted) <= share * whole, share
        (made,) = fitted.sections[0].pictures
        assert made.width == pytest.approx(picture.width, abs=3)
        seen.append((made.shrunk, made.light == made.dark))
    assert seen == [(1, False), (1, True), (2, True), (2, True), (4, True)]


def test_a_page_that_cannot_fit_is_refused_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "PAGE_BYTES", 30_000)
    data = PageData("x", ["y"], [Section("a", "A", pictures=[noise(300)])])
    with pytest.raises(DitlabError, match=r"report\.html: expected a page of at most 30,000 bytes, found"):
        save_page(data, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_pickers_keep_to_their_bytes():
    """As many maps as DiT-XS/1 has at 32x32 would fill 40 MB; the page keeps what the budget holds."""
    one = picker(tokens=1024, layers=6)
    page = build_page(PageData("x", ["y"], [Section("a", "A", pickers=[one])]))
    assert BUDGET * 0.5 < len(page) < BUDGET + 100_000 < PAGE_BYTES
    assert "Every second token of each row and column can be picked." in page
    assert "Left out to keep the page small" in page


def test_bad_data():
    with pytest.raises(DitlabError, match="found neither"):
        build_page(PageData(title="x", summary=[], runs=[]))
    with pytest.raises(DitlabError, match=r"'x\.json' is not JSON"):
        build_page(PageData(title="x", summary=["y"], runs=[], downloads={"x.json": {"a": float("nan")}}))
    part = Section("a", "A", ["words"])
    with pytest.raises(DitlabError, match="found 2 with the id 'a'"):
        build_page(PageData("x", ["y"], [Section("b", "B", parts=[part, part])]))
    with pytest.raises(DitlabError, match="plain id"):
        build_page(PageData("x", ["y"], [Section("a b", "A", ["words"])]))
    with pytest.raises(DitlabError, match="expected 2 cells in each row, found 1"):
        Table(("a", "b"), [(1,)])
