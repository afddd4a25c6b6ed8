"""Which layer of a network gets which attention pattern.

The named sets of windows and the three placements are those of An et al., "On Inductive Biases That Enable
Generalization of Diffusion Transformers" (2410.21273), Tables 2-4. Choices that the paper does not state are marked as
inferred.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, get_args

from ditlab.errors import DitlabError, unknown_name
from ditlab.nn.patterns import Border, Global, Pattern, Window

Scheme = Literal["head", "mix", "tail"]

NAMED_WINDOWS = MappingProxyType(
    {
        "global": (),
        "local": (3, 5, 7, 9, 11, 13),
        "local-star": (3, 3, 3, 5, 5, 5, 7, 7, 7),
        "same-a": (5, 5, 5, 5, 5, 5),
        "same-b": (3, 3, 5, 5, 7, 7),
        # Inferred: the paper names "smaller" and "larger" sets without printing their lists.
        "local-small": (3, 3, 5, 7, 9, 11),
        "local-star-large": (5, 5, 5, 7, 7, 7, 9, 9, 9),
    }
)


def place_windows(
    windows: tuple[int, ...], depth: int, scheme: str = "head", border: Border = "clip"
) -> tuple[Pattern, ...]:
    """Returns the pattern of each layer, first layer first: the windows in their order, global attention elsewhere.

    Args:
        windows: odd window sizes, at most `depth`, the network's number of layers.
        scheme: "head" gives the windows to the first layers, "tail" to the last ones. "mix" spreads the global layers
            evenly between them, the last layer global. The paper does not print its "mix"; inferred from its text: on
            twelve layers six windows are on layers 1, 3, ..., 11, and nine repeat (local, local, local, global).
        border: border rule of every window.

    Example:
        >>> [pattern.name for pattern in place_windows((3, 5), 4, "mix")]
        ['window 3', 'global', 'window 5', 'global']
    """
    if scheme not in get_args(Scheme):
        raise unknown_name("placement", scheme, get_args(Scheme))
    if len(windows) > depth:
        raise DitlabError(f"attention plan: expected at most {depth} windows for {depth} layers, found {len(windows)}")
    spare = depth - len(windows)
    is_global = {
        "head": [layer >= len(windows) for layer in range(depth)],
        "tail": [layer < spare for layer in range(depth)],
        # With spare / depth global layers per layer, layer l is global if their running sum reaches the next integer.
        "mix": [(layer + 1) * spare // depth > layer * spare // depth for layer in range(depth)],
    }[scheme]
    sizes = iter(windows)
    return tuple(Global() if skip else Window(next(sizes), border) for skip in is_global)


def parse_plan(plan: str, depth: int, border: Border = "clip") -> tuple[Pattern, ...]:
    """Parses an attention plan.

    Args:
        plan: one of
            a list with one entry for each layer, a window size or `g` for global, with repeats: `"3,5,7,g*9"`, `"3*4"`;
            a list of windows with a placement: `"3,5,7@mix"`; the other layers are global;
            a name of `NAMED_WINDOWS`, placed at the head by default: `"local"`, `"local@mix"`, `"local-star@tail"`.
        depth: number of layers of the network.
        border: border rule of every window.

    Returns:
        One pattern for each layer, first layer first.

    Raises:
        DitlabError: for an unknown name, entry or placement, an even window, or a list that does not match `depth`.
    """
    body, at, scheme = (part.strip() for part in plan.partition("@"))
    place = scheme if at else "head"
    if body in NAMED_WINDOWS:
        return place_windows(NAMED_WINDOWS[body], depth, place, border)
    sizes = [size for entry in body.split(",") for size in _entry(entry.strip(), plan)]
    if at:
        if None in sizes:
            raise DitlabError(f"attention plan '{plan}': expected only windows before '@', found a global layer")
        return place_windows(tuple(size for size in sizes if size is not None), depth, place, border)
    if len(sizes) != depth:
        raise DitlabError(f"attention plan '{plan}': expected one entry for each of {depth} layers, found {len(sizes)}")
    return tuple(Global() if size is None else Window(size, border) for size in sizes)


def _entry(entry: str, plan: str) -> list[int | None]:
    """Parses `"5"`, `"g"`, `"5*3"` or `"g*9"` into a list of window sizes, None for global."""
    what, star, count = (part.strip() for part in entry.partition("*"))
    if any(letter.isalpha() for letter in plan.split("@")[0].replace("g", "")):
        raise unknown_name("attention plan", plan.split("@")[0], NAMED_WINDOWS)
    if not (what == "g" or what.isdecimal()) or (star and not count.isdecimal()):
        raise DitlabError(f"attention plan '{plan}': expected entries such as 5, g or g*9, found '{entry}'")
    return [None if what == "g" else int(what)] * (int(count) if star else 1)


__all__ = ["NAMED_WINDOWS", "Scheme", "parse_plan", "place_windows"]
