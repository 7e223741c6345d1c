"""What tasks are given in tests: a picture, a mask, a map, and a ControlNet and an editor for every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    SD3ControlNetModel,
    UNet2DConditionModel,
    ZImageControlNetModel,
)
from PIL import Image

from finetune.canvas import Margins
from finetune.edges import edge_map
from finetune.tasks import Inputs

SIZE = 32  # of the short side, in pixels


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def box_mask(size: tuple[int, int] = (48, 32)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (8, 8, 28, 24))
    return mask


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def distance(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(values(one) - values(other)).max())


def wake(model: Any) -> Any:
    """New networks start at zero, where they do nothing."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def control_network(pipeline: Any) -> Any:
    if hasattr(pipeline, "unet"):
        return ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(4, 8))
    config = dict(pipeline.transformer.config)
    if "cap_feat_dim" in config:
        same = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps", "qk_norm")
        kept = {name: config[name] for name in same}
        return ZImageControlNetModel(control_layers_places=[0], control_in_dim=config["in_channels"], **kept)
    if "axes_dims_rope" in config:
        return FluxControlNetModel.from_config(config, num_layers=1, num_single_layers=1)
    same = {"num_extra_conditioning_channels": 0, "load_weights_from_transformer": False}
    return SD3ControlNetModel.from_transformer(pipeline.transformer, 1, **same)


def editing_unet(unet: Any) -> Any:
    """The same denoiser, which also sees a picture's latents."""
    wide = UNet2DConditionModel.from_config(unet.config, in_channels=8)
    state = unet.state_dict()
    kernel = state["conv_in.weight"]
    torch.manual_seed(2)
    wide.load_state_dict({**state, "conv_in.weight": torch.cat([kernel, torch.randn_like(kernel) * 0.2], 1)})
    return wide


def inputs_for(task: str, control: str, editor: str) -> Inputs:
    """What a task is given; `control` and `editor` are folders of networks."""
    return {
        "text_to_image": Inputs(),
        "image_to_image": Inputs(image=picture(), strength=0.5),
        "inpaint": Inputs(image=picture(), mask=box_mask()),
        "outpaint": Inputs(image=picture(), extend=Margins(left=16, top=8)),
        "controlnet": Inputs(control=(edge_map(picture()),), controlnet=(control,)),
        "instruct_pix2pix": Inputs(image=picture(), editor=editor, image_guidance=1.5),
    }[task]
