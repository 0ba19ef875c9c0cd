"""Proves that a piece of a test left nothing: no task, no process, no file descriptor, no thread.

Processes are found below this one, and by a mark in their environment wherever they are: a daemon that has lost its
parents is still named. What is left is waited for, bounded, and then told one by one in the error.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio
import trio.testing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

MARK: Final = "TENANTRY_TEST_MARK"
_PROC: Final = Path("/proc")
# Between two looks: at first this long, then longer and longer.
_LOOK_AGAIN_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.2
_REAL_PAUSE_S: Final = 0.002

# In the context of a task, and so of every task that is started from it, wherever its nursery is.
_within: ContextVar[tuple[Check, ...]] = ContextVar("tenantry_leftovers", default=())


class LeftOver(AssertionError):
    """Something outlived the block; the message names each piece."""


@attrs.define(eq=False)
class Check:
    """What was there when it was made; `left` is what has come since. `env` marks processes: put it into theirs."""

    mark: str = attrs.field(factory=lambda: secrets.token_hex(8))
    _processes: frozenset[tuple[int, str]] = attrs.field(init=False)
    _descriptors: dict[int, str] = attrs.field(init=False)
    _threads: frozenset[threading.Thread] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._processes = frozenset((pid, _born(pid)) for pid in descendants())
        self._descriptors = _open_descriptors()
        self._threads = frozenset(threading.enumerate())

    @property
    def env(self) -> dict[str, str]:
        """For the environment of a process, and so of all its descendants."""
        return {MARK: self.mark}

    def left(self) -> list[str]:
        """One sentence for each process, descriptor and thread that was not there before."""
        new = {pid for pid in descendants() if (pid, _born(pid)) not in self._processes}
        new |= set(marked(self.mark))
        found = [text for pid in sorted(new) if (text := _describe_process(pid))]
        found += [
            f"descriptor {number} -> {target}"
            for number, target in sorted(_open_descriptors().items())
            if self._descriptors.get(number) != target
        ]
        # Trio keeps idle workers for 10 s, under this name; one at work has the name of its work.
        found += [
            f"thread {thread.name!r}{' (daemon)' if thread.daemon else ''}"
            for thread in threading.enumerate()
            if thread not in self._threads and not thread.name.startswith("Trio thread ")
        ]
        return found

    def left_tasks(self) -> list[str]:
        """One sentence for each task that was started within this check and still runs, but for those that ask."""
        asking: set[trio.lowlevel.Task] = set()
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        while task is not None:
            asking.add(task)
            task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
        return [
            f"task {task.name!r} below {_path_of(task)}"
            for task in _all_tasks()
            if task not in asking and self in task.context.get(_within, ())
        ]

    @contextlib.contextmanager
    def watching_tasks(self) -> Iterator[None]:
        """Tasks started in this block, by this task or by those, are `left_tasks` until they end."""
        token = _within.set((*_within.get(), self))
        try:
            yield
        finally:
            _within.reset(token)


@contextlib.asynccontextmanager
async def nothing_left(*, within_s: float = 2.0) -> AsyncIterator[Check]:
    """Raises LeftOver if anything that began in this block is still there `within_s` after its end.

    Tasks count if they were started by this task or its offspring, be their nursery inside or outside. Under a mock
    clock that does not move by itself nothing is waited for. If the block raises, nothing is checked.
    """
    check = Check()
    with check.watching_tasks():
        yield check
    await wait_nothing_left(check, within_s=within_s)


async def wait_nothing_left(check: Check, *, within_s: float = 2.0) -> None:
    """Returns once nothing is left of what `check` watches; raises LeftOver after `within_s` by Trio's clock."""
    deadline = trio.current_time() + within_s
    pauses = _pauses()
    while left := [*check.left_tasks(), *check.left()]:
        if trio.current_time() >= deadline or _clock_stands_still():
            raise LeftOver(_message(left))
        await trio.sleep_until(min(deadline, trio.current_time() + next(pauses)))
        # Processes end in real time, also where Trio's jumps.
        time.sleep(_REAL_PAUSE_S)  # noqa: ASYNC251


@contextlib.contextmanager
def nothing_left_behind(*, within_s: float = 2.0) -> Iterator[Check]:
    """`nothing_left` outside of Trio, such as around a whole `trio.run`: processes, descriptors and threads."""
    check = Check()
    yield check
    deadline = time.monotonic() + within_s
    pauses = _pauses()
    while left := check.left():
        if time.monotonic() >= deadline:
            raise LeftOver(_message(left))
        time.sleep(next(pauses))


def _pauses() -> Iterator[float]:
    pause_s = _LOOK_AGAIN_S
    while True:
        yield pause_s
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


def descendants(pid: int | None = None) -> list[int]:
    """The processes below `pid` (this one by default), zombies included, parents first."""
    children: dict[int, list[int]] = {}
    for found, fields in _stats():
        children.setdefault(int(fields[1]), []).append(found)
    below = [os.getpid() if pid is None else pid]
    for known in below:
        below += children.get(known, [])
    return below[1:]


def marked(mark: str) -> list[int]:
    """The processes that carry `mark` in their environment, wherever they are. This one is not among them."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid in _pids():
        try:
            environment = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:
            continue  # it has ended, or is another user's
        if wanted in environment.split(b"\0") and pid != os.getpid():
            found.append(pid)
    return found


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir(_PROC) if entry.isdecimal())


def _stat(pid: int) -> list[str]:
    """State, parent and so on: what follows the name, which may hold spaces and parentheses (proc_pid_stat(5))."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _stats() -> Iterator[tuple[int, list[str]]]:
    return ((pid, fields) for pid in _pids() if (fields := _stat(pid)))


def _born(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _describe_process(pid: int) -> str:
    fields = _stat(pid)
    if not fields:
        return ""
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = ""
    return f"process {pid} ({command or 'no command line'}), state {fields[0]}, child of {fields[1]}"


def _open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        # The listing's own descriptor is gone by now.
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _all_tasks() -> Iterator[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    waiting = [root] if root is not None else []
    while waiting:
        task = waiting.pop()
        yield task
        for nursery in task.child_nurseries:
            waiting += nursery.child_tasks


def _path_of(task: trio.lowlevel.Task) -> str:
    names = []
    nursery = task.parent_nursery
    while nursery is not None:
        names.append(nursery.parent_task.name)
        nursery = nursery.parent_task.parent_nursery
    return " < ".join(names)


def _clock_stands_still() -> bool:
    clock = trio.lowlevel.current_clock()
    return isinstance(clock, trio.testing.MockClock) and clock.rate == 0 and clock.autojump_threshold > 1e6


def _message(left: Iterable[str]) -> str:
    return "left over:\n" + "\n".join(f"  {piece}" for piece in left)
