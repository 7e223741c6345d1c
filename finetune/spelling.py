"""How a base on this machine splits words, read from its tokenizer's files without torch.

Only CLIP's tokenizers are read: they cut captions early, and their vocabulary is in the order of how common words are.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.dataset.health import Finding
from finetune.recipe import BaseConfig, Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTH = 77  # of a caption in tokens, with its start and end
END = "</w>"  # of a word, in CLIP's vocabulary
# Words before it are ordinary: `teapot` has 40749 and `dachshund` 42720, but `ohwx` 47993 and `sks` 48136 of 49408.
ORDINARY = 45_000
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Speller:
    """One CLIP tokenizer, and whether another encoder reads on where it stops."""

    tokenizer: Tokenizer
    length: int
    alone: bool

    def rank(self, word: str) -> int | None:
        """The place of a word that is one token."""
        return self.tokenizer.get_vocab().get(word.lower() + END)

    def cut_off(self, caption: str) -> str:
        """The end of a caption that is not read."""
        offsets = self.tokenizer.encode(caption, add_special_tokens=False).offsets
        room = self.length - 2
        return caption[offsets[room][0] :] if len(offsets) > room else ""


def folder_of(base: BaseConfig) -> Path | None:
    """Where the base's configs are, if they are on this machine; in the Hub's cache a file names the snapshot."""
    source = base.config if base.source.endswith(".safetensors") else base.source
    if source is None or Path(source).is_dir():
        return Path(source) if source else None
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    cached = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{source.replace('/', '--')}"
    name = cached / "refs" / (base.revision or "main")
    snapshot = cached / "snapshots" / (name.read_text().strip() if name.is_file() else base.revision or "main")
    return snapshot if snapshot.is_dir() else None


def find_speller(base: BaseConfig) -> Speller | None:
    """That of a base's first CLIP encoder; None where the base is not here or has none."""
    folder = folder_of(base)
    if folder is None:
        return None
    parts = sorted(path for path in folder.glob("tokenizer*") if path.is_dir())
    kinds = {path: _read(path / "tokenizer_config.json") for path in parts}
    clips = [path for path in parts if _is_clip(path, kinds[path])]
    with contextlib.suppress(Exception):  # the libraries that load the base say what is wrong with it
        for path in clips:
            length = kinds[path].get("model_max_length", LENGTH)
            return Speller(_load(path), min(int(length), LENGTH), len(clips) == len(parts))
    return None


def check(recipe: Recipe[Any], captions: Mapping[str, Sequence[str]], speller: Speller) -> Iterator[Finding]:
    """What the base's tokenizer makes of the placeholder and of each file's captions."""
    word, rank = recipe.placeholder, speller.rank(recipe.placeholder)
    if rank is not None and recipe.method.trains_word:
        what = f"{word!r} is a word of the base already. Choose one that nobody writes, such as '<my-concept>'."
        yield Finding("word-taken", "placeholder", what, "error")
    elif rank is not None and rank < ORDINARY:
        what = f"{word!r} is an ordinary word of the base, whose meaning gets in the way. Choose a rare one, such as"
        yield Finding("word-ordinary", "placeholder", f"{what} 'sks'.")
    spelt = " ".join([word, *(f"{word}_{i}" for i in range(1, getattr(recipe.method, "num_vectors", 1)))])
    if recipe.method.trains_word:  # each vector is a token then, however the word is spelt
        spelt = " ".join("x" * len(spelt.split()))
    for file, templates in captions.items() if speller.alone else ():
        cut = {template: speller.cut_off(template.replace("{}", spelt)) for template in templates}
        for end in filter(None, cut.values()):
            what = f"the end of its caption is not read, which has room for {speller.length - 2} tokens: {end!r}"
            yield Finding("caption-cut", file, f"{what}. Shorten it.")


def _is_clip(folder: Path, config: Mapping[str, Any]) -> bool:
    kind = str(config.get("tokenizer_class", ""))
    return kind.startswith("CLIP") and ((folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file())


def _load(folder: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(*files, end_of_word_suffix=END, continuing_subword_prefix=""))
    lines = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(lines)  # pyright: ignore[reportAttributeAccessIssue]
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    split = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
