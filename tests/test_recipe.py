"""A recipe is checked as a whole before anything heavy loads, and what is saved of it reproduces the run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import UserError
from finetune.methods import methods
from finetune.recipe import RECIPES, Recipe, load

SETTINGS: dict[str, dict[str, Any]] = {
    "dreambooth": {"class_prompt": "a dog"},
    "pivotal_tuning": {"init": "dog"},
    "textual_inversion": {"init": "dog"},
}


def tree(method: str = "lora", **sections: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "base": {"source": "someone/a-model"},
        "method": {"name": method, **SETTINGS.get(method, {})},
        "dataset": {"folder": "pictures"},
        "train": {"steps": 10},
        "output": {"folder": "out"},
        **sections,
    }


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(tree, overrides) -> the recipe, read from a file in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def read(content: dict[str, Any], *overrides: str) -> Recipe[Any]:
        Path("test.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        return load("test.yaml", overrides)

    return read


def complaint(recipe: Any, content: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        recipe(content, *overrides)
    return str(error.value)


@pytest.fixture
def reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Resolved YAML -> the recipe it gives in another folder."""

    def read(resolved: str) -> Recipe[Any]:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(resolved, encoding="utf-8")
        monkeypatch.chdir(folder)
        return load("recipe.yaml")

    return read


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_of_the_house_means_the_same_from_any_folder(path: Path, reload: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(RECIPES.parent)
    found = load(path.stem)
    dump, digest = found.dump(), found.digest()
    again = reload(found.to_yaml())
    assert (again.dump(), again.digest()) == (dump, digest)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_of_the_house_opens_with_commands_that_can_be_run(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    commands = [line.partition("finetune train ")[2] for line in lines if line.startswith("#")]
    trained = [shlex.split(command) for command in commands if command]
    assert trained and all(name == path.stem for name, *_ in trained)
    for name, *overrides in trained:
        load(name, overrides)


@pytest.mark.parametrize("name", methods.names())
def test_the_smallest_recipe_of_every_method_reloads_from_its_own_dump(name: str, recipe: Any, reload: Any):
    resolved = recipe(tree(name)).to_yaml()
    again = reload(resolved)
    assert again.method.name == name
    assert again.to_yaml() == resolved


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.name=dreambooth", "method.denoiser=whole", "method.prior=none"],
        ["name='1e5'", "placeholder='12'"],
        ["base.revision='12e4567'"],
        ["base.revision='0123'"],
        ["placeholder='no'", "dataset.captions=['a {}: new', '1e-4', 'schön {}']"],
        ["train.learning_rate=1e-5", "train.ema=0.99", "train.min_snr_gamma=5"],
        ["train.optimizer=torch.optim.SGD", "train.optimizer_options={momentum: 0.9, nesterov: true}"],
        ["method.rank_pattern={to_k: 4}", "method.alpha_pattern={to_k: 1e-1}", "tracking=[wandb, trackio]"],
        ["validation.prompts=['a {} dog']", "validation.every=3"],
    ],
    ids=" ".join,
)
def test_the_resolved_recipe_reproduces_every_setting(overrides: list[str], recipe: Any, reload: Any):
    found = recipe(tree(), *overrides)
    dump = found.dump()
    assert reload(found.to_yaml()).dump() == dump


def test_local_paths_are_resolved_and_names_of_the_hub_are_not(recipe: Any, tmp_path: Path):
    (tmp_path / "base").mkdir()
    assert recipe(tree(base={"source": "base"})).dump()["base"]["source"] == str(tmp_path / "base")
    assert recipe(tree()).dump()["base"]["source"] == "someone/a-model"


def test_an_embedding_to_start_from_is_found_from_any_folder(recipe: Any, tmp_path: Path):
    (tmp_path / "start.safetensors").touch()
    found = recipe(tree("textual_inversion"), "method.init=start.safetensors")
    assert found.dump()["method"]["init"] == str(tmp_path / "start.safetensors")
    assert recipe(tree("textual_inversion")).dump()["method"]["init"] == "dog"


def test_the_home_folder_may_be_written_as_a_tilde(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    found = recipe(tree(base={"source": "~/base"}, dataset={"folder": "~/pictures"}, output={"folder": "~/out"}))
    assert Path(found.base.source) == tmp_path / "base"
    assert found.dataset.folder == tmp_path / "pictures"
    assert found.output.folder == tmp_path / "out"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["trian.steps=3"], ["trian: unknown key. Did you mean 'train'?"]),
        (["train.setps=3"], ["train.setps: unknown key. Did you mean 'steps'?"]),
        (["method.rnak=3"], ["method.rnak: unknown key. Did you mean 'rank'?"]),
        (["train.steps=true"], ["train.steps"]),
        (["train.steps='5'"], ["train.steps"]),
        (["method.rank=1.5"], ["method.rank"]),
        (["method.rank=0"], ["method.rank"]),
        (["train.learning_rate=-1e-4"], ["train.learning_rate"]),
        (["train.schedule=cosin"], ["train.schedule", "'cosine'"]),
        (["tracking=[wnadb]"], ["tracking", "'wandb'"]),
        (["method.name=lroa"], ["method.name", "Did you mean 'lora'?"]),
        (["method.name=5"], ["method.name", "5"]),
        (["method=lora"], ["method", "'lora'"]),
        (["base.family=stable_difusion"], ["base.family: unknown", "Did you mean 'stable_diffusion'?"]),
        (["base.source=./nowhere"], ["base.source: ./nowhere is not a folder"]),
        (["train.optimizer=adamw_8bits"], ["train.optimizer: unknown", "Did you mean 'adamw_8bit'?"]),
        (["dataset.background=white"], ["dataset.background"]),
        (["placeholder=two words"], ["placeholder"]),
        (["name=a/b"], ["name"]),
        (["validation.guidance=0.5"], ["validation.guidance"]),
        (["validation.every=0"], ["validation.every"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_named_with_what_was_meant(overrides: list[str], messages: list[str], recipe: Any):
    found = complaint(recipe, tree(), *overrides)
    assert found.startswith("test.yaml:")
    assert all(message in found for message in messages), found


@pytest.mark.parametrize(
    ("method", "overrides", "messages"),
    [
        ("lora", ["train.warmup=10"], ["train", "warmup"]),
        ("lora", ["train.batch_size=4", "train.accumulate=3"], ["train", "accumulate"]),
        ("lora", ["train.warmup=10", "train.accumulate=2"], ["warmup", "accumulate"]),
        ("lora", ["method.text_encoder_learning_rate=1e-5"], ["text_encoder"]),
        ("dreambooth", ["method.class_prompt=null"], ["class_prompt", "prior: none"]),
        ("dreambooth", ["method.class_prompt=''"], ["class_prompt"]),
        ("dreambooth", ["method.class_prompt=null", "method.prior=prediction"], ["class_prompt"]),
        ("dreambooth", ["method.class_prompt=a {} dog"], ["class_prompt"]),
        ("dreambooth", ["method.class_prompt=a sks dog"], ["class_prompt"]),
        ("dreambooth", ["method.export_energy=0.9"], ["export_energy", "denoiser: whole"]),
        ("dreambooth", ["method.export_checkpoint=true"], ["export_checkpoint", "denoiser: whole"]),
        *(
            ("dreambooth", ["method.denoiser=whole", f"method.{setting}"], [setting.split("=")[0], "denoiser: lora"])
            for setting in (
                "alpha=3",
                "targets=to_k",
                "rank_pattern={a: 3}",
                "alpha_pattern={a: 3}",
                "dropout=0.1",
                "export_weight=0.8",
            )
        ),
        ("lora", ["method.variant=dora", "method.export_weight=0.8"], ["export_weight", "dora"]),
        ("lora", ["method.export_weight=0"], ["export_weight"]),
        ("lora", ["method.export_weight=1.2"], ["export_weight"]),
        ("textual_inversion", ["dataset.captions=['a dog', 'a {}']"], ["dataset.captions", "'a dog'"]),
        ("pivotal_tuning", ["dataset.captions=['a dog']"], ["dataset.captions", "'a dog'"]),
        ("lora", ["dataset.resolution=250"], ["dataset.resolution", "8"]),
        ("lora", ["dataset.captions=['']"], ["dataset.captions"]),
        ("pivotal_tuning", ["train.optimizer=prodigy"], ["prodigy"]),
        ("lora", ["train.optimizer=.SGD"], ["train.optimizer"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_settings_that_cannot_go_together_are_refused(
    method: str, overrides: list[str], messages: list[str], recipe: Any
):
    found = complaint(recipe, tree(method), *overrides)
    assert all(message in found for message in messages), found


def test_problems_of_independent_sections_are_told_together(recipe: Any):
    overrides = [
        *("trian=3", "base.family=sd", "method.rnak=3", "dataset.backgruond=white", "train.warmup=99"),
        *("validation.every=0", "output.dtype=float8", "tracking=[wnadb]", "name=a/b"),
    ]
    found = complaint(recipe, tree(), *overrides)
    places = ("trian", "family", "method.rnak", "dataset.backgruond", "warmup", "validation.every", "output.dtype")
    assert all(place in found for place in (*places, "tracking.0", "name"))


def test_problems_of_settings_of_one_section_are_told_together(recipe: Any):
    found = complaint(recipe, tree(), *("train.capture=maybe", "train.optimizer=adamm", "train.seed=-1"))
    assert all(f"train.{name}: " in found for name in ("capture", "optimizer", "seed"))
    found = complaint(recipe, tree(), *("base.source=./nowhere", "base.family=sd", "base.quantize=nf5"))
    assert all(f"base.{name}: " in found for name in ("source", "family", "quantize"))


def test_a_folder_of_pictures_that_is_not_there_is_told_with_the_other_problems(recipe: Any, tmp_path: Path):
    assert "dataset.folder: pictures is not a folder" in complaint(recipe, tree(), "trian=3")
    (tmp_path / "pictures").mkdir()
    assert "dataset.folder" not in complaint(recipe, tree(), "trian=3")
    assert complaint(recipe, tree(), "dataset.folder=~nobody-is-called-so/x", "trian=3").count("dataset.folder") == 1


@pytest.mark.parametrize("overrides", [["method.name=lroa"], ["method=lora"], ["method.name=null"]])
def test_an_unknown_method_does_not_hide_the_other_problems(overrides: list[str], recipe: Any):
    found = complaint(recipe, tree(), *overrides, "train.setps=3", "dataset.backgruond=white")
    assert "method" in found and "train.setps" in found and "dataset.backgruond" in found


def test_an_empty_recipe_lists_every_section_it_needs(recipe: Any):
    found = complaint(recipe, {})
    assert all(f"{section}" in found for section in ("name", "base", "method", "dataset", "train", "output"))


@pytest.mark.parametrize(
    ("setting", "value"), [("train.precision=no", "no"), ("dataset.background=#0000ff", "#0000ff")]
)
def test_what_the_documentation_names_can_be_written_as_it_stands(setting: str, value: str, recipe: Any):
    section, key = setting.partition("=")[0].split(".")
    assert recipe(tree(), setting).dump()[section][key] == value


def test_one_target_and_one_caption_need_no_brackets(recipe: Any):
    found = recipe(tree(), "method.targets=to_k", "dataset.captions=a {} dog")
    assert (found.method.targets, found.dataset.captions) == (("to_k",), ("a {} dog",))


def test_a_word_to_start_from_stays_a_word_beside_a_folder_of_that_name(recipe: Any, tmp_path: Path):
    (tmp_path / "dog").mkdir()
    assert recipe(tree("textual_inversion")).dump()["method"]["init"] == "dog"


@pytest.mark.parametrize(
    ("text", "names_it"), [("a sks, seen from above", True), ("(sks)", True), ("a {}.", True), ("two masks", False)]
)
def test_the_placeholder_is_a_word_of_its_own_whatever_stands_beside_it(text: str, names_it: bool, recipe: Any):
    caption, prompt = (f"{key}={text!r}" for key in ("dataset.captions", "method.class_prompt"))
    if names_it:
        recipe(tree("textual_inversion"), caption)
        assert "class_prompt" in complaint(recipe, tree("dreambooth"), prompt)
    else:
        recipe(tree("dreambooth"), prompt)
        assert "captions" in complaint(recipe, tree("textual_inversion"), caption)


@pytest.mark.parametrize(("name", "meant"), [("demoo", "'demo'"), ("nowhere.yaml", "Known: .*demo"), ("recipes", "")])
def test_a_recipe_that_does_not_exist_is_refused_with_what_was_meant(name: str, meant: str):
    with pytest.raises(UserError, match=f"recipe '{name}'.*{meant}"):
        load(name)


def test_fill_puts_the_placeholder_in(recipe: Any):
    assert recipe(tree(), "placeholder=<dog>").fill("a {} and {}") == "a <dog> and <dog>"
