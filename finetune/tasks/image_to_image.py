"""A picture, drawn anew under a prompt (SDEdit, https://arxiv.org/abs/2108.01073)."""

from __future__ import annotations

from typing import Any

from finetune.canvas import Frame
from finetune.tasks.base import Layout, Task, tasks


@tasks.register
class ImageToImage(Task):
    """Noise is added to the picture up to `strength`, and taken away under the prompt."""

    needs = frozenset({"image"})
    takes = frozenset({"strength"})
    infix = "Img2Img"
    usual_strength = 0.6

    def lay_out(self, pipeline: Any, frame: Frame) -> Layout:
        assert self.image is not None
        image = frame.fit(self.image.image)
        return Layout(image.size, {"image": image}, {"strength": self.strength})
