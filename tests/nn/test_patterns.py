import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global, Partition, Window, check_fits

sizes = st.integers(0, 6).map(lambda r: 2 * r + 1)
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.golden_keys("08_local_attention", r"mask\.(clipped|natten)\.w\d+")
def test_masks_equal_the_golden_ones(golden, golden_key):
    fixture = golden("08_local_attention")
    _, border, size = golden_key.split(".")
    window = Window(int(size.removeprefix("w")), {"clipped": "clip", "natten": "shift"}[border])
    assert torch.equal(window.mask((fixture.config["H"], fixture.config["W"])), fixture[golden_key])


@given(grids, sizes)
def test_clipped_window_is_its_definition(grid, size):
    mask = Window(size).mask(grid)
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    for i, (row, column) in enumerate(cells):
        for j, (other_row, other_column) in enumerate(cells):
            assert mask[i, j] == (max(abs(row - other_row), abs(column - other_column)) <= size // 2)


@given(grids, sizes)
def test_shifted_window_keeps_its_number_of_keys(grid, size):
    counts = Window(size, "shift").mask(grid).sum(1)
    assert (counts == min(size, grid[0]) * min(size, grid[1])).all()


@pytest.mark.parametrize(("n", "size"), [(32, 3), (32, 7), (32, 13), (8, 5)])
def test_number_of_attended_pairs_is_the_closed_form(n, size):
    radius = (size - 1) // 2
    assert Window(size).mask((n, n)).sum() == (n * size - radius * (radius + 1)) ** 2


def test_the_papers_four_by_four_example():
    counts = Window(3).mask((4, 4)).sum(1).view(4, 4)
    assert (counts[0, 0], counts[0, 1], counts[1, 1]) == (4, 6, 9)


def test_partition_sees_its_own_window_also_where_it_does_not_fit():
    mask = Partition(2).mask((3, 4))
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert mask[11].nonzero().flatten().tolist() == [10, 11]


@given(grids, sizes, st.sampled_from(["clip", "shift"]))
def test_covers_means_that_the_mask_is_all_true(grid, size, border):
    for pattern in (Global(), Window(size, border), Partition(size)):
        assert pattern.covers(grid) == bool(pattern.mask(grid).all())


@pytest.mark.parametrize("size", [0, 2, 4, -3])
def test_even_and_empty_windows_are_refused(size):
    with pytest.raises(DitlabError, match=f"odd size.*found {size}"):
        Window(size)


def test_unknown_border_names_the_near_one():
    window = object.__new__(Window)  # past the type checks that run in tests
    window.__dict__.update(size=3, border="clipp")
    with pytest.raises(DitlabError, match="nearest: clip"):
        window.__post_init__()


def test_empty_partition_is_refused():
    with pytest.raises(DitlabError, match="at least 1"):
        Partition(0)


def test_a_window_larger_than_the_grid_does_not_fit():
    check_fits(Window(7), (4, 8))
    check_fits(Global(), (1, 1))
    with pytest.raises(DitlabError, match="at most 8 on a grid of 4x8 tokens, found 9"):
        check_fits(Window(9), (4, 8))
