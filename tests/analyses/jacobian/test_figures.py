"""Figures of Jacobians draw what the results hold, alike each time, in both themes, and text stays apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from ditlab.analyses.jacobian.comparison import CAUTION, compare_jacobians
from ditlab.analyses.jacobian.config import JacobianConfig
from ditlab.analyses.jacobian.curves import by_vector_curves, shrinkage_and_image, spectra
from ditlab.analyses.jacobian.figures import (
    _CHANNELS,
    _panels,
    denoising_strip,
    psnr,
    sensitivity_maps,
    value_text,
    vector_gallery,
)
from ditlab.analyses.jacobian.measure import measure_jacobian
from ditlab.analyses.jacobian.result import JacobianResult
from ditlab.analyses.jacobian.section import jacobian_drawings, jacobian_section
from ditlab.diffusion.baselines import WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.pages.page import ThemedFigure
from ditlab.pages.theme import DARK, LIGHT, png, wrapped
from ditlab.provenance import Provenance

CONFIG = JacobianConfig(sigmas=(0.3,), show=(0, 1, 4, 16), pixels=((1, 2), (4, 4)))


def pictures(images: np.ndarray) -> np.ndarray:
    return np.clip((images + 1) * 127.5, 0, 255).round().astype(np.uint8)


def decode(images: torch.Tensor) -> np.ndarray:
    return pictures(images.numpy())


def result(
    label: str = "wiener", n: int = 12, channels: int = 3, factor: float | None = None, **settings
) -> JacobianResult:
    images = torch.rand(16, channels, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    about = Provenance(f"{label}-{n}", label, n, 0, 9, True, "f", f"h{n}")
    denoiser = (
        WienerDenoiser(images[:n])
        if factor is None
        else Denoiser.wrap(lambda y, sigma, label: factor * y, shape=(channels, 8, 8))
    )
    return measure_jacobian(denoiser, images[12:], replace(CONFIG, **settings), about=about, train=images[:n])


@pytest.fixture(scope="module")
def three() -> list[tuple[str, JacobianResult]]:
    found = [result(), result("half", factor=0.5), result("most of all that there is to keep", factor=0.9)]
    return [(one.about.group, one) for one in found]


@pytest.fixture(scope="module")
def grey() -> list[tuple[str, JacobianResult]]:
    return [("grey", result(channels=1, decomposition="eig"))]


def points(results):
    return [(label, one.points[0]) for label, one in results]


FIGURES = {
    "gallery": lambda found, theme: vector_gallery(points(found), "svd", theme=theme),
    "right gallery of one": lambda found, theme: vector_gallery(points(found)[:1], "svd", right=True, theme=theme),
    "gallery of many": lambda found, theme: vector_gallery(points(found) * 2, "svd", theme=theme),
    "strip": lambda found, theme: denoising_strip(points(found), pictures, theme=theme),
    "strip of many": lambda found, theme: denoising_strip(points(found) * 2, pictures, theme=theme),
    "sensitivity": lambda found, theme: sensitivity_maps(points(found), theme=theme),
    "spectra": lambda found, theme: spectra(points(found), "x0", "svd", theme=theme),
    "measures": lambda found, theme: by_vector_curves(
        points(found), {"frequency": "frequency", "edges": "edges", "nothing": "-"}, theme=theme
    ),
    "shrinkage": lambda found, theme: shrinkage_and_image(points(found), "clean_coefficient", "x0", theme=theme),
    "shrinkage of many": lambda found, theme: shrinkage_and_image(
        points(found) * 2, "clean_coefficient", "x0", theme=theme
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_texts_stay_apart(name, three, texts_apart):
    texts_apart(FIGURES[name](three, LIGHT))


@pytest.mark.parametrize("name", ["gallery", "strip", "spectra"])
def test_a_figure_is_drawn_alike_each_time_and_otherwise_on_a_dark_page(name, three):
    two = three[:2]
    light = png(FIGURES[name](two, LIGHT))
    assert png(FIGURES[name](two, LIGHT)) == light
    assert png(FIGURES[name](two, DARK)) != light


@pytest.mark.parametrize("name", ["gallery", "right gallery of one", "strip", "spectra"])
def test_grey_images_and_complex_values(name, grey, texts_apart):
    texts_apart(FIGURES[name](grey, DARK))


def test_a_vector_is_white_at_zero_and_framed_in_its_channels_colours():
    vector = np.zeros((3, 4, 4))
    vector[0, 0, 0], vector[1, 3, 3] = 1.0, -0.5
    image = _panels(vector, DARK)
    scale, edge = 24, 4
    side = 4 * scale + 2 * edge
    for channel, frame in enumerate(_CHANNELS):
        start = channel * (side + 7)
        assert image[0, start, :3] == pytest.approx(to_rgb(frame))
        assert image[edge + scale, start + edge + 2 * scale, :3] == pytest.approx((1, 1, 1), abs=0.01)
    red = image[edge, edge, :3]
    blue = image[edge + 3 * scale, side + 7 + edge + 3 * scale, :3]
    assert red[0] > red[2] + 0.2
    assert blue[2] > blue[0] + 0.2
    # The channel with half of the largest entry is paler: channels share their colours.
    assert blue.sum() > red.sum()


def test_r_hom_and_r_lin_stand_beside_the_vectors(three):
    first, second = points(three)[:2]
    numbers = first[1].numbers
    unknown = (second[0], replace(second[1], numbers={**second[1].numbers, "r_hom": None, "r_lin": None}))
    texts = [text.get_text() for axes in vector_gallery([first, unknown], "svd").axes for text in axes.texts]
    assert f"r_hom {numbers['r_hom']:.2g}, r_lin {numbers['r_lin']:.2g}" in [" ".join(t.split()) for t in texts]
    assert "r_hom –, r_lin –" in [" ".join(t.split()) for t in texts]


@pytest.mark.parametrize("factor", [0.0, -0.5])
def test_values_of_which_none_is_positive_are_drawn(factor):
    denoiser = Denoiser.wrap(lambda y, sigma, label: factor * y, (3, 6, 6))
    found = measure_jacobian(denoiser, torch.zeros(1, 3, 6, 6), JacobianConfig(decomposition="eigh", sigmas=(0.3,)))
    for drawing in jacobian_drawings(compare_jacobians([found]), decode).values():
        assert png(drawing.figure()).startswith(b"\x89PNG")


def test_titles_have_index_and_value(three):
    figure = vector_gallery(points(three)[:2], "svd")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [t for t in titles if t][::2] == [
        f"k = {k}, s = {three[0][1].points[0].values[k]:.3g}" for k in (0, 1, 4, 16)
    ]
    assert [t for t in titles if t][1::2] == [f"k = {k}, s = 0.5" for k in (0, 1, 4, 16)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8341, "0.834"), (0.71 - 0.02j, "0.71 - 0.02i"), (0.7 + 0.1j, "0.7 + 0.1i"), (1 + 0j, "1"), (0, "0")],
)
def test_values_as_words(value, text):
    assert value_text(complex(value)) == text


def test_the_strip_says_psnr(three):
    figure = denoising_strip(points(three)[:2], pictures)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    point = three[0][1].points[0]
    expected = 10 * np.log10(4 / np.square(point.noisy - point.clean).mean())
    assert psnr(point.noisy, point.clean) == pytest.approx(expected, abs=1e-4)
    assert titles[:2] == ["clean\n", f"noisy, σ = 0.3\n{expected:.1f} dB"]
    denoised = 10 * np.log10(4 / point.numbers["mse"])
    assert titles[2] == f"wiener\n{denoised:.1f} dB"
    shown = figure.axes[0].images[0].get_array()
    assert (np.asarray(shown) == pictures(point.clean).transpose(1, 2, 0)).all()


def test_spectra_are_the_values_and_the_axis_names_the_target(three):
    figure = spectra(points(three), "eps", "svd")
    lines = figure.axes[0].get_lines()[:3]
    for line, (_, one) in zip(lines, three, strict=True):
        assert (line.get_ydata() == one.points[0].values).all()
    assert "estimated noise" in figure.axes[0].get_ylabel()
    assert "removed most" in figure.axes[0].get_xlabel()


def test_wiener_is_drawn_once_for_equal_training_images(three):
    words = {text.get_text() for axes in sensitivity_maps(points(three)).axes for text in axes.texts}
    assert "Wiener" in words
    other = [*points(three), ("few", result("few", n=5, factor=0.5).points[0])]
    words = {text.get_text().replace("\n", " ") for axes in sensitivity_maps(other).axes for text in axes.texts}
    assert {"Wiener, images of wiener", "Wiener, images of few"} <= words


def test_nothing_to_draw_is_refused(three, grey):
    bare = [("bare", replace(three[0][1].points[0], sensitivity=None, by_vector={}, shown=np.array([], np.int64)))]
    for draw in (
        lambda found: vector_gallery(found, "svd"),
        lambda found: denoising_strip(found, pictures),
        sensitivity_maps,
        lambda found: spectra(found, "x0", "svd"),
        lambda found: by_vector_curves(found, {"frequency": "f"}),
        lambda found: shrinkage_and_image(found, "clean_coefficient", "x0"),
    ):
        with pytest.raises(DitlabError):
            draw([])
    for draw in (
        lambda: vector_gallery(bare, "svd"),
        lambda: sensitivity_maps(bare),
        lambda: by_vector_curves(bare, {"frequency": "f"}),
        lambda: shrinkage_and_image(bare, "clean_coefficient", "x0"),
        lambda: vector_gallery([*points(three), *points(grey)], "svd"),
    ):
        with pytest.raises(DitlabError):
            draw()


def test_the_drawings_of_a_comparison():
    settings = {"images": (0, 2), "sigmas": (0.3, 1.0)}
    comparison = compare_jacobians([result(**settings), result("half", factor=0.5, **settings)])
    found = jacobian_drawings(comparison, decode, right=True)
    kinds = ("vectors", "right-vectors", "measures", "shrinkage", "sensitivity")
    each = {f"jacobian-{kind}-image{i}-sigma{s}" for kind in kinds for i in (0, 2) for s in ("0.3", "1")}
    assert set(found) == {"jacobian-denoised", "jacobian-spectra"} | each
    for drawing in found.values():
        assert "wiener and half" in drawing.alt
        assert drawing.caption
        drawing.figure(LIGHT)
    # What could show a real image is left out, the vectors too: a leading one may draw a training image.
    hidden = set(jacobian_drawings(comparison, decode, hide_images=True))
    assert set(jacobian_drawings(comparison)) == set(found) - {"jacobian-denoised"} - {n for n in found if "right" in n}
    assert hidden == {name for name in found if "denoised" not in name and "vectors" not in name}


def test_a_target_without_sensitivity_and_a_few_vectors():
    found = jacobian_drawings(compare_jacobians([result(target="eps", top=4, show=(0, 1))]), decode)
    assert set(found) == {f"jacobian-{kind}" for kind in ("denoised", "spectra", "vectors", "measures", "shrinkage")}
    for drawing in found.values():
        drawing.figure(DARK)


def test_several_n_have_colours_of_their_own():
    comparison = compare_jacobians([result("a", n=12, factor=0.5), result("a", n=5, factor=0.5)])
    figure = jacobian_drawings(comparison, decode, slots={"a": 3})["jacobian-spectra"].figure(LIGHT)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a, N = 5", "a, N = 12"]
    assert len({line.get_color() for line in figure.axes[0].get_lines()[:2]}) == 2


def test_more_groups_than_colours_have_lines_of_their_own():
    groups = [result(label, n=n, factor=0.5) for label in ("a", "b", "c", "d") for n in (5, 12)]
    found = jacobian_drawings(compare_jacobians(groups), decode)
    for name in ("jacobian-spectra", "jacobian-measures"):
        shown = found[name].figure(LIGHT).legends[0].get_lines()
        looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in shown}
        assert len(set(looks.values())) == 8
        assert looks["a, N = 5"][0] == looks["a, N = 12"][0]
        assert looks["a, N = 5"][1] == looks["d, N = 5"][1] != looks["a, N = 12"][1]


def test_the_section(three):
    comparison = compare_jacobians([one for _, one in three])
    picture = ThemedFigure(b"", b"", "alt", "caption")
    section = jacobian_section(comparison, [picture], number=2, data={"a.json": {}})
    assert section.id == "jacobian-2"
    [paragraph] = section.paragraphs
    assert paragraph.startswith("r_hom is |f - J x| / |f|")
    assert paragraph.endswith(CAUTION)
    assert "harmonic: rank correlation" in section.notes[0]
    vectors = section.tables[1]
    assert list(vectors.columns)[-2:] == ["r_hom", "r_lin"]
    assert [row[0] for row in vectors.rows] == [label for label, _ in three]
    assert set(section.data) == {"jacobian-2.json", "a.json"}


def test_labels_are_not_parted_within_n():
    assert wrapped("bias-free, N = 1000", 16) == "bias-free,\nN = 1000"
    assert wrapped("global", 16) == "global"
    assert wrapped("bf_cnn_BSD300_color", 18) == "bf_cnn_BSD300_\ncolor"
    assert wrapped("short_name", 18) == "short_name"
