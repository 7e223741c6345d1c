"""A study carried out: each run once, by several processes if asked, and its rows kept as they come."""

from __future__ import annotations

import csv
import fcntl
import io
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from finetune.errors import UserError, did_you_mean, reason, warn
from finetune.files import whole
from finetune.stopping import Stopped
from finetune.study import table
from finetune.study.plan import Study, Task, read, tasks
from finetune.study.work import Row, begin, carry_out


def run_study(path: Path, *, only: Sequence[str] = (), jobs: int = 1) -> Path:
    """Carry out what is missing of a study, and write its tables.

    Rows are kept in `NAME.csv` beside the study, `NAME.md` has the tables. A run whose row is there and whose settings
    have not changed since is not repeated, and one that stands in several comparisons is done once.

    Args:
        only: names of comparisons; none is all.
        jobs: processes, each with a run at a time.

    Returns:
        The tables' file.

    Raises:
        UserError: a recipe is wrong, which is said before the first run; or a process was killed.
        Stopped: by an interrupt, with the rows that are done written.
    """
    study = read(path)
    if unknown := [name for name in only if name not in study.comparisons]:
        raise UserError(
            f"--only {name}: no such comparison. {did_you_mean(name, study.comparisons)}" for name in unknown
        )
    every = tasks(study, path)
    page = path.with_suffix(".md")
    if page.exists() and not page.read_text(encoding="utf-8", errors="replace").startswith(table.title(path.name)):
        raise UserError(f"{page}: holds something else, where this study's tables go. Rename one of them.")
    rows_file = path.with_suffix(".csv")
    with _alone(path):
        known = {row.digest: row for row in read_rows(rows_file)}
        wanted = [task for task in every if not only or task.comparison in only]
        missing = {task.digest: task for task in wanted if task.digest not in known or not known[task.digest].is_final}
        try:
            for row in _carried_out(list(missing.values()), jobs):
                known[row.digest] = Row.from_text(row.as_text())  # as a later look finds it
                if row.error:
                    warn(f"{row.comparison}, {row.variant}, {row.concept}: {row.error}")
                _write_rows(_kept(every, known), rows_file)
        except KeyboardInterrupt:
            raise Stopped("stopped; what is done is kept, and the same command goes on from there") from None
        finally:
            _write_rows(_kept(every, known), rows_file)
            tables = _write_tables(study, of_tasks(every, known.values()), path)
        return tables


def of_tasks(every: Sequence[Task], rows: Iterable[Row]) -> list[Row]:
    """The rows of the study as it stands, under its names."""
    known = {row.digest: row for row in rows}
    return [known[task.digest].of(task) for task in every if task.digest in known]


def _kept(every: Sequence[Task], known: Mapping[str, Row]) -> list[Row]:
    """Those, and then what the study no longer asks for: it may do so again."""
    asked = {task.digest for task in every}
    return of_tasks(every, known.values()) + [row for digest, row in known.items() if digest not in asked]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two at once would write over each other's rows."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: is being carried out already. Wait for it, or stop it.") from None
        yield


def read_rows(path: Path) -> list[Row]:
    """None where there is no file yet."""
    if not path.exists():
        return []
    try:
        return [Row.from_text(line) for line in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no table of a study's runs ({reason(error)}). Move it away.") from None


def _carried_out(missing: Sequence[Task], jobs: int) -> Iterable[Row]:
    """Rows in the order in which they are done."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")  # a forked process has no GPU
    pool = ProcessPoolExecutor(min(jobs, max(1, len(missing))), context, begin, (threads,))
    waiting = iter(missing)  # no more are handed over than are at work, or a study that is stopped would do them first
    try:
        running: set[Future[Row]] = {pool.submit(carry_out, task) for task in islice(waiting, jobs)}
        with tqdm(total=len(missing), desc="runs") as bar:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                bar.update(len(done))
                yield from (future.result() for future in sorted(done, key=lambda each: each.exception() is not None))
                running |= {pool.submit(carry_out, task) for task in islice(waiting, len(done))}
    except BrokenProcessPool:
        raise UserError("a run's process was killed, as by a computer short of memory. Try fewer --jobs.") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _write_rows(rows: Sequence[Row], path: Path) -> None:
    with whole(path, overwrite=True) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_text() for row in rows)


def _write_tables(study: Study, rows: Sequence[Row], path: Path) -> Path:
    target = path.with_suffix(".md")
    with whole(target, overwrite=True) as unfinished:
        unfinished.write_text(table.page(path.name, study, rows), encoding="utf-8")
    return target
