"""A picture, edited as the prompt instructs (InstructPix2Pix, https://arxiv.org/abs/2211.09800)."""

from __future__ import annotations

from typing import Any

from finetune.canvas import Frame
from finetune.errors import UserError
from finetune.tasks.base import Inputs, Layout, Task, load_model, tasks


@tasks.register
class InstructPix2Pix(Task):
    """Another denoiser of the same base, which sees the picture beside the noise."""

    needs = frozenset({"image", "editor"})
    takes = frozenset({"image_guidance"})
    infix = "InstructPix2Pix"

    def __init__(self, inputs: Inputs, steps: int):
        super().__init__(inputs, steps)
        if inputs.image_guidance is not None and not inputs.image_guidance >= 1:
            self.problems.append(f"--image-guidance: {inputs.image_guidance} is not 1 or more")

    def channels(self, latent: int) -> tuple[int, ...]:
        return (2 * latent,)

    def parts(self, pipeline: Any, kind: Any) -> dict[str, Any]:
        assert self.inputs.editor is not None
        if getattr(pipeline.unet, "peft_config", None):
            raise UserError(
                f"--adapter: this pipeline's denoiser has adapters, and {self.name} has a denoiser of its own, which "
                "would not. Name the base instead of the pipeline, and give the adapters beside it."
            )
        return {"unet": load_model("editor", self.inputs.editor, pipeline.dtype)}

    def lay_out(self, pipeline: Any, frame: Frame) -> Layout:
        assert self.image is not None
        image = frame.fit(self.image.image)
        given = {"image_guidance_scale": self.inputs.image_guidance} if self.inputs.image_guidance is not None else {}
        return Layout(image.size, {"image": image}, given)
