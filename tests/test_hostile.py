"""Whatever a file holds, there is an answer, or one clear line for each problem: never a traceback, nothing that runs,
nothing that is changed, and no time or memory that only a header asks for.

Cases are counted as calls with different input. `test_the_corpus_is_large` counts those of the corpus (`hostile` and
`hostile_adapters`, made anew from fixed seeds): 3,620 recipes and settings, 460 pictures, 390 metadata files, names and
captions, 1,960 adapters and 140 pickles. Hypothesis adds 600 examples, always the same ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import hostile
import hostile_adapters
import pytest
import tiny
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin

from finetune import cli
from finetune.convert import convert
from finetune.dataset import DatasetConfig, Picture, scan
from finetune.dataset.pixels import decode
from finetune.errors import LONGEST, UNPRINTABLE, UserError
from finetune.extract import extract
from finetune.files import MOST_TENSORS
from finetune.formats import read
from finetune.inspection import as_lines, inspect
from finetune.load import Adapter, load_adapters
from finetune.merge import merge
from finetune.recipe import load
from finetune.resize import resize

SECONDS = 30  # for one case, on a machine that does other things as well
MEMORY = 4 * 2**30  # on top of what the libraries have
CASES: dict[str, Callable[[], int]] = {
    "recipes": lambda: len(hostile.recipe_files()) + len(hostile.OVERRIDES),
    "settings": lambda: len(list(hostile.all_keys())) * len(hostile.VALUES),
    "pictures": lambda: len(hostile.pictures()),
    "metadata": lambda: len(hostile.metadata()) + len(hostile.tables(Path("loop"))),
    "names and captions": lambda: len(hostile.NAMES) + len(hostile.FILE_NAMES) + len(hostile.CAPTION_FILES),
    "adapters": lambda: sum(len(hostile_adapters.adapters(group)) for group in hostile_adapters.GROUPS),
    "pickles": lambda: len(hostile_adapters.pickles()),
}
any_example = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", autouse=True)
def no_more_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that would run leaves a file called `owned` where it runs."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("owned")) and not (tmp_path.parent / "owned").exists()


def problems(what: str, act: Callable[[], Any]) -> list[str]:
    """What is complained of; nothing where there is an answer."""
    start, found = time.monotonic(), []
    try:
        act()
    except UserError as error:
        found = error.problems
        assert found, what
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - start < SECONDS, what
    for line in found:
        assert line.strip() and len(line) < LONGEST + 50 and not UNPRINTABLE.search(line), what
    return found


def contents(folder: Path) -> dict[str, Any]:
    """All that could be changed of what lies in a folder, its links and pipes included."""
    return {
        str(path): (found.st_mode, found.st_mtime_ns, found.st_size, _digest(path, found))
        for path in (folder, *folder.rglob("*"))
        for found in [path.lstat()]
    }


def _digest(path: Path, found: os.stat_result) -> str:
    if stat.S_ISLNK(found.st_mode):
        return str(path.readlink())
    small = stat.S_ISREG(found.st_mode) and found.st_size < 2**24
    return hashlib.sha256(path.read_bytes()).hexdigest() if small and os.access(path, os.R_OK) else ""


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


def test_the_corpus_is_large():
    counts = {area: count() for area, count in CASES.items()}
    least = {"recipes": 110, "settings": 3400, "pictures": 450, "metadata": 300, "adapters": 1800, "pickles": 140}
    assert all(counts[area] >= number for area, number in least.items()), counts
    assert sum(counts.values()) > 6000


# Recipes


def recipe_problems(what: str, overrides: Sequence[str] = ()) -> list[str]:
    """Of `hostile.yaml`; one that is taken can be written down and read again."""

    def act() -> None:
        loaded = load("hostile.yaml", overrides)
        Path("again.yaml").write_text(loaded.to_yaml(), encoding="utf-8")
        assert load("again.yaml").digest() == loaded.digest()

    return problems(what, act)


def write(content: bytes | str) -> None:
    Path("sub").mkdir(exist_ok=True)
    Path("hostile.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_hostile_recipe_is_refused_or_read():
    taken = []
    for what, content in hostile.recipe_files().items():
        write(content)
        found = recipe_problems(what)
        assert all(
            re.match(r"hostile\.yaml: |hostile\.yaml:$|  |override |\S+/etc/passwd: ", line) for line in found
        ), what
        taken += [what] if not found else []
    assert sorted(taken) == ["a long line", "a mark first", "base 60"]


def test_a_hostile_override_is_refused_or_taken():
    write(hostile.VALID)
    for text in hostile.OVERRIDES:
        recipe_problems(text[:80], [text])


@pytest.mark.parametrize("method", hostile.METHODS)
def test_every_key_takes_or_refuses_any_value(method: str):
    write(yaml.safe_dump(hostile.recipe(method)))
    for (_, key), (what, value) in itertools.product(
        [found for found in hostile.all_keys() if found[0] == method], hostile.VALUES.items()
    ):
        for line in recipe_problems(f"{key}: {what}", [f"{key}={value}"]):
            assert "function-" not in line and "literal[" not in line, line


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a billion laughs", "more than 100,000 keys and values"),
        ("laughs that merge", "more than 100,000 keys and values"),
        ("itself in a section", "an alias stands within what it stands for"),
        ("deep flow", "nested too deeply"),
        ("a chain of aliases", "nested too deeply"),
        ("a NUL", "not valid YAML"),
        ("a large file", "3,000,"),
        ("hexadecimal", "a number of more than 63 bits"),
        ("a list as a key", "a list or a section cannot be a key"),
        ("extends itself in a roundabout way", "extends: it extends itself"),
        ("utf-16", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_in_one_line(what: str, line: str):
    write(hostile.recipe_files()[what])
    (found,) = recipe_problems(what)
    assert found.startswith("hostile.yaml: ") and line in found


def test_recipes_that_extend_one_another_without_end_are_refused():
    for number in range(100):
        Path(f"r{number}.yaml").write_text(f"extends: r{number + 1}")
    Path("r100.yaml").write_text(hostile.VALID)
    (line,) = problems("a chain", lambda: load("r0.yaml"))
    assert "more than 20 recipes" in line


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.sampled_from([key.rpartition(".")[2] for _, key in hostile.all_keys()]) | st.text(max_size=8)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4))


@any_example
@given(st.dictionaries(st.sampled_from(list(hostile.recipe())) | names, trees, max_size=6))
def test_any_tree_is_a_recipe_or_is_refused(tree: dict[str, Any]):
    write(yaml.safe_dump({**hostile.recipe(), **tree}, allow_unicode=True).encode("utf-8", "surrogatepass"))
    recipe_problems(str(tree))


@any_example
@given(st.text(alphabet="ab: -[]{}&*!#|>%@`'\"\n\t?,<=~\\0.9e\u2028", max_size=60), st.binary(max_size=40))
def test_any_text_is_a_recipe_or_is_refused(text: str, content: bytes):
    write(text)
    recipe_problems(text)
    write(hostile.VALID.encode() + content)
    recipe_problems(repr(content))
    write(hostile.VALID)
    recipe_problems(text, [f"train={text}", text])


# Pictures


def scanned(what: str, folder: Path, **options: Any) -> tuple[list[Picture], list[str]]:
    """The pictures, and what is wrong."""
    pictures: list[Picture] = []
    given = {"captions": ("a {}",), **options}
    with unchanged(folder):
        found = problems(what, lambda: pictures.extend(scan(DatasetConfig(folder=folder, **given))))
    return pictures, found


def save(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# Whole pictures with something behind them, which nothing reads.
USABLE = (
    "lie picture and script.png",
    "lie picture and zip.jpg",
    "lie picture and page.gif",
    "lie tiff of long strips.tif",
)


@pytest.mark.parametrize("mask", ["none", "alpha"])
def test_a_hostile_picture_is_refused_in_one_line_that_names_it(tmp_path: Path, mask: str):
    files = hostile.pictures()
    pictures, found = scanned("all", save(tmp_path / "set", files), mask=mask)
    named = [line.partition(": ")[0] for line in found]
    assert len(named) == len(set(named)) and set(named) <= {str(tmp_path / "set" / name) for name in files}
    lies = {str(tmp_path / "set" / name) for name in files if name.startswith("lie ") and name not in USABLE}
    assert not lies - set(named)
    assert all("Remove or replace it." in line for line in found)
    assert not pictures and len(found) > 250


def test_a_hostile_picture_that_is_taken_can_be_drawn(tmp_path: Path):
    refused = {Path(line.partition(": ")[0]).name for line in scanned("all", save(tmp_path, hostile.pictures()))[1]}
    for name, content in hostile.pictures().items():
        if name not in refused:
            assert min(decode(content, "#ffffff", (8, 8)).size) > 0, name


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow has Ghostscript draw PostScript, whatever the file is called."""
    (save(tmp_path / "bin", {"gs": b"#!/bin/sh\ntouch owned\n"}) / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    _, found = scanned("PostScript", save(tmp_path / "set", {"a.png": hostile.pictures()["lie postscript.png"]}))
    assert len(found) == 1
    assert not Path("owned").exists()


def test_what_only_calls_itself_a_picture_is_refused_and_never_waited_for(tmp_path: Path):
    folder = save(tmp_path / "set", {"good.png": hostile.png()})
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "linked.png").symlink_to(save(tmp_path / "other", {"b.png": hostile.png()}) / "b.png")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "good.txt")
    os.truncate(save(folder, {"sparse.png": b""}) / "sparse.png", 2**40)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        shutil.move("socket.png", folder / "socket.png")
        _, found = scanned("special", folder)
    named = {Path(line.partition(": ")[0]).name: line for line in found}
    assert len(named) == len(found)
    assert sorted(named) == [f"{name}.png" for name in ("device", "folder", "gone", "loop", "pipe", "socket", "sparse")]
    assert "is a folder" in named["folder.png"] and "a pipe" in named["pipe.png"] and "bytes" in named["sparse.png"]


def test_large_pictures_are_unpacked_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    at_work: list[int] = []
    lock, most = threading.Lock(), [0]
    module: Any = sys.modules["finetune.dataset.scan"]
    measure = module.measure

    def watched(*arguments: Any) -> Any:
        with lock:
            at_work.append(1)
            most[0] = max(most[0], len(at_work))
        time.sleep(0.01)
        with lock:
            at_work.pop()
        return measure(*arguments)

    monkeypatch.setattr(module, "measure", watched)
    folder = save(tmp_path / "set", {f"{number}.png": hostile.png() for number in range(12)})
    assert len(scanned("small", folder)[0]) == 12 and most[0] > 1
    most[0] = 0
    monkeypatch.setattr(module, "LARGE", 4)
    assert len(scanned("large", folder)[0]) == 12 and most[0] == 1


def test_pictures_of_any_name_are_found_with_their_captions(tmp_path: Path):
    (tmp_path / "set").mkdir()
    for number, name in enumerate(hostile.FILE_NAMES.values()):
        stem = os.fsdecode(name)
        save(tmp_path / "set", {f"{stem}.png": hostile.png((6 + number, 4)), f"{stem}.txt": b"a {} of its own"})
    pictures, found = scanned("names", tmp_path / "set")
    assert len(found) == 1 and "its name is no text. Rename it." in found[0] and "\\udcff" in found[0]
    for path in (tmp_path / "set").glob("\udcff*"):
        path.unlink()
    pictures, found = scanned("names", tmp_path / "set")
    assert not found and len(pictures) == len(hostile.FILE_NAMES) - 1
    assert all(picture.captions == ("a {} of its own",) for picture in pictures)


def test_a_hostile_caption_is_refused_or_read(tmp_path: Path):
    for what, content in hostile.CAPTION_FILES.items():
        folder = save(tmp_path / "set", {"a.png": hostile.png(), "a.txt": content})
        pictures, found = scanned(what, folder, captions=())
        assert len(pictures) + len(found) == 1, what
        assert all(line.startswith(str(folder / "a.txt")) for line in found), what


# Metadata


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder with one good picture, and all that metadata could wrongly point to."""
    folder = save(tmp_path / "set", {"a.png": hostile.png(), ".a.png": hostile.png()})
    save(tmp_path, {"a.png": hostile.png()})
    save(tmp_path / "away", {"b.png": hostile.png()})
    (folder / "sub").mkdir()
    return folder


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_hostile_metadata_is_refused_or_read(trap: Path, name: str):
    for (file, what), content in hostile.metadata().items():
        if file == name:
            (trap / name).write_bytes(content)
            pictures, found = scanned(what, trap, captions=())
            assert [Path(picture.path).name for picture in pictures] in ([], ["a.png"]), what
            assert all(line.startswith(str(trap)) for line in found), (what, found)


def test_metadata_points_nowhere_else(trap: Path):
    """As a folder's pictures, links and what is no picture are told of anyway; here it is about the rows."""
    (trap / "loop.png").symlink_to("loop.png")
    (trap / "gone.png").symlink_to("nowhere.png")
    (trap / "out.png").symlink_to(trap.parent / "a.png")
    (trap / "away").symlink_to(trap.parent / "away")
    (trap / "folder.png").mkdir()
    os.mkfifo(trap / "pipe.png")
    for what, name in hostile.NAMES.items():
        (trap / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "a {}"}), encoding="utf-8")
        rows = [line for line in scanned(what, trap, captions=())[1] if "metadata.jsonl, line 1" in line]
        assert len(rows) == 1 and ("this folder" in rows[0]), what


def test_ten_thousand_captions(tmp_path: Path):
    folder = save(tmp_path / "set", {"00000.png": hostile.png()})
    for number in range(1, 10_000):
        os.link(folder / "00000.png", folder / f"{number:05d}.png")
    rows = [json.dumps({"file_name": f"{number:05d}.png", "caption": f"{{}} {number}"}) for number in range(10_000)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    pictures: list[Picture] = []
    assert not problems("good", lambda: pictures.extend(scan(DatasetConfig(folder=folder))))
    assert [picture.captions[0] for picture in pictures] == [f"{{}} {number}" for number in range(10_000)]
    alone = save(tmp_path / "alone", {"00000.png": hostile.png()})
    shutil.copy(folder / "metadata.jsonl", alone)
    found = scanned("bad", alone)[1]
    assert len(found) == 9999 and all(f"line {number}: " in line for number, line in enumerate(found, 2))


@any_example
@given(
    st.lists(st.dictionaries(st.sampled_from(["file_name", "caption", "text"]) | names, trees, max_size=4), max_size=4)
)
def test_any_rows_are_metadata_or_are_refused(rows: list[dict[str, Any]]):
    with tempfile.TemporaryDirectory() as place:
        folder = save(Path(place), {"a.png": hostile.png()})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        scanned(str(rows), folder)


@any_example
@given(st.text(alphabet='a.pngfile_name,caption"\n\r\t\0;é', max_size=80), st.binary(max_size=60))
def test_any_text_is_metadata_or_is_refused(text: str, content: bytes):
    with tempfile.TemporaryDirectory() as place:
        folder = save(Path(place), {"a.png": hostile.png(), "metadata.csv": f"file_name,caption\n{text}".encode()})
        scanned(text, folder)
        (folder / "metadata.csv").unlink()
        scanned(repr(content), save(folder, {"metadata.jsonl": content, "a.txt": content}))


def test_rows_of_a_table_are_pictures_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "loop").symlink_to("loop")
    taken, tables = [], hostile.tables(tmp_path / "loop")
    for what, content in tables.items():
        (tmp_path / "table.parquet").write_bytes(content)
        config = DatasetConfig(source=str(tmp_path / "table.parquet"))
        taken += [what] if not problems(what, lambda config=config: scan(config)) else []
    assert taken == [what for what in tables if what.startswith("good ")]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything; nobody may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder of a user, whose rights count."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    folder = save(top / "set", {"a.png": hostile.png(), "a.txt": b"a {}", "b.png": hostile.png(), "b.txt": b"b {}"})
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(top)


@pytest.mark.parametrize(
    ("path", "mode", "line"),
    [
        ("", 0o000, "dataset.folder: "),
        ("", 0o444, "Permission denied"),
        ("a.png", 0o000, "a.png: cannot be read as a picture (Permission denied)"),
        ("a.txt", 0o000, "a.txt: cannot be read as a caption (Permission denied)"),
    ],
)
def test_what_may_not_be_read_is_named(locked: Path, path: str, mode: int, line: str):
    scan(DatasetConfig(folder=locked))  # imports what nobody may not
    (locked / path).chmod(mode)
    with as_nobody():
        found = problems(path, lambda: scan(DatasetConfig(folder=locked)))
    assert found and all(str(locked) in each for each in found) and any(line in each for each in found)


def test_a_folder_that_may_only_be_read_is_read(locked: Path):
    for path in (*locked.iterdir(), locked):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with as_nobody():
        pictures, found = scanned("read-only", locked)
    assert not found and len(pictures) == 2


def test_a_folder_that_may_only_be_read_is_not_written_to(locked: Path):
    file = save(locked, {"lora.safetensors": hostile_adapters.GOOD["kohya"]}) / "lora.safetensors"
    convert(file, "diffusers", output=locked.parent / "there.safetensors")  # imports what nobody may not
    locked.chmod(0o555)
    with as_nobody():
        (line,) = problems("read-only", lambda: convert(file, "diffusers", output=locked / "new.safetensors"))
    assert line.startswith(f"{locked}/new.safetensors: cannot be written (Permission denied). ")
    assert not [path.name for path in locked.iterdir() if "new" in path.name]


# Adapters

OUTPUT = Path("out.safetensors")
COMMANDS: dict[str, Callable[[Path], Any]] = {
    **{
        f"convert to {to}": lambda file, to=to: convert(file, to, output=OUTPUT, overwrite=True)
        for to in ("diffusers", "kohya", "embedding", "embedding_a1111", "embedding_comfyui")
    },
    **{
        f"convert for {name}": lambda file, name=name: convert(
            file, "kohya", output=OUTPUT, architecture=name, overwrite=True
        )
        for name in ("sdxl", "sd3", "flux", "z_image")
    },
    "convert by its word": lambda file: convert(file, "embedding_a1111", overwrite=True),
    "convert to a pickle": lambda file: convert(file, "embedding_a1111", output=Path("out.pt"), overwrite=True),
    "resize": lambda file: resize(file, rank=1, energy=None, output=OUTPUT, overwrite=True),
    "resize by energy": lambda file: resize(file, rank=None, energy=0.5, output=OUTPUT, overwrite=True),
    "merge": lambda file: merge([Adapter(file, 0.5), Adapter(file, -1e30)], OUTPUT, overwrite=True),
    "extract": lambda file: extract(file, file, OUTPUT, rank=1, energy=None, overwrite=True),
}


def look(file: Path) -> None:
    found = inspect(file)
    json.dumps(found)
    lines = as_lines(found)
    assert not any(UNPRINTABLE.search(line) for line in lines)
    if "finetune generate" in found.get("use", ""):  # which people paste into a shell
        program, command, prompt, option, name, *_ = shlex.split(found["use"])
        assert (program, command, option, name) == ("finetune", "generate", "--adapter", str(file))
        assert prompt.startswith("a picture of ") and not re.search(r'"[^"]*[$`!][^"]*"', found["use"])


@pytest.mark.parametrize("group", hostile_adapters.GROUPS)
def test_a_hostile_adapter_is_refused_or_read(group: str):
    file, commands = Path("hostile.safetensors"), itertools.cycle(COMMANDS.items())
    for what, content in hostile_adapters.adapters(group).items():
        file.write_bytes(content)
        problems(f"inspect {what}", lambda: look(file))
        refused = problems(f"read {what}", lambda: read(file))
        assert all(line.startswith("hostile.safetensors: ") for line in refused), what
        for name, command in itertools.islice(commands, 1 if refused else 2):
            problems(f"{name}: {what}", lambda command=command: command(file))
        assert file.read_bytes() == content, what


@pytest.mark.parametrize("suffix", ["pt", "bin", "ckpt", "pth", "safetensors", "PT", "txt"])
def test_a_pickle_is_never_opened_unasked(suffix: str, tmp_path: Path):
    for what, content in hostile_adapters.pickles().items():
        if what == "safetensors":
            continue
        file = tmp_path / f"hostile.{suffix}"
        file.write_bytes(content)
        problems(f"inspect {what}", lambda file=file: look(file))
        for name, command in [("read", read), ("convert", COMMANDS["convert to kohya"]), ("merge", COMMANDS["merge"])]:
            (line,) = problems(f"{name} {what}", lambda file=file, command=command: command(file))
            assert line.startswith(str(file)) and ("--allow-pickle" in line or "not a safetensors file" in line), what


def test_a_pickle_that_is_asked_for_runs_nothing_either():
    file, answers = Path("hostile.pt"), []
    for what, content in hostile_adapters.pickles().items():
        file.write_bytes(content)
        answers += [what] if not problems(what, lambda: read(file, allow_pickle=True)) else []
    assert not [what for what in answers if re.search("code|call|evaluation|stretched|sparse|bomb", what)]
    assert any(what.startswith("an embedding") for what in answers)


def test_a_pickle_would_run_if_it_were_opened(tmp_path: Path):
    """What the other tests prove nothing without."""
    (tmp_path / "hostile.pt").write_bytes(hostile_adapters.pickles()["of code"])
    torch.load(tmp_path / "hostile.pt", weights_only=False)["a"].close()
    (tmp_path / "owned").unlink()


def test_a_million_keys_are_refused_at_once():
    text = ",".join(
        f'"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(MOST_TENSORS + 1)
    )
    Path("hostile.safetensors").write_bytes(hostile_adapters.claimed(b"{" + text.encode() + b"}"))
    start = time.monotonic()
    for act in (inspect, read):
        (line,) = problems("keys", lambda act=act: act(Path("hostile.safetensors")))
        assert "131,073 tensors" in line
    assert time.monotonic() - start < SECONDS / 3


def test_extract_refuses_or_takes_layers_of_any_name():
    anchors = ["cond_stage_model.transformer.x", "cond_stage_model.model.x", "conditioner.embedders.0.x"]
    anchors += ["model.diffusion_model.joint_blocks.0.x.weight", "double_blocks.0.x.weight", "noise_refiner.0.x.weight"]
    ones, written = hostile_adapters.ones, hostile_adapters.written
    shapes = itertools.cycle([(48, 16), (), (3,), (0, 16), (4, 4, 3, 3)])
    for anchor, name in itertools.product(anchors, hostile_adapters.NAMES[::2]):
        layer = f"model.diffusion_model.{name.removeprefix('lora_unet_')}.weight"
        tensors = {anchor: ones(2, 2), layer: ones(*next(shapes))}
        Path("base.safetensors").write_bytes(written(tensors))
        Path("tuned.safetensors").write_bytes(written({name: tensor * 2 for name, tensor in tensors.items()}))
        given: list[Path] = [Path("tuned.safetensors"), Path("base.safetensors"), OUTPUT]
        problems(f"{anchor} {name}", lambda given=given: extract(*given, rank=1, energy=None, overwrite=True))


def test_a_folder_of_lies_is_no_pipeline(tmp_path: Path):
    texts = ["", "{}", "[]", "3", '"a"', "[" * 100_000, '{"_class_name": [], "a": []}', '{"_class_name": {"a": "b"}}']
    folder = save(tmp_path / "model", {})
    (folder / "gone.safetensors").symlink_to("nowhere")
    (folder / "folder.safetensors").mkdir()
    for text in texts:
        (folder / "model_index.json").write_text(text)
        problems(text[:50], lambda: look(folder))
        problems(text[:50], lambda: extract(folder, folder, OUTPUT, rank=1, energy=None))


def test_an_adapter_of_another_base_is_named(tmp_path: Path):
    pipeline = tiny.stable_diffusion()
    cases = [case for group in ("names", "shapes") for case in hostile_adapters.adapters(group).items()][::23]
    for what, content in cases:
        file = save(tmp_path, {"hostile.safetensors": content}) / "hostile.safetensors"
        found = problems(what, lambda file=file: load_adapters(pipeline, [Adapter(file)]))
        assert all("hostile.safetensors: " in line for line in found), (what, found)
        pipeline.unload_lora_weights()


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3", "X"]),
        "shape": st.lists(st.integers(-1, 5), max_size=4) | st.lists(st.integers(), max_size=3),
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)) | st.lists(st.integers(), max_size=3),
    }
)
layers = st.sampled_from([*hostile_adapters.lora(), *hostile_adapters.kohya(), "emb_params", "clip_l", "__metadata__"])


@any_example
@given(st.dictionaries(layers | st.text(max_size=9), entries | trees, max_size=4), st.binary(max_size=64))
def test_any_header_is_refused_or_read(header: dict[str, Any], content: bytes):
    file = Path("hostile.safetensors")
    file.write_bytes(hostile_adapters.claimed(header, content))
    problems(str(header), lambda: look(file))
    problems(str(header), lambda: read(file))


# The command line


def in_this_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def assert_clear(status: int, printed: str, complaint: str, mention: str) -> None:
    assert (status, printed) == (2, "")
    assert "Traceback" not in complaint and not UNPRINTABLE.search(complaint.replace("\n", ""))
    assert mention in complaint
    assert all(line.startswith("error: ") for line in complaint.splitlines()), complaint


def test_the_command_line_says_it_in_lines_and_ends_with_status_2(
    trap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def told(mention: str, *arguments: str) -> None:
        status = in_this_process(monkeypatch, *arguments)
        assert_clear(status, *capsys.readouterr(), mention)

    for content in list(hostile.recipe_files().values())[::6]:
        write(content)
        told("", "check", "hostile.yaml", "dataset.folder=nowhere")
    write(hostile.VALID)
    for text in hostile.OVERRIDES[1:10]:
        told("", "show", "hostile.yaml", text)
    for (name, _), content in list(hostile.metadata().items())[10::40]:
        (trap / name).write_bytes(content)
        told(str(trap), "check", "hostile.yaml", f"dataset.folder={trap}", "dataset.caption_column=nowhere")
        (trap / name).unlink()
    (trap / "b\nc\x1b[2J\u202e.png").write_bytes(b"no picture")
    told(
        "b\\nc\\x1b[2J\\u202e.png: cannot be read",
        "check",
        "hostile.yaml",
        f"dataset.folder={trap}",
        "dataset.captions=a",
    )
    file = Path("hostile.safetensors")
    for content in list(hostile_adapters.adapters("lies").values())[::9]:
        file.write_bytes(content)
        told("", "convert", str(file), "--to", "kohya")
        told("hostile.safetensors", "merge", str(file), "--output", "out.safetensors")
        told("hostile.safetensors", "resize", str(file), "--rank", "1")
    for content in list(hostile_adapters.pickles().values())[::20]:
        Path("hostile.pt").write_bytes(content)
        told("hostile.pt", "convert", "hostile.pt", "--to", "kohya")
    told("no such file", "show", "a\0b")


def test_a_name_that_is_no_text_is_printed_all_the_same(tmp_path: Path):
    name = os.fsencode(tmp_path) + "/ä🦊".encode() + b"\xff.pt"
    Path(os.fsdecode(name)).write_bytes(b"a pickle, which is not opened")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-m", "finetune", "inspect", name], capture_output=True, env=environment)
    assert done.returncode == 0 and b"\\udcff.pt" in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["check", "hostile.yaml"], "an alias stands within"),
        (["check", "pictures.yaml"], "pipe.png: cannot be read as a picture"),
        (
            ["convert", "hostile.pt", "--to", "kohya", "--allow-pickle"],
            "hostile.pt: cannot be read without running code",
        ),
    ],
)
def test_a_process_of_its_own_says_it_as_well(tmp_path: Path, arguments: list[str], mention: str):
    write(hostile.recipe_files()["itself in a section"])
    os.mkfifo(save(tmp_path / "pictures", {}) / "pipe.png")
    Path("pictures.yaml").write_text(yaml.safe_dump(hostile.recipe(dataset={"folder": "pictures", "captions": ["a"]})))
    Path("hostile.pt").write_bytes(hostile_adapters.pickles()["of code"])
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert_clear(done.returncode, done.stdout, done.stderr, mention)
