"""YAML to typed config: nothing is guessed, nothing is dropped, every problem is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from finetune.config import LocalPath, PositiveFloat, PositiveInt, Section, Strings, build, override, read_tree
from finetune.errors import UserError


class Oven(Section):
    heat: PositiveFloat = 1.0
    mode: Literal["fan", "grill"] = "fan"


class Cake(Section):
    name: str
    eggs: PositiveInt = 2
    layers: Strings = ()
    spices: dict[str, PositiveInt] = {}
    tin: LocalPath | None = None
    oven: Oven = Oven()


def read(tmp_path: Path, text: str, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "cake.yaml"
    file.write_text(text, encoding="utf-8")
    return override(read_tree(file), overrides)


def bake(tmp_path: Path, text: str, *overrides: str) -> Cake:
    return build(Cake, read(tmp_path, text, *overrides))


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        bake(tmp_path, text, *overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("naem: a\nname: a", "naem: unknown key. Did you mean 'name'?"),
        ("name: a\noven: {haet: 3}", "oven.haet: unknown key. Did you mean 'heat'?"),
        ("name: a\noven: {zzz: 3}", "oven.zzz: unknown key. Known: heat, mode."),
        ("eggs: 1", "name: missing"),
        ("name: a\neggs: true", "eggs: "),
        ('name: a\neggs: "5"', "eggs: "),
        ("name: a\neggs: 1.5", "eggs: "),
        ("name: a\neggs: 1e1", "eggs: "),
        ("name: a\neggs: 0", "eggs: "),
        ("name: 3", "name: "),
        ("name: yes", "name: "),
        ("name: a\noven: {heat: true}", "oven.heat: "),
        ("name: a\noven: {heat: .inf}", "oven.heat: "),
        ("name: a\noven: {heat: .nan}", "oven.heat: "),
        ("name: a\noven: {mode: gril}", "oven.mode: "),
        ("name: a\noven: 3", "oven: "),
        ("name: a\nspices: {salt: much}", "spices.salt: "),
        ("name: a\nlayers: [1]", "layers.0: "),
    ],
)
def test_a_mistake_is_named_by_its_place(tmp_path: Path, text: str, message: str):
    assert message in complaint(tmp_path, text)


def test_every_problem_stands_in_one_message(tmp_path: Path):
    text = "naem: a\neggs: true\noven: {haet: 3, mode: gril}\nspices: {salt: much}\nlayers: 3"
    problems = complaint(tmp_path, text).splitlines()
    assert {problem.split(":")[0] for problem in problems} == {
        *("name", "naem", "eggs", "oven.haet", "oven.mode", "spices.salt", "layers")
    }


@pytest.mark.parametrize("value", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "1e-04", "0.0001", ".0001"])
def test_a_number_is_a_number_however_it_is_written(tmp_path: Path, value: str):
    assert bake(tmp_path, f"name: a\noven: {{heat: {value}}}").oven.heat == 1e-4
    assert bake(tmp_path, "name: a", f"oven.heat={value}").oven.heat == 1e-4


@pytest.mark.parametrize("value", ["'1e-4'", '"1e-4"', "1e", "3 eggs", "-x", "1-2"])
def test_what_is_quoted_or_no_number_stays_text(tmp_path: Path, value: str):
    assert bake(tmp_path, f"name: {value}").name == value.strip("'\"")


@pytest.mark.parametrize("text", ["name: a\neggs: 1\nname: b", "name: a\noven: {heat: 1, heat: 2}"])
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path, text: str):
    message = complaint(tmp_path, text)
    assert "cake.yaml" in message and "line" in message and "twice" in message


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "3"])
def test_a_file_that_is_no_section_is_refused(tmp_path: Path, text: str):
    assert "sections" in complaint(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    ["name: [", "\tname: a", "name: 'a", "name: !!python/name:os.system", "name: 2026-13-45", "eggs: !!int many"],
)
def test_broken_yaml_is_the_users_to_mend(tmp_path: Path, text: str):
    assert "not valid YAML" in complaint(tmp_path, text)


def test_anchors_and_merges_work_as_in_any_yaml(tmp_path: Path):
    tree = read(tmp_path, "hot: &hot {heat: 250, mode: fan}\noven:\n  <<: *hot\n  mode: grill\n")
    assert tree["oven"] == {"heat": 250, "mode": "grill"}


@pytest.mark.parametrize("content", [b"\xff\xfename", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    file = tmp_path / "cake.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"cake\.yaml: cannot be read"):
        read_tree(file)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=b", "name", "b"),
        ("name=b=c", "name", "b=c"),
        ("oven.heat=3", "oven", {"heat": 3, "mode": "fan"}),
        ("spices.salt=2", "spices", {"salt": 2}),
        ("layers=[a, b]", "layers", ["a", "b"]),
        ("layers=['a {} dog']", "layers", ["a {} dog"]),
        ("tin=", "tin", None),
        ("tin=null", "tin", None),
        ("name=#ff0000", "name", "#ff0000"),
        ("name=a #1", "name", "a #1"),
        ("empty.key=1", "empty", {"key": 1}),
    ],
)
def test_an_override_replaces_a_setting(tmp_path: Path, override: str, key: str, value: Any):
    assert read(tmp_path, "name: a\noven: {heat: 1, mode: fan}\nempty:\n", override)[key] == value


@pytest.mark.parametrize("override", ["nope", "=3", ".eggs=3", "oven.=3", "oven..heat=3", "name.first=3", "eggs=["])
def test_an_override_that_cannot_be_applied_is_quoted(tmp_path: Path, override: str):
    assert f"override {override!r}" in complaint(tmp_path, "name: a", override)


def test_all_bad_overrides_are_told_at_once(tmp_path: Path):
    message = complaint(tmp_path, "name: a", "eggs=[", "nope", "name.first=3")
    assert all(repr(override) in message for override in ("eggs=[", "nope", "name.first=3"))


def test_a_section_cannot_be_changed_once_it_is_read(tmp_path: Path):
    cake = bake(tmp_path, "name: a")
    with pytest.raises(ValueError, match="frozen"):
        cake.eggs = 3


@pytest.mark.parametrize("text", ["name: a\nlayers: 3", "name: a\noven:", "name: a\noven: 3"])
def test_a_complaint_speaks_of_yaml_and_not_of_python(tmp_path: Path, text: str):
    message = complaint(tmp_path, text)
    assert not any(word in message for word in ("tuple", "dictionary", "instance of", "NoneType", "got None"))
