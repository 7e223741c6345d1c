"""A part of a picture, painted anew under a prompt; the rest stays pixel for pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from finetune.canvas import Frame, cover
from finetune.errors import UserError
from finetune.tasks.base import Inputs, Layout, Task, tasks

WHITE = 128  # and above, of 255: what is painted


@tasks.register
class Inpaint(Task):
    """Made for bases of any kind: one without inpainting weights has its kept latents put back after every step.

    Transparency serves as the mask where none is given.
    """

    needs = frozenset({"image"})
    takes = frozenset({"mask", "strength"})
    infix = "Inpaint"
    usual_strength = 1.0

    def __init__(self, inputs: Inputs, steps: int):
        super().__init__(inputs, steps)
        if self.image is None or (inputs.mask is not None and self.mask is None):
            return
        hidden = self.mask.image.convert("L") if self.mask is not None else self.image.hidden
        if hidden is None:
            self.problems.append("--mask: inpaint needs it, or a picture with transparent parts")
        elif hidden.size != self.image.size:
            self.problems.append(f"--mask: is {_by(hidden.size)} pixels, but the picture is {_by(self.image.size)}")
        elif not np.any(np.asarray(hidden) >= WHITE):
            self.problems.append("--mask: nothing in it is white, so nothing would be painted")
        self.hidden = hidden

    def channels(self, latent: int) -> tuple[int, ...]:
        """Those of inpainting weights come with the mask and the masked picture."""
        return latent, 2 * latent + 1

    def lay_out(self, pipeline: Any, frame: Frame) -> Layout:
        assert self.image is not None and self.hidden is not None
        mask = Image.fromarray(np.where(np.asarray(frame.fit(self.hidden)) >= WHITE, 255, 0).astype(np.uint8))
        if mask.getbbox() is None:
            raise UserError("--mask: nothing of what is white in it lies in the part that is drawn")
        return self.repaint(frame.fit(self.image.image), mask, frame)

    def repaint(self, image: Image.Image, mask: Image.Image, frame: Frame) -> Layout:
        pictures = {"image": image, "mask_image": cover(mask, frame.cell)}
        return Layout(image.size, pictures, {"strength": self.strength}, image, mask, frame.cell)


def _by(size: tuple[int, int]) -> str:
    return "{} x {}".format(*size)
