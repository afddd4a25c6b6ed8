"""Figures of attention maps, patterns and locality draw what the maps and results hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.attention.figures import (
    attention_map_figure,
    layers_shown,
    locality_by_n,
    locality_curves,
    patterns_figure,
)
from ditlab.analyses.attention.locality import pattern_weights
from ditlab.analyses.attention.maps import AttentionMaps
from ditlab.analyses.attention.result import QUANTITIES, RADII, LocalityResult
from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global, Pattern, Window
from ditlab.pages.theme import DARK, LIGHT, png
from ditlab.provenance import Provenance

GRID = (6, 6)
PATTERNS: tuple[Pattern, ...] = (Window(3), Window(5), Global())


def maps(sigma: float = 1.0, layers=(1, 2, 3)) -> AttentionMaps:
    found = {}
    for layer in layers:
        weights = torch.rand(2, 2, 36, 36) * PATTERNS[layer - 1].mask(GRID)
        found[layer] = weights / weights.sum(-1, keepdim=True)
    return AttentionMaps(found, GRID, {layer: PATTERNS[layer - 1] for layer in layers}, sigma)


def result(label: str, n: int, seed: int = 0, distance: float = 2.0, local: bool = False) -> LocalityResult:
    shape = (2, 3, 2)
    layer = np.arange(3)[None, :, None]
    values: dict[str, Any] = {name: np.full(shape, 0.5) for name in QUANTITIES}
    values["distance"] = distance + 0.1 * seed + 0.2 * layer * np.ones(shape)
    return LocalityResult(
        about=Provenance(f"{label}-{n}-{seed}", label, n, seed, 9, True, f"f{seed}", f"h{seed}-{n}"),
        config=AttentionConfig(images=2),
        levels=(0.3, 1.2),
        timesteps=None,
        layers=(1, 2, 3),
        depth=3,
        heads=2,
        grid=GRID,
        patch=1.0,
        patterns=PATTERNS if local else (Global(),) * 3,
        images=2,
        mass={radius: np.full(shape, (radius + 1) / 8) for radius in RADII},
        **values,
    )


def results(counts=(30, 300), seeds=(0, 1, 2)) -> list[LocalityResult]:
    return [
        result(label, n, seed, distance=base - n / 1000, local=label == "local")
        for label, base in (("global", 2.5), ("local", 1.5))
        for n in counts
        for seed in seeds
    ]


FIGURES = {
    "maps": lambda theme: attention_map_figure([("global", maps())], theme=theme),
    "maps as in the paper": lambda theme: attention_map_figure([("global", maps())], scale="paper", theme=theme),
    "maps of two runs, by head": lambda theme: attention_map_figure(
        [("a long name of a run with windows", maps()), ("local", maps())],
        heads=(1, 2),
        token=(0, 5),
        picture=np.zeros((1, 12, 12), np.uint8),
        theme=theme,
    ),
    "patterns": lambda theme: patterns_figure(PATTERNS, GRID, theme=theme),
    "patterns of the paper": lambda theme: patterns_figure([Window(3)] * 2 + [Global()], (4, 4), theme=theme),
    "curves": lambda theme: locality_curves(results(), theme=theme),
    "curves of one run": lambda theme: locality_curves(results((30,), (0,))[:1], theme=theme),
    "curves of four N": lambda theme: locality_curves(results((10, 30, 100, 300)), theme=theme),
    "by N": lambda theme: locality_by_n(results((10, 30, 100, 300)), theme=theme),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_over_other_text_or_outside_the_figure(name, texts_apart):
    texts_apart(FIGURES[name](LIGHT))


def test_themes_differ_and_the_same_figure_has_the_same_bytes():
    made = results((30,), (0,))
    light, dark = png(locality_curves(made, theme=LIGHT)), png(locality_curves(made, theme=DARK))
    assert light != dark
    assert light == png(locality_curves(made, theme=LIGHT))


def axes_with_images(figure):
    return [axes for axes in figure.axes if axes.images]


def test_a_map_of_uniform_attention_is_drawn_in_the_colour_of_uniform_attention():
    """In the style of the paper it would be the brightest of all."""
    uniform = torch.full((1, 1, 36, 36), 1 / 36)
    peaked = 0.6 * torch.eye(36).expand(1, 1, 36, 36) + 0.4 * uniform
    shown = AttentionMaps({1: uniform, 2: peaked}, GRID, {1: Global(), 2: Global()}, 1.0)
    images = [axes.images[0] for axes in axes_with_images(attention_map_figure([("x", shown)]))]
    assert {image.get_clim() for image in images} == {(0.25, 9.0)}  # one scale for all maps, from 1/4 to T/4
    flat, sharp = (np.asarray(image.get_array()) for image in images[:2])
    assert np.allclose(flat, 1)
    assert np.allclose(np.diag(sharp), 0.6 * 36 + 0.4)
    shades = [images[0].norm(value) for value in (0.0, 0.25, 1.0, 9.0, 22.0)]
    assert np.allclose(shades, [0, 0, np.log(4) / np.log(36), 1, 1])
    row = np.asarray(images[3].get_array())
    assert np.allclose(row, sharp[3 * 6 + 3].reshape(6, 6))  # the middle token's


def test_keys_outside_the_window_have_the_lowest_colour():
    image = axes_with_images(attention_map_figure([("x", maps())], layers=[1]))[0].images[0]
    outside = ~Window(3).mask(GRID).numpy()
    values = np.asarray(image.get_array())
    assert (values[outside] == 0.25).all()
    assert (values[~outside] > 0.25).any()


def test_in_the_papers_style_a_map_goes_from_its_least_to_its_largest_weight_and_is_clipped_at_a_tenth():
    found = maps()
    figure = attention_map_figure([("x", found)], layers=[2], token=(1, 4), scale="paper")
    above, below = axes_with_images(figure)
    shown = above.images[0]
    values = np.asarray(shown.get_array())
    assert (values.min(), values.max()) == (0, 1)
    assert shown.get_clim() == (0, 0.1)
    expected = found.maps[2][0].mean(0).double().numpy()
    assert np.allclose(values, (expected - expected.min()) / (expected.max() - expected.min()))
    [inset] = above.child_axes
    assert np.allclose(np.asarray(inset.images[0].get_array()), values[9:27, 9:27])  # the grid's middle rows
    assert tuple(inset.images[0].get_extent()) == (8.5, 26.5, 26.5, 8.5)
    row = np.asarray(below.images[0].get_array())
    assert np.allclose(row, expected[1 * 6 + 4].reshape(6, 6))
    box = below.patches[0]
    assert isinstance(box, Rectangle)
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (2.5, -0.5, 3, 3)


def test_the_box_of_a_corner_token_stays_on_the_grid():
    below = axes_with_images(attention_map_figure([("x", maps())], layers=[1], token=(5, 0)))[1]
    box = below.patches[0]
    assert isinstance(box, Rectangle)
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (-0.5, 3.5, 2, 2)


def test_one_head_of_one_image():
    found = maps()
    figure = attention_map_figure([("x", found)], layers=[3], heads=[2], image=1, token=(0, 0), scale="paper")
    above, below = axes_with_images(figure)
    expected = found.maps[3][1, 1].double().numpy()
    shown = np.asarray(above.images[0].get_array())
    assert np.allclose(shown, (expected - expected.min()) / (expected.max() - expected.min()))
    assert np.allclose(np.asarray(below.images[0].get_array()), expected[0].reshape(6, 6))


def test_runs_and_heads_are_lines_and_layers_are_columns():
    figure = attention_map_figure([("x", maps()), ("y", maps(layers=(1, 3)))], heads=[1, 2])
    assert len(axes_with_images(figure)) == 2 * 2 * 2 * 2  # runs, heads, map and token, the layers 1 and 3 of both
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert said.count("head 2") == 2
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["layer 1", "layer 3"]


def test_six_layers_are_shown_as_in_the_paper():
    assert layers_shown(range(1, 13)) == [2, 4, 6, 8, 10, 12]
    assert layers_shown([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert layers_shown(range(1, 8)) == [1, 3, 5, 7]
    assert layers_shown(range(1, 29))[-1] == 28
    assert len(layers_shown(range(1, 29))) <= 6


def test_the_patterns_of_the_papers_example():
    figure = patterns_figure([Window(3), Global()], (4, 4))
    said = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert said[:3] == ["sees 4 of 16", "sees 6 of 16", "sees 9 of 16"]
    shown = [np.asarray(axes.images[0].get_array()) for axes in axes_with_images(figure)]
    mask = Window(3).mask((4, 4)).numpy()
    assert np.array_equal(shown[2], mask[2 * 4 + 2].reshape(4, 4))
    assert np.array_equal(shown[3], mask)
    assert [axes.get_title(loc="center") for axes in figure.axes][1:5] == [
        "corner token", "edge token", "middle token", "whole mask",
    ]  # fmt: skip
    texts = [
        t.get_text()
        for axes in patterns_figure([Window(3)] * 3 + [Global(), Window(3)], (4, 4)).axes
        for t in axes.texts
    ]
    assert "layers 1-3, 5" in texts
    named = patterns_figure([Window(3)], (4, 4), numbers=[7])
    assert "layer 7" in {text.get_text() for axes in named.axes for text in axes.texts}
    assert "layer 4" in texts


def test_curves_show_means_over_seeds_and_both_references():
    made = results((30,))
    distance, mass = locality_curves(made).axes[:2]
    lines = {to_hex(line.get_color()): line for line in distance.lines if line.get_linewidth() > 1.5}
    of_local = [r for r in made if r.about.label == "local"]
    expected = np.mean([r.by_layer("distance") for r in of_local], axis=0)
    assert np.allclose(lines[LIGHT.run(1)].get_ydata(), expected)
    references = [np.asarray(line.get_ydata()) for line in distance.lines if line.get_linewidth() < 1.5]
    assert np.allclose(references[0], of_local[0].uniform_distance)
    assert np.allclose(references[1], of_local[0].pattern_distance)
    assert len(references) == 2  # global layers may see the grid, which the dotted line is
    shares = [float((pattern_weights(Global(), GRID) * w).sum()) for w in (Window(3).mask(GRID) / 36,)]
    dotted = np.asarray(mass.lines[0].get_ydata())
    assert dotted[1] == pytest.approx(shares[0])


def test_by_n_shows_each_seed():
    distance = locality_by_n(results((10, 300))).axes[0]
    solid = [line for line in distance.lines if line.get_linewidth() > 1.5]
    assert [list(np.asarray(line.get_xdata())) for line in solid] == [[10, 300], [10, 300]]
    dots = [np.asarray(c.get_offsets())[:, 1].tolist() for c in distance.collections]
    assert dots[0] == pytest.approx([2.49 + 0.2 + 0.1 * seed for seed in range(3)])


def test_a_run_keeps_its_colour():
    figure = locality_curves(results((30,), (0,))[:1], slots={"other": 0, "global": 1})
    assert LIGHT.run(1) in {to_hex(line.get_color()) for line in figure.axes[0].lines}


def test_what_cannot_be_drawn():
    with pytest.raises(DitlabError, match="the maps of at least one model, found none"):
        attention_map_figure([])
    with pytest.raises(DitlabError, match=r"one grid and noise level, found .* at 1 and .* at 2"):
        attention_map_figure([("x", maps()), ("y", maps(2.0))])
    with pytest.raises(DitlabError, match="a layer that all models have, found none"):
        attention_map_figure([("x", maps(layers=(1,))), ("y", maps(layers=(2,)))])
    with pytest.raises(DitlabError, match=r"expected a `token` from 0,0 to 5,5 .*found 6,0"):
        attention_map_figure([("x", maps())], token=(6, 0))
    with pytest.raises(DitlabError, match="expected `heads` from 1 to 2, found 3"):
        attention_map_figure([("x", maps())], heads=[3])
    with pytest.raises(DitlabError, match="at least one layer, found none"):
        patterns_figure([], GRID)
    with pytest.raises(DitlabError, match="different noise levels"):
        locality_curves([results()[0], LocalityResult(**{**vars(results()[1]), "levels": (0.3, 9.0)})])
