"""Full checkpoints in one file, as their authors publish them: where each weight of diffusers lies in it.

Sources: diffusers' `single_file_utils.py`, which loads such files into pipelines, and ComfyUI's `supported_models.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from finetune.originals import TABLES, clip_name, in_diffusers, stacked, swap, swapped

Shapes = Mapping[str, tuple[int, ...]]
DENOISER = "model.diffusion_model."
# The beginnings of names, the part that is meant, and whose names it has; None are those of transformers.
ENCODERS = {
    r"(cond_stage_model|conditioner\.embedders\.0|text_encoders\.clip_l)\.transformer\.": ("text_encoder", None),
    r"cond_stage_model\.model\.": ("text_encoder", "open_clip"),
    r"conditioner\.embedders\.1\.model\.": ("text_encoder_2", "open_clip"),
    r"text_encoders\.clip_g\.transformer\.": ("text_encoder_2", None),
    r"text_encoders\.t5xxl\.transformer\.": ("text_encoder_3", None),
}
VAE = ("first_stage_model.", "vae.")  # a LoRA changes none
# No weight of diffusers: Stable Diffusion 2 reads its encoder's last layer but one.
UNUSED = r"\.logit_scale$|^cond_stage_model\.model\.(text_projection$|transformer\.resblocks\.23\.)"
# Weights whose layer is not before a dot, and FLUX's norms.
SPELLINGS = {
    r"in_proj_(weight|bias)$": r"in_proj.\1",
    r"^(positional_embedding|text_projection)$": r"\1.weight",
    r"^pos_embed$": "pos_embed.pos_embed",
    r"_norm\.scale$": "_norm.weight",
}


@dataclass(frozen=True)
class Piece:
    """Where a weight of diffusers lies: in a tensor, or in some of its rows, which may be laid out otherwise."""

    stored: str
    rows: tuple[int, int] | None = None
    swapped: bool = False
    transposed: bool = False

    def cut(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.rows is None else tensor[slice(*self.rows)]
        tensor = swap(tensor) if self.swapped else tensor
        return tensor.T if self.transposed else tensor


def pieces(shapes: Shapes, architecture: str | None) -> dict[str, dict[str, Piece]]:
    """Part of the pipeline -> weight of diffusers -> where it lies in a file with tensors of these names.

    Raises:
        UserError: a tensor cannot be what its name says.
    """
    found: dict[str, dict[str, Piece]] = {}
    # Transformers are also published alone, and then without the denoiser's prefix.
    prefix = "" if architecture in TABLES and not any(name.startswith(DENOISER) for name in shapes) else DENOISER
    for stored in shapes:
        part, table, rest = _place(stored, architecture or "sd1", prefix)
        if part is not None:
            found.setdefault(part, {}).update(_pieces(stored, rest, table, shapes))
    return found


def _place(name: str, architecture: str, prefix: str) -> tuple[str | None, str | None, str]:
    """The part, whose names it has, and the rest of the name."""
    for pattern, (part, table) in ENCODERS.items():
        if beginning := re.match(pattern, name):
            second = architecture == "flux" and part == "text_encoder_3"  # it has no CLIP-G
            place = None if re.search(UNUSED, name) else "text_encoder_2" if second else part
            return place, table, name[beginning.end() :]
    if name.startswith(prefix) and not name.startswith(VAE):
        return ("transformer" if architecture in TABLES else "unet"), architecture, name.removeprefix(prefix)
    return None, None, name


def _pieces(stored: str, rest: str, table: str | None, shapes: Shapes) -> dict[str, Piece]:
    """The weights of diffusers that lie in one tensor."""
    if table is None:
        return {clip_name(rest): Piece(stored)}
    for pattern, spelling in SPELLINGS.items():
        rest = re.sub(pattern, spelling, rest)
    layer, _, kind = rest.rpartition(".")
    if not layer:
        return {rest: Piece(stored)}
    names = in_diffusers(layer, table)
    # How many inputs a layer has shows in its weight, and not in its bias.
    weight = shapes.get(f"{stored.rpartition('.')[0]}.weight", shapes[stored])
    num_outputs, num_inputs = (*weight, 1, 1)[:2]
    if len(names) == 1:
        other, turned = swapped(names[0], num_outputs, num_inputs), rest == "text_projection.weight"
        return {f"{names[0]}.{kind}": Piece(stored, swapped=other, transposed=turned)}
    rows = pairwise([0, *accumulate(stacked(layer, names, num_outputs, num_inputs))])
    return {f"{name}.{kind}": Piece(stored, ends) for name, ends in zip(names, rows, strict=True)}
