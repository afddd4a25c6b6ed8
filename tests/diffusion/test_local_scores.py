"""LS, ELS and bbELS against double loops that say what they are, and at the ends where they are something simpler."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser, WienerLocalityDenoiser
from ditlab.diffusion.local_scores import EquivariantLocalScoreDenoiser, LocalScoreDenoiser, WindowSchedule
from ditlab.errors import DitlabError
from ditlab.rng import torch_generator

KINDS = {
    "LS": LocalScoreDenoiser,
    "ELS": EquivariantLocalScoreDenoiser,
    "bbELS": lambda images, window, **more: EquivariantLocalScoreDenoiser(images, window, "broken", **more),
    "Wiener-locality": lambda images, window, **more: WienerLocalityDenoiser(images, 0.1, **more),
}


def images(count: int, shape=(2, 5, 6)) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch_generator(count, "images")).double() * 2 - 1


def noisy(x0: torch.Tensor, sigma: float) -> torch.Tensor:
    return x0 + sigma * torch.randn(x0.shape, dtype=x0.dtype, generator=torch_generator(1, "noise"))


def window_at(
    image: np.ndarray, row: int, column: int, radius: int, circular: bool
) -> dict[tuple[int, int], np.ndarray]:
    """Offset -> the channels there; without those outside, where the window does not go round."""
    height, width = image.shape[1:]
    actual = {}
    for offset in product(range(-radius, radius + 1), repeat=2):
        r, c = row + offset[0], column + offset[1]
        if circular:
            actual[offset] = image[:, r % height, c % width]
        elif 0 <= r < height and 0 <= c < width:
            actual[offset] = image[:, r, c]
    return actual


def by_loops(kind: str, train: torch.Tensor, y: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """Every pixel of every image, every place of every training image that it may be compared with."""
    radius, circular = size // 2, kind == "ELS"
    result = np.empty(y.shape)
    places = list(product(range(y.shape[2]), range(y.shape[3])))
    for b, (row, column) in product(range(len(y)), places):
        mine = window_at(y[b].numpy(), row, column, radius, circular)
        logits, values = [], []
        for x in train.numpy():
            for there in places if kind != "LS" else [(row, column)]:
                other = window_at(x, *there, radius, circular)
                if other.keys() != mine.keys():
                    continue  # the border is met in another way
                logits.append(-sum(((mine[o] - other[o]) ** 2).sum() for o in mine) / (2 * sigma**2))
                values.append(x[:, there[0], there[1]])
        weights = np.exp(np.array(logits) - max(logits))
        result[b, :, row, column] = weights @ np.array(values) / weights.sum()
    return torch.from_numpy(result)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 8.0])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("kind", ["LS", "ELS", "bbELS"])
def test_they_are_what_double_loops_say(kind, size, sigma):
    train = images(3)
    y = noisy(train[:2], sigma)
    expected = by_loops(kind, train, y, size, sigma)
    torch.testing.assert_close(KINDS[kind](train, size)(y, sigma), expected, rtol=1e-11, atol=1e-12)


def test_a_broken_border_where_no_window_fits_inside():
    """Rows that hang over both ends, and columns that do not."""
    train = images(3, (1, 3, 9))
    y = noisy(train[:2], 0.7)
    for size in (5, 7):
        expected = by_loops("bbELS", train, y, size, 0.7)
        torch.testing.assert_close(KINDS["bbELS"](train, size)(y, 0.7), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_does_not_matter(kind):
    train = images(23)
    y, sigma = noisy(train[:4], 0.4), torch.tensor([0.05, 0.4, 2.0, 0.4], dtype=torch.float64)
    whole = KINDS[kind](train, 3, chunk=23)(y, sigma)
    for chunk in (1, 2, 7, 22, 100):
        torch.testing.assert_close(KINDS[kind](train, 3, chunk=chunk)(y, sigma), whole, rtol=0, atol=1e-12)
    single = KINDS[kind](train.float(), 3, chunk=5)(y.float(), sigma.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, whole.float(), rtol=0, atol=2e-4)


def test_many_images_at_once_are_handled_in_blocks(monkeypatch):
    train = images(4)
    y = noisy(images(7), 0.5)
    whole = KINDS["ELS"](train, 3)(y, 0.5)
    monkeypatch.setattr("ditlab.diffusion.local_scores._CPU_ENTRIES", 2 * 30**2)
    torch.testing.assert_close(KINDS["ELS"](train, 3)(y, 0.5), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_its_own_level_and_its_own_window(kind):
    train = images(6)
    y, sigma = noisy(train[:4], 0.4), torch.tensor([1.0, 0.3, 5.0, 0.3], dtype=torch.float64)
    denoiser = KINDS[kind](train, WindowSchedule((0.3, 4.0), (3, 5)))
    together = denoiser(y, sigma)
    for i, size in enumerate((3, 3, 5, 3)):
        alone = KINDS[kind](train, size)(y[i : i + 1], float(sigma[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-13)
    prediction = denoiser.predict(y, sigma)
    torch.testing.assert_close(prediction.x0 + sigma.reshape(-1, 1, 1, 1) * prediction.eps, y)


@pytest.mark.parametrize("kind", ["LS", "bbELS"])
def test_a_window_that_sees_everything_is_empirical_bayes(kind):
    train = images(9)
    for sigma in (0.1, 1.0, 30.0):
        y = noisy(train[:3], sigma)
        actual = KINDS[kind](train, 2 * 6 - 1)(y, sigma)
        torch.testing.assert_close(actual, EmpiricalBayesDenoiser(train)(y, sigma), rtol=1e-10, atol=1e-11)


def test_wiener_locality_without_a_threshold_is_empirical_bayes():
    train = images(9)
    y = noisy(train[:3], 0.8)
    actual = WienerLocalityDenoiser(train, 0.0)(y, 0.8)
    torch.testing.assert_close(actual, EmpiricalBayesDenoiser(train)(y, 0.8), rtol=1e-10, atol=1e-11)


def test_wiener_locality_looks_where_the_wiener_denoiser_looks():
    # Two halves that are independent of one another, each of one brightness: a value is to look at its own half alone.
    generator = torch_generator(0, "halves")
    halves = torch.randn(4000, 2, 1, generator=generator).double() * torch.tensor([[0.5], [0.3]], dtype=torch.float64)
    train = halves.expand(-1, -1, 6).reshape(4000, 1, 2, 6).clamp(-1, 1)
    denoiser, sigma = WienerLocalityDenoiser(train, 0.1), 0.4
    half = torch.arange(12) // 6
    assert torch.equal(denoiser.mask(sigma), half[:, None] == half)
    y = noisy(train[:3], sigma)
    expected = torch.cat(
        [EmpiricalBayesDenoiser(train[..., i : i + 1, :])(y[..., i : i + 1, :], sigma) for i in (0, 1)], 2
    )
    torch.testing.assert_close(denoiser(y, sigma), expected, rtol=1e-9, atol=1e-10)


def test_the_mask_of_wiener_locality_by_loops():
    train, sigma = images(40, (1, 3, 4)), 0.6
    wiener, denoiser = WienerDenoiser(train), WienerLocalityDenoiser(train, 0.3)
    matrix = torch.autograd.functional.jacobian(lambda y: wiener(y, sigma), train[:1]).reshape(12, 12)
    ratios = (matrix / matrix.diagonal()[:, None]).abs()
    assert torch.equal(denoiser.mask(sigma), ratios >= 0.3 * ratios.max())
    y = noisy(train[:2], sigma)
    squares = (y.reshape(2, 1, 12) - train.reshape(1, 40, 12)) ** 2
    expected = torch.empty(2, 12, dtype=torch.float64)
    for q in range(12):
        weights = torch.softmax(-squares[:, :, denoiser.mask(sigma)[q]].sum(-1) / (2 * sigma**2), 1)
        expected[:, q] = weights @ train.reshape(40, 12)[:, q]
    torch.testing.assert_close(denoiser(y, sigma).reshape(2, 12), expected, rtol=1e-11, atol=1e-12)


def test_a_value_that_never_changes_looks_at_itself():
    train = images(20, (1, 2, 3))
    train[..., 0, 0] = 0.25
    denoiser = WienerLocalityDenoiser(train, 0.02)
    assert denoiser.mask(0.5)[0].nonzero().flatten().tolist() == [0]
    assert not denoiser.mask(0.5)[1:, 0].any()
    torch.testing.assert_close(denoiser(noisy(train[:2], 0.5), 0.5)[..., 0, 0], train[:2, :, 0, 0])


def test_els_is_equivariant_and_ls_and_bbels_are_not():
    train = images(5, (2, 6, 6))
    y = noisy(train[:2], 0.5)
    for shift in ((1, 0), (2, -3)):
        moved = y.roll(shift, (2, 3))
        els = KINDS["ELS"](train, 3)
        torch.testing.assert_close(els(moved, 0.5), els(y, 0.5).roll(shift, (2, 3)), rtol=1e-11, atol=1e-12)
        for kind in ("LS", "bbELS"):
            other = KINDS[kind](train, 3)
            assert (other(moved, 0.5) - other(y, 0.5).roll(shift, (2, 3))).abs().max() > 1e-2
        # Training images that are moved change nothing either.
        again = KINDS["ELS"](train.roll(shift, (2, 3)), 3)
        torch.testing.assert_close(again(y, 0.5), els(y, 0.5), rtol=1e-11, atol=1e-12)


def test_inside_the_image_a_broken_border_is_no_border():
    """Far from it, pixels see the same windows, but for the circular ones that ELS takes from the border too."""
    train = images(2, (1, 9, 9))
    y = noisy(train[:1], 0.3)
    actual = KINDS["bbELS"](train, 3)(y, 0.3)[..., 1:-1, 1:-1]
    inner = torch.nn.functional.unfold(train, 3).transpose(1, 2).reshape(-1, 9)
    mine = torch.nn.functional.unfold(y, 3)[0].T
    weights = torch.softmax(-torch.cdist(mine, inner).square() / (2 * 0.3**2), 1)
    torch.testing.assert_close(actual.flatten(), weights @ inner[:, 4], rtol=1e-9, atol=1e-10)


def test_a_window_of_one_pixel_knows_only_that_pixel():
    train = images(4)
    y = noisy(train[:2], 0.5)
    ls, els, bbels = (KINDS[kind](train, 1)(y, 0.5) for kind in ("LS", "ELS", "bbELS"))
    torch.testing.assert_close(els, bbels, rtol=1e-12, atol=1e-13)
    pixels = train.permute(0, 2, 3, 1)
    distance = (y.permute(0, 2, 3, 1)[:, None] - pixels).square().sum(-1)
    here = torch.einsum("bnhw,nhwc->bchw", torch.softmax(-distance / 0.5, 1), pixels)
    torch.testing.assert_close(ls, here, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["LS", "ELS", "bbELS"])
def test_both_ends_of_the_noise(kind):
    train = images(12).float()
    y = noisy(train[:3], 0.2)
    # At no noise, the pixel in the middle of the nearest window.
    expected = by_loops(kind, train.double(), y.double(), 3, 1e-4).float()
    torch.testing.assert_close(KINDS[kind](train, 3)(y, 1e-4), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(KINDS[kind](train, 3)(train[:3], 1e-3), train[:3], rtol=0, atol=1e-6)
    # At nothing but noise, the mean over all places that count.
    far = KINDS[kind](train, 3)(1e5 * y, 1e5 * 10**3)
    mean = {"LS": train.mean(0), "ELS": train.mean((0, 2, 3))[:, None, None]}.get(kind)
    if mean is not None:
        torch.testing.assert_close(far, mean.expand_as(far), rtol=0, atol=1e-3)
    else:
        inner = train[:, :, 1:-1, 1:-1].mean((0, 2, 3))
        torch.testing.assert_close(far[..., 2, 2], inner.expand(3, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    train = images(4, (1, 3, 4))
    denoiser = KINDS[kind](train, 3, chunk=3)
    y = noisy(train[:2], 0.6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: denoiser(z, 0.6), (y,))
    assert torch.autograd.gradcheck(lambda z: denoiser(z, torch.tensor([0.6, 0.9])), (y,))


def test_float32_is_exact_at_small_levels_too():
    train = images(6, (3, 16, 16)).float()
    y = noisy(train[:1], 0.02)
    wide = KINDS["ELS"](train.double(), 9)(y.double(), 0.02)
    torch.testing.assert_close(KINDS["ELS"](train, 9)(y, 0.02).double(), wide, rtol=0, atol=1e-5)


def test_schedules():
    schedule = WindowSchedule((0.1, 1.0, 10.0), (3, 7, 17))
    assert [schedule.at(s) for s in (0.001, 0.3, 0.33, 3.0, 3.3, 1e4)] == [3, 3, 7, 7, 17, 17]
    assert WindowSchedule.of(5).at(99.0) == 5
    assert WindowSchedule.of(schedule) is schedule
    for levels, sizes, says in (
        ((), (), "at least one"),
        ((1.0,), (3, 5), "1 levels and 2 sizes"),
        ((2.0, 1.0), (3, 5), "ascending"),
        ((1.0,), (4,), "odd size"),
        ((1.0,), (-1,), "odd size"),
    ):
        with pytest.raises(DitlabError, match=says):
            WindowSchedule(levels, sizes)


def test_what_cannot_be():
    with pytest.raises(DitlabError, match="expected float images"):
        LocalScoreDenoiser(torch.zeros(0, 1, 2, 2), 3)
    with pytest.raises(DitlabError, match="chunk of at least 1 image, found 0"):
        EquivariantLocalScoreDenoiser(torch.zeros(2, 1, 2, 2), 1, chunk=0)
    with pytest.raises(DitlabError, match="circular windows of at most 5 pixels, the side of the images, found 7"):
        EquivariantLocalScoreDenoiser(images(2), 7)
    with pytest.raises(DitlabError, match=r"threshold in \[0, 1\], found 2"):
        WienerLocalityDenoiser(images(2), 2.0)
