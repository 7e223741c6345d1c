"""Files that lie, and what would have to be promised of every one of them."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from finetune.config import Section
from finetune.methods import methods
from finetune.recipe import Recipe

# Recipes

RECIPE: dict[str, Any] = {
    "name": "test",
    "base": {"source": "someone/a-model"},
    "dataset": {"folder": "pictures"},
    "train": {"steps": 10},
    "output": {"folder": "out"},
}
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth": {"class_prompt": "a dog"},
    "lora": {},
    "pivotal_tuning": {"init": "dog"},
    "textual_inversion": {"init": "dog"},
}
# As YAML has them; every key of a recipe is given each.
VALUES = {
    "nothing": "null",
    "a truth": "true",
    "a negative": "-1",
    "zero": "0",
    "a fraction": "0.5",
    "more than a float": "1e999",
    "infinity": ".inf",
    "not a number": ".nan",
    "a thousand digits": "9" * 1000,
    "too many digits": "9" * 5000,
    "no text": "''",
    "blanks": "' '",
    "a long text": "x" * 5000,
    "a list": "[]",
    "a list of lists": "[[[]], null]",
    "a section": "{a: {b: c}}",
    "keys that are no text": "{1: 2, null: 3, 2026-11-23: x}",
    "a NUL": r'"a\0b"',
    "half a character": r'"\ud800"',
    "nobody's home": "~nobody-of-that-name/x",
    "upwards": "../../../../etc/passwd",
    "a date": "2026-11-23",
    "bytes": "!!binary aGVsbG8=",
    "a set": "!!set {a, b}",
    "python": "!!python/object/apply:os.system ['touch owned']",
    "an emoji": "'👩🏽‍🚀 {}'",
    "right to left": "'\u202eمرحبا\u202c'",  # noqa: RUF001
    "an unclosed pattern": "{'(': 1, '[': 2}",
    "an empty number": "!!int ''",
    "no truth": "!!bool perhaps",
    "no time": "!!timestamp soon",
}


def recipe(method: str = "lora", **sections: Any) -> dict[str, Any]:
    return {**RECIPE, "method": {"name": method, **METHODS[method]}, **sections}


def all_keys() -> Iterator[tuple[str, str]]:
    """(method, key) of everything that a recipe can set; what all methods share is once there."""
    for method in METHODS:
        for name, field in Recipe[methods[method]].model_fields.items():
            if method != "lora" and name != "method":
                continue
            kind: Any = methods[method] if name == "method" else field.annotation
            yield method, name
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from ((method, f"{name}.{inner}") for inner in kind.model_fields)


def laughs(levels: int, of: str = "[{}]", first: str = "[lol]") -> str:
    """Nine of each level in the next."""
    lines = [f"l0: &l0 {first}"]
    lines += [f"l{n}: &l{n} " + of.format(", ".join([f"*l{n - 1}"] * 9)) for n in range(1, levels)]
    return "\n".join(lines) + "\n"


VALID = yaml.safe_dump(recipe())


def recipe_files() -> dict[str, bytes]:
    """The content of files, all of which are named as recipes."""
    texts = {
        "nothing": "",
        "a comment": "# nothing",
        "a text": "hello",
        "a list": "- a\n- b",
        "a number": "12",
        "two documents": f"{VALID}---\n{VALID}",
        "a tab": VALID.replace("  ", "\t"),
        "a key twice": VALID + "name: other\n",
        "a section twice": VALID + "train:\n  steps: 3\n",
        "a mark first": "\ufeff" + VALID,
        "a NUL": VALID.replace("test", "te\0st"),
        "an escape": VALID.replace("test", "te\x1b[2Jst"),
        "an open bracket": VALID + "tracking: [",
        "an open quote": VALID + 'placeholder: "sks',
        "an open anchor": VALID + "placeholder: *nowhere",
        "deep lists": "name: " + "[" * 5000,
        "deep closed lists": "name: " + "[" * 3000 + "]" * 3000,
        "deep sections": "\n".join(" " * depth + "a:" for depth in range(1500)),
        "deep flow": "train: " + "{a: " * 2000 + "1" + "}" * 2000,
        "a billion laughs": laughs(10),
        "laughs in a section": VALID + laughs(10, "{{a: [{}]}}"),
        "laughs that merge": laughs(10, "{{<<: [{}]}}", "{x: 1}"),
        "laughs in the options": VALID.replace("steps: 10", "steps: 10\n  optimizer_options: {a: *l9}").replace(
            "name: test", "name: test\n" + laughs(10)
        ),
        "a chain of aliases": VALID.replace("steps: 10", "steps: 10\n  optimizer_options: {a: *l300}").replace(
            "name: test",
            "name: test\n" + "l0: &l0 [x]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}]\n" for n in range(1, 301)),
        ),
        "laughs alone": laughs(10).replace("l0: ", "- ", 1).replace("\nl", "\n- l"),
        "itself in a list": "name: &a [*a]",
        "itself in a section": VALID.replace("steps: 10", "steps: 10\n  optimizer_options: &a {x: *a}"),
        "itself merged": "name: &a {<<: *a}",
        "itself as a key": "? &a [*a]\n: x",
        "a list as a key": VALID + "? [a, b]\n: c\n",
        "a section as a key": VALID + "? {a: b}\n: c\n",
        "a number as a key": VALID + "1: c\n",
        "nothing as a key": VALID + "null: c\n",
        "not a number as a key": VALID + ".nan: c\n.nan : d\n",
        "many keys": "\n".join(f"k{number}: 1" for number in range(4000)),
        "many nested keys": VALID + "x:\n" + "\n".join(f"  k{number}: 1" for number in range(4000)),
        "a long key": f"{VALID}{'k' * 900}: 1\n",
        "a long line": VALID + "placeholder: " + "x" * 400_000,
        "a large file": VALID + "# " + "x" * 3_000_000,
        "a tag of python": "!!python/object/apply:os.system ['touch owned']",
        "a tag of nobody": VALID + "placeholder: !mine x",
        "a directive": "%YAML 9.9\n---\n" + VALID,
        "base 60": VALID.replace("steps: 10", "steps: 190:20:30"),
        "octal": VALID.replace("steps: 10", "steps: 0o19"),
        "hexadecimal": VALID.replace("steps: 10", "steps: 0x" + "f" * 6000),
        "a date that is none": VALID + "placeholder: 2026-02-31\n",
        "a time at the edge": VALID + "placeholder: 0001-01-01T00:00:00+23:59\n",
        "extends nothing": "extends: null",
        "extends a number": "extends: 12",
        "extends a list": "extends: [demo]",
        "extends itself": "extends: hostile",
        "extends itself in a roundabout way": "extends: ./sub/../hostile",
        "extends a path": "extends: ../../../../../etc/passwd",
        "extends a device": "extends: /dev/zero",
        "extends a NUL": r'extends: "a\0b"',
        "extends a long name": "extends: " + "x" * 5000,
        "extends half a character": r'extends: "\ud800"',
        "extends an emoji": "extends: 🦊",
        "extends a folder": "extends: sub",
        "extends a house recipe by half": "extends: demo\nmethod: 3\ntrain: null\n",
    }
    raw = {
        "latin 1": VALID.replace("test", "schön").encode("latin-1"),
        "utf-16": VALID.encode("utf-16"),
        "utf-32": VALID.encode("utf-32"),
        "broken utf-8": VALID.encode() + b"\xff\xfe\xfa",
        "half of a character": VALID.encode() + "placeholder: ü".encode()[:-1],
        "an encoded surrogate": VALID.encode() + b"placeholder: \xed\xa0\x80\n",
        "a picture": png(),
        "zeros": bytes(10_000),
        "noise": random.Random(0).randbytes(10_000),
        "a zip": zipped({"a": bytes(1000)}),
    }
    return {name: text.encode() for name, text in texts.items()} | raw


OVERRIDES = [
    "",
    "=",
    "=1",
    "train",
    "train=",
    "train=3",
    ".=1",
    "train..steps=1",
    "train.steps.more=1",
    ".train=1",
    "name.x=1",
    "train.steps=[",
    "train.steps={",
    'train.steps="',
    "train.steps=\t1",
    "train.steps=\0",
    "train.steps=\x1b[2J",
    "train.steps=\udcff",
    "\udcff=1",
    "train.steps=&a [*a]",
    "train.optimizer_options=&a {x: *a}",
    "train.steps=*a",
    "train.steps=" + "[" * 3000,
    "train.steps=" + "9" * 5000,
    "train.steps=1\n2",
    "train.steps=!!python/name:os.system",
    "train.steps=# comment",
    "train.steps=--- 1",
    "train.steps=1\n---\n2",
    "x" * 100_000 + "=1",
    ".".join("a" * 3000) + "=1",
    "🦊=🦊",
    "dataset.folder=\u202etxt.exe",
    "extends=demo",
    "extends=hostile",
    "method=null",
    "method.name=../../etc",
    "method.name=base",
    "method.name=__init__",
    "method.name=[lora]",
    "null=1",
    "1=1",
    "dataset.folders=[{folder: a}, {folder: a}]",
    r'dataset.folders=["a\0b"]',
    "dataset.folders=[" + ", ".join(["a"] * 2000) + "]",
    "train.optimizer=os.system",
    "train.optimizer=.",
]


def png(size: tuple[int, int] = (6, 4), kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    cells = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(cells).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


# Pictures

KINDS: dict[str, dict[str, Any]] = {
    "png": {"kind": "PNG"},
    "jpg": {"kind": "JPEG"},
    "webp": {"kind": "WEBP", "lossless": True},
    "bmp": {"kind": "BMP"},
    "tiff": {"kind": "TIFF", "compression": "tiff_lzw"},
    "gif": {"kind": "GIF", "mode": "P"},
    "avif": {"kind": "AVIF"},
    "heic": {"kind": "HEIF"},
}
CUTS = (1, 4, 8, 12, 16, 24, 32, 48, 64, 100, 0.5, 0.75, 0.9, 0.99)
FLIPS = 24


def chunk(name: bytes, content: bytes, length: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content) if length is None else length) + name + content + struct.pack(">I", checksum)


def png_of(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def damaged(content: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Cut short, with bytes that are others, with parts that are gone, and with more at its ends."""
    for cut in CUTS:
        yield f"cut at {cut}", content[: cut if isinstance(cut, int) else int(cut * len(content))]
    chance = random.Random(seed)
    for number in range(FLIPS):
        flipped = bytearray(content)
        for _ in range(1 + number % 6):
            flipped[chance.randrange(len(flipped) if number % 2 else min(64, len(flipped)))] = chance.randrange(256)
        yield f"flipped {number}", bytes(flipped)
    middle = len(content) // 2
    yield "a hole", content[: middle - 20] + content[middle + 20 :]
    yield "zeros", content[:middle] + bytes(len(content) - middle)
    yield "twice", content + content
    yield "a tail", content + zipped({"../../owned": b"x"})
    yield "a head", b"\n" + content


@cache
def pictures() -> dict[str, bytes]:
    """File name -> content; hardly any is a picture that can be used."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    found = {}
    for seed, (suffix, options) in enumerate(KINDS.items()):
        content = png((24, 16), **options)
        found |= {f"{suffix} {name}.{suffix}": bad for name, bad in damaged(content, seed)}
        found |= {f"{suffix} called {other}.{other}": content for other in KINDS if other != suffix}
    lines, empty = zlib.compress(bytes(5 * 19)), zlib.compress(b"")
    data, end = chunk(b"IDAT", lines), chunk(b"IEND", b"")
    sizes = [(2**31 - 1, 2**31 - 1), (0, 5), (5, 0), (0, 0), (2**32 - 1, 1), (1, 2**31 - 1), (70_000, 70_000), (6, 6)]
    pngs = {f"says {width} x {height}": (header(width, height), data, end) for width, height in sizes}
    pngs |= {
        "of 3 bits": (header(6, 5, 3), data, end),
        "of colour 9": (header(6, 5, 8, 9), data, end),
        "twice begun": (header(6, 5), header(9000, 9000), data, end),
        "without pixels": (header(6, 5), end),
        "of pixels alone": (data, end),
        "of empty pixels": (header(6, 5), chunk(b"IDAT", empty), end),
        "of too many pixels": (header(6, 5), chunk(b"IDAT", zlib.compress(bytes(10**7))), end),
        "of a chunk of 4 GB": (header(6, 5), chunk(b"IDAT", lines, 2**32 - 1), end),
        "of a chunk of -1": (header(6, 5), chunk(b"IDAT", lines, 2**31), end),
        "with a text bomb": (header(6, 5), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), data, end),
        "with a long text": (header(6, 5), chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(10**8))), data, end),
        "with a profile bomb": (header(6, 5), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8))), data, end),
        "with a profile of noise": (
            header(6, 5),
            chunk(b"iCCP", b"a\0\0" + zlib.compress(random.Random(7).randbytes(500))),
            data,
            end,
        ),
        "of no palette": (header(6, 5, 8, 3), data, end),
        "interlaced": (header(6, 5, 8, 2, 1), data, end),
        "of frames": (header(6, 5), chunk(b"acTL", struct.pack(">II", 2**31, 0)), data, end),
        "of a broken frame": (header(6, 5), chunk(b"fcTL", bytes(26)), data, end),
        "with broken exif": (header(6, 5), chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), data, end),
        "with exif of itself": (header(6, 5), chunk(b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 40), data, end),
    }
    found |= {f"png {name}.png": png_of(*chunks) for name, chunks in pngs.items()}
    found |= {f"lie {name}": content for name, content in lies().items()}
    return found


def lies() -> dict[str, bytes]:
    """Headers that promise more than there is, and files that are two things at once."""
    ones = {kind: png((24, 16), **options) for kind, options in KINDS.items()}
    frame = ones["jpg"].index(b"\xff\xc0") + 5
    place = ones["avif"].index(b"ispe") + 8
    side = ones["heic"].index(b"ispe") + 8
    bmp, gif, webp = ones["bmp"], ones["gif"], ones["webp"]
    script = b"<script>alert(1)</script>"
    return {
        "jpg of 65535 x 65535.jpg": ones["jpg"][:frame] + b"\xff" * 4 + ones["jpg"][frame + 4 :],
        "jpg of 0 x 0.jpg": ones["jpg"][:frame] + bytes(4) + ones["jpg"][frame + 4 :],
        "gif of 65535 x 65535.gif": gif[:6] + b"\xff" * 4 + gif[10:],
        "bmp of 2 billion.bmp": bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:],
        "bmp of -2 billion.bmp": bmp[:18] + struct.pack("<ii", -(2**31), -(2**31)) + bmp[26:],
        "bmp of pixels far away.bmp": bmp[:10] + struct.pack("<I", 2**32 - 1) + bmp[14:],
        "webp of more than there is.webp": webp[:4] + struct.pack("<I", 2**32 - 1) + webp[8:],
        "webp canvas.webp": webp[:8] + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xff" * 6 + webp[12:],
        "avif of 4 billion.avif": ones["avif"][:place] + b"\xff" * 8 + ones["avif"][place + 8 :],
        "heic of 4 billion.heic": ones["heic"][:side] + b"\xff" * 8 + ones["heic"][side + 8 :],
        "tiff of itself.tif": b"II*\0\x08\0\0\0\x00\x00\x08\0\0\0",
        "tiff of entries.tif": b"II*\0\x08\0\0\0\xff\xff" + b"\x00\x01\x04\0\xff\xff\xff\xff\xff\xff\xff\xff" * 9,
        "tiff of 4 billion.tif": tiff(2**32 - 1, 2**32 - 1),
        "tiff of strips far away.tif": tiff(6, 5, offset=2**32 - 1),
        "tiff of long strips.tif": tiff(6, 5, count=2**32 - 1),
        "tiff of many samples.tif": tiff(6, 5, samples=65535),
        "big tiff.tif": b"II+\0\x08\0\0\0" + b"\xff" * 8,
        "a bomb.png": bomb(30_000),
        "nothing.png": b"",
        "a byte.png": b"\x89",
        "zeros.png": bytes(100_000),
        "noise.jpg": random.Random(1).randbytes(100_000),
        "text.png": b"not a picture",
        "page.png": b"<html>" + script,
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">' + script + b"</svg>",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file closefile\nshowpage\n",
        "pdf.png": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
        "program.png": b"\x7fELF" + bytes(200),
        "script.png": b"#!/bin/sh\ntouch owned\n",
        "zip.png": zipped({"a.png": ones["png"], "../../owned": b"x"}),
        "zip bomb.png": zipped({"a.png": bytes(10**7)}),
        "pickle.png": pickle.dumps(Owns("owned")),
        "picture and page.gif": gif.replace(b"GIF89a", b"GIF89a/*", 1) + b"*/" + script,
        "picture and zip.jpg": ones["jpg"] + zipped({"a": bytes(1000)}),
        "picture and script.png": ones["png"] + script,
        "pdf and picture.jpg": b"%PDF-1.4\n" + ones["jpg"],
    }


def tiff(width: int, height: int, offset: int = 8, count: int = 90, samples: int = 3) -> bytes:
    """One strip of plain RGB, whatever its tags say."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 2), (273, offset), (277, samples), (278, height)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, count)]]
    return b"II*\0" + struct.pack("<I", 98) + bytes(90) + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def bomb(side: int) -> bytes:
    """A whole PNG of one grey, of some kilobytes and so many pixels a side."""
    row = bytes(side + 1)
    packer = zlib.compressobj(1)
    packed = b"".join([packer.compress(row * 500) for _ in range(side // 500)] + [packer.flush()])
    return png_of(header(side, side, 8, 0), chunk(b"IDAT", packed), chunk(b"IEND", b""))


class Owns:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self) -> Any:
        return open, (self.trace, "w")


# Metadata

NAMES = {
    "upwards": "../a.png",
    "upwards within": "sub/../../a.png",
    "upwards and back": "../set/a.png",
    "absolute": "/etc/passwd",
    "absolute picture": "/tmp/a.png",
    "a drive": "C:\\a.png",
    "a drive with slashes": "C:/a.png",
    "a share": "\\\\server\\share\\a.png",
    "backslashes": "sub\\a.png",
    "backslashes upwards": "..\\a.png",
    "a NUL": "a.png\0.txt",
    "a NUL first": "\0a.png",
    "a line feed": "a.png\nb.png",
    "an escape": "\x1b]0;owned\x07a.png",
    "long": "x" * 5000 + ".png",
    "as long as can be": "x" * 251 + ".png",
    "deep": "d/" * 3000 + "a.png",
    "nothing": "",
    "a dot": ".",
    "two dots": "..",
    "the folder": "./",
    "a tilde": "~/a.png",
    "a variable": "$HOME/a.png",
    "a command": "`touch owned`.png",
    "an address": "file:///etc/a.png",
    "the net": "https://example.com/a.png",
    "a device": "/dev/zero",
    "a link to itself": "loop.png",
    "a link to nothing": "gone.png",
    "a link out": "out.png",
    "a folder linked out": "away/b.png",
    "a folder": "folder.png",
    "a pipe": "pipe.png",
    "hidden": ".a.png",
    "the metadata": "metadata.jsonl",
    "an emoji": "👩🏽‍🚀.png",
    "right to left": "\u202egnp.a",
    "arabic": "صورة.png",
    "combining": "e\u0301" * 100 + ".png",
    "half a character": "\ud800.png",
    "a stream": "a.png:stream",
    "a device of Windows": "CON.png",
    "a space at the end": "a.png ",
    "capitals": "A.PNG",
}
CAPTIONS: dict[str, Any] = {
    "nothing": None,
    "no text": "",
    "blanks": " \t\n",
    "a number": 12,
    "a list": ["a"],
    "a section": {"a": "b"},
    "a truth": True,
    "half a character": "\ud83d",
    "a NUL": "a\0b",
    "controls": "".join(map(chr, range(32))),
    "an escape": "\x1b[2J\x1b]0;owned\x07",
    "right to left": "\u202e{} siht",
    "a long text": "x " * 50_000,
    "lines": "a\nb\r\nc\u2028d",
    "braces": "{}{{}}{0}{x!r:{y}}",
    "an emoji": "👩🏽‍🚀" * 100,
    "marks": "e" + "\u0301" * 5000,
    "a patch": "%s %n ${x} $(touch owned)",
}


@cache
def metadata() -> dict[tuple[str, str], bytes]:
    """(name of the file, what it is) -> content."""

    def lines(*rows: Any) -> bytes:
        return "\n".join(json.dumps(row) for row in rows).encode()

    good = {"file_name": "a.png", "caption": "a {}"}
    found = {f"named {what}": lines(good, {"file_name": name, "caption": "x"}) for what, name in NAMES.items()}
    found |= {f"captioned {what}": lines({"file_name": "a.png", "caption": text}) for what, text in CAPTIONS.items()}
    others = [None, 3, "a", [], {}, {"file_name": None}, {"file_name": 3}, {"file_name": ["a.png"]}, {"caption": "a"}]
    found |= {f"a row of {json.dumps(other)}": lines(good, other) for other in others}
    found |= {
        "nothing": b"",
        "blanks": b"\n \n\t\n",
        "deep": b'{"file_name": ' + b"[" * 100_000,
        "deep and closed": b"[" * 100_000 + b"]" * 100_000,
        "a deep caption": b'{"file_name": "a.png", "caption": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        "keys twice": b'{"file_name": "a.png", "file_name": "b.png", "caption": "a", "caption": "b"}',
        "digits": b'{"file_name": "a.png", "caption": ' + b"9" * 5000 + b"}",
        "not a number": b'{"file_name": "a.png", "caption": NaN}',
        "a mark": b"\xef\xbb\xbf" + lines(good),
        "utf-16": lines(good).decode().encode("utf-16"),
        "latin": '{"file_name": "a.png", "caption": "schön"}'.encode("latin-1"),
        "a list of all": json.dumps([good]).encode(),
        "zeros": bytes(1000),
        "noise": random.Random(2).randbytes(3000),
        "a picture": png(),
        "a zip": zipped({"metadata.jsonl": lines(good)}),
        "one line": lines(good) + b", " + lines(good),
        "old line ends": lines(good) + b"\r" + lines(good),
    }
    tables = {
        **{f"named {what}": f'file_name,caption\na.png,a\n"{name}",x\n' for what, name in NAMES.items()},
        "nothing": "",
        "a header": "file_name,caption\n",
        "no header": "a.png,a {}\n",
        "columns twice": "file_name,file_name,caption\na.png,b.png,x\n",
        "more cells": "file_name,caption\na.png,x,y,z\n",
        "fewer cells": "file_name,caption\na.png\n",
        "an open quote": 'file_name,caption\na.png,"x\n' * 50,
        "quotes": 'file_name,caption\n"a.png"x,"y"z"\n',
        "a NUL": "file_name,caption\na.png,a\0b\n",
        "a long cell": "file_name,caption\na.png," + "x" * 200_000,
        "a long header": "x" * 100_000 + ",caption\na.png,x\n",
        "many columns": ",".join(f"c{number}" for number in range(5000)) + "\n" + "x," * 5000,
        "old line ends": "file_name,caption\ra.png,x\r",
        "a formula": "file_name,caption\na.png,=cmd|'/c calc'!A0\n",
        "lines alone": "\n" * 5000,
        "commas alone": "," * 5000,
    }
    tables = {what: text.encode("utf-8", "surrogatepass") for what, text in tables.items()}
    tables |= {"zeros": bytes(1000), "noise": random.Random(3).randbytes(3000), "utf-16": "file_name".encode("utf-16")}
    parquet = dict(columns())
    return {
        **{("metadata.jsonl", what): content for what, content in found.items()},
        **{("metadata.csv", what): content for what, content in tables.items()},
        **{("metadata.parquet", what): content for what, content in parquet.items()},
    }


def columns() -> Iterator[tuple[str, bytes]]:
    """Files of parquet, and of what claims to be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def held(table: Any, **options: Any) -> bytes:
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        return sink.getvalue()

    good = held(pa.table({"file_name": ["a.png"], "caption": ["a {}"]}))
    for what, name in NAMES.items():
        if what != "half a character":
            yield f"named {what}", held(pa.table({"file_name": ["a.png", name], "caption": ["a", "x"]}))
    kinds: dict[str, Any] = {
        "numbers": pa.array([1]),
        "bytes": pa.array([b"\xff\xfe"]),
        "lists": pa.array([["a"]]),
        "structs": pa.array([{"a": 1}]),
        "nothing": pa.array([None]),
        "a late time": pa.array([2**62], pa.timestamp("us")),
        "a late date": pa.array([2**31 - 1], pa.date32()),
        "a duration": pa.array([2**62], pa.duration("us")),
        "decimals": pa.array([1], pa.decimal128(38, 0)),
        "no utf-8": pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")),
        "a dictionary": pa.array(["a"]).dictionary_encode(),
    }
    for what, array in kinds.items():
        yield f"captions of {what}", held(pa.table({"file_name": ["a.png"], "caption": array}))
        yield f"names of {what}", held(pa.table({"file_name": array, "caption": ["a"]}))
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(30_000, np.int32)), pa.array(["x" * 100_000]))
    yield "three GB", held(pa.table({"file_name": ["a.png"] * 30_000, "other": repeated}))
    yield "columns twice", held(pa.Table.from_arrays([pa.array(["a.png"])] * 2, names=["file_name", "file_name"]))
    yield "no rows", held(pa.table({"file_name": pa.array([], pa.string())}))
    yield "no columns", held(pa.table({}))
    yield from damaged(good, 9)
    for length in (0, 2**31 - 1, 2**32 - 1, len(good)):
        yield f"a footer of {length}", good[:-8] + struct.pack("<I", length) + b"PAR1"


def tables(loop: Path) -> dict[str, bytes]:
    """Data sets of one row: the picture that it has or names, and its caption."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def held(image: Any, caption: Any) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pa.table({"image": image, "text": pa.array([caption], pa.string())}), sink)
        return sink.getvalue()

    paths = [
        "a\0b.png",
        "/dev/zero",
        "/etc/passwd",
        "x" * 5000,
        "../../a.png",
        "",
        str(loop),
        "https://example.com/a.png",
    ]
    rows = {f"only {path[:30]!r}": {"bytes": None, "path": path} for path in paths}
    rows |= {f"noise at {path[:30]!r}": {"bytes": bytes(range(200)), "path": path} for path in paths}
    rows |= {f"good at {path[:30]!r}": {"bytes": png(), "path": path} for path in paths}
    rows |= {"no bytes": {"bytes": b"", "path": None}, "a bomb": {"bytes": bomb(20_000), "path": "a.png"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    found = {what: held(pa.array([row], kind), "a {}") for what, row in rows.items()}
    kinds = {"numbers": [1], "texts": ["/etc/passwd"], "lists": [[1]], "nothing": [None], "noise": [b"noise"]}
    found |= {what: held(pa.array(column), "a {}") for what, column in kinds.items()}
    for caption in (None, "", " \n"):
        found[f"captioned {caption!r}"] = held(pa.array([{"bytes": png(), "path": "a.png"}], kind), caption)
    return found


# Names and captions of files

FILE_NAMES = {
    "an emoji": "👩🏽‍🚀".encode(),
    "right to left": "صورة".encode(),
    "turned around": "\u202egnp.exe".encode(),
    "combining": ("e" + "\u0301" * 100).encode(),
    "not composed": "e\u0301".encode(),
    "composed": "\u00e9".encode(),
    "as long as can be": b"x" * 251,
    "long and not ASCII": "é".encode() * 125,
    "a line feed": b"a\nb",
    "an escape": b"\x1b]0;owned\x07",
    "no text": b"\xff\xfe",
    "blanks": b"  ",
    "a dash": b"--help",
    "a command": b"$(touch owned)",
    "quotes": b"'\"",
    "braces": b"{}{0}%s",
    "a star": b"*?[a-z]",
    "backslashes": b"x\\..\\owned",
    "a drive": b"C:a",
    "a device of Windows": b"NUL",
    "dots": b"a..b",
    "a control": b"\x01\x7f",
    "a separator": "\u2028".encode(),
    "nothing to see": "\u200b\u2060".encode(),
    "mathematics": "𝕗𝕠𝕩".encode(),  # noqa: RUF001
}
CAPTION_FILES = {
    "nothing": b"",
    "blanks": b" \t\r\n",
    "a mark": b"\xef\xbb\xbfa {}",
    "a mark alone": b"\xef\xbb\xbf",
    "utf-16": "a {}".encode("utf-16"),
    "latin": "schön".encode("latin-1"),
    "an encoded surrogate": b"a \xed\xa0\x80",
    "half of a character": "ü".encode()[:1],
    "zeros": bytes(1000),
    "noise": random.Random(4).randbytes(1000),
    "a picture": b"\x89PNG\r\n\x1a\n",
    "controls": bytes(range(1, 128)),
    "an escape": b"\x1b[2J\x1b]0;owned\x07",
    "right to left": "\u202e{} siht".encode(),
    "an emoji": "👩🏽‍🚀".encode() * 1000,
    "marks": ("e" + "\u0301" * 10_000).encode(),
    "lines": b"a\nb\r\nc\n" * 1000,
    "long": b"word " * 100_000,
    "longer": b"word " * 1_000_000,
    "braces": b"{}{{}}{0}{x!r:{y}}%s%n",
    "a command": b"$(touch owned) `touch owned`",
}
