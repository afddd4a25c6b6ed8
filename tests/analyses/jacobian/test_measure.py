"""The whole measurement: what it holds, what is written, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ditlab.analyses.jacobian import measure as jacobian
from ditlab.analyses.jacobian.config import JacobianConfig
from ditlab.analyses.jacobian.measure import BY_VECTOR, NUMBERS, jacobian_levels
from ditlab.analyses.jacobian.measure import measure_jacobian as measure
from ditlab.analyses.jacobian.result import JacobianResult
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.network_denoisers import BlindDenoiser, VPDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.metrics.denoising_errors import level_noise
from ditlab.networks.bf_cnn import BFCNN, BFCNNConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.provenance import Provenance
from ditlab.rng import torch_generator

SHAPE = (2, 6, 6)
SIZE = 72


def draw(count: int, name: str = "images") -> Tensor:
    return (0.4 * torch.randn(count, *SHAPE, generator=torch_generator(0, name))).clamp(-1, 1)


@pytest.fixture(scope="module")
def denoiser() -> VPDenoiser:
    network = DiT(DiTConfig(image_size=(6, 6), channels=2, width=16, depth=2, heads=2, attention="3,g")).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch_generator(0, "weights")))
    return VPDenoiser(network, make_schedule("linear", 1000))


@pytest.fixture(scope="module")
def blind() -> BlindDenoiser:
    """Bias-free, on [0, 1]: homogeneous about -1."""
    network = BFCNN(BFCNNConfig(image_size=(6, 6), channels=2, width=8, depth=4)).eval()
    with torch.no_grad():
        for gamma in network.gammas:
            gamma.fill_(1.0)
    return BlindDenoiser(network, LevelRange(0.0, 2.0))


def test_what_a_result_holds(denoiser):
    images, train, seen = draw(4), draw(30, "train"), []
    config = JacobianConfig(
        images=(3, 1), sigmas=(0.2, 0.5), show=(0, 5, 71, 99), pixels=((0, 0), (2, 5)), noise_seed=7
    )
    result = measure(denoiser, images, config, train=train, progress=lambda *at: seen.append(at))
    assert [(p.image, p.sigma) for p in result.points] == [(3, 0.2), (3, 0.5), (1, 0.2), (1, 0.5)]
    assert seen[-1] == (4 * SIZE, 4 * SIZE)
    assert seen == sorted(seen)
    for point in result.points:
        noise = level_noise(7, point.sigma, [point.image], [0], SHAPE)[0].numpy()
        clean = images[point.image].numpy()
        np.testing.assert_allclose(point.clean, clean)
        np.testing.assert_allclose(point.noisy, clean + point.sigma * noise, atol=1e-6)
        with torch.no_grad():
            estimate = denoiser(torch.from_numpy(point.noisy)[None], point.sigma)[0]
        np.testing.assert_allclose(point.denoised, estimate.numpy(), atol=1e-5)
        assert point.numbers["mse"] == pytest.approx(float(((estimate.numpy() - clean) ** 2).mean()), rel=1e-4)
        assert point.shown.tolist() == [0, 5, 71]
        assert point.left.shape == point.right.shape == (3, *SHAPE)
        assert point.values.shape == point.residuals.shape == (SIZE,)
        assert set(point.numbers) == set(NUMBERS) - {"negative"}
        assert all(value is not None and np.isfinite(value) for value in point.numbers.values())
        assert set(point.by_vector) == set(BY_VECTOR)
        assert all(v.shape == (SIZE,) and np.isfinite(v).all() for v in point.by_vector.values())
        np.testing.assert_allclose(point.channels.sum(1), 1)
        assert point.residuals.max() < 1e-12
        for side in (point.sensitivity, point.wiener):
            assert side is not None
            assert side.pixels == ((0, 0), (2, 5))
            assert side.maps.shape == (2, 6, 6)
            assert side.sizes.shape == (3, 6, 6)


def test_numbers_follow_from_the_values(denoiser):
    point = measure(denoiser, draw(1), train=draw(5, "train")).points[0]
    u, v = point.left.reshape(-1, SIZE).astype(float), point.right.reshape(-1, SIZE).astype(float)
    assert point.numbers["sum_of_squares"] == pytest.approx((point.values**2).sum(), rel=1e-9)
    np.testing.assert_allclose(point.by_vector["alignment"][point.shown], np.abs((u * v).sum(1)), atol=1e-5)
    np.testing.assert_allclose(point.by_vector["clean_coefficient"][point.shown], u @ point.clean.ravel(), atol=1e-5)
    np.testing.assert_allclose(point.by_vector["noisy_coefficient"][point.shown], v @ point.noisy.ravel(), atol=1e-5)
    squares = point.by_vector["clean_coefficient"] ** 2
    oracle = squares / (squares + point.sigma**2)
    np.testing.assert_allclose(point.by_vector["oracle_shrinkage"], oracle)
    assert point.numbers["shrinkage_distance"] == pytest.approx(((point.values - oracle) ** 2).mean() ** 0.5)


@pytest.mark.parametrize("decomposition", ["svd", "eigh", "eig", "eig-right"])
def test_leading_values_alone_equal_the_whole(denoiser, decomposition):
    config = JacobianConfig(decomposition=decomposition, show=(0, 2, 5))
    whole = measure(denoiser, draw(1), config, train=draw(5, "train")).points[0]
    seen = []
    top = measure(
        denoiser, draw(1), replace(config, top=6), train=draw(5, "train"), progress=lambda *at: seen.append(at)
    ).points[0]
    np.testing.assert_allclose(top.values, whole.values[:6], atol=1e-5)
    assert top.residuals.max() < 1e-3
    assert set(top.numbers) == set(whole.numbers)
    assert set(top.by_vector) == set(whole.by_vector)
    for name in ("r_hom", "r_lin", "mse"):
        assert top.numbers[name] == pytest.approx(whole.numbers[name], rel=1e-3)
    for name in ("trace", "sum_of_squares", "asymmetry", "participation_ratio", "leading_over_median", "sure"):
        assert top.numbers[name] is None
    assert top.sensitivity is top.wiener is None
    # The guess of the total is kept to: it neither ends early nor goes back.
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_wiener_beside_itself():
    train = draw(200, "train")
    wiener = WienerDenoiser(train)
    point = measure(wiener, draw(2), JacobianConfig(sigmas=(0.3,), pixels=((1, 2),)), train=train).points[0]
    shrinkage = (wiener.variances / (wiener.variances + 0.3**2)).numpy()
    np.testing.assert_allclose(point.values, shrinkage, atol=1e-6)
    assert point.numbers["trace"] == pytest.approx(shrinkage.sum(), rel=1e-6)
    assert point.numbers["asymmetry"] < 1e-6
    assert point.numbers["alignment"] == pytest.approx(1, abs=1e-4)
    assert point.numbers["r_lin"] < 1e-5
    assert point.sensitivity is not None
    assert point.wiener is not None
    np.testing.assert_allclose(point.sensitivity.maps, point.wiener.maps, atol=1e-5)
    assert point.sensitivity.locality == point.wiener.locality


def test_steins_estimate_is_unbiased():
    """Over many noise draws it has the mean of the error itself."""
    train, found = draw(200, "train"), []
    wiener = WienerDenoiser(train)
    for seed in range(60):
        numbers = measure(wiener, train, JacobianConfig(sigmas=(0.4,), noise_seed=seed)).points[0].numbers
        found.append((numbers["mse"], numbers["sure"]))
    errors, estimates = np.array(found).T
    spread = (errors - estimates).std() / 60**0.5
    assert abs((errors - estimates).mean()) < 3 * spread
    assert spread < 0.1 * errors.mean()


def test_the_vectors_of_empirical_bayes_draw_training_images():
    train = draw(2, "train")
    point = measure(
        EmpiricalBayesDenoiser(train), train, JacobianConfig(sigmas=(5.0,), decomposition="eigh", top=1, show=(0,)),
        train=train,
    ).points[0]  # fmt: skip
    # Of two images the covariance has one direction, their difference.
    other = (train[0] - train[1]).flatten()
    cosine = abs(float(torch.from_numpy(point.left[0]).flatten() @ other / other.norm()))
    assert cosine == pytest.approx(1, abs=1e-4)
    assert point.by_vector["image_correlation"][0] > 0.5
    assert point.by_vector["nearest_correlation"][0] > 0.5
    assert "others_correlation" not in point.by_vector  # the image itself is not its own neighbour


def test_the_nearest_training_image_is_another_one(denoiser):
    train = draw(10, "train")
    images = train[3:4].clone()
    train[7] = images[0] + 0.01 * draw(1, "little")[0]
    point = measure(denoiser, images, JacobianConfig(show=(0,)), train=train).points[0]
    u, nearest = point.left[0].astype(float).ravel(), train[7].double().numpy().ravel()
    expected = abs(np.corrcoef(u, nearest)[0, 1])
    assert point.by_vector["nearest_correlation"][0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("target", ["x0", "eps", "I-eps"])
def test_a_bias_free_network_is_homogeneous_about_its_origin(blind, target):
    point = measure(blind, draw(1), JacobianConfig(sigmas=(0.3,), target=target)).points[0]
    assert point.numbers["r_hom"] < 1e-4
    assert 1e-6 < point.numbers["r_lin"] < 0.5  # it is not linear
    assert ("sure" in point.numbers) == (target == "x0")
    assert (point.sensitivity is None) == (target != "x0")


def test_homogeneity_is_about_the_origin():
    away = Denoiser.wrap(lambda y, s, label: 1 + 0.5 * (y - 1), SHAPE)
    assert measure(away, draw(1)).points[0].numbers["r_hom"] > 0.1
    there = Denoiser.wrap(lambda y, s, label: 1 + 0.5 * (y - 1), SHAPE, origin=1.0)
    assert measure(there, draw(1)).points[0].numbers["r_hom"] < 1e-6


def test_small_steps_are_more_linear(denoiser):
    gaps = [
        measure(denoiser, draw(1), JacobianConfig(step_size=size)).points[0].numbers["r_lin"] for size in (1.0, 0.1)
    ]
    assert gaps[1] < 0.3 * gaps[0]


def test_the_mode_and_the_chunk_do_not_matter(denoiser):
    points = [
        measure(denoiser, draw(1), JacobianConfig(mode=mode, chunk=chunk)).points[0]
        for mode, chunk in (("forward", 7), ("reverse", 100), ("auto", 1))
    ]
    for point in points[1:]:
        np.testing.assert_allclose(point.values, points[0].values, atol=1e-5)


def test_default_levels_are_those_of_step_100(denoiser):
    sigma = float(make_schedule("linear", 1000).sigmas[100])
    assert jacobian_levels(denoiser, JacobianConfig()) == (sigma,)
    assert measure(denoiser, draw(1)).points[0].timestep == 100
    assert measure(denoiser, draw(1), JacobianConfig(timesteps=(250,))).points[0].timestep == 250
    wiener = WienerDenoiser(draw(5))
    assert jacobian_levels(wiener, JacobianConfig()) == (sigma,)
    assert measure(wiener, draw(1)).points[0].timestep is None


@pytest.mark.parametrize(("schedule", "steps"), [("cosine", 4000), ("linear", 4000)])
def test_steps_of_other_processes_near_the_default_level_show_the_same_noise(denoiser, schedule, steps):
    other = VPDenoiser(denoiser.network, make_schedule(schedule, steps))
    one, two = (measure(each, draw(1)).points[0] for each in (denoiser, other))
    assert one.sigma != two.sigma
    assert one.sigma == pytest.approx(two.sigma, rel=1e-2)
    noises = [(point.noisy - point.clean) / point.sigma for point in (one, two)]
    np.testing.assert_allclose(*noises, atol=1e-5)


def test_a_random_denoiser_is_refused():
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.Dropout(0.1)).train()
    # Within a function of one's own the network's mode is not seen, but what it does is.
    random = Denoiser.wrap(lambda y, sigma, label: network(y), SHAPE)
    for settings in ({}, {"top": 3}, {"target": "eps"}):
        with pytest.raises(DitlabError, match=r"found one that is random \(dropout"):
            measure(random, draw(1), JacobianConfig(sigmas=(0.3,), **settings))
    network.eval()
    assert measure(random, draw(1), JacobianConfig(sigmas=(0.3,))).points[0].numbers["r_lin"] < 1e-5


def test_the_denoiser_gets_the_label():
    network = DiT(DiTConfig(image_size=(6, 6), channels=2, width=16, depth=1, heads=2, num_classes=2)).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=torch_generator(0, "weights")))
    one = VPDenoiser(network, make_schedule("linear", 1000))
    images = draw(1).repeat(2, 1, 1, 1)
    found = [
        measure(one, images, JacobianConfig(), labels=torch.tensor([label, 0])).points[0].values for label in (0, 1)
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("decomposition", ["svd", "eigh", "eig", "eig-right"])
def test_a_result_comes_back_from_disk(denoiser, tmp_path, decomposition):
    about = Provenance("run", label="global", n=30, settings={"space": "pixels"})
    config = JacobianConfig(
        images=(1, 0), sigmas=(0.2, 0.5), decomposition=decomposition, pixels=((0, 1),), show=(0, 3)
    )
    result = measure(denoiser, draw(2), config, train=draw(5, "train"), about=about)
    path = result.save(tmp_path)
    assert path == tmp_path / "jacobian.json"
    found = JacobianResult.load(path)
    assert found.about == about
    assert found.config == config
    assert found.to_json() == result.to_json()
    assert json.loads(path.read_text()) == json.loads(json.dumps(result.to_json()))
    for ours, theirs in zip(result.arrays().values(), found.arrays().values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert found.points[0].sensitivity.pixels == ((0, 1),)
    top = measure(denoiser, draw(2), replace(config, top=4), about=about)
    again = JacobianResult.load(top.save(tmp_path, "top"))
    assert again.points[0].sensitivity is None
    assert again.notes == top.notes
    assert "Only the 4 leading values" in top.notes[0]


@pytest.mark.parametrize("decomposition", ["svd", "eig", "eig-right"])
def test_right_eigenvectors_had_another_name_in_the_first_version(denoiser, tmp_path, decomposition):
    path = measure(denoiser, draw(1), JacobianConfig(decomposition=decomposition, top=3)).save(tmp_path)
    assert JacobianResult.load(path).config.decomposition == decomposition
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    assert JacobianResult.load(path).config.decomposition == ("svd" if decomposition == "svd" else "eig-right")


def test_damaged_files_are_refused(denoiser, tmp_path):
    path = measure(denoiser, draw(1)).save(tmp_path)
    record = json.loads(path.read_text())
    for broken, words in (
        ({**record, "kind": "psnr-gap"}, "expected a result of kind"),
        ({**record, "version": 99}, "expected version"),
        ({key: value for key, value in record.items() if key != "points"}, "a field is missing"),
        ({**record, "config": {**record["config"], "unknown": 1}}, "missing or unknown"),
        ({**record, "config": {**record["config"], "top": -1}}, "`top` must be at least 0, found -1"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DitlabError, match=words):
            JacobianResult.load(path)
    path.write_text(json.dumps(record))
    path.with_suffix(".npz").write_bytes(b"no")
    with pytest.raises(DitlabError, match="expected the arrays"):
        JacobianResult.load(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigmas": (0.2,), "timesteps": (3,)}, "found both"),
        ({"sigmas": (0.2, 0.1)}, "jacobian: `sigmas` must be ascending"),
        ({"sigmas": ()}, "jacobian: `sigmas` must be positive"),
        ({"timesteps": (5, 5)}, "`timesteps` must be ascending"),
        ({"images": ()}, "jacobian: `images`"),
        ({"images": (1, 1)}, "jacobian: `images`"),
        ({"show": (-1,)}, "jacobian: `show`"),
        ({"pixels": ((0, -1),)}, "jacobian: `pixels`"),
        ({"top": -1}, "`top` must be at least 0"),
        ({"chunk": 0}, "`chunk` must be at least 1"),
        ({"step_size": 0.0}, "`step_size` must be above 0"),
        ({"step_size": float("nan")}, "`step_size` must be above 0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, words):
    with pytest.raises(DitlabError, match=words):
        JacobianConfig(**settings)


@pytest.mark.parametrize("name", ["target", "decomposition", "mode"])
def test_unknown_names_are_refused(name):
    config = JacobianConfig()
    object.__setattr__(config, name, "both")  # past the type checks that run in tests
    with pytest.raises(DitlabError, match=f"unknown jacobian `{name}` 'both'"):
        config.__post_init__()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"images": (0, 4)}, "`images` must be places from 0 to 3, found 4"),
        ({"pixels": ((6, 0),)}, "`pixels` must be rows below 6 and columns below 6, found 6,0"),
        ({"timesteps": (1000,)}, "expected `timesteps` from 0 to 999"),
        ({"sigmas": (1e6,)}, "expected a noise level"),
        ({"top": 71}, "`top` must be 1 to 70 for a matrix of 72 x 72"),
        ({"show": (72,)}, "`show` must have a vector below 72"),
        ({"top": 4, "show": (4,)}, "`show` must have a vector below 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(denoiser, monkeypatch, settings, words):
    monkeypatch.setattr(jacobian, "JacobianOperator", None)
    with pytest.raises(DitlabError, match=words):
        measure(denoiser, draw(4), JacobianConfig(**settings))


def test_a_matrix_that_would_not_fit_is_refused_before_any_work(denoiser, monkeypatch):
    monkeypatch.setattr(jacobian, "available_memory", lambda: 1000)
    with pytest.raises(DitlabError, match=r"the whole matrix of 72 x 72 .* `top` computes"):
        measure(denoiser, draw(1))
    assert len(measure(denoiser, draw(1), JacobianConfig(top=3)).points[0].values) == 3


def test_images_of_another_size_are_refused(denoiser):
    with pytest.raises(DitlabError, match=r"takes images \(2, 6, 6\), found images \(2, 8, 8\)"):
        measure(denoiser, torch.zeros(1, 2, 8, 8))
    with pytest.raises(DitlabError, match=r"found training images \(3, 6, 6\)"):
        measure(denoiser, draw(1), train=torch.zeros(1, 3, 6, 6))


def test_weights_that_are_not_finite_are_refused():
    network = BFCNN(BFCNNConfig(image_size=(6, 6), channels=2, width=4, depth=2)).eval()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.inf)
    for top in (0, 3):
        with pytest.raises(DitlabError, match="is not finite"):
            measure(BlindDenoiser(network, LevelRange(0.0, 2.0)), draw(1), JacobianConfig(sigmas=(0.3,), top=top))
