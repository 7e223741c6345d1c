"""What keeps the class in place while the concept is learnt: prior preservation (2208.12242, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetune.dataset import Pictures
from finetune.dataset.class_images import ClassImages
from finetune.errors import UserError, reason
from finetune.families.base import Family
from finetune.methods.base import Prior
from finetune.recipe import Recipe
from finetune.render import render
from finetune.request import cache_folder, request_for, sampler_name

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image


def make_prior(recipe: Recipe[Any], family: Family, concept: Pictures, accelerator: Accelerator) -> Pictures | None:
    """What keeps the class in place: pictures made by the base, or the concept's own under the class prompt."""
    prior = recipe.method.prior_half
    if prior is None:
        return None
    if prior.source == "prediction":
        return concept.as_prior(prior.prompt)
    made = make_class_images(recipe, prior, family, accelerator)
    config = recipe.dataset.model_copy(update={"crop": "center", "flip": False})
    pictures = Pictures.from_pictures(made.pictures(cache_folder(), prior.count), config, recipe.placeholder)
    return pictures.as_prior(prior.prompt)


def make_class_images(recipe: Recipe[Any], prior: Prior, family: Family, accelerator: Accelerator) -> ClassImages:
    """Have the base make those class images that the cache lacks, shared among the processes."""
    scheduler = family.pipeline.scheduler
    sampler = sampler_name(type(scheduler).__name__, scheduler.config, str(family.dtype))
    request = request_for(recipe, prior, family.fingerprint, sampler)
    missing = request.missing(cache_folder(), prior.count)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(total=len(mine), desc="class images", disable=not (accelerator.is_main_process and mine))

    def draw(seeds: Sequence[int]) -> list[Image.Image]:
        return render(
            family.pipeline,
            [request.prompt] * len(seeds),
            seeds,
            steps=request.steps,
            guidance=request.guidance,
            size=request.size,
            batch_size=len(seeds),
        )

    def make(seeds: Sequence[int]) -> list[Image.Image]:
        bar.update(len(seeds))
        return draw(seeds)

    at_once = recipe.validation.batch_size
    if mine:
        family.read_to_draw(draw, mine, at_once)
    try:
        with family.drawing() if mine else nullcontext(), bar:
            request.make(cache_folder(), mine, make, at_once)
    except OSError as error:
        raise UserError(
            f"class images: {request.folder(cache_folder())} cannot be written ({reason(error)}). Make room, or set "
            "XDG_CACHE_HOME to a folder that has some; those that are done stay."
        ) from None
    accelerator.wait_for_everyone()
    return request
