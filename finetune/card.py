"""The model card beside an export: what it is, its trigger, how to load it, how it was made, what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architectures import ARCHITECTURES, from_header
from finetune.export import LORA_FILE, WORDS_FILE, Verdict
from finetune.files import read_shapes, whole

if TYPE_CHECKING:
    from finetune.recipe import Recipe

PICTURES = "<Gallery />\n\n![what taught it, before and after](grid.png)\n\n"
TEXT = """# {name}

{pictures}Taught with {method} on {num_pictures} pictures, {steps} steps. Write **`{trigger}`** in a prompt to get it.

```python
{imports}import torch
from diffusers import {pipeline}

folder = "."  # where this file lies
pipeline = {pipeline}.{opening}
{loaders}
picture = pipeline({prompt!r}, generator=torch.Generator().manual_seed(0)).images[0]
```

| file | size |
|---|---|
{files}

Base: `{base}` (fingerprint `{fingerprint}`). Loaded into a fresh pipeline, the files reproduce the change that
training made to the model's predictions with an error of {error:.2%}. The whole recipe is in `recipe.yaml`; its digest
is `{digest}`.
"""


def write_card(
    recipe: Recipe[Any],
    files: Sequence[Path],
    *,
    fingerprint: str,
    num_pictures: int,
    verdict: Verdict,
) -> Path:
    from huggingface_hub import ModelCard, ModelCardData

    folder = recipe.output.folder
    prompts = [recipe.fill(prompt) for prompt in recipe.validation.prompts] or [recipe.placeholder]
    from_hub = not Path(recipe.base.source).exists()
    data = ModelCardData(
        base_model=recipe.base.source if from_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=recipe.placeholder,
        tags=["text-to-image", "diffusers", *_tags(files), recipe.method.name],
        widget=widget(folder, [recipe.fill(prompt) for prompt in recipe.validation.prompts]),
    )
    pipeline, opening = _opening(recipe, files[0])
    loaders = "\n".join(map(_loader, files))
    text = TEXT.format(
        name=recipe.name,
        pictures=PICTURES if recipe.validation.prompts else "",
        method=recipe.method.name.replace("_", " "),
        num_pictures=num_pictures,
        steps=recipe.train.steps,
        trigger=recipe.placeholder,
        base=recipe.base.source,
        pipeline=pipeline,
        opening=opening,
        imports="import finetune.load\n" if "finetune.load" in loaders else "",
        loaders=loaders,
        prompt=prompts[0],
        files="\n".join(f"| `{file.name}` | {file.stat().st_size / 1000:,.1f} kB |" for file in files),
        fingerprint=fingerprint,
        error=verdict.error,
        digest=recipe.digest(),
    )
    with whole(folder / "README.md", overwrite=True) as unfinished:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(unfinished)
    return folder / "README.md"


def gallery(folder: Path) -> list[Path]:
    """The validation pictures of the last step, in the prompts' order."""
    steps = sorted((folder / "samples").glob("step-*"))
    return sorted(steps[-1].glob("*.png")) if steps else []


def widget(folder: Path, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """What the Hub shows: each prompt with the picture that the export made of it."""
    pictures = gallery(folder)
    if len(pictures) != len(prompts):  # of an interrupted run
        return [{"text": prompt} for prompt in prompts]
    return [
        {"text": prompt, "output": {"url": path.relative_to(folder).as_posix()}}
        for prompt, path in zip(prompts, pictures, strict=True)
    ]


def _opening(recipe: Recipe[Any], file: Path) -> tuple[str, str]:
    """The class that opens the base, and how."""
    source, config = recipe.base.source, recipe.base.config
    architecture = from_header(read_shapes(file)[1])
    if architecture is None or not recipe.base.is_single_file:
        return "DiffusionPipeline", f"from_pretrained({source!r})"
    return ARCHITECTURES[
        architecture
    ].pipeline, f"from_single_file({source!r}{f', config={config!r}' if config else ''})"


def _loader(file: Path) -> str:
    if file.name == LORA_FILE:
        return f'pipeline.load_lora_weights(folder, weight_name="{file.name}")'
    names, header = read_shapes(file)
    if len(names) == 1 and _loads_words(from_header(header)):
        return f'pipeline.load_textual_inversion(folder, weight_name="{file.name}")'
    # diffusers reads a file of one encoder's vectors alone, and of some models none.
    return f'finetune.load.load_adapters(pipeline, [f"{{folder}}/{file.name}"])'


def _loads_words(architecture: str | None) -> bool:
    """Whether diffusers has a loader of words for the model; most have one."""
    import diffusers

    return architecture is None or hasattr(
        getattr(diffusers, ARCHITECTURES[architecture].pipeline), "load_textual_inversion"
    )


def _tags(files: Sequence[Path]) -> list[str]:
    kinds = {LORA_FILE: "lora", WORDS_FILE: "textual_inversion"}
    return [kinds[file.name] for file in files]
