"""How many CPU threads torch uses."""

from __future__ import annotations

from ditlab.errors import InvalidConfig

__all__ = ["use_threads"]


def use_threads(threads: int | None) -> None:
    """Limits torch's CPU threads; None leaves torch's own choice (all cores)."""
    if threads is None:
        return
    if threads < 1:
        raise InvalidConfig(f"`threads`: expected at least 1, found {threads}")
    import torch

    torch.set_num_threads(threads)
