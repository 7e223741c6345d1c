"""What looks at the pictures: CLIP and DINO by name, with preprocessing of our own.

Shapes: N pictures or prompts, D width of an embedding. Embeddings are unit vectors in float32 on the CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from finetune.errors import UserError, reason
from finetune.hub import meet
from finetune.quiet import quiet_loading

EMBEDDED = Path(__file__).parent.parent.parent / "data" / "base" / "evaluation"
AT_ONCE = 16
GRAY = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture is shown to an encoder: `resize` is the shortest side after bicubic scaling with antialiasing by
    Pillow, then the centre square of side `crop` is cut, scaled to 0..1, less `mean`, divided by `std`."""

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, settings: dict[str, Any], size: int) -> Preprocessing:
        """From a `preprocessor_config.json`; what it lacks is as CLIP has it, with `size` pixels and gray at 0.5."""
        crop = _side(settings.get("crop_size"), size)
        resize = max(_side(settings.get("size"), crop), crop)
        return cls(resize, crop, tuple(settings.get("image_mean", GRAY)), tuple(settings.get("image_std", GRAY)))

    def apply(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, 3, crop, crop) float32."""
        pixels = np.stack([np.asarray(self._cut(picture.convert("RGB")), np.float32) for picture in pictures])
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (self.mean, self.std))
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std

    def _cut(self, picture: Image.Image) -> Image.Image:
        scale = self.resize / min(picture.size)
        width, height = (max(self.resize, round(side * scale)) for side in picture.size)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
        return scaled.crop((left, top, left + self.crop, top + self.crop))


@dataclass(frozen=True)
class EncoderInfo:
    """What must be the same for two scores to be compared."""

    name: str
    kind: Literal["clip", "dino"]
    fingerprint: str  # of its weights
    preprocessing: Preprocessing


class Encoder:
    """CLIP's projected embeddings (2103.00020), or the class token of a vision transformer, as of DINO (2104.14294)."""

    def __init__(self, model: Any, tokenizer: Any, info: EncoderInfo):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.info = info

    @classmethod
    def load(cls, name: str) -> Encoder:
        """From a folder or the Hub.

        Raises:
            UserError: there is none, or it is no encoder of pictures.
        """
        from transformers import AutoConfig, AutoModel, CLIPModel

        quiet_loading()
        try:
            meet(name, "config.json")
            is_clip = AutoConfig.from_pretrained(name).model_type == "clip"
            model: Any = (CLIPModel if is_clip else AutoModel).from_pretrained(name, dtype=torch.float32)
            if not is_clip and model.main_input_name != "pixel_values":
                raise ValueError(f"a {type(model).__name__} reads no pictures")
            tokenizer = _tokenizer(name) if is_clip else None
            config = model.config.vision_config if is_clip else model.config
            preprocessing = Preprocessing.read(_preprocessor(name), config.image_size)
            info = EncoderInfo(name, "clip" if is_clip else "dino", _fingerprint(model), preprocessing)
            encoder = cls(model, tokenizer, info)
            if encoder.see([Image.new("RGB", (8, 8))]).ndim != 2:
                raise ValueError(f"a {type(model).__name__} has no class token")
        except Exception as error:  # a broken folder fails in as many ways as it has files
            raise UserError(
                f"--encoder {name}: cannot be loaded ({reason(error)}). Name a folder or a model of the Hub, such as "
                "openai/clip-vit-base-patch32 or facebook/dino-vits16."
            ) from None
        return encoder

    @property
    def reads(self) -> bool:
        """Whether it has embeddings of prompts, too."""
        return self.tokenizer is not None

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D)"""
        found = []
        for start in range(0, len(pictures), AT_ONCE):
            pixels = self.info.preprocessing.apply(pictures[start : start + AT_ONCE])
            if self.reads:
                seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
            else:
                seen = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            found.append(F.normalize(seen.float(), dim=-1))
        return torch.cat(found)

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """(N, D), of an encoder that reads."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        seen = self.model.text_model(input_ids=ids.input_ids, attention_mask=ids.attention_mask)
        return F.normalize(self.model.text_projection(seen.pooler_output).float(), dim=-1)


def _side(value: Any, default: int) -> int:
    """`224`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}`, as these files have it."""
    if isinstance(value, dict):
        value = value.get("shortest_edge") or value.get("height")
    return int(value) if value else default


def _preprocessor(name: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}


def _tokenizer(name: str) -> Any:
    """The encoder's own, or the one in the folder beside it, as in a base in diffusers' layout."""
    from transformers import CLIPTokenizer

    beside = Path(name).parent / "tokenizer"
    has_own = not Path(name).is_dir() or any(Path(name).glob("*vocab.json")) or any(Path(name).glob("tokenizer*"))
    return CLIPTokenizer.from_pretrained(name if has_own or not beside.is_dir() else str(beside))


def _fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
