"""The `inspect` command: what a file is, and how it is used. Pickles are not opened."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapter import AdapterWeights, Content, WordVectors, not_finite
from finetune.architectures import ARCHITECTURES, PROMPT_WIDTHS, from_header, from_names
from finetune.errors import UserError, one_line
from finetune.files import is_file, read_shapes
from finetune.formats.base import PICKLES, parse, recognise

# Tensors that only such a checkpoint has, in the order in which they are looked for.
CHECKPOINTS = {
    r"^conditioner\.embedders\.": ("sdxl", "a full checkpoint in one file"),
    r"^cond_stage_model\.model\.": ("sd2", "a full checkpoint in one file"),
    r"^cond_stage_model\.": ("sd1", "a full checkpoint in one file"),
    r"(^|\.)joint_blocks\.": ("sd3", "a denoiser, or a full checkpoint, under its original names"),
    r"(^|\.)(double_blocks|single_blocks)\.": ("flux", "a denoiser, or a full checkpoint, under its original names"),
    r"(^|\.)(noise_refiner|context_refiner)\.": ("z_image", "a denoiser"),
    r"^model\.diffusion_model\.": (None, "a full checkpoint in one file"),
    r"^controlnet_(cond_embedding|down_blocks|mid_block)": (None, "a ControlNet in diffusers' layout"),
    r"^single_transformer_blocks\.": ("flux", "a denoiser in diffusers' layout"),
    r"^add_embedding\.": ("sdxl", "a UNet in diffusers' layout"),
    r"^(down_blocks|up_blocks)\.\d+\.(attentions|resnets)\.": (None, "a UNet in diffusers' layout"),
    r"^transformer_blocks\.\d+\.": (None, "a denoiser in diffusers' layout"),
    r"^(encoder|decoder)\.(down|up)_blocks\.|^first_stage_model\.": (None, "a VAE"),
    r"^(text_model\.)?encoder\.layers\.\d+\.self_attn": (None, "a CLIP text encoder"),
    r"^encoder\.block\.\d+\.layer": (None, "a T5 text encoder"),
}
PRECISIONS = {"torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}


def inspect(path: Path) -> dict[str, Any]:
    """What a file or folder is, as plain data; the keys are in the order in which they are shown.

    Raises:
        UserError: it does not exist, or is damaged.
    """
    if path.is_dir():
        return _folder(path)
    if not is_file(path):
        raise UserError(f"{path}: does not exist. Name a file or a folder.")
    found: dict[str, Any] = {"file": str(path), "size": f"{path.stat().st_size / 1000:,.1f} kB"}
    if path.suffix in PICKLES:
        return found | {
            "format": "pickle, not opened: opening one can run code",
            "use": f"finetune convert {path} --to kohya --allow-pickle  (embedding_a1111 for an embedding)",
        }
    shapes, header = read_shapes(path)
    if recognise(shapes) is None:
        return found | _checkpoint(shapes, header) | {"metadata": header}
    try:
        name, content = parse(path)
    except UserError as error:  # an adapter all the same: what can be told of it helps more than a refusal
        problems = [problem.removeprefix(f"{path}: ") for problem in error.problems]
        return found | {"format": recognise(shapes), "problems": problems, "metadata": header}
    described = _lora(content) if isinstance(content, AdapterWeights) else _embedding(content)
    return found | {"format": name, **described, "use": _use(path, content), "metadata": header}


def _folder(path: Path) -> dict[str, Any]:
    index = path / "model_index.json"
    if not index.is_file():
        held = sorted(file.name for file in path.glob("*.safetensors"))
        raise UserError(f"{path}: a folder. Name a file in it{': ' + ', '.join(held) if held else ''}.")
    try:
        config = json.loads(index.read_text(encoding="utf-8"))
        pipeline = config["_class_name"]
        parts = sorted(name for name, value in config.items() if isinstance(value, list) and value and value[0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: no JSON that names a pipeline") from None
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors") if file.is_file())
    return {
        "file": str(path),
        "size": f"{size / 1e6:,.1f} MB",
        "format": "a full pipeline in diffusers' layout",
        "pipeline": pipeline,
        "architecture": " or ".join(known.title for known in ARCHITECTURES.values() if known.pipeline == pipeline),
        "parts": parts,
        "use": f"{pipeline}.from_pretrained({str(path)!r})",
    }


def _checkpoint(shapes: Mapping[str, tuple[int, ...]], header: Mapping[str, str]) -> dict[str, Any]:
    """A file that is no adapter."""
    what, architecture = checkpoint(shapes, header)
    count = {"tensors": len(shapes), "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,}"}
    if what is None:
        return {"format": "unknown", **count, "names": sorted(shapes)[:5]}
    return {
        "format": what,
        "architecture": ARCHITECTURES[architecture].title if architecture else "unknown",
        **count,
    }


def checkpoint(shapes: Mapping[str, tuple[int, ...]], header: Mapping[str, str]) -> tuple[str | None, str | None]:
    """What a file of whole weights is, and for which architecture; None where its names do not tell."""
    for pattern, (architecture, what) in CHECKPOINTS.items():
        if any(re.search(pattern, name) for name in shapes):
            return what, architecture or from_header(header) or from_names(shapes) or _from_shapes(shapes)
    return None, None


def _from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """By the width of the prompt that a UNet reads."""
    widths = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    return PROMPT_WIDTHS.get(widths[0]) if widths else None


def _lora(content: AdapterWeights) -> dict[str, Any]:
    updates = [update for *_, update in content.updates()]
    norms = [math.sqrt(max(update.energy(), 0.0)) for update in updates]
    finite = sorted(norm for norm in norms if math.isfinite(norm))
    return {
        "architecture": _title(content),
        "method": content.kind,
        "rank": _range([update.rank for update in updates]),
        "alpha": _range([update.alpha for update in updates]),
        "parts": {part: f"{len(layers)} layers" for part, layers in content.parts.items()},
        **_said(content),
        "precision": _precision(content),
        "norm": {
            "of all": round(math.sqrt(sum(norm**2 for norm in finite)), 6),
            "median layer": round(finite[len(finite) // 2], 6) if finite else None,
            "largest layer": round(finite[-1], 6) if finite else None,
        },
        **_broken(content),
    }


def _embedding(content: WordVectors) -> dict[str, Any]:
    norms = {name: vectors.float().norm(dim=1) for name, vectors in content.vectors.items()}
    return {
        "architecture": _title(content),
        "method": "embedding",
        "word": content.word,
        "vectors": {name: " x ".join(map(str, vectors.shape)) for name, vectors in content.vectors.items()},
        **_said(content),
        "precision": _precision(content),
        "norm": {name: _range([round(norm, 4) for norm in found.tolist()]) for name, found in norms.items()},
        **_broken(content),
    }


def _title(content: Content) -> str:
    return ARCHITECTURES[content.architecture].title if content.architecture else "unknown"


def _said(content: Content) -> dict[str, str]:
    """What the metadata says under whichever name."""
    names = {
        "trigger": ("trigger", "modelspec.trigger_phrase"),
        "base": ("base", "ss_sd_model_name"),
        "trained as": ("method", "ss_network_module"),
    }
    said = {}
    for title, keys in names.items():
        value = next((content.header[key] for key in keys if content.header.get(key)), None)
        if value is not None:
            said[title] = value
    return said


def _precision(content: Content) -> str:
    return ", ".join(sorted({PRECISIONS.get(str(tensor.dtype), str(tensor.dtype)) for _, tensor in content.tensors()}))


def _broken(content: Content) -> dict[str, Any]:
    broken = not_finite(content)
    return {"not finite": f"{len(broken)} layers, such as {broken[0]}"} if broken else {}


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _use(path: Path, content: Content) -> str:
    base = "" if content.header.get("base") else " --base BASE"
    word = content.word if isinstance(content, WordVectors) else content.header.get("trigger", "")
    prompt = _quoted(f"a picture of {word or '...'}")
    return f"finetune generate {prompt} --adapter {shlex.quote(str(path))}{base}"


def _quoted(text: str) -> str:
    """For a shell that does nothing with it, whatever a file says of itself."""
    return f'"{text}"' if re.fullmatch(r"[\w .,:<>|+-]*", text) else shlex.quote(text)


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """For people: one line for each fact; metadata last, and cut where it is long."""
    lines = [f"{title:14}{_in_words(value)}" for title, value in found.items() if title != "metadata"]
    metadata = sorted(found.get("metadata", {}).items())
    lines += [*(["metadata"] if metadata else []), *(f"  {key} {_cut(value)}" for key, value in metadata)]
    return [one_line(line) for line in lines]


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}… ({len(text):,} characters)"
