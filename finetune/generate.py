"""Pictures with a base and any mix of adapters: from prompts, pictures, masks, maps and instructions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from finetune.adapter import AdapterWeights
from finetune.canvas import Frame, Size
from finetune.detection import detect
from finetune.errors import UserError
from finetune.families.base import Source, families
from finetune.files import read_shapes
from finetune.formats import read
from finetune.load import Adapter, load_adapters
from finetune.quiet import quiet_loading
from finetune.render import file_name, render, use_ddim
from finetune.tasks.base import Inputs, Task, choose


def generate(
    base: Any | str | Path | None,
    prompts: str | Sequence[str],
    inputs: Inputs | None = None,
    *,
    adapters: Sequence[Adapter] = (),
    task: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    seed: int = 0,
    steps: int = 25,
    guidance: float | None = None,
    size: Size | None = None,
) -> list[Image.Image]:
    """A picture for each prompt; picture i has the seed `seed + i`.

    Args:
        base: a folder, model of the Hub or file; or a pipeline with adapters in it; or that of the first adapter.
        inputs: what the pictures are made from beside the prompts.
        task: one of `finetune.tasks`; without it, the one that the inputs are for.
        revision, config: of a base on the Hub; where the configs of a base in a single file are.
        guidance: without it, the pipeline's own.
        size: side of a square, or (width, height); a given picture is scaled to it by its short side, or cut to both.

    Raises:
        UserError: the inputs do not fit each other, the task or the base.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    chosen = choose(task, inputs or Inputs(), steps)
    if base is None or isinstance(base, (str, Path)):
        pipeline = _open(str(base or _base_of(adapters)), revision, config, adapters, chosen)
    elif adapters:
        raise UserError("--adapter: a pipeline comes with its own. Load them into it, or name its base instead.")
    else:
        pipeline = chosen.switch(base)
    layout = chosen.lay_out(pipeline, Frame.of(pipeline, size))
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc="pictures") as bar:
        for start in range(0, len(prompts), chosen.batch_size):
            batch = prompts[start : start + chosen.batch_size]
            seeds = range(seed + start, seed + start + len(batch))
            sampling: Any = {"steps": steps, "guidance": guidance, "size": layout.size}
            images += render(pipeline, batch, seeds, pictures=layout.pictures, settings=layout.settings, **sampling)
            bar.update(len(batch))
    return [layout.finish(image) for image in images]


def _base_of(adapters: Sequence[Adapter]) -> str:
    headers = [read_shapes(file)[1] for adapter in adapters for file in adapter.files()]
    for header in headers:
        if "base" in header:
            return header["base"]
    raise UserError("--base: no adapter says which base it is for. Name one.")


def _open(base: str, revision: str | None, config: str | None, adapters: Sequence[Adapter], task: Task) -> Any:
    """The task's pipeline of a base, with adapters in it, on the fastest device."""
    headers = {file: read_shapes(file)[1] for adapter in adapters for file in adapter.files()}
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    loaded = load_base(Source(base, revision, dtype, config))
    use_ddim(loaded, zero_terminal_snr=any(header.get("zero_terminal_snr") == "true" for header in headers.values()))
    pipeline = task.switch(loaded)
    if hasattr(pipeline, "unet") and pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        _check_first_convolution(headers, task)
    return load_adapters(pipeline, adapters).to(device)


def _check_first_convolution(files: Iterable[Path], task: Task) -> None:
    for file in files:
        content = read(file)  # its layers under diffusers' names, whatever the file calls them
        if isinstance(content, AdapterWeights) and "conv_in" in content.parts.get("unet", {}):
            raise UserError(
                f"--adapter: {file} changes the first convolution, which takes other channels in {task.name}. "
                "A LoRA whose method.targets leave conv_in out can be used there."
            )


def load_base(source: Source, *, every_part: bool = False) -> Any:
    """A text-to-image pipeline of one of the families, or whatever other pipeline the checkpoint names.

    Args:
        every_part: also what is not needed for a picture, such as a safety checker.

    Raises:
        UserError: it cannot be loaded.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    quiet_loading()
    try:
        name = detect(source)
        if name in families.names() and (source.is_single_file or not every_part):
            return families[name].load(source, min_snr_gamma=None, zero_terminal_snr=False).pipeline
        if source.is_single_file:
            raise UserError(f"it is a {name}, which no family here is made for")
        return DiffusionPipeline.from_pretrained(
            source.path, revision=source.revision, dtype=source.dtype, use_safetensors=True
        )
    except UserError as error:
        reason = str(error).removeprefix("base.source: ")
        raise UserError(f"--base: {source.path} cannot be loaded: {reason}") from None
    except Exception as error:  # a broken folder fails in as many ways as it has files
        needs_configs = source.is_single_file and source.config is None
        hint = " Without the Hub, name a folder in diffusers' layout of its architecture with --config."
        reason = " ".join(str(error).split()) + (hint if needs_configs else "")
        raise UserError(f"--base: {source.path} cannot be loaded: {reason}") from error


def generate_files(
    prompts: Sequence[str],
    adapters: Sequence[Adapter],
    inputs: Inputs | None = None,
    *,
    base: str | None,
    folder: Path,
    seed: int = 0,
    **settings: Any,
) -> list[Path]:
    """What `generate` makes, as a PNG for each prompt."""
    images = generate(base, prompts, inputs, adapters=adapters, seed=seed, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed + index:04d}-{file_name(prompt)}.png" for index, prompt in enumerate(prompts)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths
