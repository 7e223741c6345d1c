"""Real processes to be killed, starved and interrupted: `finetune` as a user runs it, forked from one that has
imported everything already, and the faults that an operating system can bring about in them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
# Numbers of system calls, and the architecture as the kernel's filters know it.
CALLS = {
    "x86_64": (0xC000003E, {"rename": 82, "fsync": 74, "unlink": 263, "mkdir": 83, "fcntl": 72}),
    "aarch64": (0xC00000B7, {"rename": 38, "fsync": 82, "unlink": 35, "mkdir": 34, "fcntl": 25}),
}
LIBC = ctypes.CDLL(None, use_errno=True)
Fault = Callable[[], None]


class Victim:
    """`finetune ARGUMENTS` in a process of its own, with the environment of this one."""

    def __init__(
        self, *arguments: str, before: Fault | None = None, env: Mapping[str, str] | None = None, **faults: Any
    ):
        """`before` is called first of all, `faults` are those that `strike` takes."""
        folder = Path(tempfile.mkdtemp())
        self.files = {name: folder / f"{name}.txt" for name in ("stdout", "stderr")}
        env = {**os.environ, **(env or {})}
        self.process = CONTEXT.Process(target=_live, args=(self.files, arguments, env, before, faults))
        self.process.start()
        STARTED.append(self)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def await_(self, sign: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something can be seen of it."""
        end = time.monotonic() + seconds
        while not sign():
            assert self.process.is_alive(), self.complaint
            assert time.monotonic() < end, self.complaint
            time.sleep(0.01)

    def end(self, seconds: float = 60) -> int:
        """Its exit status, or minus the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still there after {seconds} s: {self.complaint}")
        return self.process.exitcode

    @property
    def printed(self) -> str:
        return self.files["stdout"].read_text()

    @property
    def complaint(self) -> str:
        return self.files["stderr"].read_text() if self.files["stderr"].exists() else ""

    @property
    def lines(self) -> list[str]:
        """What it complained of, without progress bars."""
        return [line for line in self.complaint.splitlines() if line.startswith(("error: ", "warning: ", "stopped"))]


STARTED: list[Victim] = []


def end_all() -> None:
    """Of those that a test has left behind."""
    while STARTED:
        STARTED.pop().process.kill()


def start_server() -> None:
    """Import once what takes seconds."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(HERE)
    CONTEXT.set_forkserver_preload(["finetune.run", "finetune.cli", "tiny", "peft", "bitsandbytes", "victims"])
    CONTEXT.Process(target=_nothing).start()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def _nothing() -> None:
    pass


def _live(
    files: Mapping[str, Path], arguments: Sequence[str], env: Mapping[str, str], before: Fault | None, faults: Any
) -> None:
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ |= env
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that nohup has started are not to hand that on
    tqdm.set_lock(threading.RLock())  # its own is known to other processes, which would hear of each that is killed
    if before is not None:
        before()
    strike(**faults)
    command(*arguments)


def command(*arguments: str) -> None:
    """`finetune ARGUMENTS` in this process."""
    from finetune import cli

    sys.argv = ["finetune", *arguments]
    cli.main()


def fork(act: Callable[[], Any]) -> int:
    """Do something in a child of this process; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def strike(
    steps: Mapping[int, Fault] | None = None,
    class_images: Fault | None = None,
    drawing: Mapping[int, Fault] | None = None,
    finish: Fault | None = None,
) -> None:
    """Have faults come before the given steps are at work, before class images are made, before the validation
    pictures after the given steps, before the export.
    """
    from finetune import assemble, run

    prepare, make_prior = run.prepare, assemble.make_prior

    def prepared(*args: Any, **kwargs: Any) -> run.Run:
        at_work = prepare(*args, **kwargs)
        update, draw, export = at_work.trainer._update, at_work.draw, at_work.finish

        def updating() -> Any:
            (steps or {}).get(at_work.trainer.step + 1, _nothing)()
            return update()

        def draws(*args: Any) -> None:
            (drawing or {}).get(at_work.trainer.step, _nothing)()
            draw(*args)

        def finishing() -> Any:
            (finish or _nothing)()
            return export()

        at_work.trainer._update, at_work.draw, at_work.finish = updating, draws, finishing
        return at_work

    def making(*args: Any) -> Any:
        (class_images or _nothing)()
        return make_prior(*args)

    run.prepare, assemble.make_prior = prepared, making


# Faults. The kernel itself brings them about, at exactly the system call that is named.


class Dies:
    """The process is gone at its next call of a name, as by kill -9, with no word of Python's."""

    def __init__(self, call: str):
        self.call = call

    def __call__(self) -> None:
        _filter(self.call, 0x80000000)


class HasNoLocks:
    """A network folder without a lock service: what asks for a lock is told so."""

    def __call__(self) -> None:
        _filter("fcntl", 0x00050000 | errno.ENOLCK, second=fcntl.F_SETLK)


class Signals:
    """The process gets a signal."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self) -> None:
        os.kill(os.getpid(), self.number)


class Removes:
    """Files are gone."""

    def __init__(self, *paths: Path):
        self.paths = paths

    def __call__(self) -> None:
        for path in self.paths:
            path.unlink()


class Sets:
    """Settings of a module."""

    def __init__(self, module: str, **values: Any):
        self.module, self.values = module, values

    def __call__(self) -> None:
        __import__(self.module)
        vars(sys.modules[self.module]).update(self.values)


def gives_back() -> None:
    """Have every tensor's memory go back to the system as soon as it is freed, as that of a GPU would."""
    threshold = -3
    assert LIBC.mallopt(threshold, 64 * 1024)


class Starves:
    """The process gets no more memory than it has, but for some."""

    def __init__(self, more: int):
        self.more = more

    def __call__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + self.more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Mounts:
    """A file system in memory of a few bytes, for this process and its children alone."""

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size

    def __call__(self) -> None:
        user, group = os.getuid(), os.getgid()
        _demand(LIBC.unshare(0x10000000 | 0x00020000))  # a user of its own, who may mount, and mounts of its own
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        self.path.mkdir(parents=True, exist_ok=True)
        _demand(LIBC.mount(b"none", os.fsencode(self.path), b"tmpfs", 0, f"size={self.size}".encode()))


class Fills:
    """A disk without room, but for some bytes."""

    def __init__(self, folder: Path, but: int = 0):
        self.folder, self.but = folder, but

    def __call__(self) -> None:
        with (self.folder / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                ballast.truncate(max(0, ballast.tell() - self.but))


class Both:
    """One fault and then another."""

    def __init__(self, *faults: Fault):
        self.faults = faults

    def __call__(self) -> None:
        for fault in self.faults:
            fault()


def _filter(call: str, answer: int, second: int | None = None) -> None:
    """A seccomp filter of this thread: `answer` for one system call, all others as before.

    Args:
        second: the call's second argument, where not all of its calls are meant.
    """
    architecture, numbers = CALLS[platform.machine()]
    allow, load, equal, give = 0x7FFF0000, 0x20, 0x15, 0x06
    narrower = [] if second is None else [(load, 0, 0, 24), (equal, 0, 1, second)]
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, 3 + len(narrower), architecture),
        (load, 0, 0, 0),  # the number of the call
        (equal, 0, 1 + len(narrower), numbers[call]),
        *narrower,
        (give, 0, 0, answer),
        (give, 0, 0, allow),
    ]

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(program))(*program)
    set_no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    given = ctypes.byref(Program(len(program), instructions))
    _demand(LIBC.prctl(set_no_new_privileges, 1, 0, 0, 0))
    _demand(LIBC.prctl(set_seccomp, by_filter, given))


def _demand(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def works(fault: str, then: str, status: int) -> bool:
    """Whether a fault can be brought about on this machine; some forbid filters or mounts."""
    script = f"import os, sys, victims\nfrom pathlib import Path\nvictims.{fault}()\n{then}"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", script, folder], cwd=HERE, capture_output=True)
    return done.returncode == status
