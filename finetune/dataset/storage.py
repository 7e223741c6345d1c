"""What the machine keeps between runs; every name says what a file holds."""

from __future__ import annotations

import os
from pathlib import Path


def kept(kind: str) -> Path:
    """The folder of one kind of file."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "finetune" / kind
