"""What is shared of a run, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import lessons
import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from finetune import run
from finetune.cli import app
from finetune.errors import UserError
from finetune.push import push

SD = "stable_diffusion"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a base, pictures, and a run of each kind of adapter."""
    folder = tmp_path_factory.mktemp("secret-home")
    tiny.stable_diffusion().save_pretrained(folder / "my-base")
    for method, way in {"lora": "plain", "pivotal_tuning": "plain"}.items():
        train = {"checkpoint_every": 2}
        run.train(lessons.recipe(folder / "my-base", folder / method, method, way, train=train))
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


SHOWN = "samples/step-000004/00-a-it-thing.png"


def test_a_folder_holds_exactly_what_others_need(home: Path, tmp_path: Path):
    pushed = push(home / "pivotal_tuning" / "run", str(tmp_path / "to-share"))
    adapters = ["learned_embeds.safetensors", "pytorch_lora_weights.safetensors"]
    assert pushed.files == files_of(tmp_path / "to-share") == ["README.md", *adapters, "recipe.yaml", SHOWN]
    assert (home / "pivotal_tuning" / "run" / "grid.png").exists() and pushed.where == str(tmp_path / "to-share")


def test_the_training_pictures_go_only_when_asked(home: Path, tmp_path: Path):
    pushed = push(home / "lora" / "run", str(tmp_path / "to-share"), with_training_pictures=True)
    assert "grid.png" in pushed.files and any("grid.png shows" in note for note in pushed.notes)
    assert "grid.png" in (tmp_path / "to-share" / "README.md").read_text()
    push(home / "lora" / "run", str(tmp_path / "without"))
    assert "grid.png" not in (tmp_path / "without" / "README.md").read_text()


@pytest.mark.parametrize("method", ["lora", "pivotal_tuning"])
def test_no_local_path_goes_out_and_the_output_says_so(method: str, home: Path, tmp_path: Path):
    pushed = push(home / method / "run", str(tmp_path / "to-share"))
    for name in pushed.files:
        assert str(home).encode() not in (tmp_path / "to-share" / name).read_bytes(), name
    recipe = yaml.safe_load((tmp_path / "to-share" / "recipe.yaml").read_text())
    assert recipe["base"]["source"] == "my-base" and recipe["output"]["folder"] == "run"
    assert any("'my-base'" in note for note in pushed.notes)


def test_the_tensors_stay_bit_for_bit_and_only_the_base_in_the_header_changes(home: Path, tmp_path: Path):
    push(home / "lora" / "run", str(tmp_path / "to-share"))
    name = "pytorch_lora_weights.safetensors"
    with (
        safe_open(home / "lora" / "run" / name, "pt") as before,
        safe_open(tmp_path / "to-share" / name, "pt") as after,
    ):
        assert before.keys() == after.keys()
        assert all(before.get_tensor(key).equal(after.get_tensor(key)) for key in before.keys())  # noqa: SIM118
        assert after.metadata() == {**before.metadata(), "base": "my-base"}


def test_the_card_shows_each_prompt_with_its_picture(home: Path, tmp_path: Path):
    push(home / "lora" / "run", str(tmp_path / "to-share"))
    for folder in (home / "lora" / "run", tmp_path / "to-share"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict()["widget"] == [{"text": "a <it> thing", "output": {"url": SHOWN}}]
        assert (folder / SHOWN).is_file() and "<Gallery />" in card.text


def test_a_base_of_the_hub_keeps_its_name(home: Path, tmp_path: Path):
    folder = tmp_path / "run"
    push(home / "lora" / "run", str(folder))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["base"]["source"] = "someone/a-model"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pushed = push(folder, str(tmp_path / "again"))
    assert pushed.notes == []
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["base"]["source"] == "someone/a-model"


def test_what_is_no_run_or_no_free_folder_is_named(home: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"my-base: no finished run, for it has no README\.md, recipe\.yaml"):
        push(home / "my-base", str(tmp_path / "x"))
    with pytest.raises(UserError, match="exists already"):
        push(home / "lora" / "run", str(home))
    assert not (tmp_path / "x").exists()


class Hub:
    """Stands in for the Hub: keeps what it was sent."""

    private = True
    sent: dict[str, Any]

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        type(self).sent = {"name": name, "private": private}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def repo_info(self, name: str) -> Any:
        return type("Info", (), {"private": self.private})

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.sent["files"] = files_of(folder_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "private", True)
    return Hub


def test_the_hub_gets_the_same_files_and_is_private_by_default(
    hub: type[Hub], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    local = push(home / "lora" / "run", str(tmp_path / "to-share"))
    app(["push", str(home / "lora" / "run"), "me/a-thing"], standalone_mode=False)
    assert hub.sent == {"name": "me/a-thing", "private": True, "files": local.files}
    printed = capsys.readouterr().out
    assert "pushed to https://huggingface.co/me/a-thing" in printed and str(home) not in printed


def test_a_repository_that_is_public_already_is_not_pushed_to_unasked(hub: type[Hub], home: Path):
    hub.private = False
    with pytest.raises(UserError, match=r"is public\. Add --public"):
        push(home / "lora" / "run", "me/a-thing")
    assert "files" not in hub.sent
    push(home / "lora" / "run", "me/a-thing", public=True)
    assert hub.sent["private"] is False and "files" in hub.sent


def test_no_login_and_no_network_are_one_line_each(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no login to the Hub") as refused:
        push(home / "lora" / "run", "me/a-thing")
    assert len(refused.value.problems) == 1
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_none")
    with pytest.raises(UserError, match="the Hub cannot be reached or refuses") as refused:  # tests are offline
        push(home / "lora" / "run", "me/a-thing")
    assert "\n" not in str(refused.value)
