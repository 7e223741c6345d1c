"""How large and how long: the real run, and the smoke run that shows that every stage works."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """All sizes of one build.

    Attributes:
        folder: checkpoints, logs and samples; a finished stage is not run again.
        seconds: of training for each stage; the denoiser trains until `total` seconds after the start.
        seconds_refine, seconds_controlnet, seconds_instruct: of the second run, on the exported pipeline.
        steps: end every stage after so many steps instead (0: by the clock).
        batch sizes are per process.
    """

    folder: Path
    total: float = 1270.0
    seconds_clip: float = 45.0
    seconds_evaluation: float = 36.0
    seconds_autoencoder: float = 320.0
    seconds_refine: float = 280.0
    seconds_controlnet: float = 130.0
    seconds_instruct: float = 210.0
    steps: int = 0
    workers: int = 30
    num_pictures: int = 400_000
    num_fresh: int = 200_000
    num_pairs: int = 80_000
    num_judged: int = 1024
    picture_size: int = 256
    clip_size: int = 128
    clip_patch: int = 16
    batch_clip: int = 2048
    batch_autoencoder: int = 32
    batch_denoiser: int = 512
    rank: int = 32
    compile: bool = True
    autoencoder_channels: tuple[int, ...] = (32, 64, 128, 128)
    denoiser_channels: tuple[int, ...] = (96, 160, 256)
    text_width: int = 256
    text_layers: int = 4
    image_layers: int = 6
    vocabulary: int = 3000
    sample_every: float = 150.0

    @property
    def latent_size(self) -> int:
        return self.picture_size // 8


def smoke(settings: Settings) -> Settings:
    """A toy of the same shape: two steps of every stage on a few dozen pictures of 64 px."""
    return replace(
        settings, steps=2, workers=1, num_pictures=48, num_fresh=24, num_pairs=24, num_judged=16, rank=4,
        picture_size=64, clip_size=32,
        clip_patch=8, batch_clip=8, batch_autoencoder=2, batch_denoiser=4, compile=False,
        autoencoder_channels=(16, 16, 16, 16), denoiser_channels=(32, 32, 32), text_width=32, text_layers=1,
        image_layers=1, vocabulary=700, sample_every=0.0,
    )  # fmt: skip
