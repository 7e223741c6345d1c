"""What was taught, to which base, and by which photos: read from a run's folder or from an adapter and options."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune.base import load_family
from finetune.dataset import DatasetConfig, Picture, scan, split
from finetune.dataset.pixels import decode
from finetune.detection import detect
from finetune.errors import UserError
from finetune.evaluation.prompts import STYLE
from finetune.families.base import Family, Source, families
from finetune.files import read_shapes
from finetune.folder import RECIPE_FILE
from finetune.generate import load_base
from finetune.load import Adapter
from finetune.recipe import Recipe, ValidationConfig
from finetune.recipe import load as load_recipe
from finetune.render import use_ddim

PLACES = ("at", "by", "in", "near", "of", "on", "under", "wearing", "with")  # they end a noun in a caption


@dataclass(frozen=True)
class Given:
    """What the command line says of an adapter; a run's recipe says it otherwise."""

    photos: Path | None = None
    base: str | None = None
    class_prompt: str | None = None  # "a dog"
    subject: str | None = None  # "a sks dog", or a style's word


@dataclass(frozen=True)
class Photo:
    """One real picture of the concept."""

    path: str
    sha256: str
    image: Image.Image


@dataclass(frozen=True)
class Concept:
    """A concept that can be drawn and has photos to be compared with."""

    name: str
    adapter: Adapter
    word: str  # what stands in the place of `{}` in prompts for a style
    subject: str  # and in prompts for a subject: "a sks dog"
    class_prompt: str | None  # "a dog"; a style has none
    is_style: bool  # as its captions have it
    trained_on: tuple[Photo, ...]
    held_out: tuple[Photo, ...]  # photos of the concept that training never saw
    open_base: Callable[[], Family]  # a fresh one, without the adapter
    base: str
    opened: str  # all that decides how the base is opened
    size: int | None  # pixels of a side; without it, the base's own
    steps: int
    guidance: float

    @property
    def photos(self) -> tuple[Photo, ...]:
        """What pictures are compared with: photos that were not trained on, where there are any."""
        return self.held_out or self.trained_on

    @property
    def folder(self) -> Path:
        """Where the adapter is."""
        return self.adapter.path if self.adapter.path.is_dir() else self.adapter.path.parent


def read(text: str, given: Given) -> Concept:
    """A run's folder or an adapter, either with `=weight` behind it.

    Raises:
        UserError: it does not exist, or what it is and was trained on cannot be known.
    """
    try:
        adapter = Adapter.parse(text)
        adapter.files()
    except UserError as error:
        raise UserError(str(error).removeprefix("--adapter ")) from None
    if (recipe := adapter.path / RECIPE_FILE).is_file():
        return _of_run(adapter, load_recipe(str(recipe)), given)
    return _of_adapter(adapter, given)


def _of_run(adapter: Adapter, recipe: Recipe[Any], given: Given) -> Concept:
    if given.base is not None:
        raise UserError(f"--base: {adapter.path} is a run, whose recipe names its base. Leave it out.")
    trained, held_out = split(scan(recipe.dataset), recipe.dataset.held_out)
    word = rf"(?<!\w){re.escape(recipe.placeholder)}(?!\w)"  # captions may have it instead of `{}`
    captions = [re.sub(word, "{}", caption) for picture in trained for caption in picture.captions]
    prior = recipe.method.prior_half
    named = given.class_prompt or (prior.prompt if prior else getattr(recipe.method, "class_prompt", None))
    is_style = bool(captions) and all(STYLE.search(caption) for caption in captions)
    subject, class_prompt = phrases(captions, named)
    concept = Concept(
        name=recipe.name,
        adapter=adapter,
        word=given.subject or recipe.placeholder,
        subject=given.subject or recipe.fill(subject),
        class_prompt=class_prompt,
        is_style=is_style,
        trained_on=_opened(trained, recipe.dataset.background),
        held_out=_opened(held_out, recipe.dataset.background),
        open_base=lambda: load_family(recipe),
        base=recipe.base.source,
        opened=repr(recipe.base),
        size=recipe.dataset.resolution,
        steps=recipe.validation.steps,
        guidance=recipe.validation.guidance,
    )
    return concept if given.photos is None else _with_photos(concept, given.photos)


def _of_adapter(adapter: Adapter, given: Given) -> Concept:
    headers = [read_shapes(file)[1] for file in adapter.files()]
    said = {key: value for header in reversed(headers) for key, value in header.items()}
    base, trigger = given.base or said.get("base"), said.get("trigger")
    noun = re.sub(r"^(an?|the) ", "", given.class_prompt or "")
    subject = given.subject or (trigger and f"{_article(trigger)} {trigger} {noun}".strip())
    needed = {
        "--photos: no recipe says which pictures show the concept. Name a folder with some.": given.photos,
        "--base: the adapter does not say which base it is for. Name one.": base,
        "--subject: the adapter does not say its word. Give it as in a prompt, such as 'a sks dog'.": subject,
    }
    if problems := [f"{adapter.path}: {problem}" for problem, found in needed.items() if not found]:
        raise UserError(problems)
    usual = ValidationConfig()
    concept = Concept(
        name=adapter.path.stem if adapter.path.is_file() else adapter.path.name,
        adapter=adapter,
        word=given.subject or trigger or "",
        subject=subject or "",
        class_prompt=given.class_prompt,
        is_style=False,
        trained_on=(),
        held_out=(),
        open_base=lambda: _open(base or "", zero_terminal_snr=said.get("zero_terminal_snr") == "true"),
        base=base or "",
        opened=base or "",
        size=None,
        steps=usual.steps,
        guidance=usual.guidance,
    )
    return _with_photos(concept, given.photos or Path())


def _open(base: str, *, zero_terminal_snr: bool) -> Family:
    """A base of one of the families, ready to be drawn from."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    source = Source(base, dtype=dtype)
    pipeline = load_base(source)
    use_ddim(pipeline, zero_terminal_snr=zero_terminal_snr)
    kind = families[detect(source)]
    objective = kind.objective_class.from_scheduler(
        pipeline.scheduler.config, min_snr_gamma=None, zero_terminal_snr=zero_terminal_snr
    )
    return kind(pipeline, objective, source)


def phrases(captions: Sequence[str], class_prompt: str | None) -> tuple[str, str | None]:
    """How captions write the subject, and its class: `a {} dog in a park` and `a {} dog at home` say `a {} dog`, a dog.

    Args:
        class_prompt: the class, where it is known.
    """
    told = [caption.partition("{}") for caption in captions if "{}" in caption]
    after = [rest.split() for _, found, rest in told if found]
    several = len({tuple(words) for words in after}) > 1  # of a single one no word is known to be the noun's last
    columns = itertools.takewhile(_is_noun, zip(*after, strict=False)) if several else ()
    noun = re.sub(r"^(an?|the) ", "", class_prompt) if class_prompt else " ".join(column[0] for column in columns)
    says_noun = bool(noun) and any(" ".join(words).startswith(noun) for words in after)
    has_article = not told or any(re.search(r"\b(an?|the) $", before) for before, _, _ in told)
    subject = ("a {}" if has_article else "{}") + (f" {noun}" if says_noun else "")
    return subject, class_prompt or (f"{_article(noun)} {noun}" if noun else None)


def _is_noun(words: tuple[str, ...]) -> bool:
    """Whether captions agree on a word, and it ends no noun."""
    return len(set(words)) == 1 and words[0].isalpha() and words[0] not in PLACES


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in tuple("aeiou") else "a"


def _with_photos(concept: Concept, folder: Path) -> Concept:
    """The photos of a folder, less those that were trained on, as the held-out ones."""
    config = DatasetConfig(folder=folder, captions=("any",))
    try:
        found = _opened(scan(config), config.background)
    except UserError as error:
        raise UserError(problem.replace("dataset.folder", "--photos") for problem in error.problems) from None
    known = {photo.sha256 for photo in concept.trained_on}
    return replace(concept, held_out=tuple(photo for photo in found if photo.sha256 not in known))


def _opened(pictures: Sequence[Picture], background: str) -> tuple[Photo, ...]:
    opened = []
    for picture in pictures:
        content = Path(picture.path).read_bytes()
        opened.append(Photo(picture.path, hashlib.sha256(content).hexdigest(), decode(content, background)))
    return tuple(opened)
