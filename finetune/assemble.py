"""A trainer of a recipe's parts, in an order in which no two of the base's large parts are on the device at once.

What reads captions and what sees pictures is there only until all is read and seen; then the denoiser comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.batch import Encoder
from finetune.dataset import Draw, Picture, Pictures
from finetune.errors import UserError, gone
from finetune.families.base import Family
from finetune.prior import make_prior
from finetune.recipe import Recipe
from finetune.recomputing import find_parts
from finetune.samples import Samples
from finetune.schedule import find_optimizer
from finetune.shares import Shares
from finetune.shortage import explained
from finetune.trainer import Trainer
from finetune.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


def assemble(
    recipe: Recipe[Any],
    family: Family,
    trained: Sequence[Picture],
    held_out: Sequence[Picture],
    accelerator: Accelerator,
    first: int = 0,
) -> Trainer:
    """What is taught, to what, in which steps.

    Args:
        first: steps that an earlier run has done.

    Raises:
        UserError: a picture cannot be read any more, or the memory runs out.
    """
    concept = Pictures.from_pictures(trained, recipe.dataset, recipe.placeholder)
    validation = Validation.find(recipe, held_out)
    family.to(accelerator.device, resting=list(family.named_parts()))
    _check(recipe, family)
    with explained(recipe, "class images", "drawing"):
        prior = make_prior(recipe, family, concept, accelerator)
    multiple = family.pipeline.vae_scale_factor * family.size_multiple
    ours = accelerator.process_index, accelerator.num_processes
    shares = Shares(concept, prior, recipe.train, multiple, *ours)
    draws = itertools.chain(validation.draws if validation is not None else (), shares.all_mine(first))
    different = {(draw.key, draw.mask_key, draw.caption): draw for draw in draws}
    with explained(recipe, "encoding the pictures", "else"):
        encoder = _encode(recipe, family, list(different.values()), accelerator, first)
    with explained(recipe, "setting up", "else"):
        family.bring([name for name in family.resting if name not in encoder.done])
        student = recipe.method.attach(family, recipe.placeholder, recipe.train.learning_rate)
        return Trainer(student, shares, encoder, recipe.train, accelerator, validation)


def _check(recipe: Recipe[Any], family: Family) -> None:
    """What does not fit the base is said before anything is drawn or encoded.

    Raises:
        UserError: it does not.
    """
    recipe.method.check(family)
    find_optimizer(recipe.train)
    if isinstance(recipe.train.gradient_checkpointing, tuple):
        find_parts(family.denoiser, recipe.train.gradient_checkpointing)


def _encode(
    recipe: Recipe[Any], family: Family, draws: Sequence[Draw], accelerator: Accelerator, first: int
) -> Encoder:
    """All that is frozen of the draws, and the prompts of the pictures that this process will draw."""
    config, show = recipe.dataset, accelerator.is_main_process
    encoder = Encoder(
        family,
        size=config.resolution,
        trains_text=recipe.method.trains_text,
        noise_offset=recipe.train.noise_offset,
        unmasked_weight=None if config.mask == "none" else config.unmasked_weight,
        keep_layout=recipe.method.keep_layout,
    )
    if not recipe.method.trains_text:
        with family.at_hand(family.text_encoders):
            encoder.read(draws, show=show)
            with accelerator.autocast():
                samples = Samples(recipe, family)
                samples.read(range(accelerator.process_index, len(samples.prompts), accelerator.num_processes))
    try:
        with family.at_hand(["vae"]):
            encoder.see(draws, show=show)
    except OSError as error:
        kept = (
            f"step {first} is kept, --resume goes on from there" if first else "no step is kept, --resume begins anew"
        )
        raise UserError([f"encoding the pictures: {gone(error)}", kept]) from None
    return encoder
