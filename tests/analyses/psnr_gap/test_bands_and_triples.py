"""What an average over all levels hides: bands of noise levels, and the two sides of a gap."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ditlab.analyses.base import Comparison
from ditlab.analyses.psnr_gap import PSNRGap
from ditlab.analyses.psnr_gap.comparison import compare
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.errors import Incompatible, InvalidConfig
from ditlab.provenance import Provenance

LEVELS = (0.05, 0.5, 1.0, 2.0, 4.0, 8.0)
OFFSETS = np.array([-0.04, 0.0, 0.04])
"""Of three seeds, so that differences have a spread."""


def result(label: str, train: list[float], test: list[float], seed: int = 0, images: int = 4) -> PSNRResult:
    """A result with these PSNRs in dB by level, the same for all images."""
    sides = [np.tile(4 / 10 ** (np.array(psnr) / 10), (images, 1)).T[..., None] for psnr in (train, test)]
    about = Provenance(f"{label}-{seed}", label, 30, seed, 9, True, f"f{seed}", f"h{seed}")
    return PSNRResult(about, PSNRConfig(images=images), LEVELS, None, 2.0, *sides)


def kind(label: str, train: list[float], test: list[float], scale: float = 1.0) -> list[PSNRResult]:
    """Three seeds of a kind of run; `scale` sets how they scatter."""
    return [
        result(label, [v + scale * o for v in train], [v + scale * o for v in test], seed)
        for seed, o in enumerate(OFFSETS)
    ]


GLOBAL = kind("global", [40, 30, 28, 22, 18, 10], [40, 27, 25, 20, 17, 10])
# Better by 1 dB on held-out images at low noise and worse by 1 dB at middle noise; the average does not move.
LOCAL = kind("local", [40, 30, 28, 22, 18, 10], [40, 28, 26, 19, 16, 10], scale=-1.0)


def test_effects_of_opposite_signs_are_seen_by_band():
    comparison = compare([*GLOBAL, *LOCAL])
    (triple,) = comparison.triples
    assert triple.test.mean == pytest.approx(0.0)
    assert not triple.test.seen
    by_band = {band.name: inside.triples[0].test for band, inside in comparison.by_band.items()}
    assert {name: round(d.mean, 6) for name, d in by_band.items()} == {"low": 1.0, "middle": -1.0, "high": 0.0}
    assert {name: d.seen for name, d in by_band.items()} == {"low": True, "middle": True, "high": False}


def test_the_averages_of_a_band_are_those_of_its_levels():
    one = result("global", [40, 30, 28, 22, 18, 10], [40, 27, 25, 20, 17, 11])
    bands = {band.name: inside for band, inside in one.by_band().items()}
    assert {name: inside.levels for name, inside in bands.items()} == {
        "low": (0.5, 1.0),
        "middle": (2.0, 4.0),
        "high": (8.0,),
    }
    assert bands["middle"].average("train") == pytest.approx(20.0)
    assert bands["high"].average("gap") == 0.0
    assert bands["high"].average("gap_untruncated") == pytest.approx(-1.0)
    saved = one.to_json()["bands"]
    assert [(band["name"], band["from"], band["levels"]) for band in saved] == [
        ("low", 0.1, 2),
        ("middle", 1.5, 2),
        ("high", 6.0, 1),
    ]
    assert saved[0]["averages"]["mse_mean"]["test"] == pytest.approx(26.0)


def test_bands_are_a_setting_that_the_result_keeps(tmp_path):
    about, levels = GLOBAL[0].about, GLOBAL[0].levels
    config = PSNRConfig(images=4, bands=(0.7, 3.0))
    path = PSNRResult(about, config, levels, None, 2.0, GLOBAL[0].train_mse, GLOBAL[0].test_mse).save(tmp_path)
    again = PSNRResult.load(path)
    assert again.config.bands == (0.7, 3.0)
    assert [inside.levels for inside in again.by_band().values()] == [(1.0, 2.0), (4.0, 8.0)]
    record = json.loads(path.read_text())
    del record["config"]["bands"], record["bands"]  # a result of before
    path.write_text(json.dumps(record))
    assert PSNRResult.load(path).config.bands == (0.1, 1.5, 6.0)
    with pytest.raises(InvalidConfig, match=r"`bands`: expected noise levels above 0, ascending, found \[3, 1\]"):
        PSNRConfig(bands=(3, 1))


def test_a_smaller_gap_says_which_side_moved():
    base = [30.0] * 6, [25.0] * 6
    worse_fit = kind("worse", [28.0] * 6, [25.0] * 6, scale=-0.2)
    better = kind("better", [30.0] * 6, [27.0] * 6, scale=-0.2)
    both_fall = kind("falls", [27.0] * 6, [24.0] * 6, scale=-0.2)

    def reading(others: list[PSNRResult]) -> str:
        (triple,) = compare([*kind("global", *base, scale=0.2), *others]).triples
        assert triple.gap.mean == pytest.approx(-2.0)
        return triple.reading

    assert reading(worse_fit) == "train PSNR is lower; test PSNR is not seen to be higher"
    assert reading(better) == "test PSNR is higher"
    assert reading(both_fall) == "train PSNR is lower; test PSNR is lower, too"
    sentences = compare([*kind("global", *base, scale=0.2), *worse_fit]).sentences()
    assert sentences[-1] == (
        "At N = 30 the gap of worse is smaller than that of global: train PSNR is lower; test PSNR is not seen to be "
        "higher."
    )


def test_no_reading_of_a_difference_that_is_not_seen():
    (triple,) = compare([*GLOBAL, *kind("other", [40, 30, 28, 22, 18, 10], [40, 27, 25, 20, 17, 10], -1.0)]).triples
    assert triple.reading == ""


def test_tables_show_the_triple_and_the_bands():
    analysis = PSNRGap()
    results = [*GLOBAL, *LOCAL]
    comparison = Comparison(analysis, analysis.compare(results), results)
    over_all, by_band = analysis.tables(comparison)
    assert over_all.columns[3:] == ("train PSNR, dB", "test PSNR, dB", "gap, dB", "train - test, dB")
    assert [row[2:4] for row in by_band.rows[::2]] == [
        ("low, 0.1-1.5", 2),
        ("middle, 1.5-6", 2),
        ("high, above 6", 1),
    ]
    section = analysis.section(comparison, {})
    quantities = [row[0] for row in section.parts[0].tables[0].rows]
    assert quantities[:4] == ["train PSNR", "test PSNR", "gap", "train - test PSNR"]
    assert quantities[4:8] == [f"{name}, low band" for name in quantities[:4]]


def test_one_image_has_no_interval():
    """A bootstrap over one image would print an interval of no width."""
    (group,) = compare([result("global", [30.0] * 6, [25.0] * 6, images=1)]).groups
    assert group.interval("gap") is None
    assert "one image and one seed cannot tell" in compare(group.results).verdict()


def test_models_of_other_steps_or_weights_are_labelled():
    first, second = GLOBAL[0], LOCAL[0]

    def notes(**changes: object) -> list[str]:
        other = replace(second, about=replace(second.about, **changes))
        return compare([first, other]).unlike_weights()

    assert notes() == []
    assert notes(step=400) == [
        "The models were measured at different training steps (step 9: global-0; step 400: local-0)."
    ]
    assert notes(ema=False) == ["Raw weights were measured of local-0, averaged weights of the others."]
    with pytest.raises(Incompatible, match="were measured with different draws"):
        compare([first, replace(second, config=replace(second.config, draws=2))])


def test_high_noise_below_the_wiener_denoiser_is_said():
    analysis = PSNRGap()
    wiener = result("Wiener", [30.0] * 6, [14.0] * 6)
    wiener = replace(wiener, about=replace(wiener.about, name="Wiener", settings={"baseline": True}))
    notes = analysis.notes(Comparison(analysis, analysis.compare([*GLOBAL, wiener]), GLOBAL))
    assert notes[-1].startswith("Of the 6 noise levels, 1 lie above sigma = 6.")
    assert notes[-1].endswith("below that of the Wiener denoiser there: global, N = 30 10.0 dB against 14.0 dB.")
