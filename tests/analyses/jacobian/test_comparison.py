"""Jacobians of several runs side by side: groups, numbers in words, distances, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ditlab.analyses.jacobian.comparison import (
    CAUTION,
    compare_jacobians,
    comparison_key,
    differs,
    gap_sentence,
    measure_value,
)
from ditlab.analyses.jacobian.config import JacobianConfig
from ditlab.analyses.jacobian.measure import measure_jacobian
from ditlab.analyses.jacobian.result import JacobianResult
from ditlab.analyses.jacobian.section import definitions, jacobian_tables
from ditlab.diffusion.baselines import WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.provenance import Provenance

CONFIG = JacobianConfig(images=(0, 2), sigmas=(0.2, 0.5), show=(0, 1, 5))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth ones, so that their covariance is not that of noise."""
    noise = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1).clamp(-1, 1)


def facts(label: str, n: int = 20, seed: int = 0) -> Provenance:
    return Provenance(f"{label}-{n}-{seed}", label, n, seed, 9, True, f"f{seed}", f"h{seed}-{n}")


def halving(factor: float = 0.5) -> Denoiser:
    return Denoiser.wrap(lambda y, sigma, label: factor * y, shape=(1, 6, 6))


@pytest.fixture(scope="module")
def wiener(images) -> JacobianResult:
    return measure_jacobian(WienerDenoiser(images[:20]), images[20:], CONFIG, about=facts("wiener"), train=images[:20])


@pytest.fixture(scope="module")
def half(images) -> JacobianResult:
    return measure_jacobian(halving(), images[20:], CONFIG, about=facts("half"), train=images[:20])


def test_numbers_of_groups_are_those_of_their_points(wiener, half, images):
    comparison = compare_jacobians([wiener, half])
    assert [group.name for group in comparison.groups] == ["wiener, N = 20", "half, N = 20"]
    assert (comparison.levels, comparison.dimension) == ((0.2, 0.5), 36)
    variances = WienerDenoiser(images[:20]).variances.numpy()
    first, second = comparison.groups
    for level, sigma in enumerate((0.2, 0.5)):
        assert first.mean("trace", level) == pytest.approx((variances / (variances + sigma**2)).sum(), rel=1e-4)
        assert second.mean("trace", level) == pytest.approx(18, rel=1e-5)
        assert second.mean("sum_of_squares", level) == pytest.approx(9, rel=1e-5)
        assert second.mean("locality 0.95", level) == 1
        assert first.mean("locality 0.5", level) == pytest.approx(first.mean("Wiener locality 0.5", level))
        assert second.mean("r_hom", level) == pytest.approx(0, abs=1e-6)
        # The Wiener denoiser adds the mean image, so it is linear but not homogeneous.
        assert first.mean("r_lin", level) == pytest.approx(0, abs=1e-4)
        assert first.mean("r_hom", level) > 1e-3
    assert first.std("trace", 0) is None


def test_the_best_of_the_leading_vectors_and_its_control(wiener):
    point = wiener.points[0]
    nearest = point.by_vector["nearest_correlation"][:8]
    assert measure_value(point, "best nearest") == nearest.max()
    assert measure_value(point, "best others") == point.by_vector["others_correlation"][nearest.argmax()]
    assert measure_value(point, "best image") == point.by_vector["image_correlation"][:8].max()
    without = replace(point, by_vector={})
    assert [measure_value(without, f"best {what}") for what in ("nearest", "others", "image")] == [None] * 3


def test_what_the_leading_vectors_are_like(wiener):
    point = wiener.points[0]
    for what in ("frequency", "participation", "edges"):
        assert measure_value(point, f"leading {what}") == pytest.approx(point.by_vector[what][:64].mean())
    assert measure_value(replace(point, by_vector={}), "leading edges") is None


def test_seeds_are_averaged(wiener, half, images):
    other = replace(half, about=facts("wiener", seed=1))
    comparison = compare_jacobians([wiener, other])
    [group] = comparison.groups
    traces = [wiener.points[0].numbers["trace"], 18.0]
    assert group.mean("trace", 0) == pytest.approx(np.mean(traces))
    assert group.std("trace", 0) == pytest.approx(np.std(traces, ddof=1))
    assert comparison.spectra_apart() == ()


def test_distances_of_spectra(wiener, half, images):
    double = measure_jacobian(halving(0.9), images[20:], CONFIG, about=facts("most"), train=images[:20])
    found = {
        (a.first, a.second, a.sigma): a.distance for a in compare_jacobians([wiener, half, double]).spectra_apart()
    }
    assert found["half, N = 20", "most, N = 20", 0.5] == pytest.approx(0, abs=1e-6)
    values = wiener.points[1].values
    expected = np.abs(values / values.sum() - 1 / 36).sum() / 2
    assert found["wiener, N = 20", "half, N = 20", 0.5] == pytest.approx(expected, rel=1e-6)
    assert found["wiener, N = 20", "half, N = 20", 0.5] > 0.1


def test_words_carry_r_hom_and_the_caution(wiener, half):
    comparison = compare_jacobians([half, wiener])
    lines = comparison.sentences()
    assert lines[-1] == CAUTION
    for group in ("half", "wiener"):
        for sigma in ("0.2", "0.5"):
            mine = [line for line in lines if line.startswith(f"{group}, N = 20, σ = {sigma}:")]
            assert "r_hom" in mine[-1]
            assert "r_lin" in mine[-1]
            assert any("trace" in line and "of 36 dimensions" in line for line in mine)
            assert any("Wiener denoiser of its training images" in line for line in mine)
    assert comparison.gaps()[0] == next(line for line in lines if "r_hom" in line)
    assert sum("normalized spectra" in line for line in lines) == 2


@pytest.mark.parametrize(("r_hom", "says"), [(1e-6, "the vectors describe"), (0.3, "do not describe"), (None, "zero")])
def test_what_r_hom_lets_be_said(r_hom, says):
    assert says in gap_sentence(r_hom, 0.1)


def test_tables(wiener, half):
    comparison = compare_jacobians([wiener, half])
    matrix, *vectors = jacobian_tables(comparison)
    for table in (matrix, *vectors):
        assert table.columns[:3] == ["model", "N", "σ"]
        assert [row[:3] for row in table.texts] == [
            [name, "20", sigma] for name in ("wiener", "half") for sigma in ("0.2", "0.5")
        ]
    assert [table.columns[-2:] for table in vectors] == [["r_hom", "r_lin"]] * 2
    assert dict(zip(matrix.columns, matrix.texts[2], strict=True))["trace"] == "18"
    # Each column that is shown is defined once, and nothing else is.
    shown = list(dict.fromkeys(column for table in (matrix, *vectors) for column in table.columns[3:]))
    assert sorted(line.split(":")[0] for line in definitions(comparison)) == sorted(shown)
    assert "first 64" not in shown  # there are 36 vectors


def test_what_top_leaves_out(images):
    config = JacobianConfig(sigmas=(0.5,), top=4, show=(0, 1))
    result = measure_jacobian(WienerDenoiser(images[:20]), images[20:], config, about=facts("wiener"))
    comparison = compare_jacobians([result])
    assert "trace" not in comparison.measured
    tables = jacobian_tables(comparison)
    assert [table.caption.startswith("Jacobian of x0, 36 dimensions") for table in tables] == [True, True]
    legend = " ".join(definitions(comparison))
    assert not any(word in legend for word in ("trace", "50 %", "64", "8 leading", "nearest"))
    assert "the 4 leading vectors" in legend
    lines = comparison.sentences()
    assert not any("trace" in line or "Wiener denoiser" in line for line in lines)
    assert any("r_hom" in line for line in lines)


def test_json(wiener, half):
    record = json.loads(json.dumps(compare_jacobians([wiener, half]).to_json(), allow_nan=False))
    assert (record["kind"], record["target"], record["dimension"]) == ("jacobian-comparison", "x0", 36)
    [first, second] = record["groups"]
    assert [level["sigma"] for level in first["by_level"]] == [0.2, 0.5]
    assert second["by_level"][0]["mean"]["trace"] == pytest.approx(18)
    assert second["by_level"][0]["largest_residual"] < 1e-5
    assert {"r_hom", "r_lin", "locality 0.5", "best nearest"} <= set(first["by_level"][0]["mean"])
    assert record["sentences"][-1] == CAUTION


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": "eps"}, "different target (x0 and eps)"),
        ({"decomposition": "eig"}, "different decomposition"),
        ({"decomposition": "eig-right"}, "different decomposition"),
        ({"noise_seed": 1}, "different noise_seed"),
        ({"images": (0, 1)}, "different images"),
        ({"sigmas": (0.2, 0.6)}, "different noise levels (0.2, 0.5 and 0.2, 0.6)"),
    ],
)
def test_what_may_not_stand_side_by_side(half, images, change, says):
    config = replace(CONFIG, **change)
    other = measure_jacobian(halving(), images[20:], config, about=facts("other"))
    assert differs(half, half) is None
    assert hash(tuple(comparison_key(half).items())) == hash(tuple(comparison_key(half).items()))
    assert comparison_key(half) != comparison_key(other)
    with pytest.raises(DitlabError) as error:
        compare_jacobians([half, other])
    assert says in str(error.value)
    assert "'half-20-0' and 'other-20-0'" in str(error.value)


def test_other_sides_and_names(half):
    trained = replace(half, about=replace(facts("train"), settings={"images_from": "train"}))
    with pytest.raises(DitlabError, match="pictures \\(test and train\\)"):
        compare_jacobians([half, trained])
    with pytest.raises(DitlabError, match="jacobian: 'half-20-0' and 'half-20-0' are both 'half' with N = 20"):
        compare_jacobians([half, replace(half, about=facts("half"))])
    with pytest.raises(DitlabError, match="at least one result"):
        compare_jacobians([])


def test_levels_a_little_apart_are_alike_where_their_noise_is(images):
    at = {sigma: measure_jacobian(halving(), images[20:], replace(CONFIG, sigmas=(sigma,)), about=facts(f"{sigma}"))
          for sigma in (0.3422, 0.3424, 0.5, 0.501)}  # fmt: skip
    assert differs(at[0.3422], at[0.3424]) is None  # both count as the default level
    assert differs(at[0.5], at[0.501]) == "noise levels (0.5 and 0.501)"
