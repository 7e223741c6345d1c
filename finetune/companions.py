"""A base's companions, ControlNet and InstructPix2Pix, rebuilt from the base and a small file.

`companions/NAME/difference.safetensors` holds what a companion has beside the base's denoiser:

- `PARAMETER.up` int8 [out, r] and `PARAMETER.down` int8 [r, in], each with a float16 `.scale` for every row: their
  product is added to the base's parameter, seen as a matrix;
- `PARAMETER` float16: the value itself, for what the base lacks and for what is no matrix.

`companions/NAME/config.json` is the companion's own configuration, as diffusers writes it.

    unet = companion("instruct_pix2pix", "data/base")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained("data/base", unet=unet, ...)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

FILE = "difference.safetensors"
CLASSES = {kind.__name__: kind for kind in (ControlNetModel, UNet2DConditionModel)}


def companion(name: str, base_folder: str | Path) -> ControlNetModel | UNet2DConditionModel:
    """The companion as diffusers knows it, in float32.

    Args:
        name: a folder in `base_folder/companions`.
        base_folder: a Stable Diffusion pipeline's folder.

    Raises:
        ValueError: no such companion; the message lists those that are there.
    """
    folder = Path(base_folder) / "companions" / name
    if not (folder / FILE).exists():
        known = sorted(path.parent.name for path in folder.parent.glob(f"*/{FILE}"))
        raise ValueError(f"{base_folder} has no companion '{name}'. It has: {', '.join(known) or 'none'}.")
    config = json.loads((folder / "config.json").read_text())
    model: Any = CLASSES[config["_class_name"]].from_config(config)
    base = UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet", torch_dtype=torch.float32)
    stored = load_file(folder / FILE)
    model.load_state_dict(restored(model.state_dict(), base.state_dict(), stored))
    return model.eval()


def restored(own: Mapping[str, Tensor], base: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by name: stored whole, or the base's with the stored difference added."""
    weights = {}
    for name, initial in own.items():
        if name in stored:
            weights[name] = stored[name].float()
            continue
        weights[name] = base[name].float()
        if f"{name}.up" in stored:
            product = widened(stored, f"{name}.up") @ widened(stored, f"{name}.down")
            weights[name] = weights[name] + product.view(initial.shape)
    return weights


def widened(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """int8 rows times their scales, float32."""
    return stored[name].float() * stored[f"{name}.scale"].float()[:, None]


def narrowed(matrix: Tensor, name: str) -> dict[str, Tensor]:
    """What `widened` reads: rows rounded to 127 steps of their greatest value."""
    scale = (matrix.abs().amax(1) / 127).clamp(min=1e-7).half()
    rows = (matrix / scale.float().clamp(min=1e-7)[:, None]).round().clamp(-127, 127)
    return {name: rows.to(torch.int8), f"{name}.scale": scale}
