"""What is wrong with pictures that can be read: small, cut off, blurred, empty, shown twice, turned twice, left out.

Shapes: h w pixels of a small gray copy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from finetune.dataset import buckets, masks, metadata
from finetune.dataset.colors import profile_damage
from finetune.dataset.pixels import JPEGS, SUFFIXES, Size, decode, open_picture, scaled_size
from finetune.dataset.scan import CAPTION_SUFFIXES, Picture, room, scan
from finetune.dataset.settings import DatasetConfig
from finetune.dataset.turning import SIDEWAYS, exif_damage, orientation, upright

LOOKED_AT = 500  # pictures of one data set: more would hold up the answer
MULTIPLE = 8  # of a picture's sides, where the base is not known
SIDE = 256  # of the small copies, the short one

ENLARGED = 1.5  # times, and more
CUT_AWAY = 0.5  # of a picture's area, and more
CONTRAST = 3.0  # of 256 levels, and less, as a standard deviation

# The variance of the Laplacian over neighbours, as a share of that over pixels four times as far apart: of the 64 tiles
# of the small copy, in the six that have most of the latter. So neither a plain background nor low contrast counts as
# blur, nor does the blurred background of a sharp portrait. 67 emoji (data/concepts) have 0.047 to 0.124 and 17
# photographs and scans of scikit-image and scikit-learn 0.074 to 0.373; blurred by a Gaussian of 2 pixels at this size,
# all 84 have 0.005 to 0.017.
SHARPNESS = 0.025
FAR, TILES, SHARPEST = 4, 8, 6
ROUNDING = 20 / 12  # variance of the Laplacian of levels that were rounded and of nothing else
LEAST = 64  # pixels on the short side, below which tiles say nothing

# Bits of 63 (pHash: the signs of the lowest frequencies of 32 x 32 pixels, against their median). Copies saved as JPEG
# of quality 50, halved, or 15 % brighter are 4 apart at most, and ones without 2 % of each edge 8, nine times of ten.
SIMILAR = 8
WAVES, PIXELS = 8, 32
# Other things in the same place may be no further apart, but differ there: copies of 16 x 16 pixels, in that one of 16
# tiles where they differ the most, by 2.1 of their variance and more among all sample concepts, and by 0.99 and less
# between a picture and the copies above.
DIFFERENT = 1.4
THUMB, PATCHES = 16, 4

PIXEL_WIDTH, PIXEL_HEIGHT, EXIF = 0xA002, 0xA003, 0x8769  # Exif's tags for the size that was recorded
SAME_RATIO = 0.01  # as far as rounding goes


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a code that stays the same, where it is, and what to do."""

    code: str
    file: str  # or a setting
    message: str
    severity: Literal["error", "warning"] = "warning"

    def __str__(self) -> str:
        return f"{self.file}: {self.message}" if self.file else self.message


@dataclass(frozen=True)
class Look:
    """What a small copy of a picture shows."""

    contrast: float
    sharpness: float | None  # of one that is too small, nothing is said
    waves: int  # 63 bits
    thumb: np.ndarray  # (16, 16), of mean 0 and variance 1
    told: Mapping[str, str]  # code -> what is wrong with what the file says of its pixels


def trained_size(width: int, height: int, config: DatasetConfig, multiple: int = MULTIPLE) -> Size:
    """The size that a picture is trained at, on a base that takes sides of that multiple."""
    square = config.resolution, config.resolution
    if not config.buckets:
        return square
    shapes = _shapes(config.resolution, multiple)
    return min(shapes, key=lambda size: abs(math.log(width / height) - math.log(size[0] / size[1])))


def enlargement(picture: Picture, config: DatasetConfig, multiple: int = MULTIPLE) -> float:
    """How many times longer its sides become."""
    size = trained_size(picture.width, picture.height, config, multiple)
    return max(size[0] / picture.width, size[1] / picture.height)


def cut_away(picture: Picture, config: DatasetConfig, multiple: int = MULTIPLE) -> float:
    """The share of its area that no crop shows at one time."""
    width, height = size = trained_size(picture.width, picture.height, config, multiple)
    scaled = scaled_size(picture.width, picture.height, size)
    return 1 - width * height / (scaled[0] * scaled[1])


def examine(pictures: Sequence[Picture], config: DatasetConfig, multiple: int = MULTIPLE) -> list[Finding]:
    """Everything worth a warning, picture by picture, and then what lies beside them unused."""
    looked = pictures[:LOOKED_AT]
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(lambda picture: look(picture, config.background), looked))
    found = [finding for picture in pictures for finding in _shape(picture, config, multiple)]
    found += [finding for picture, seen in zip(looked, looks, strict=True) for finding in _sight(picture, seen)]
    found += [*_copies(pictures), *_resemblances(looked, looks, config.background), *ignored(pictures, config)]
    place = {picture.path: number for number, picture in enumerate(pictures)}
    return sorted(found, key=lambda finding: place.get(finding.file, len(place)))


def look(picture: Picture, background: str) -> Look:
    """A small copy's measures."""
    content = Path(picture.path).read_bytes()
    with room(content):
        small, told = _small(content, background)
    gray = np.asarray(small, dtype=np.float32)
    return Look(float(gray.std()), _sharpness(gray), _waves(small), _thumb(small), told)


def ignored(pictures: Sequence[Picture], config: DatasetConfig) -> Iterator[Finding]:
    """What lies in the folders and is not used; what systems leave there themselves is not told."""
    every = scan(config) if config.held_out else pictures  # what is held out is used, too
    used = {Path(picture.path) for picture in every}
    used |= {path.with_suffix(suffix) for path in used for suffix in CAPTION_SUFFIXES}
    for folder in (given.folder for given in config.all_folders):
        entries = sorted(folder.iterdir())
        left = [path for path in entries if path.is_file() and path not in used and not _is_expected(path)]
        left += [path for path in entries if path.is_dir() and not path.name.startswith(".") and _hides(path, used)]
        if left:
            names = ", ".join(path.name + "/" * path.is_dir() for path in left[:3]) + " and more" * (len(left) > 3)
            verb = "is" if len(left) == 1 else "are"
            yield Finding(
                "ignored-files",
                str(folder),
                f"{len(left)} of what lies in it {verb} not used: {names}. Pictures end in "
                f"{', '.join(sorted(SUFFIXES))} and are not hidden, captions have a picture's name, and other folders "
                "go into dataset.folders.",
            )


def _shape(picture: Picture, config: DatasetConfig, multiple: int) -> Iterator[Finding]:
    times, share = enlargement(picture, config, multiple), cut_away(picture, config, multiple)
    size = f"{picture.width} x {picture.height}"
    wanted = "{} x {}".format(*trained_size(picture.width, picture.height, config, multiple))
    if times > ENLARGED:
        what = f"is {size} and enlarged {times:.1f} times to {wanted}, which teaches blur. Use a larger one"
        yield Finding("small", picture.path, f"{what}, or lower dataset.resolution.")
    if share > CUT_AWAY:
        other = "." if config.buckets else ", or set dataset.buckets=true."
        yield Finding("cut", picture.path, f"is {size}; at {wanted}, {share:.0%} is cut away. Crop it yourself{other}")


def _sight(picture: Picture, seen: Look) -> Iterator[Finding]:
    for code, text in seen.told.items():
        yield Finding(code, picture.path, text)
    if seen.contrast < CONTRAST:
        yield Finding("uniform", picture.path, "is of one color nearly all over. Remove or replace it.")
    elif seen.sharpness is not None and seen.sharpness < SHARPNESS:
        what = f"is blurred (sharpness {seen.sharpness:.3f} at {SIDE} px, sharp from {SHARPNESS})"
        yield Finding("blurred", picture.path, f"{what}. What it teaches is blurred as well: replace it.")


def _copies(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Files of the same bytes, each group once."""
    groups: defaultdict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        groups[picture.sha256].append(picture)
    for first, *others in groups.values():
        if others:
            yield Finding("same-file", first.path, f"is the same file as {_name(others)}. Keep one of them.")


def _resemblances(pictures: Sequence[Picture], looks: Sequence[Look], background: str) -> Iterator[Finding]:
    """Other files that show the same, each group once, under its first one."""
    seen: dict[str, int] = {}
    for number, (picture, one) in enumerate(zip(pictures, looks, strict=True)):
        if one.contrast >= CONTRAST:
            seen.setdefault(picture.sha256, number)
    places = list(seen.values())
    waves = np.array([looks[place].waves for place in places], dtype=np.uint64)
    told: set[int] = set()
    for row, place in enumerate(places):
        close = np.flatnonzero(np.bitwise_count(waves[row + 1 :] ^ waves[row]) <= SIMILAR) + row + 1
        near = [other for other in map(int, close) if _differ(looks[place], looks[places[other]]) < DIFFERENT]
        others = [pictures[places[other]] for other in near if other not in told]
        if row in told or not others:
            continue
        told.update(near)
        picture = pictures[place]
        same = [other for other in others if _show_the_same(picture, other, background)]
        alike = [other for other in others if other not in same]
        if same:
            yield Finding("same-pixels", picture.path, f"shows the same pixels as {_name(same)}. Keep one of them.")
        if alike:
            what = f"is nearly the same as {_name(alike)}"
            yield Finding(
                "near-duplicate", picture.path, f"{what}, so it counts for more than others. Keep one of them."
            )


def _differ(one: Look, other: Look) -> float:
    """The squared difference of two pictures in the tile that has most of it."""
    side = THUMB // PATCHES
    return float(np.square(one.thumb - other.thumb).reshape(PATCHES, side, PATCHES, side).mean((1, 3)).max())


def _show_the_same(one: Picture, other: Picture, background: str) -> bool:
    if (one.width, one.height) != (other.width, other.height):
        return False
    first, second = (decode(Path(picture.path).read_bytes(), background) for picture in (one, other))
    return first.tobytes() == second.tobytes()


def _small(content: bytes, background: str) -> tuple[Image.Image, dict[str, str]]:
    """A gray copy that is as shown, and what is wrong with what the file says of its pixels."""
    with open_picture(content) as file:
        told = dict(_misled(file))
        if file.format in JPEGS:
            file.draft("L", (2 * SIDE, 2 * SIDE))  # its own scaling, which takes a tenth of the time
            image = upright(file).convert("L")
        else:
            image = decode(content, background).convert("L")
    scale = SIDE / min(image.size)
    if scale < 1:
        size = max(SIDE, round(image.width * scale)), max(SIDE, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    return image, told


def _misled(file: Image.Image) -> Iterator[tuple[str, str]]:
    if why := exif_damage(file):
        what = f"has Exif data that cannot be read ({why}), so it is taken as upright"
        yield "exif-damaged", f"{what}. If it is not, turn it; saved anew, it has none."
    elif turned := _turned_twice(file):
        yield "turned-twice", turned
    if why := profile_damage(file):
        what = f"has a color profile that cannot be used ({why}), so its colors are taken as sRGB"
        yield "profile-damaged", f"{what}. If they look wrong, save it anew in sRGB."


def _turned_twice(file: Image.Image) -> str:
    """A program that turned the pixels and left the tag: the size that the camera recorded is then theirs swapped.

    Also if they were made smaller meanwhile; a square says nothing.
    """
    if orientation(file) not in SIDEWAYS:
        return ""
    try:
        details: Mapping[int, object] = file.getexif().get_ifd(EXIF)
    except Exception:  # damaged further in, which turns nothing
        return ""
    width, height = details.get(PIXEL_WIDTH), details.get(PIXEL_HEIGHT)
    if not isinstance(width, int) or not isinstance(height, int) or min(width, height) < 1 or width == height:
        return ""
    if abs(file.width * width / (file.height * height) - 1) > SAME_RATIO:
        return ""
    return (
        f"lies on its side: its Exif says that it was {width} x {height} and is to be turned, but the file is "
        f"{file.width} x {file.height}, so it was turned already. Save it upright, without that tag."
    )


def _sharpness(gray: np.ndarray) -> float | None:
    """How much of the change over four pixels is one over a single pixel: about 1/4 at an edge, 1/256 in a slope."""
    if min(gray.shape) < LEAST:
        return None
    inner = FAR - 1
    near = _variances(_laplacian(gray, 1)[inner:-inner, inner:-inner])
    far = _variances(_laplacian(gray, FAR))
    sharpest = np.argsort(far)[-SHARPEST:]
    near, far = (float(np.maximum(each[sharpest] - ROUNDING, 0).sum()) for each in (near, far))
    return near / far if far else 0.0


def _laplacian(gray: np.ndarray, step: int) -> np.ndarray:
    inner = gray[step:-step, step:-step]
    beside = gray[step:-step, : -2 * step] + gray[step:-step, 2 * step :]
    return beside + gray[: -2 * step, step:-step] + gray[2 * step :, step:-step] - 4 * inner


def _variances(values: np.ndarray) -> np.ndarray:
    rows = [part for band in np.array_split(values, TILES, 0) for part in np.array_split(band, TILES, 1)]
    return np.array([part.var() for part in rows])


def _waves(image: Image.Image) -> int:
    """pHash: which of the lowest frequencies are above their median, all but the mean."""
    gray = np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS), dtype=np.float32)
    cosines = np.cos(np.pi / PIXELS * np.outer(np.arange(WAVES), np.arange(PIXELS) + 0.5))
    strengths = (cosines @ gray @ cosines.T).flatten()[1:]
    return int("".join("01"[above] for above in (strengths > np.median(strengths)).astype(int)), 2)


def _thumb(image: Image.Image) -> np.ndarray:
    gray = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.LANCZOS), dtype=np.float32)
    return (gray - gray.mean()) / max(1.0, float(gray.std()))


@cache
def _shapes(resolution: int, multiple: int) -> tuple[Size, ...]:
    return tuple(buckets.sizes(resolution, multiple))


def _name(pictures: Sequence[Picture]) -> str:
    names = [Path(picture.path).name for picture in pictures]
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _is_expected(path: Path) -> bool:
    """Files that are in use in another way, or that nobody put there to be learnt."""
    if path.name.startswith("."):
        return path.name.startswith("._") or path.suffix.lower() not in SUFFIXES
    system = path.name.lower() in ("thumbs.db", "desktop.ini") or path.stem.lower() in ("readme", "license", "licence")
    return system or path.name in metadata.NAMES or (path.suffix.lower() in SUFFIXES and masks.is_mask(path))


def _hides(folder: Path, used: set[Path]) -> bool:
    """Whether a folder has pictures, none of which is used."""
    try:
        inside = {path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    except OSError:
        return False
    return bool(inside) and not inside & used
