"""Importance sampling of the step t by its last losses: steps with a large loss are drawn more often.

    p(t) proportional to sqrt(E[L_t^2]),  weight 1 / (T p(t))

Source: Nichol and Dhariwal 2021, Eq. 18 and section 3.3 (the variational bound's gradient is too noisy without it).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ditlab.errors import DitlabError

__all__ = ["LossSecondMoment"]

LAST = 10
"""Number of losses of each step in the history."""
UNIFORM = 0.001
"""Share of uniform draws, so that a step with a small loss is still drawn."""


class LossSecondMoment:
    """p(t) of each step from its last losses; uniform until every step has ten.

    A draw of t has the weight 1 / (T p(t)), so the weighted mean estimates the mean over all steps.
    """

    def __init__(self, steps: int) -> None:
        self.losses = np.zeros((steps, LAST), dtype=np.float32)  # oldest first
        self.counts = np.zeros(steps, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"LossSecondMoment({len(self)} steps, {int(self.counts.sum())} losses)"

    def probabilities(self) -> np.ndarray:
        """Returns p(t), float64 [T]."""
        if (self.counts < LAST).any():
            return np.full(len(self), 1 / len(self))
        root = np.sqrt(np.square(self.losses, dtype=np.float64).mean(axis=1))
        total = root.sum()
        # If all losses are zero, every step is equally likely.
        share = root / total if total > 0 else np.full(len(self), 1 / len(self))
        return (1 - UNIFORM) * share + UNIFORM / len(self)

    def draw(self, generator: torch.Generator, count: int) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """Returns `count` steps and their weights: a function of the generator and the history."""
        p = self.probabilities()
        edges = np.cumsum(p)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
        t = np.minimum(np.searchsorted(edges, uniform * edges[-1], side="right"), len(self) - 1)
        return torch.from_numpy(t), torch.from_numpy(1 / (len(self) * p[t])).float()

    def update(self, t: Int[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Adds unweighted losses, in the order of the global batch; the oldest losses of a step are dropped."""
        for step, loss in zip(t.tolist(), losses.float().cpu().numpy(), strict=True):
            if self.counts[step] == LAST:
                self.losses[step] = np.append(self.losses[step, 1:], loss)
            else:
                self.losses[step, self.counts[step]] = loss
                self.counts[step] += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the history as JSON values: little-endian bytes in base64, which are exact and short."""
        return {
            "time_sampling": "loss-second-moment",
            "losses": base64.b64encode(self.losses.astype("<f4").tobytes()).decode(),
            "counts": base64.b64encode(self.counts.tobytes()).decode(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the history that `state_dict` returned; that of another sampling or number of steps is refused."""
        if set(state) != {"time_sampling", "losses", "counts"} or state["time_sampling"] != "loss-second-moment":
            raise DitlabError(
                "objective: expected the remembered losses of time_sampling loss-second-moment, found "
                f"{', '.join(sorted(state)) or 'nothing'}"
            )
        try:
            losses = np.frombuffer(base64.b64decode(state["losses"], validate=True), dtype="<f4")
            counts = np.frombuffer(base64.b64decode(state["counts"], validate=True), dtype=np.uint8)
        except (TypeError, ValueError, binascii.Error):
            raise DitlabError("objective: expected remembered losses in base64, found something else") from None
        if losses.size != self.losses.size or counts.size != len(self) or counts.max() > LAST:
            raise DitlabError(
                f"objective: expected {LAST} remembered losses of each of {len(self)} steps, found {losses.size} of "
                f"{counts.size} steps"
            )
        self.losses = losses.reshape(-1, LAST).astype(np.float32)
        self.counts = counts.copy()
