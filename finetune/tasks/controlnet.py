"""Pictures along edges, poses or depth maps (ControlNet, https://arxiv.org/abs/2302.05543)."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

from finetune.canvas import Frame, Picture
from finetune.edges import edge_map
from finetune.errors import UserError
from finetune.tasks.base import Inputs, Layout, Task, load_model, tasks


@tasks.register
class ControlNet(Task):
    """One network or several, each with a map of its own; maps are given as they are, or as a picture's edges."""

    needs = frozenset({"controlnet"})
    takes = frozenset({"control", "control_from"})
    infix = "ControlNet"
    batch_size = 1  # SD3's pipeline draws the map's latents from the global generator

    def __init__(self, inputs: Inputs, steps: int):
        super().__init__(inputs, steps)
        self.maps = self._open_all("control", inputs.control)
        self.drawings = self._open_all("control_from", inputs.control_from)
        count = len(inputs.control) + len(inputs.control_from)
        if inputs.controlnet and count != len(inputs.controlnet):
            self.problems.append(
                f"--control: {len(inputs.controlnet)} ControlNets need a map each, but {count} are given. "
                "Give --control MAP, or --control-from PICTURE for its edges."
            )
        sizes = sorted({picture.size for picture in (*self.maps, *self.drawings)})
        if len(sizes) > 1:
            self.problems.append(f"--control: the maps have different sizes, {', '.join(map(str, sizes))}")
        self.sources, self.scales = [], []
        for text in inputs.controlnet:
            self._parse(text)

    def _open_all(self, name: str, given: Any) -> list[Picture]:
        return [picture for one in given if (picture := self._open(name, one)) is not None]

    def _parse(self, text: str) -> None:
        """`source` or `source=scale`."""
        source, equals, scale = text.rpartition("=")
        try:
            self.scales.append(float(scale) if equals else 1.0)
        except ValueError:
            self.scales.append(math.nan)
        self.sources.append(source if equals else text)
        if not math.isfinite(self.scales[-1]):
            self.problems.append(f"--controlnet {text!r}: the scale after '=' is not a number")

    def parts(self, pipeline: Any, kind: Any) -> dict[str, Any]:
        networks = [load_model("controlnet", source, pipeline.dtype) for source in self.sources]
        wanted = str(inspect.signature(kind.__init__).parameters["controlnet"].annotation)
        for source, network in zip(self.sources, networks, strict=True):
            _check_fit(source, network, wanted, pipeline)
        if len(networks) > 1 and not re.search("list|tuple", wanted, re.IGNORECASE):
            raise UserError(f"--controlnet: {kind.__name__} takes one")
        return {"controlnet": networks if len(networks) > 1 else networks[0]}

    def lay_out(self, pipeline: Any, frame: Frame) -> Layout:
        maps = [frame.fit(picture.image) for picture in self.maps]
        maps += [edge_map(frame.fit(picture.image)) for picture in self.drawings]
        several = len(maps) > 1
        name = "control_image" if "control_image" in inspect.signature(pipeline.__call__).parameters else "image"
        scale = self.scales if several else self.scales[0]
        settings = {name: maps if several else maps[0], "controlnet_conditioning_scale": scale}
        return Layout(maps[0].size, settings=settings)


def _check_fit(source: str, network: Any, wanted: str, pipeline: Any) -> None:
    if not re.search(rf"\b{type(network).__name__}\b", wanted):
        raise UserError(f"--controlnet: {source} is a {type(network).__name__}, which is made for another family")
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    for width in ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim"):
        has, needs = network.config.get(width), denoiser.config.get(width)
        if has is not None and has != needs:
            raise UserError(f"--controlnet: {source} reads prompts of width {has}, but this base's have {needs}")
