"""Pictures from prompts alone."""

from __future__ import annotations

from typing import Any

from finetune.canvas import Frame
from finetune.tasks.base import Layout, Task, tasks


@tasks.register
class TextToImage(Task):
    """From noise to a picture."""

    def lay_out(self, pipeline: Any, frame: Frame) -> Layout:
        return Layout(frame.sides)
