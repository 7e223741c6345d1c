"""Ctrl-C, and the signals by which machines are taken away: the first saves and leaves, the second just leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO = 2.0  # seconds within which a launcher or a shell passes on what the terminal has sent already


class Stopped(KeyboardInterrupt):
    """Asked to stop by a signal; the message says what is kept.

    No `Exception`, so that no library takes it for a failure of its own and goes on.
    """


class Stop:
    """What signals have asked for, and whether the work at hand may be broken off for it.

    A step, a save and an export go on to their end, after which `heed` is called.
    Work that leaves nothing half done is put into `breakable`.
    """

    def __init__(self) -> None:
        self.asked = False
        self._breakable = False
        self._listening = False

    def heed(self) -> None:
        """Raises: Stopped, if a signal has asked for it."""
        if self.asked:
            raise Stopped

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Work that ends at once, wherever it is, when a signal comes."""
        before, self._breakable = self._breakable, True
        try:
            self.heed()
            yield
        finally:
            self._breakable = before
        self.heed()  # a library may have swallowed it

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, but that of a closed terminal where `nohup` has it ignored; only the main thread can."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:
            del before[signal.SIGHUP]
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writer, False)
        woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in before:
            signal.signal(number, self._ask)
        threading.Thread(target=_watch, args=(reader, set(before)), name="stopping", daemon=True).start()
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(woken)
            os.close(writer)

    def _ask(self, number: int, _: Any) -> None:
        if self.asked:
            return
        self.asked = True
        if self._breakable:
            self._breakable = False  # what follows is clearing up
            raise Stopped
        if os.environ.get("RANK", "0") == "0":  # not through Python's own stream, which may be at work right now
            os.write(2, b"\nstopping once the work at hand is whole and saved; a second signal ends it at once\n")


def _watch(reader: int, numbers: set[int]) -> None:
    """End the process at the second signal, though its main thread may wait where no Python runs: for another
    process, a GPU or a disk.
    """
    first, launched = None, "TORCHELASTIC_RUN_ID" in os.environ
    while found := os.read(reader, 1):
        now, number = time.monotonic(), found[0]
        echo = 0.0 if number == signal.SIGINT and not launched else ECHO
        if number in numbers:
            if first is not None and now - first >= echo:
                os._exit(128 + number)
            first = first or now
    os.close(reader)
