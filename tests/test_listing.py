"""README's tables say what the registries say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import drawing
import pytest

from finetune.errors import UserError
from finetune.families import families
from finetune.listing import TABLES, rewrite
from finetune.tasks import choose, tasks

README = Path(__file__).parent.parent / "README.md"


def test_the_tables_of_the_readme_are_those_of_the_registries():
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == len(TABLES)
    assert rewrite(text) == text, "run `python -m finetune.listing README.md`"


def test_a_table_names_every_family_and_what_it_can_be_taught():
    rows = {row.split(" | ")[0].strip("| `"): row for row in TABLES["families"]().splitlines()[2:]}
    assert list(rows) == families.names()
    assert rows["flux"] == "| `flux` | FLUX.1 | `FluxPipeline` | CLIP, T5 | CLIP |"
    assert rows["stable_diffusion_xl"].endswith("| CLIP-L, CLIP-G | CLIP-L, CLIP-G |")


def test_a_table_says_which_pipeline_does_a_task_as_tasks_themselves_find_it(made: Any):
    head, _, *rows = (row.strip("| \n").split(" | ") for row in TABLES["tasks"]().splitlines())
    assert [name.strip("`") for name in head[1:]] == tasks.names()
    assert [row[0].strip("`") for row in rows] == families.names()
    for family, *cells in rows:
        pipeline, control, editor = made(family.strip("`"))
        for name, cell in zip(tasks.names(), cells, strict=True):
            task = choose(name, drawing.inputs_for(name, control, editor), steps=2)
            if cell == "-":
                with pytest.raises(UserError, match="diffusers has no"):
                    task.switch(pipeline)
            else:
                assert cell == f"`{type(task.switch(pipeline)).__name__}`"


def test_only_what_lies_between_the_marks_is_written(tmp_path: Path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- table: methods -->\nold\n<!-- end -->\nafter\n")
    subprocess.run([sys.executable, "-m", "finetune.listing", str(file)], check=True)
    assert file.read_text() == f"before\n<!-- table: methods -->\n{TABLES['methods']()}<!-- end -->\nafter\n"
    assert "old" not in file.read_text() and "`lora`" in file.read_text()


def test_a_mark_with_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="Did you mean 'methods'"):
        rewrite("<!-- table: method -->\n<!-- end -->\n")
