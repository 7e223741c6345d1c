"""How a base on this machine splits words, read from its tokenizers' files without torch.

CLIP's vocabulary is in the order of how common words are; T5's and Qwen's have ordinary words alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.dataset.health import Finding
from finetune.outline import folder_of, outline, read_json
from finetune.recipe import BaseConfig, Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTH = 77  # of a caption in CLIP's tokens, with its start and end
END = "</w>"  # of a word, in CLIP's vocabulary
# Words before it are ordinary: `teapot` has 40749 and `dachshund` 42720, but `ohwx` 47993 and `sks` 48136 of 49408.
ORDINARY = 45_000
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
HERE = "\ue000"  # where a chat's template puts the caption


@dataclass(frozen=True)
class Reader:
    """One text encoder's tokenizer."""

    tokenizer: Tokenizer
    length: int  # in tokens, without the ends that it puts to a text itself
    is_clip: bool
    before: str = ""  # what a chat's template writes around a caption
    after: str = ""

    @property
    def room(self) -> int:
        """Tokens that a caption may have."""
        return self.length - len(self._encode(self.before).ids)

    def knows(self, word: str) -> bool:
        """Whether it is one token, so that it cannot be taught as a new one."""
        return len(self._encode(word).ids) == 1

    def is_ordinary(self, word: str) -> bool:
        ids = [self._encode(start + word).ids for start in ("", " ")]
        return any(len(found) == 1 and (not self.is_clip or found[0] < ORDINARY) for found in ids)

    def cut_off(self, caption: str) -> str:
        """The end of a caption that is not read."""
        offsets = self._encode(self.before + caption + self.after).offsets
        if len(offsets) <= self.length:
            return ""
        return caption[max(0, offsets[self.length][0] - len(self.before)) :]

    def _encode(self, text: str) -> Any:
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class Speller:
    """All tokenizers of a base; a caption is cut where the last of them stops."""

    readers: tuple[Reader, ...]
    unread: tuple[str, ...]  # those whose files are of another kind

    def cut_off(self, caption: str) -> tuple[str, int]:
        """The end of a caption that none of them reads, and how many tokens have room where it is read the furthest."""
        if self.unread or not self.readers:
            return "", 0
        return min(((reader.cut_off(caption), reader.room) for reader in self.readers), key=lambda cut: len(cut[0]))


def find_speller(base: BaseConfig) -> Speller | None:
    """None where the base is not here."""
    folder, known = folder_of(base), outline(base)
    if folder is None:
        return None
    if known is None:
        lengths = dict.fromkeys(sorted(path.name for path in folder.glob("tokenizer*") if path.is_dir()))
    else:
        stated = known.stated["prompt_lengths"]
        lengths = {tokenizer: stated.get(encoder) for encoder, tokenizer in known.text_encoders.items()}
    readers = {name: _reader(folder / name, length) for name, length in lengths.items()}
    unread = tuple(name for name, reader in readers.items() if reader is None)
    return Speller(tuple(filter(None, readers.values())), unread)


def check(recipe: Recipe[Any], captions: Mapping[str, Sequence[str]], speller: Speller) -> Iterator[Finding]:
    """What the base's tokenizers make of the placeholder and of each file's captions."""
    word = recipe.placeholder
    names = [word, *(f"{word}_{i}" for i in range(1, getattr(recipe.method, "num_vectors", 1)))]
    taken = [name for name in names if any(reader.knows(name) for reader in speller.readers)]
    if taken and recipe.method.trains_word:
        what = f"{taken[0]!r} is a word of the base already. Choose one that nobody writes, such as '<my-concept>'."
        yield Finding("word-taken", "placeholder", what, "error")
    elif any(reader.is_ordinary(word) for reader in speller.readers):
        what = f"{word!r} is an ordinary word of the base, whose meaning gets in the way. Choose a rare one, such as"
        yield Finding("word-ordinary", "placeholder", f"{what} 'sks'.")
    spelt = " ".join("x" for _ in names) if recipe.method.trains_word else word  # a token for each vector then
    for file, templates in captions.items():
        cut = {template: speller.cut_off(template.replace("{}", spelt)) for template in templates}
        for end, room in cut.values():
            if end:
                what = f"the end of its caption is not read, which has room for {room} tokens: {end!r}"
                yield Finding("caption-cut", file, f"{what}. Shorten it.")


def _reader(folder: Path, length: int | None) -> Reader | None:
    """None where the tokenizer is of no kind that can be read here, or how much its encoder reads is not known."""
    config = read_json(folder / "tokenizer_config.json")
    with contextlib.suppress(Exception):  # the libraries that load the base say what is wrong with it
        if str(config.get("tokenizer_class", "")).startswith("CLIP"):
            length = min(int(config.get("model_max_length", LENGTH)), LENGTH)
            return Reader(_load(folder), length - 2, is_clip=True)
        if length is not None:
            tokenizer = _load(folder)
            before, after = _chat(folder, config)
            return Reader(tokenizer, length - tokenizer.num_special_tokens_to_add(False), False, before, after)
    return None


def _chat(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """What stands before and after a caption where it is read as a message."""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not template:
        return "", ""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    settings = {"add_generation_prompt": True, "enable_thinking": True}
    written = sandbox.from_string(template).render(messages=[{"role": "user", "content": HERE}], **settings)
    before, _, after = written.partition(HERE)
    return before, after


def _load(folder: Path) -> Tokenizer:
    """Raises whatever its files make the library raise."""
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
