from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditlab.errors import DitlabError
from ditlab.nn.attention_plan import NAMED_WINDOWS, parse_plan, place_windows
from ditlab.nn.patterns import Global, Window


def written(plan, depth=12):
    """A plan's layers as window sizes, 0 for global."""
    return [pattern.size if isinstance(pattern, Window) else 0 for pattern in parse_plan(plan, depth)]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("global", [0] * 12),
        ("local", [3, 5, 7, 9, 11, 13] + [0] * 6),
        ("local-star", [3, 3, 3, 5, 5, 5, 7, 7, 7, 0, 0, 0]),
        ("same-a", [5] * 6 + [0] * 6),
        ("same-b", [3, 3, 5, 5, 7, 7] + [0] * 6),
        ("local-small", [3, 3, 5, 7, 9, 11] + [0] * 6),
        ("local-star-large", [5, 5, 5, 7, 7, 7, 9, 9, 9, 0, 0, 0]),
        ("local@tail", [0] * 6 + [3, 5, 7, 9, 11, 13]),
        ("local-star@tail", [0] * 3 + [3, 3, 3, 5, 5, 5, 7, 7, 7]),
        ("local@mix", [3, 0, 5, 0, 7, 0, 9, 0, 11, 0, 13, 0]),
        ("local-star@mix", [3, 3, 3, 0, 5, 5, 5, 0, 7, 7, 7, 0]),
        ("local @ head", [3, 5, 7, 9, 11, 13] + [0] * 6),
        ("3,5,7,g*9", [3, 5, 7] + [0] * 9),
        ("3*4, g , 5*2,g*5", [3] * 4 + [0] + [5] * 2 + [0] * 5),
        ("3,5@tail", [0] * 10 + [3, 5]),
    ],
)
def test_plans(plan, expected):
    assert written(plan) == expected


@given(st.integers(1, 30).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(0, depth))))
def test_mix_keeps_the_order_and_spreads_the_global_layers(numbers):
    depth, count = numbers
    windows = tuple(2 * i + 1 for i in range(count))
    layers = place_windows(windows, depth, "mix")
    assert tuple(p.size for p in layers if isinstance(p, Window)) == windows
    places = [-1, *(i for i, p in enumerate(layers) if isinstance(p, Global))]
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_border_reaches_every_window():
    assert parse_plan("3,g", 2, "shift") == (Window(3, "shift"), Global())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("locall", "unknown attention plan 'locall' .nearest: local"),
        ("local@midle", "unknown placement 'midle'"),
        ("3,5", "one entry for each of 12 layers, found 2"),
        ("3,4,g*10", "odd size"),
        ("3,,g*10", "found ''"),
        ("3*x,g", "unknown attention plan"),
        ("3*-1,g*11", "found '3\\*-1'"),
        ("3,g@mix", "only windows before '@'"),
        ("3*13@head", "at most 12 windows for 12 layers, found 13"),
    ],
)
def test_bad_plans_say_what_is_wrong(plan, message):
    with pytest.raises(DitlabError, match=message):
        parse_plan(plan, 12)


def test_a_named_set_needs_as_many_layers_as_it_has_windows():
    with pytest.raises(DitlabError, match="at most 4 windows for 4 layers, found 6"):
        parse_plan("local", 4)


def test_named_sets_hold_odd_windows():
    assert all(size % 2 for windows in NAMED_WINDOWS.values() for size in windows)


def test_unknown_scheme():
    with pytest.raises(DitlabError, match="unknown placement"):
        place_windows((3,), 2, "middle")
