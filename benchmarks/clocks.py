"""What benchmarks read the time from."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: the thread's own on one CPU thread, so that other processes disturb less; else the wall's."""
    if device.type == "cuda":

        def wall() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return wall
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
