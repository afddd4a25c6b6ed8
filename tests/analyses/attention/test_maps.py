"""Attention maps of denoisers of several kinds, and what is measured on them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ditlab.analyses.attention.comparison import compare_locality
from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.attention.locality import (
    consistency,
    consistency_control,
    grid_part,
    mean_distance,
    position_invariance,
)
from ditlab.analyses.attention.maps import (
    AttentionLayer,
    attention_layers,
    attention_maps,
    has_attention,
    noise_levels_of,
    uniform_grid_layers,
)
from ditlab.analyses.attention.measure import measure_attention
from ditlab.analyses.attention.result import LocalityResult, pattern_from_json, pattern_to_json
from ditlab.diffusion.baselines import WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.network_denoisers import EDMDenoiser, VPDenoiser
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.metrics.denoising_errors import level_noise
from ditlab.networks.dit import Block, DiT, DiTConfig
from ditlab.nn.attention import SelfAttention, attention, capture_attention
from ditlab.nn.patterns import Global, Partition, Window
from ditlab.progress import Bar
from ditlab.provenance import Provenance

GRID, TOKENS = (4, 4), 16


def dit(attention: str = "3,g,g", *, learn_sigma: bool = True, classes: int = 0) -> DiT:
    config = DiTConfig(
        image_size=(8, 8), patch=2, width=16, depth=3, heads=2, attention=attention, num_classes=classes,
        learn_sigma=learn_sigma,
    )  # fmt: skip
    network = DiT(config).eval().requires_grad_(False)
    for parameter in network.parameters():  # a fresh DiT's blocks are identities
        parameter += 0.3 * torch.randn_like(parameter)
    return network


class Own(nn.Module):
    """A user's own network: tokens are 2x2 patches, with two registers behind them in the second layer."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.first = SelfAttention(12, 2, GRID, Window(3))
        self.second = SelfAttention(12, 2, GRID, extra=extra)
        self.registers = nn.Parameter(torch.randn(1, extra, 12))

    def forward(self, y: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        tokens = nn.functional.pixel_unshuffle(y, 2).flatten(2).transpose(1, 2)
        tokens = tokens + self.first(tokens)
        tokens = torch.cat([tokens, self.registers.expand(len(y), -1, -1)], 1)
        tokens = (tokens + self.second(tokens))[:, :TOKENS]
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).reshape(-1, 12, *GRID), 2)

    def again(self, y: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        return self(self(y, sigma, label), sigma, label)


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8) * 2 - 1


class Shows(Bar):
    """Collects what a bar is told."""

    def __init__(self, shown: list[tuple[int, int | None]]) -> None:
        self.shown = shown

    def __call__(self, done: int, total: int | None = None, **fields: Any) -> None:
        self.shown.append((done, total))


DENOISERS = {
    "DiT-VP": lambda: VPDenoiser(dit(), make_schedule("linear", 1000)),
    "DiT-EDM": lambda: EDMDenoiser(dit(learn_sigma=False)),
    "own": lambda: Denoiser.wrap(Own().requires_grad_(False), (3, 8, 8)),
    "own with registers": lambda: Denoiser.wrap(Own(2).requires_grad_(False), (3, 8, 8)),
}


@pytest.mark.parametrize("kind", DENOISERS)
def test_maps_of_any_denoiser(kind):
    denoiser = DENOISERS[kind]()
    found = attention_maps(denoiser, images(2), 0.7)
    layers = attention_layers(denoiser)
    assert [*found.maps] == [layer.number for layer in layers] == [*range(1, len(layers) + 1)]
    assert (found.grid, found.sigma) == (GRID, 0.7)
    for layer in layers:
        maps = found.maps[layer.number]
        assert maps.shape == (2, 2, TOKENS, TOKENS)
        assert torch.allclose(maps.sum(-1), torch.ones(2, 2, TOKENS), atol=1e-5)
        assert (maps[..., ~layer.pattern.mask(GRID)] == 0).all()  # exactly
        assert found.patterns[layer.number] == layer.pattern
    assert layers[0].pattern == Window(3)


@pytest.mark.parametrize("attention", ["3,3,3", "g,g,g"])
def test_maps_times_values_are_the_output_of_the_layer(attention):
    network = dit(attention)
    denoiser = VPDenoiser(network, make_schedule("linear", 1000))
    x0, sigma, seen = images(2), 0.7, {}
    for number, block in enumerate(network.blocks, 1):
        assert isinstance(block, Block)
        block.attention.register_forward_hook(
            lambda layer, args, out, number=number: seen.__setitem__(number, (layer, args[0], out))
        )
    found = attention_maps(denoiser, x0, sigma)
    for number, (layer, tokens, out) in seen.items():
        _, _, values = layer.split(tokens)
        again = layer.proj((found.maps[number] @ values).transpose(1, 2).flatten(2))
        assert float((again - out).abs().max() / out.abs().max()) < 1e-6


def test_the_noise_is_that_of_the_other_analyses():
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.seen = Own(), []

        def forward(self, y, sigma, label):
            self.seen.append(y)
            return self.inner(y, sigma, label)

    module, x0 = Remembers().requires_grad_(False), images(3)
    denoiser = Denoiser.wrap(module, (3, 8, 8))
    attention_maps(denoiser, x0, 0.5, noise_seed=4)
    attention_maps(denoiser, x0[1:], 0.5, noise_seed=4, place=1)
    measure_attention(denoiser, x0, AttentionConfig(images=3, sigmas=(0.5,), noise_seed=4, batch_size=2))
    expected = x0 + 0.5 * level_noise(4, 0.5, range(3), [0] * 3, (3, 8, 8))
    for seen, part in zip(module.seen, (slice(0, 3), slice(1, 3), slice(0, 2), slice(2, 3)), strict=True):
        assert torch.equal(seen, expected[part])


def test_layers_and_places_count_as_the_paper_does():
    denoiser = DENOISERS["DiT-VP"]()
    x0 = images(2)
    every, some = attention_maps(denoiser, x0, 0.7), attention_maps(denoiser, x0, 0.7, layers=[3, 1])
    assert [*some.maps] == [1, 3]
    assert torch.equal(some.maps[3], every.maps[3])
    with capture_attention(denoiser.module) as inside:
        denoiser(x0 + 0.7 * level_noise(0, 0.7, range(2), [0, 0], (3, 8, 8)), 0.7)
    assert torch.equal(inside[0][0], every.maps[1])
    assert torch.equal(every.of(2, image=1, head=2), every.maps[2][1, 1])
    assert torch.equal(every.of(2), every.maps[2][0].mean(0))
    assert torch.equal(every.token((2, 3), 2, head=1).flatten(), every.maps[2][0, 0, 2 * 4 + 3])


@pytest.mark.parametrize("kind", DENOISERS)
def test_numbers_are_those_of_the_maps(kind):
    denoiser, x0 = DENOISERS[kind](), images(5)
    config = AttentionConfig(images=5, sigmas=(0.3, 2.0), batch_size=2)
    shown = []
    result = measure_attention(denoiser, x0, config, bar=Shows(shown))
    assert shown == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]
    assert result.distance.shape == (2, len(result.layers), 2)
    for level, sigma in enumerate(result.levels):
        found = attention_maps(denoiser, x0, sigma)
        for place, layer in enumerate(result.layers):
            maps = found.maps[layer]
            for values, expected in (
                (result.distance, mean_distance(maps, GRID).mean(0)),
                (result.position_invariance, position_invariance(maps).mean(0)),
                (result.consistency, consistency(maps)),
                (result.consistency_control, consistency_control(maps)),
            ):
                assert np.allclose(values[level, place], expected.numpy(), atol=1e-5)
    assert result.extra == (2 if kind == "own with registers" else 0)
    assert bool(result.notes) == bool(result.extra)


def test_batches_do_not_matter():
    denoiser, x0 = DENOISERS["DiT-EDM"](), images(5)
    one, other = (measure_attention(denoiser, x0, AttentionConfig(images=5, batch_size=b)) for b in (1, 5))
    for name, values in one.to_json()["values"].items():
        assert np.allclose(values, other.to_json()["values"][name], atol=2e-6), name


def test_a_local_layer_stays_within_its_window():
    result = measure_attention(DENOISERS["DiT-VP"](), images())
    assert np.allclose(result.mass[1][:, 0], 1, atol=1e-6)
    assert (result.mass[1][:, 1] < 0.99).all()
    assert result.pattern_distance[0] < result.pattern_distance[1] == pytest.approx(result.uniform_distance)


def test_labels_reach_the_network():
    denoiser = VPDenoiser(dit(classes=3), make_schedule("linear", 1000))
    x0, config = images(), AttentionConfig(images=4, sigmas=(0.5,))
    zero, two = (measure_attention(denoiser, x0, config, labels=torch.full((4,), label)).distance for label in (0, 2))
    assert not np.allclose(zero, two)
    labelled = attention_maps(denoiser, x0[:1], 0.5, label=torch.tensor([2]))
    assert not torch.allclose(labelled.maps[3], attention_maps(denoiser, x0[:1], 0.5).maps[3])


def test_a_compiled_network_is_seen_too():
    module = Own().requires_grad_(False)
    expected = attention_maps(Denoiser.wrap(module, (3, 8, 8)), images(1), 0.5).maps
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    module.first.compile(backend=backend)
    compiled = attention_maps(Denoiser.wrap(module, (3, 8, 8)), images(1), 0.5).maps
    assert compiled.keys() == expected.keys()
    assert not calls


def test_default_levels():
    vp = DENOISERS["DiT-VP"]()
    assert measure_attention(vp, images(), AttentionConfig(images=2)).timesteps == (100, 300, 500)
    levels = noise_levels_of(vp, AttentionConfig())
    assert noise_levels_of(DENOISERS["DiT-EDM"](), AttentionConfig()) == pytest.approx(levels)
    other = VPDenoiser(dit(), make_schedule("cosine", 1000))
    assert noise_levels_of(other, AttentionConfig()) == pytest.approx(levels, rel=0.01)
    assert set(noise_levels_of(other, AttentionConfig())) <= set(make_schedule("cosine", 1000).sigmas.tolist())
    assert noise_levels_of(vp, AttentionConfig(timesteps=(0, 999)))[0] == pytest.approx(0.01, rel=1e-2)


def result_of(label: str, n: int, seed: int, distance: float, **changes) -> LocalityResult:
    about = Provenance(f"{label}-{n}-{seed}", label, n, seed, 9, True, f"family{seed}", f"hash{seed}-{n}")
    result = measured()
    return replace(result, about=about, distance=np.full_like(result.distance, distance), **changes)


@cache
def measured() -> LocalityResult:
    return measure_attention(DENOISERS["DiT-VP"](), images(2), AttentionConfig(images=2, sigmas=(0.5,)))


def test_results_come_back_from_their_files(tmp_path):
    result = measure_attention(DENOISERS["own with registers"](), images(), about=Provenance("a", "own", 30, 1))
    path = result.save(tmp_path)
    again = LocalityResult.load(path)
    assert again.to_json() == result.to_json()
    assert again.by_image is not None
    assert again.by_image["distance"].shape == (4, 3, 2, 2)
    assert np.allclose(again.by_image["distance"].mean(0), again.distance, atol=1e-6)
    (tmp_path / "attention.npz").unlink()
    alone = LocalityResult.load(path)
    assert alone.by_image is None
    assert (alone.about, alone.config, alone.patterns) == (result.about, result.config, result.patterns)
    assert json.loads(path.read_text())["pattern_distance"] == result.pattern_distance.tolist()


def test_keys_of_files_are_those_of_before(tmp_path):
    result = measure_attention(DENOISERS["own"](), images(2), AttentionConfig(images=2, sigmas=(0.5,)))
    record = json.loads(result.save(tmp_path).read_text())
    assert record["config"] == {
        "images": 2, "levels": [0.5], "steps": None, "layers": [], "noise_seed": 0, "batch_size": 4,
    }  # fmt: skip


RECORDED = sorted((Path(__file__).parents[3] / "results").rglob("attention.json"))


def test_results_of_earlier_versions_are_read():
    assert len(RECORDED) > 20
    for path in RECORDED:
        result = LocalityResult.load(path)
        again, record = result.to_json(), json.loads(path.read_text())
        assert again.keys() == record.keys()
        assert {**again["about"], "weights": ""} == {"weights": "", **record["about"]}
        for name in ("config", "levels", "timesteps", "layers", "heads", "grid", "patterns", "values", "by_layer"):
            assert json.loads(json.dumps(again[name])) == record[name], (path, name)


@pytest.mark.parametrize("pattern", [Global(), Window(5), Window(3, "shift"), Partition(4)], ids=lambda p: p.name)
def test_patterns_come_back(pattern):
    assert pattern_from_json(json.loads(json.dumps(pattern_to_json(pattern)))) == pattern


def test_a_damaged_result_is_refused(tmp_path):
    path = measure_attention(DENOISERS["own"](), images(2)).save(tmp_path)
    record = json.loads(path.read_text())
    for change, says in (
        (lambda r: r.pop("grid"), "a field is missing or unknown"),
        (lambda r: r["config"].update(colour=1), "a field is missing or unknown"),
        (lambda r: r["values"].update(entropy=[[1.0]]), r"expected entropy of shape \(3, 2, 2\), found \(1, 1\)"),
        (lambda r: r["patterns"][0].update(kind="star"), "unknown attention pattern 'star'"),
        (lambda r: r.update(kind="psnr-gap"), "expected a result of kind 'attention-locality'"),
    ):
        copy = json.loads(json.dumps(record))
        change(copy)
        path.write_text(json.dumps(copy))
        with pytest.raises(DitlabError, match=says):
            LocalityResult.load(path)


def test_means_by_layer_and_over_all():
    result = measure_attention(DENOISERS["DiT-VP"](), images())
    assert result.by_layer("distance").tolist() == pytest.approx(result.distance.mean(axis=(0, 2)).tolist())
    assert result.by_layer("distance", 1).tolist() == pytest.approx(result.distance[1].mean(axis=1).tolist())
    assert result.average(1) == pytest.approx(result.mass[1].mean())
    with pytest.raises(DitlabError, match=r"unknown attention quantity 'distanc' .nearest: distance"):
        result.values("distanc")
    with pytest.raises(DitlabError, match=r"expected a radius of .* found 9"):
        result.values(9)


def test_sentences_hold_the_numbers():
    said = " ".join(result_of("global", 30, 0, 1.25).sentences())
    assert "global, N = 30: mean attention distance 1.25 tokens, over 3 layers, 2 heads, 1 levels and 2 images." in said


def test_comparison_is_paired_by_seed():
    results = [
        result_of(label, n, seed, base + 0.1 * seed)
        for label, n, base in (("global", 10, 4.0), ("global", 300, 2.0), ("local", 300, 1.0))
        for seed in (0, 1, 2)
    ]
    comparison = compare_locality(results)
    assert [(g.label, g.n, len(g.results)) for g in comparison.groups] == [
        ("global", 10, 3), ("global", 300, 3), ("local", 300, 3),
    ]  # fmt: skip
    [(label, by_n)] = comparison.between_counts()
    assert (label, by_n.seeds, by_n.seen) == ("global", (0, 1, 2), True)
    assert by_n.mean == pytest.approx(-2)
    [(n, by_label)] = comparison.between_labels()
    assert (n, by_label.mean) == (300, pytest.approx(-1))
    said = comparison.sentences()
    assert any("global at N = 300 is lower (global at N = 300 minus global at N = 10: -2.00 tokens" in s for s in said)
    assert json.loads(json.dumps(comparison.to_json()))["groups"][0]["mean"]["distance"] == pytest.approx(4.1)


def test_one_seed_claims_nothing():
    comparison = compare_locality([result_of("global", n, 0, 1.0) for n in (10, 300)])
    assert "with one seed (0), so nothing can be said about its spread" in comparison.sentences()[-1]


def test_results_that_may_not_stand_side_by_side():
    one = result_of("global", 10, 0, 1.0)
    about = replace(one.about, label="local", name="other")
    for changes, says in (
        ({"about": replace(about, split_family="x")}, "have different splits"),
        ({"about": replace(about, label="global")}, "are both 'global' with N = 10 and seed 0"),
        ({"about": about, "levels": (0.6,)}, "were measured at different noise levels .0.5 and 0.6."),
        ({"about": replace(about, settings={"images_from": "train"})}, "with different images .test and train."),
        ({"about": about, "images": 3}, "were measured with different images .2 and 3."),
        ({"about": about, "layers": (1, 2, 4)}, "were measured with different layers"),
        ({"about": about, "config": AttentionConfig(noise_seed=1)}, "were measured with different noise .0 and 1."),
    ):
        with pytest.raises(DitlabError, match=says):
            compare_locality([one, replace(one, **changes)])
    with pytest.raises(DitlabError, match="at least one result"):
        compare_locality([])


class Plain(nn.Module):
    def forward(self, y, sigma, label):
        return y


class Two(nn.Module):
    """Layers over two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SelfAttention(12, 2, GRID), SelfAttention(12, 2, (2, 2))])


class OneToken(nn.Module):
    """One layer over a single token."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SelfAttention(12, 2, (1, 1))


REFUSED = {
    "a plain function": (
        lambda: Denoiser.wrap(lambda y, sigma, label: y, (3, 8, 8)),
        {},
        "expected a denoiser made of a network, found a WrappedDenoiser without one; give Denoiser.wrap the nn.Module",
    ),
    "a closed form": (lambda: WienerDenoiser(images(4)), {}, "found a WienerDenoiser without one"),
    "no attention": (lambda: Denoiser.wrap(Plain(), (3, 8, 8)), {}, "a network with attention layers, found Plain"),
    "two grids": (
        lambda: Denoiser.wrap(Two(), (3, 8, 8)),
        {},
        "found 4x4 tokens with 2 heads in layer 1 and 2x2 tokens with 2 heads in layer 2; layers 1 are alike",
    ),
    "a single token": (
        lambda: Denoiser.wrap(OneToken(), (3, 8, 8)),
        {},
        "expected layers with at least 2 tokens, found 1x1 tokens",
    ),
    "a layer too high": (DENOISERS["DiT-VP"], {"layers": (4,)}, "expected `layers` from 1 to 3, found 4"),
    "a step too high": (DENOISERS["DiT-VP"], {"timesteps": (1000,)}, "expected `timesteps` from 0 to 999, found 1000"),
    "steps of a range": (DENOISERS["DiT-EDM"], {"timesteps": (3,)}, "this denoiser has no numbered steps"),
    "a level too high": (DENOISERS["DiT-VP"], {"sigmas": (1e4,)}, "expected a noise level sigma from"),
    "a layer twice": (
        lambda: Denoiser.wrap(Own().requires_grad_(False).again, (3, 8, 8)),
        {},
        "expected layer 1 to run once in a pass, found it running again",
    ),
}


def layers_over(*grids: tuple[int, int]) -> list[AttentionLayer]:
    return [AttentionLayer(number, Global(), 2, grid, 0) for number, grid in enumerate(grids, 1)]


def test_the_largest_group_of_layers_that_are_alike():
    assert uniform_grid_layers(layers_over((4, 4), (4, 4))) == ()
    assert uniform_grid_layers(layers_over((4, 4), (2, 2), (2, 2))) == (2, 3)
    assert uniform_grid_layers(layers_over((2, 2), (4, 4))) == (2,)
    # Layers of a single token have nothing to show, however many there are.
    assert uniform_grid_layers(layers_over((1, 1), (1, 1), (2, 2))) == (3,)


def test_which_denoisers_have_attention():
    assert has_attention(DENOISERS["own"]())
    assert not has_attention(Denoiser.wrap(lambda y, sigma, label: y, (3, 8, 8)))
    assert not has_attention(Denoiser.wrap(Plain(), (3, 8, 8)))
    assert not has_attention(Denoiser.wrap(OneToken(), (3, 8, 8)))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_measured(what):
    make, settings, says = REFUSED[what]
    with pytest.raises(DitlabError, match=says):
        measure_attention(make(), images(), AttentionConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"images": 1}, "`images` must be at least 2, found 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"layers": (0,)}, "counted from 1, found .0."),
        ({"layers": (2, 2)}, "`layers` must be different"),
        ({"timesteps": (5, 3)}, "`timesteps` must be ascending"),
        ({"timesteps": (5,), "sigmas": (0.5,)}, "expected `sigmas` or `timesteps`, found both"),
        ({"sigmas": (-0.5,)}, "`sigmas` must be positive"),
    ],
)
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(DitlabError, match=says):
        AttentionConfig(**settings)


def test_images_and_weights_that_cannot_be_used():
    denoiser = DENOISERS["DiT-VP"]()
    with pytest.raises(DitlabError, match="at least 2 images, found 1"):
        measure_attention(denoiser, images(1))
    with pytest.raises(DitlabError, match=r"takes images .3, 8, 8., found images .3, 4, 4."):
        attention_maps(denoiser, torch.zeros(2, 3, 4, 4), 0.5)
    with pytest.raises(DitlabError, match=r"expected a `token` from 0,0 to 3,3 .row,column., found 4,0"):
        attention_maps(denoiser, images(1), 0.5).token((4, 0), 1)
    with pytest.raises(DitlabError, match="expected `heads` from 1 to 2, found 3"):
        attention_maps(denoiser, images(1), 0.5).of(1, head=3)
    with pytest.raises(DitlabError, match=r"expected a layer of \[1, 2, 3\], found 4"):
        attention_maps(denoiser, images(1), 0.5).of(4)
    denoiser.module.blocks[1].attention.qkv.weight[0, 0] = float("nan")
    with pytest.raises(DitlabError, match=r"the maps of layer 2 at noise level 0.5 are not finite"):
        attention_maps(denoiser, images(1), 0.5)


def test_a_window_by_the_kernel_and_by_the_map():
    # The layer's own kernel and the recomputed map agree where the pattern is a partition too.
    layer = SelfAttention(8, 2, GRID, Partition(2)).requires_grad_(False)
    x = torch.randn(2, TOKENS, 8)
    with capture_attention(layer) as maps:
        layer(x)
    q, k, v = layer.split(x)
    assert torch.allclose(maps[0][0] @ v, attention(q, k, v, layer.pattern, GRID), atol=1e-6)
    assert torch.equal(grid_part(maps[0][0], GRID), maps[0][0])
