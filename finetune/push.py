"""A finished run to the Hub or into a folder: what others need, and nothing that is the user's own business."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.card import widget
from finetune.config import parse_yaml, to_yaml
from finetune.errors import UserError
from finetune.files import read_shapes, read_tensors, write_tensors

CARD, RECIPE, GRID_FILE = "README.md", "recipe.yaml", "grid.png"


@dataclass(frozen=True)
class Pushed:
    """What went out."""

    files: list[str]  # relative to the folder or repository
    where: str
    notes: list[str]  # what the user should know


def push(run: Path, target: str, *, public: bool = False, with_training_pictures: bool = False) -> Pushed:
    """Send a run's folder to a repository of the Hub, or to a new folder where `target` is a path.

    Raises:
        UserError: there is no finished run, or no way to the target.
    """
    if target.startswith((".", "/", "~")):
        folder = Path(target).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{target} exists already. Name a new or an empty folder.")
        return stage(run, folder, with_training_pictures=with_training_pictures)
    with tempfile.TemporaryDirectory() as folder:
        staged = stage(run, Path(folder), with_training_pictures=with_training_pictures)
        return Pushed(staged.files, _upload(Path(folder), target, public=public), staged.notes)


def stage(run: Path, folder: Path, *, with_training_pictures: bool) -> Pushed:
    """Exactly what is published, in `folder`: adapters, card, recipe and the last pictures of the prompts."""
    adapters = sorted(file for file in run.glob("*.safetensors") if not file.name.startswith("."))
    missing = [name for name in (CARD, RECIPE) if not (run / name).is_file()]
    if missing or not adapters:
        raise UserError(f"{run}: no finished run, for it has no {', '.join([*missing] or ['adapter (.safetensors)'])}")
    recipe = parse_yaml((run / RECIPE).read_text(encoding="utf-8"), str(run / RECIPE))
    private = {path: Path(path).name for path in _paths(recipe)}
    notes = []
    if recipe["base"]["source"] in private:
        named = {read_shapes(file)[1].get("base", "") for file in adapters} - {""}
        private |= dict.fromkeys(named, private[recipe["base"]["source"]])
        notes.append(
            f"the base is a local folder, so the files call it {private[recipe['base']['source']]!r}; "
            "who loads them must have it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in adapters:
        _copy_adapter(file, folder / file.name, private)
    (folder / RECIPE).write_text(to_yaml(_scrubbed(recipe, private)), encoding="utf-8")
    shown = _write_card(run, folder, recipe, private, with_training_pictures)
    for name in shown:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, folder / name)
    if with_training_pictures and GRID_FILE in shown:
        notes.append(f"{GRID_FILE} shows the pictures that taught it")
    return Pushed(sorted([*(file.name for file in adapters), CARD, RECIPE, *shown]), str(folder), notes)


def _paths(tree: Any) -> Iterator[str]:
    """Texts that are absolute paths: they tell who trained it and where."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _paths(part)
    elif isinstance(tree, str) and Path(tree).is_absolute() and len(Path(tree).parts) > 2:
        yield tree


def _scrubbed(tree: Any, private: Mapping[str, str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _scrubbed(value, private) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_scrubbed(part, private) for part in tree]
    return private.get(tree, tree) if isinstance(tree, str) else tree


def _copy_adapter(file: Path, target: Path, private: Mapping[str, str]) -> None:
    """The same tensors; the header without local paths."""
    header = read_shapes(file)[1]
    scrubbed = {key: private.get(value, value) for key, value in header.items()}
    if scrubbed == header:
        shutil.copyfile(file, target)
    else:
        write_tensors(read_tensors(file), target, scrubbed, overwrite=True)


def _write_card(
    run: Path, folder: Path, recipe: Mapping[str, Any], private: Mapping[str, str], with_training_pictures: bool
) -> list[str]:
    """The card for others; the pictures that it shows, relative to the run's folder."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(run / CARD)
    prompts = [prompt.replace("{}", recipe["placeholder"]) for prompt in recipe["validation"]["prompts"]]
    card.data.widget = widget(run, prompts)  # pyright: ignore[reportAttributeAccessIssue]
    text = card.content
    shown = [item["output"]["url"] for item in widget(run, prompts) if "output" in item]
    if with_training_pictures and (run / GRID_FILE).is_file():
        shown.append(GRID_FILE)
    else:
        text = re.sub(r"!\[[^\]]*\]\(grid\.png\)\s*", "", text)
    for path in sorted(private, key=len, reverse=True):
        text = text.replace(path, private[path])
    (folder / CARD).write_text(text, encoding="utf-8")
    return shown


def _upload(folder: Path, repository: str, *, public: bool) -> str:
    """The repository's address."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("no login to the Hub. Run `hf auth login`, or push into a folder, such as ./to-share.")
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=not public, exist_ok=True)
        if not public and not hub.repo_info(address.repo_id).private:
            raise UserError(f"{address.repo_id} exists and is public. Add --public to push there all the same.")
        hub.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Push a run of finetune")
    except UserError:
        raise
    except Exception as error:  # a network fails in as many ways as a hub refuses
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{repository}: the Hub cannot be reached or refuses ({reason})") from error
    return str(address)
