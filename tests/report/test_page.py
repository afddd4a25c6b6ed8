"""The report page: self-contained, complete, escaped, and empty parts left out."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ditlab.analysis.comparison import compare
from ditlab.analysis.matched import Trajectory, compare_trajectories
from ditlab.analysis.psnr import PSNRConfig, PSNRResult, RunFacts
from ditlab.errors import DitlabError
from ditlab.report.figures import gap_bars
from ditlab.report.page import PageData, Picture, RunCard, build_page, save_page


def result(label: str, gap_db: float, seed: int) -> PSNRResult:
    mse = np.full((3, 4, 1), 0.1)
    about = RunFacts(f"{label}-{seed}", label, 50, seed, 9, True, f"f{seed}", f"h{seed}")
    return PSNRResult(about, PSNRConfig(images=4), (0.1, 0.5, 2.0), None, 2.0, mse / 10 ** (gap_db / 10), mse)


@pytest.fixture(scope="module")
def data() -> PageData:
    results = [result(k, g + s / 10, s) for k, g in (("global", 3.0), ("local", 2.0)) for s in (0, 1)]
    comparison = compare(results)
    sides = [
        [Trajectory.from_points(k, s, [(100, 10.0, 9.5), (200, top + s / 10, 12.0)], n=50) for s in (0, 1)]
        for k, top in (("global", 20.0), ("local", 18.0))
    ]
    picture = Picture.draw(
        lambda theme: gap_bars(comparison, theme=theme), "Two bars <of> gap", "The gap & its spread."
    )
    return PageData(
        title="Global & local <attention>",
        summary=comparison.sentences(),
        runs=[
            RunCard(
                r.about.name, r.about.group, {"network.attention": r.about.group, "training.steps": 20_000, "ema": True}
            )
            for r in results
        ],
        comparison=comparison,
        matched=[compare_trajectories(*sides)],
        samples=[picture],
        curves=[picture],
        bars=[picture],
        along_training=[picture],
        matched_pictures=[picture],
        notes=["Only 4 images."],
        commands=[("Measure", "ditlab psnr-gap runs/global-0 runs/local-0")],
        environment={"torch": "2.13.0"},
        downloads={"psnr-gap.json": results[0].to_json()},
    )


class Reader(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

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
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not reader.all("script")
    policy = next(a for a in reader.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])


def test_every_picture_has_both_themes_and_words(data):
    reader = Reader(build_page(data))
    assert len(reader.all("img")) == len(reader.all("source")) == 5
    for image, dark in zip(reader.all("img"), reader.all("source"), strict=True):
        assert image["alt"] == "Two bars <of> gap"
        assert dark["media"] == "(prefers-color-scheme: dark)"
        for content in (image["src"], dark["srcset"]):
            assert base64.b64decode(str(content).split(",", 1)[1]).startswith(b"\x89PNG")
        assert image["src"] != dark["srcset"]


def test_links_lead_to_sections(data):
    reader = Reader(build_page(data))
    ids = {a["id"] for a in reader.all("section")}
    assert ids == {"settings", "samples", "psnr", "gap", "training", "matched", "commands", "environment", "files"}
    assert {str(a["href"])[1:] for a in reader.all("a") if str(a["href"]).startswith("#")} == ids


def test_numbers_settings_and_words_are_there(data):
    html = build_page(data)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    for expected in (
        "Global &amp; local &lt;attention&gt;",
        "The gap &amp; its spread.",
        "Only 4 images.",
        "ditlab psnr-gap runs/global-0 runs/local-0",
        "Settings that all runs share (2)",
        "20,000",
        "no difference seen",
    ):
        assert expected in text, expected
    differing = html[html.index("What differs") : html.index("<details>")]
    assert "network.attention" in differing
    assert "training.steps" not in differing


def test_downloads_hold_the_results(data):
    (link,) = [a for a in Reader(build_page(data)).all("a") if "download" in a]
    assert link["download"] == "psnr-gap.json"
    content = base64.b64decode(str(link["href"]).split(",", 1)[1])
    assert json.loads(content) == json.loads(json.dumps(data.downloads["psnr-gap.json"]))


def test_empty_parts_are_left_out():
    html = build_page(PageData(title="One run", summary=["Trained."], runs=[RunCard("a", "a", {"x": None})]))
    assert [a["id"] for a in Reader(html).all("section")] == ["settings"]


def test_the_same_data_make_the_same_page(data, tmp_path):
    assert save_page(data, tmp_path / "report.html").read_text(encoding="utf-8") == build_page(data)


def test_bad_data():
    with pytest.raises(DitlabError, match="found neither"):
        build_page(PageData(title="x", summary=[], runs=[]))
    with pytest.raises(DitlabError, match=r"'x\.json' is not JSON"):
        build_page(PageData(title="x", summary=["y"], runs=[], downloads={"x.json": {"a": float("nan")}}))
