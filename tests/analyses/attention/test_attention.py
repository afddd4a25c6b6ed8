"""The attention analysis of models: results, cache, figures, what it refuses, its section of a report, its verb."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ditlab
from ditlab.analyses.attention import Attention, AttentionConfig, AttentionOptions, measure
from ditlab.analyses.attention.entries import AttentionEntry, group_entries, page_rows, token_pickers
from ditlab.analyses.attention.measure import measure_attention
from ditlab.analyses.attention.result import LocalityResult
from ditlab.analyses.base import Comparison, ReportContext
from ditlab.data import ImageSet, prepare
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.samplers import DDIMConfig
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.models.comparing import ModelSet, open_models
from ditlab.models.model import Model
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.nn.attention import SelfAttention
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import PageData, Section, ThemedFigure, build_page


def undrawn(drawing: Drawing) -> ThemedFigure:
    """A figure of the page, without the time that drawing takes."""
    return ThemedFigure(EMPTY, EMPTY, drawing.alt, drawing.caption)


_BUFFER = io.BytesIO()
Image.new("L", (1, 1)).save(_BUFFER, "PNG")
EMPTY = _BUFFER.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    np.savez(folder / "set.npz", images=rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), labels=np.arange(60) % 3)
    return prepare(f"array:{folder / 'set.npz'}", folder / "set", size=8)


def dit(attention: str = "g,g", *, patch: int = 1, classes: int = 0, seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    config = DiTConfig(
        image_size=(8, 8), channels=3, patch=patch, width=16, depth=2, heads=2, attention=attention, num_classes=classes
    )
    network = DiT(config).eval().requires_grad_(False)
    for parameter in network.parameters():  # a fresh DiT's blocks are identities
        parameter += 0.3 * torch.randn_like(parameter)
    return network


@pytest.fixture
def model(images, tmp_path) -> Callable[..., Model]:
    """`model("name", attention="3,3")` is one with 20 training and 20 test images; also of any other network."""

    def make(
        name: str, attention: str = "g,g", *, n: int = 20, seed: int = 0, module: nn.Module | None = None, **more: int
    ) -> Model:
        if module is None:
            denoiser = VPDenoiser(dit(attention, seed=seed, **more), make_schedule("linear", 1000))
        else:
            denoiser = Denoiser.wrap(module.eval().requires_grad_(False), shape=(3, 8, 8))
        few = DDIMConfig(steps="3") if module is None else None
        return Model(
            denoiser, images, n=n, test=20, seed=seed, own_split=True, name=name, out=tmp_path / name, sampler=few
        )

    return make


@pytest.fixture
def pair(model) -> ModelSet:
    return open_models([model("plain"), model("local", "3,3")], names=["global", "local"])


SMALL = AttentionConfig(images=4, sigmas=(0.5, 2.0))


def run(models: ModelSet, config: AttentionConfig = SMALL, out: Path | None = None, **options) -> Comparison:
    return Attention().run(models, config, AttentionOptions(**options), out=out)


def measured(models: ModelSet, config: AttentionConfig = SMALL, **options) -> list[LocalityResult]:
    return Attention().measure(models, config, AttentionOptions(**options))


def test_two_models(pair, tmp_path):
    out = tmp_path / "out"
    done = run(pair, out=out, token="2,3")
    assert [(g.label, g.n) for g in done.groups] == [("global", 20), ("local", 20)]
    assert done.to_json()["groups"][1]["mean"]["mass 1"] == pytest.approx(1, abs=1e-5)
    names = {
        "attention-comparison.json", "attention-locality.png", "attention-maps-sigma0.5.png",
        "attention-maps-sigma2.png", "attention-patterns.png",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in done.files} == names
    for name in names - {"attention-comparison.json"}:
        with Image.open(out / name) as image:
            assert image.width > 300
    for opened, plan in zip(pair, ("global", "window 3"), strict=True):
        assert sorted(p.name for p in (opened.path / "analysis").iterdir()) == ["attention.json", "attention.npz"]
        result = LocalityResult.load(opened.path / "analysis" / "attention.json")
        assert (result.levels, result.layers, result.heads, result.grid) == ((0.5, 2.0), (1, 2), 2, (8, 8))
        assert [pattern.name for pattern in result.patterns] == [plan] * 2
        assert result.about.settings["images_from"] == "test"
    [table] = done.tables()
    assert [row[0] for row in table.rows] == ["global", "local"]
    assert "Mean attention distance at N = 20: local minus global" in done.sentences()[0]


def test_a_measured_model_is_taken_from_the_cache(pair, monkeypatch):
    first = measured(pair)

    def fails(*words, **more):
        raise AssertionError("measured again")

    monkeypatch.setattr(measure, "measure_attention", fails)
    assert [r.to_json() for r in measured(pair)] == [r.to_json() for r in first]
    for change in ({"noise_seed": 1}, {"sigmas": (0.5,)}, {"images": 3}):
        with pytest.raises(AssertionError, match="measured again"):
            measured(pair, replace(SMALL, **change))
    with pytest.raises(AssertionError, match="measured again"):
        measured(pair, images_from="train")
    assert measured(pair, replace(SMALL, batch_size=3))


@pytest.mark.parametrize("source", ["train", "samples"])
def test_other_images(model, source, tmp_path):
    models = open_models([model("plain")])
    [result] = run(models, replace(SMALL, sigmas=(2.0,)), out=tmp_path / "out", images_from=source, image=2).results
    assert (result.images, result.about.settings["images_from"]) == (4, source)
    assert not np.allclose(result.distance, measured(models, replace(SMALL, sigmas=(2.0,)))[0].distance)
    assert (tmp_path / "out" / "attention-maps-sigma2.png").is_file()


def test_samples_are_those_of_their_seeds(model):
    opened = open_models([model("plain")]).open_one(0)
    every, labels = measure.images_of(opened, "samples", range(3))
    last, _ = measure.images_of(opened, "samples", range(2, 3))
    assert labels is None
    assert (every[2:] - last).abs().max() < 1e-4 * last.abs().max()
    conditional = open_models([model("classes", classes=3)]).open_one(0)
    assert measure.images_of(conditional, "samples", range(2, 5))[1].tolist() == [2, 0, 1]


def test_fewer_images_than_there_should_be_are_noted(model):
    [result] = measured(open_models([model("plain")]), AttentionConfig(images=500, sigmas=(1.0,), batch_size=25))
    assert result.notes == ("Only 20 images exist where 500 were asked for.",)


def test_a_conditional_model_gets_its_classes(model):
    opened = model("classes", classes=3)
    [result] = measured(open_models([opened]))
    batch, labels = opened.batch("test", 4)
    assert labels is not None
    with_labels, without = (
        measure_attention(opened.source_denoiser, batch, result.config, labels=chosen).distance
        for chosen in (labels, None)
    )
    assert np.abs(result.distance - with_labels).max() <= 2e-7
    assert np.abs(result.distance - without).max() > 2e-6


def test_seeds_are_averaged_and_the_first_is_drawn(model, monkeypatch):
    """Seeds have test images of their own, so that a picture of one must not be drawn beside the maps of another."""
    from ditlab.analyses.attention import section

    drawn = []
    draw = section.attention_map_figure
    monkeypatch.setattr(
        section, "attention_map_figure", lambda rows, **more: drawn.append((rows, more)) or draw(rows, **more)
    )
    settings = AttentionConfig(images=2, sigmas=(1.0,), layers=(1,))
    zero, one, local, other = model("a0"), model("a1", seed=1), model("b0", "3,3"), model("b1", "3,3", seed=1)

    def call(models: Sequence[Model], names: Sequence[str]) -> Comparison:
        return run(open_models(models, names=names), settings)

    group = call([zero, one], ["a", "a"]).to_json()["groups"][0]
    assert (group["runs"], group["std"]["distance"] > 0) == (["a0", "a1"], True)
    call([zero, one, local, other], list("aabb"))
    call([one, zero, local, other], list("aabb"))
    assert [[name for name, _ in rows] for rows, _ in drawn] == [["a"], ["a", "b"], ["a", "b"]]
    # The last call's first models of a and b are of seeds 1 and 0.
    assert [more["picture"] is None for _, more in drawn] == [False, False, True]


def test_options_reach_the_figure(pair, monkeypatch):
    from ditlab.analyses.attention import section

    drawn = []
    draw = section.attention_map_figure
    monkeypatch.setattr(section, "attention_map_figure", lambda rows, **more: drawn.append(more) or draw(rows, **more))
    run(pair, replace(SMALL, sigmas=(1.0,)), map_scale="paper", heads=(2,), token=(7, 0))
    [settings] = drawn
    assert (settings["scale"], settings["heads"], settings["token"]) == ("paper", (2,), (7, 0))


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({"layers": (3,)}, {}, "model plain: attention: expected `layers` from 1 to 2, found 3"),
        ({"timesteps": (1000,)}, {}, "model plain: attention: expected `timesteps` from 0 to 999, found 1000"),
        ({"sigmas": (9999.0,)}, {}, "expected a noise level sigma from 0.0100005 to"),
        ({}, {"heads": (3,)}, "expected `heads` from 1 to 2, found 3"),
        ({}, {"token": "8,0"}, r"expected a `token` from 0,0 to 7,7 \(row,column\), found 8,0"),
        ({}, {"image": 16}, "`image` must be from 0 to 15, one of the `images`, found 16"),
        ({"images": 40}, {"image": 30}, "`image` must be from 0 to 19, one of the `images`, found 30"),
    ],
)
def test_what_is_refused_before_work_starts(model, monkeypatch, config, options, says):
    monkeypatch.setattr(measure, "measure_attention", None)
    plain = model("plain")
    with pytest.raises(DitlabError, match=says):
        measured(open_models([plain]), AttentionConfig(**config), **options)
    assert not plain.path.exists()


def test_options_that_make_no_sense():
    for options, says in (
        ({"token": "8"}, "`token` must be ROW,COLUMN"),
        ({"image": -1}, "`image` must be at least 0"),
    ):
        with pytest.raises(DitlabError, match=says):
            AttentionOptions(**options)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, y, sigma, label):
        return self.inner(y)


class Mixed(nn.Module):
    """Layers over 8x8, twice 4x4, and a single token."""

    GRIDS = ((8, 8), (4, 4), (4, 4), (1, 1))

    def __init__(self, grids: Sequence[tuple[int, int]] = GRIDS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(192, 2, grid) for grid in grids)

    def forward(self, y, sigma, label):
        for layer in self.layers:
            rows, columns = layer.grid
            tokens = y.reshape(len(y), rows * columns, -1)
            wide = nn.functional.pad(tokens, (0, 192 - tokens.shape[-1]))
            y = y + layer(wide)[..., : tokens.shape[-1]].reshape(y.shape)
        return y


def test_a_model_without_attention_is_refused(model):
    models = open_models([model("plain"), model("conv", module=Convolution())], names=list("ab"))
    says = "model conv: attention: expected a network with attention layers, found Convolution"
    with pytest.raises(DitlabError, match=says):
        measured(models)


def test_models_that_have_other_layers_or_another_grid(model):
    coarse = model("coarse", patch=2)
    with pytest.raises(DitlabError, match="layers 1, 2 over 8x8 tokens in plain and layers 1, 2 over 4x4 tokens"):
        measured(open_models([model("plain"), coarse], names=list("ab")))
    with pytest.raises(DitlabError, match="in layer 2; layers 2, 3 are alike"):
        measured(open_models([model("mixed", module=Mixed())]))
    [result] = measured(open_models([model("mixed", module=Mixed())]), replace(SMALL, layers=(2, 3)))
    assert result.grid == (4, 4)


def test_models_that_cannot_be_told_apart(model):
    with pytest.raises(DitlabError, match="are both 'same' with N = 20 and seed 0; give them different `names`"):
        measured(open_models([model("plain"), model("local", "3,3")], names=["same", "same"]))


# ---- a report ----


def page(models: ModelSet, *, hide: bool = False, room: int = 0, shared: dict | None = None, config=SMALL) -> list:
    context = ReportContext(hide, configs={"attention": config}, shared=shared or {}, picker_bytes=room)
    return Attention().for_report(models, context)


def sections(comparisons: Sequence[Comparison]) -> list[Section]:
    return [
        c.section({name: undrawn(drawing) for name, drawing in c.drawings().items()}, number)
        for number, c in enumerate(comparisons, 1)
    ]


def test_a_report_has_maps_pickers_and_a_table(pair):
    [section] = sections(page(pair, room=500_000))
    assert (section.id, [part.id for part in section.parts]) == ("attention", ["locality"])
    [picker] = section.pickers
    assert [packed.label for packed in picker.runs] == ["global", "local"]
    assert picker.title == "N = 20, seed 0: the first held-out image"
    assert np.array_equal(picker.image, pair[0].decoded_held_out(1)[0].transpose(1, 2, 0))
    assert picker.levels == ["σ = 0.50", "σ = 2.00"]
    assert sum(packed.size for packed in picker.runs) < 500_000
    [locality] = section.parts
    assert set(locality.data) == {"locality.json", "plain-attention.json", "local-attention.json"}
    assert len(section.pictures) == len(locality.pictures) == 1
    html = build_page(PageData("t", ["s"], [section], labels=["global", "local"]))
    assert 'id="locality"' in html
    assert "relative to uniform attention" in html


def test_files_of_a_report_keep_their_names(pair):
    [comparison] = page(pair)
    drawings = comparison.drawings()
    assert list(drawings) == ["attention-maps", "attention-locality-1"]
    maps = drawings["attention-maps"].figure()
    assert {axes.get_title() for axes in maps.axes if axes.get_title()} == {"layer 1", "layer 2"}
    assert "σ = 2;" in maps.get_suptitle().replace("\n", " ")


def test_a_section_without_bytes_for_pickers_does_no_work(pair, monkeypatch):
    [comparison] = page(pair)
    monkeypatch.setattr(ModelSet, "open_one", None)
    section = comparison.section({})
    assert not section.pickers
    assert section.parts[0].tables


def test_too_few_bytes_are_said(pair):
    [section] = sections(page(pair, room=10))
    assert not section.pickers
    assert list(section.paragraphs) == [
        "No token picker: the page reached its size limit. Report fewer models to get one."
    ]


def test_hidden_images(pair):
    samples = torch.rand(2, 3, 8, 8) * 2 - 1
    [without] = sections(page(pair, hide=True, room=500_000))
    assert not without.pickers
    assert not without.pictures
    assert "real images are hidden" in without.paragraphs[0]
    empty = {"plain": (samples[:0], None)}
    [none_left] = sections(page(pair, hide=True, room=500_000, shared={"samples": empty}))
    assert "real images are hidden" in none_left.paragraphs[0]
    shared = {"samples": {"plain": (samples, None), "local": (samples.flip(0), None)}}
    [section] = sections(page(pair, hide=True, room=500_000, shared=shared))
    [picker] = section.pickers
    assert picker.title == "N = 20, seed 0: a sample drawn by plain"
    assert np.array_equal(picker.image, pair[0].decode(samples[:1])[0].transpose(1, 2, 0))
    assert len(section.pictures) == 1


def test_models_without_attention_are_left_out(model):
    models = open_models([model("conv", module=Convolution()), model("plain")], names=["conv", "dit"])
    [comparison] = page(models)
    assert comparison.labels == ("dit",)
    assert [m.name for m in comparison.models] == ["plain"]
    assert page(open_models([model("conv", module=Convolution())])) == []


def test_a_network_with_several_grids(model):
    models = open_models([model("mixed", module=Mixed()), model("plain")], names=["mixed", "dit"])
    first, second = page(models, room=500_000)
    assert (first.results[0].grid, first.results[0].layers) == ((4, 4), (2, 3))
    assert second.results[0].layers == (1, 2)
    parts = sections([first, second])
    assert [section.id for section in parts] == ["attention", "attention-2"]
    assert [section.parts[0].id for section in parts] == ["locality", "locality-2"]
    assert list(second.drawings()) == ["attention-maps-2", "attention-locality-2"]
    build_page(PageData("t", ["s"], parts, labels=["mixed", "dit"]))
    assert sum(packed.size for section in parts for p in section.pickers for packed in p.runs) < 500_000


@pytest.mark.parametrize("module", [None, Mixed([(1, 1)])], ids=["DiT", "own"])
def test_a_model_of_a_single_token_does_not_break_a_report(model, module):
    tiny = model("tiny", patch=8) if module is None else model("tiny", module=module)
    assert page(open_models([tiny])) == []
    [comparison] = page(open_models([tiny, model("plain")], names=["tiny", "dit"]))
    assert comparison.labels == ("dit",)
    with pytest.raises(DitlabError, match="model tiny: attention: expected layers with at least 2 tokens"):
        measured(open_models([tiny]))


def test_many_differences_are_a_table(model):
    models = [model(f"a{n}", n=n) for n in (10, 20)] + [model(f"b{n}", "3,3", n=n) for n in (10, 20)]
    [comparison] = page(open_models(models, names=list("aabb")))
    assert comparison.sentences() == ()
    _, differences = comparison.tables()
    assert [row[0] for row in differences.rows] == [
        "a at N = 20 minus a at N = 10", "b at N = 20 minus b at N = 10", "b minus a", "b minus a",
    ]  # fmt: skip
    assert "attention-locality-by-n-1" in comparison.drawings()


def entries_of(models: ModelSet) -> list[AttentionEntry]:
    return [AttentionEntry(models, place, result) for place, result in enumerate(measured(models))]


def test_the_figure_of_maps_has_four_rows_at_most(model):
    models = [model(f"a{n}", n=n) for n in (10, 15, 20)] + [model(f"b{n}", "3,3", n=n) for n in (10, 15, 20)]
    entries = entries_of(open_models(models, names=list("aaabbb")))
    assert [[entry.result.about.name for entry in group] for group in group_entries(entries)] == [
        ["a10", "b10"], ["a15", "b15"], ["a20", "b20"],
    ]  # fmt: skip
    assert [row.name for row in page_rows(entries, None)] == ["a, N = 10", "b, N = 10", "a, N = 15", "b, N = 15"]


def test_pickers_are_of_one_seed_and_what_does_not_fit_is_said(model):
    models = [model("a0", n=10), model("a1", n=10, seed=1), model("b0", "3,3", n=10), model("c", n=20)]
    entries = entries_of(open_models(models, names=["a", "a", "b", "a"]))
    first, second = token_pickers(entries, 1_000_000)
    assert [packed.label for packed in first.runs] == ["a", "b"]
    assert first.title.startswith("N = 10, seed 0")
    assert second.title.startswith("N = 20, seed 0")
    assert not first.notes
    [only] = token_pickers(entries, 25_000)
    assert list(only.notes) == ["The page has no room for 1 more picker."]
    drawn = token_pickers(
        entries, 1_000_000, samples={"a0": (torch.zeros(1, 3, 8, 8), None)}, drawn_by="the largest model"
    )
    assert [picker.title for picker in drawn] == ["N = 10, seed 0: a sample drawn by the largest model"]


# ---- Python and the command line ----


def test_the_call(model):
    comparison = ditlab.attention(model("plain"), images=2, sigmas=[1.0], device="cpu")
    assert comparison.results[0].levels == (1.0,)
    assert "Mean" not in comparison.sentences()[0]
    assert "<table" in comparison._repr_html_()


@pytest.fixture
def weights(tmp_path) -> Path:
    """A module that gives a model by name."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom ditlab.diffusion.denoisers import Denoiser\nfrom ditlab.nn.attention import SelfAttention\n\n"
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = SelfAttention(12, 2, (4, 4))\n\n    def forward(self, y, sigma, label):\n"
        "        tokens = torch.nn.functional.pixel_unshuffle(y, 2).flatten(2).transpose(1, 2)\n"
        "        tokens = self.layer(tokens).transpose(1, 2).reshape(-1, 12, 4, 4)\n"
        "        return torch.nn.functional.pixel_shuffle(tokens, 2)\n\n"
        "torch.manual_seed(0)\nmodel = Denoiser.wrap(Net().eval(), shape=(3, 8, 8))\n"
    )
    return tmp_path / "mine.py"


def test_the_verb(in_process, weights, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["attention", f"{weights}:model", "--data", images.path, "--test", 20, "--device", "cpu", "--out", "out"]
    done = in_process(*words, "--images", 3, "--sigmas", 0.5, "--token", "1,2", "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert record["kind"] == "locality-comparison"
    assert {Path(file).name for file in record["files"]} == {
        "attention-comparison.json", "attention-locality.png", "attention-maps-sigma0.5.png",
    }  # fmt: skip
    done = in_process(*words, "--images", 3, "--sigmas", 0.5)
    assert done.status == 0, done.err
    assert "Locality of attention: means over 1 layers, 2 heads, 3 images and noise levels σ = 0.5" in done.out
    for flags, says in (
        (["--layers", 3], "expected --layers from 1 to 1, found 3"),
        (["--sigmas", 1, "--timesteps", 3], "expected --sigmas or --timesteps, found both"),
        (["--token", "8"], "--token must be ROW,COLUMN such as 8,8, found '8'"),
        (["--images", 1], "--images must be at least 2, found 1"),
    ):
        done = in_process(*words, *flags)
        assert done.status == 2
        assert says in done.err.replace("\n", " ")
