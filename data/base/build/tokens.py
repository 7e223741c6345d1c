"""A CLIP tokenizer of the world's own words."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
from models import MAX_TOKENS
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from world import World

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def learn_merges(captions: list[str], size: int) -> list[tuple[str, str]]:
    """The byte pairs that CLIP's way of splitting text makes of the captions."""
    learner = Tokenizer(models.BPE(unk_token=SPECIAL[1], continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(captions, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]


def build_tokenizer(world: World, size: int, folder: Path, num_captions: int = 40_000) -> CLIPTokenizer:
    """Learn from drawn captions, write `vocab.json` and `merges.txt`, and read them back."""
    rng = Random(0)
    merges = learn_merges([world.picture(rng).caption for _ in range(num_captions)], size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(
        [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), *SPECIAL]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    start, end = SPECIAL
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "bos_token": start}
    config |= {"eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> np.ndarray:
    """Token ids int16 [n, 77], padded."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="np"
    ).input_ids.astype(np.int16)
