"""What a run takes: time, and memory of a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping

import torch


class Cost:
    """Counts from where it is made, which is before the base is loaded, and over all sessions of a run."""

    def __init__(self) -> None:
        self.before: Mapping[str, float] = {}  # what sessions before this one took
        self.begun = time.monotonic()
        if torch.cuda.is_available():
            gc.collect()  # what an earlier run of this process has left: its parts know each other
            torch.cuda.reset_peak_memory_stats()

    def numbers(self) -> dict[str, float]:
        """Seconds until now, and the GiB that torch took of the GPU at most."""
        found = {"seconds": self.before.get("seconds", 0.0) + time.monotonic() - self.begun}
        if torch.cuda.is_available():
            found["peak_gib"] = max(self.before.get("peak_gib", 0.0), torch.cuda.max_memory_reserved() / 2**30)
        return found
