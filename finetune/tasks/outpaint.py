"""A picture on a larger canvas, whose new part is painted under a prompt."""

from __future__ import annotations

from typing import Any

from finetune.canvas import Frame, grow
from finetune.errors import UserError
from finetune.tasks.base import Inputs, Layout, Task, tasks
from finetune.tasks.inpaint import Inpaint


@tasks.register
class Outpaint(Inpaint):
    """The canvas is grown and then inpainted; the picture fades into the new part over two latents' width."""

    needs = frozenset({"image", "extend"})
    takes = frozenset({"strength"})

    def __init__(self, inputs: Inputs, steps: int):
        Task.__init__(self, inputs, steps)
        if inputs.extend is not None and not any(pixels for _, pixels in inputs.extend.items()):
            self.problems.append("--extend: no side grows")

    def lay_out(self, pipeline: Any, frame: Frame) -> Layout:
        assert self.image is not None and self.inputs.extend is not None
        wrong = [f"{side}={pixels}" for side, pixels in self.inputs.extend.items() if pixels % frame.multiple]
        if wrong:
            raise UserError(
                f"--extend: {', '.join(wrong)} is not a multiple of {frame.multiple}, which this base needs"
            )
        seam = 2 * frame.cell
        layout = self.repaint(*grow(frame.fit(self.image.image), self.inputs.extend, seam), frame)
        return Layout(layout.size, layout.pictures, layout.settings, layout.original, layout.mask, seam)
