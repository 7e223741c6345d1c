"""Pictures of the class that the base makes itself, kept between runs and never mixed up.

A folder holds the pictures of one exact request; its name is the request's
hash and its manifest names every finished file with its checksum. A file that
the manifest does not vouch for does not exist.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.dataset.scan import Picture

MANIFEST = "manifest.jsonl"
# Renders one picture for each seed.
Render = Callable[[Sequence[int]], Sequence[Image.Image]]


@dataclass(frozen=True)
class ClassImages:
    """Everything that decides how a class image looks."""

    prompt: str
    model: str  # the base's fingerprint
    sampler: str
    steps: int
    guidance: float
    size: int
    seed: int

    def folder(self, cache: Path) -> Path:
        return cache / hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def missing(self, cache: Path, count: int) -> list[int]:
        """Which of the first `count` pictures are still to be made."""
        return self._unfinished(cache, range(count))

    def make(self, cache: Path, indices: Sequence[int], render: Render, batch_size: int) -> None:
        """Render the pictures of `indices`; each is safe on disk once its batch is done.

        Picture i depends on (request, i) alone, so any number of processes may share the work. Another run may make
        the same ones meanwhile: what was there first stays, for a run may be reading it.
        """
        folder = self.folder(cache)
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(indices), batch_size):
            chunk = self._unfinished(cache, indices[start : start + batch_size])
            drawn = render([self.seed + index for index in chunk]) if chunk else []
            for index, image in zip(chunk, drawn, strict=True):
                self._store(cache, index, image)

    def pictures(self, cache: Path, count: int) -> list[Picture]:
        folder, finished = self.folder(cache), self._finished(cache, range(count))
        return [
            Picture(str(folder / name), finished[name], self.size, self.size, (self.prompt,))
            for name in map(_name, range(count))
        ]

    def _store(self, cache: Path, index: int, image: Image.Image) -> None:
        folder = self.folder(cache)
        unfinished = folder / f".{_name(index)}.{os.getpid()}"
        image.save(unfinished, format="PNG")
        row = {"file": _name(index), "sha256": _checksum(unfinished), "request": asdict(self)}
        with (folder / MANIFEST).open("a+b") as manifest:
            fcntl.flock(manifest, fcntl.LOCK_EX)
            if self._finished(cache, [index]):
                unfinished.unlink()
                return
            unfinished.replace(folder / _name(index))
            manifest.seek(max(0, manifest.seek(0, os.SEEK_END) - 1))
            cut = manifest.read() not in (b"", b"\n")  # a crash may have left half a line
            manifest.write((cut * "\n" + json.dumps(row) + "\n").encode())

    def _unfinished(self, cache: Path, indices: Sequence[int]) -> list[int]:
        finished = self._finished(cache, indices)
        return [index for index in indices if _name(index) not in finished]

    def _finished(self, cache: Path, indices: Sequence[int]) -> dict[str, str]:
        """File name -> checksum of those pictures that are whole and were made for this request."""
        folder, wanted = self.folder(cache), set(map(_name, indices))
        listed = {row["file"]: row["sha256"] for row in _rows(folder / MANIFEST) if row["request"] == asdict(self)}
        return {
            name: checksum
            for name, checksum in listed.items()
            if name in wanted and (folder / name).is_file() and _checksum(folder / name) == checksum
        }


def _rows(manifest: Path) -> Iterator[dict[str, Any]]:
    """The manifest's whole lines."""
    if not manifest.is_file():
        return
    for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() >= {"file", "sha256", "request"}:
            yield row


def _name(index: int) -> str:
    return f"{index:05d}.png"


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
