"""The file: one page that holds everything it shows, and asks nothing of any network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune import __version__
from finetune.errors import UserError, reason, warn
from finetune.files import whole
from finetune.folder import REPORT_FILE
from finetune.report.markup import Markup, element
from finetune.report.page import one
from finetune.report.read import Run, read
from finetune.report.several import several

# Even if something slipped in, a browser would not load it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folders: Sequence[Path], file: Path | None = None) -> Path:
    """Read runs, and write what there is to see; an earlier report is replaced.

    Args:
        file: default: `report.html`, of one run in its folder, of several in the working directory.

    Raises:
        UserError: there are no runs, or some folders are none, or the file cannot be a report.
    """
    if not folders:
        raise UserError("RUNS: name at least one run's folder.")
    runs = read(folders)
    target = file or (folders[0] / REPORT_FILE if len(folders) == 1 else Path(REPORT_FILE))
    if target.is_dir():
        raise UserError(f"--output: {target} is a folder. Name a file, such as {target / REPORT_FILE}.")
    text = page(runs)
    with whole(target, overwrite=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return target


def show(folder: Path) -> Path | None:
    """Write a run's report beside it; without one it is no worse."""
    try:
        return write_report([folder])
    except (UserError, OSError) as error:
        warn(f"{folder}: its report cannot be written ({reason(error)})")
        return None


def page(runs: Sequence[Run]) -> str:
    """The whole page of one run, or of several."""
    title = (
        f"{runs[0].settings.get('name', runs[0].name)}: a report" if len(runs) == 1 else f"{len(runs)} runs compared"
    )
    head = (
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))),
    )
    body = (
        element("header", element("h1", title)),
        element("main", one(runs[0]) if len(runs) == 1 else several(runs)),
        element("footer", f"Written by finetune {__version__}."),
    )
    return "<!doctype html>\n" + element("html", element("head", *head), element("body", *body), lang="en") + "\n"
