"""What networks cost: the papers' numbers, the width of equal cost, and input that cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

import ditlab


def networks(*presets: str, **settings: Any) -> list[dict[str, Any]]:
    """The costs as JSON values, without memory where nothing else is said."""
    return ditlab.complexity(presets, **{"memory": False, **settings}).to_json()["networks"]


def test_the_papers_numbers(tmp_path):
    costs = ditlab.complexity(["dit-s/8", "dit-s/4"], channels=4, classes=1000, out=tmp_path / "costs")
    result = costs.to_json()
    assert [network["name"] for network in result["networks"]] == ["dit-s/8", "dit-s/4"]
    for network, gmacs in zip(result["networks"], (0.36, 1.41), strict=True):
        assert abs(network["gmacs"] - gmacs) < 0.01
        assert round(network["parameters"] / 1e6) == 33
        assert (network["batch_size"], network["steps"]) == (256, 400_000)
        assert network["training_gmacs"] == pytest.approx(network["gmacs"] * 256 * 400_000 * 3)
        assert 0 < network["activation_bytes_bf16"] < network["activation_bytes"]
        assert network["gmacs_without_attention"] < network["gmacs"]
        assert [*network["network"]["image_size"]] == [32, 32]
    folder = tmp_path / "costs"
    assert sorted(path.name for path in folder.iterdir()) == ["complexity.json", "complexity.png"]
    saved = json.loads((folder / "complexity.json").read_text())
    assert saved["networks"] == json.loads(json.dumps(result["networks"]))
    assert (folder / "complexity.png").read_bytes()[:4] == b"\x89PNG"


def test_the_width_that_costs_the_same():
    costs = ditlab.complexity("dit-nano/1", attention="3*4", size=(16,), memory=False, match="dit-nano/1")
    wanted, matched = costs.to_json()["networks"]
    assert wanted["name"] == "dit-nano/1"
    assert matched["network"]["attention"] == "3*4"
    assert matched["network"]["width"] > wanted["network"]["width"]
    assert matched["network"]["width"] % 4 == 0
    assert abs(matched["gmacs"] / wanted["gmacs"] - 1) < 0.06  # a step of 4 in the width is 10% here
    assert any(f"width {matched['network']['width']} costs" in sentence for sentence in costs.sentences())


def test_networks_of_every_kind():
    unet, *bias_free = networks("unet-an2024", "bf-unet", "bf-cnn", classes=10)
    assert unet["network"]["kind"] == "unet"
    assert (unet["network"]["num_classes"], [*unet["network"]["multipliers"]]) == (10, [1, 2, 3, 4])
    assert unet["parameters"] == 109_554_051 + 10 * 512  # and the table of classes
    assert unet["gmacs_without_attention"] == pytest.approx(302.7 / 32, abs=0.002)
    assert [network["attention_macs"] for network in bias_free] == [0, 0]  # which take no classes
    assert bias_free[0]["parameters"] == 7_659_264 + 2 * 9 * 64 * 2  # published for one channel; two more in and out


def test_classes_and_size_that_a_preset_has_are_its_own():
    costs = ditlab.complexity(["unet-imagenet64-cond", "unet-imagenet64"], memory=False)
    cond, uncond = costs.to_json()["networks"]
    assert (cond["network"]["num_classes"], uncond["network"]["num_classes"]) == (1000, 0)
    assert [[*network["network"]["image_size"]] for network in (cond, uncond)] == [[64, 64], [64, 64]]
    assert round(cond["parameters"] / 1e6, 2) == 273.05
    assert round(uncond["parameters"] / 1e6, 2) == 121.06
    assert costs.table().caption == "For one image of 64x64x3"


def test_an_et_als_equal_operations():
    costs = ditlab.complexity("dit-xs/1", match="unet-an2024", linear=True, memory=False)
    unet, dit = costs.to_json()["networks"]
    # The width nearest to the operations of their UNet, attention matrices aside, is the one that their DiT has.
    assert dit["network"]["width"] == 252
    says = "width 252 costs 99.06% of unet-an2024's GMACs without attention matrices"
    assert any(says in sentence for sentence in costs.sentences())
    assert dit["gmacs"] / unet["gmacs"] > 1.6


def test_a_unet_as_wide_as_costs_the_same():
    wanted, unet, bias_free = networks("unet-nano", "bf-unet", match="dit-nano/2")
    assert unet["network"]["width"] % 4 == 0
    for network in (unet, bias_free):
        assert abs(network["gmacs"] / wanted["gmacs"] - 1) < 0.15


@pytest.mark.parametrize(
    ("presets", "settings", "sentence"),
    [
        ("unet-nano", {"attention": "g"}, "unet-nano: expected settings of a unet network, found `attention`"),
        ("bf-unet dit-s/8", {"heads": 2}, "bf-unet: expected settings of a bf-unet network, found `heads`"),
        (
            "unet-cifar10 unet-imagenet64",
            {},
            "expected `size` for presets whose images differ in size, found 32x32 of unet-cifar10, 64x64 of unet-",
        ),
        (
            "unet-imagenet64",
            {"match": "dit-s/2"},
            "expected `size` for presets whose images differ in size, found 64x64 of unet-imagenet64, 32x32 of dit-s/2",
        ),
        ("unet-nano", {"size": (30,)}, "unet-nano: UNet config: with 3 levels image_size must be multiples of 4"),
        ("unet-nano", {"width": 18}, "unet-nano: UNet config: width must be even and a multiple of the 4 groups"),
        ("dit-s/8", {"linear": True}, "`linear` says what `match` compares; expected `match` with it, found none"),
        ("", {}, "complexity: expected at least one preset (e.g. dit-s/2), found none"),
        ("dit-sx/2", {}, "unknown preset 'dit-sx/2' (nearest: "),
        (
            "dit-s/8",
            {"size": (33,)},
            "dit-s/8: DiT config: image_size must be multiples of the patch 8, found (33, 33)",
        ),
        ("dit-s/8", {"size": (8, 8, 8)}, "complexity: `size`: expected one side or height and width, found [8, 8, 8]"),
        ("dit-s/8", {"size": (0,)}, "complexity: `size`: expected one side or height and width, found [0]"),
        ("dit-s/8", {"batch": 0}, "complexity: `batch`: expected at least 1, found 0"),
        ("dit-s/8", {"steps": -5}, "complexity: `steps`: expected at least 1, found -5"),
        ("dit-s/8", {"classes": -1}, "num_classes must be 0 (unconditional) or more, found -1"),
        ("dit-s/8", {"attention": "99,g*11"}, "attention window 99: expected a size of at most 4"),
        ("dit-s/8", {"heads": 7}, "width must be a multiple of the 7 heads, found 384"),
        ("dit-s/8", {"match": "dit-nona/1"}, "unknown preset 'dit-nona/1'"),
        ("dit-s/8", {"match": "dit-s/4", "width": 8}, "`match` finds the width, so `width` cannot be given with it"),
        ("dit-xl/2", {"size": (8,), "match": "dit-nano/8"}, "dit-xl/2: match: expected a network that can cost"),
        ("dit-s/8", {"sise": 8}, "unknown setting of complexity 'sise' (nearest: size, classes)"),
    ],
)
def test_input_that_cannot_be_used(refused, presets, settings, sentence):
    assert sentence in refused(ditlab.complexity, presets.split(), out="costs", **settings)
