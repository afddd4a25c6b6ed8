"""Denoising networks: `(x, t, label=None) -> raw output`, with no knowledge of any noise schedule."""

from ditlab.networks.registry import *  # noqa: F403
