"""What a picture can be made from beside its prompt, and which of diffusers' pipelines makes it."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, UnidentifiedImageError

from finetune.canvas import Frame, Given, Margins, Picture, paste, read
from finetune.errors import UserError
from finetune.hub import meet
from finetune.registry import Registry


@dataclass(frozen=True)
class Inputs:
    """All that a task may need or take; each is an option of the command of the same name."""

    image: Given | None = None
    """The picture that is changed, edited or grown."""
    mask: Given | None = None
    """White where the picture is repainted."""
    strength: float | None = None
    """How much of the picture is given up for the prompt, above 0 and up to 1."""
    extend: Margins | None = None
    """How far the picture grows on each side."""
    control: tuple[Given, ...] = ()
    """Edges, a pose or a depth map, one for each ControlNet."""
    control_from: tuple[Given, ...] = ()
    """Pictures whose edges are such maps; they come after those of `control`."""
    controlnet: tuple[str, ...] = ()
    """Names on the Hub, folders or companions of the embedded base; `name=0.5` sets a scale."""
    editor: str | None = None
    """The InstructPix2Pix model that follows the prompt as an instruction."""
    image_guidance: float | None = None
    """How closely an edit keeps to the picture, 1 or more."""

    def given(self) -> set[str]:
        return {option.name for option in fields(self) if getattr(self, option.name) not in (None, ())}


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Layout:
    """What goes into a call of the pipeline, and what stays of the picture afterwards."""

    size: tuple[int, int]
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)  # one for each prompt of a batch
    settings: Mapping[str, Any] = field(default_factory=dict)
    original: Image.Image | None = None
    mask: Image.Image | None = None  # white where `original` does not stay
    seam: int = 0

    def finish(self, drawn: Image.Image) -> Image.Image:
        if self.original is None or self.mask is None:
            return drawn
        return paste(self.original, drawn, self.mask, self.seam)


class Task(ABC):
    """A way of making pictures. One subclass for each."""

    needs: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset()  # beside what it needs
    infix: ClassVar[str] = ""  # StableDiffusion*Pipeline, Flux*Pipeline: the pipelines that do it
    usual_strength: ClassVar[float | None] = None
    batch_size: ClassVar[int] = 4

    def __init__(self, inputs: Inputs, steps: int):
        self.inputs = inputs
        self.problems = [f"{option(name)}: {self.name} needs it" for name in sorted(self.needs - inputs.given())]
        unused = sorted(inputs.given() - self.needs - self.takes)
        self.problems += [f"{option(name)}: {self.name} has no use for it" for name in unused]
        self.image = self._open("image", inputs.image)
        self.mask = self._open("mask", inputs.mask)
        self.strength = inputs.strength or self.usual_strength
        if inputs.strength is not None and not 0 < inputs.strength <= 1:
            self.problems.append(f"--strength: {inputs.strength} is not above 0 and up to 1")
        elif self.strength is not None and int(self.strength * steps) < 1:
            self.problems.append(f"--strength: {self.strength} of {steps} steps is none. Raise one of them.")

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def _open(self, name: str, given: Given | None) -> Picture | None:
        if given is None:
            return None
        shown = "the picture" if isinstance(given, Image.Image) else given
        try:
            return read(given)
        except UnidentifiedImageError:  # its own words name a buffer in memory
            self.problems.append(f"{option(name)}: {shown} is a picture of no known format")
        except Exception as error:  # Pillow raises almost anything on hostile files
            self.problems.append(f"{option(name)}: {shown} cannot be read as a picture ({error})")
        return None

    def channels(self, latent: int) -> tuple[int, ...]:
        """How many channels its denoiser may take, where a latent has so many."""
        return (latent,)

    def parts(self, pipeline: Any, kind: Any) -> dict[str, Any]:
        """Modules that the task's pipeline, of class `kind`, has beside or instead of those of `pipeline`."""
        return {}

    @abstractmethod
    def lay_out(self, pipeline: Any, frame: Frame) -> Layout:
        """The pictures at a size that the base can draw, under the names that the task's pipeline has for them."""

    def switch(self, pipeline: Any) -> Any:
        """The pipeline of diffusers for this task, of the same modules.

        Raises:
            UserError: the base has none, or it is made for another task.
        """
        base = type(pipeline).__name__
        kind = pipeline_class(base, self.infix)
        if kind is None:
            able = [name for name in tasks.names() if pipeline_class(base, tasks[name].infix) is not None]
            raise UserError(
                f"--task: diffusers has no {_stem(base)}{self.infix}Pipeline, so this base cannot serve "
                f"{self.name}. It serves {', '.join(able)}."
            )
        known = {**pipeline.config, **pipeline.components, **self.parts(pipeline, kind)}
        accepted = inspect.signature(kind.__init__).parameters
        switched = kind(**{name: known[name] for name in accepted if name in known})
        self._check_channels(switched)
        return switched

    def _check_channels(self, pipeline: Any) -> None:
        if not hasattr(pipeline, "unet"):
            return
        takes, fitting = pipeline.unet.config.in_channels, self.channels(pipeline.vae.config.latent_channels)
        if takes not in fitting:
            raise UserError(
                f"--task: {self.name} needs a denoiser that takes {' or '.join(map(str, fitting))} channels, "
                f"but this one takes {takes}"
            )


tasks: Registry[Task] = Registry("task", "finetune.tasks")


def choose(name: str | None, inputs: Inputs, steps: int) -> Task:
    """The named task, or the one that uses most of what is given and misses least.

    Raises:
        UserError: every problem with the inputs.
    """
    given = inputs.given()

    def misfit(name: str) -> tuple[int, int]:
        task = tasks[name]
        return len(given - task.needs - task.takes), len(task.needs - given)

    task = tasks[name or min(tasks.names(), key=misfit)](inputs, steps)
    if task.problems:
        raise UserError(task.problems)
    return task


def _stem(base: str) -> str:
    """`StableDiffusionXL` of StableDiffusionXLInpaintPipeline."""
    return re.sub(r"(Img2Img|Inpaint|ControlNet|InstructPix2Pix)?Pipeline$", "", base)


def pipeline_class(base: str, infix: str) -> Any | None:
    """The class of the same family as the class called `base` for another task, if diffusers has one."""
    import diffusers

    return getattr(diffusers, f"{_stem(base)}{infix}Pipeline", None)


def load_model(name: str, source: str, dtype: Any) -> Any:
    """A ControlNet or a UNet from the Hub, a folder, or a companion of a base.

    Args:
        name: the option that it was given by.

    Raises:
        UserError: there is none.
    """
    from diffusers.models.auto_model import AutoModel

    from finetune.companions import FILE, companion

    folder = Path(source)
    try:
        if (folder / FILE).is_file():
            return companion(folder.name, folder.parent.parent).to(dtype)
        whole = not (folder / "config.json").is_file() and name == "editor"
        subfolder = "unet" if whole else None
        meet(source, f"{subfolder}/config.json" if subfolder else "config.json")
        return AutoModel.from_pretrained(source, subfolder=subfolder, dtype=dtype, use_safetensors=True)
    except Exception as error:  # a broken folder fails in as many ways as it has files
        raise UserError(f"{option(name)}: {source} cannot be loaded: {' '.join(str(error).split())}") from error
