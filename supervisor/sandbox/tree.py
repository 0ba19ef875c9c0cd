"""A tree of processes as /proc shows it: who is in it, what it has used, and how to end it.

Nothing is remembered between calls, and no signal ever reaches a process outside the tree: a pid is held by a
pidfd and its parent looked up before it is signalled.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
# A fork bomb that is frozen in fewer passes than this is the rule; what escapes is met again in the next round.
_FREEZE_PASSES: Final = 16


def children(pid: int) -> list[int]:
    """The children of a process, zombies included; empty if it is gone. Exact only while none forks or ends."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                found += map(int, file.read().split())
        except OSError:
            continue
    return found


def descendants(root: int, spare: Collection[int] = ()) -> list[int]:
    """Everything below `root`, parents before their children, without `spare` and what is below those."""
    children_of = children if _has_children_files() else _scan()
    tree = [root]
    seen = {root, *spare}
    for parent in tree:
        for pid in children_of(parent):
            if pid not in seen:
                seen.add(pid)
                tree.append(pid)
    return tree[1:]


def end(spare: Collection[int] = (), *, freeze: bool) -> int:
    """Sends SIGKILL to everything below this process but `spare`; returns to how many.

    Once is enough for processes that do not fork meanwhile; the caller reaps, and calls again until it has
    no children. With `freeze` all are stopped before the first is killed.

    Why freeze: a bomb at its limit of processes fills every place that a killed one leaves, faster than one
    process can kill; a stopped one keeps its place, so the number of those that run only falls.
    """
    root = os.getpid()
    if freeze:
        stopped: set[int] = set()
        for _ in range(_FREEZE_PASSES):
            found = descendants(root, spare)
            fresh = [pid for pid in found if pid not in stopped]
            if not fresh:
                break
            _send(signal.SIGSTOP, fresh, {root, *found})
            stopped.update(fresh)
    found = descendants(root, spare)
    _send(signal.SIGKILL, found, {root, *found})
    return len(found)


def state(pid: int) -> str | None:
    """The letter of the process's state, `Z` for a zombie; None if it is gone."""
    fields = _stat(pid)
    return fields[0] if fields else None


def parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def cpu_seconds_below(root: int) -> tuple[float, int]:
    """Processor time of all below `root`, those that `root` or they have reaped included, and how many live."""
    pids = descendants(root)
    ticks = 0
    if fields := _stat(root):
        ticks += int(fields[13]) + int(fields[14])
    for pid in pids:
        if fields := _stat(pid):
            ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS_PER_SECOND, len(pids)


def _send(number: signal.Signals, pids: Collection[int], tree: Collection[int]) -> None:
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            # Gone; or a kernel before 5.3, where only our own children, whose pids cannot be reused, are safe.
            if parent(pid) == os.getpid():
                os.kill(pid, number)
            continue
        try:
            # The pid may be another's since it was listed; what the pidfd holds now is what the parent tells.
            if parent(pid) in tree:
                signal.pidfd_send_signal(fd, number)
        except OSError:
            continue
        finally:
            os.close(fd)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; the name before it may hold anything."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read()
    except OSError:
        return None
    return text[text.rindex(b")") + 2 :].decode("ascii").split()


def _has_children_files() -> bool:
    # CONFIG_PROC_CHILDREN; gVisor and some small kernels lack it.
    return os.path.exists("/proc/thread-self/children")


def _scan() -> Callable[[int], list[int]]:
    """The same relation from one walk over all of /proc, which costs as much as the machine has processes."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (above := parent(int(name))) is not None:
            found.setdefault(above, []).append(int(name))
    return lambda pid: found.get(pid, [])
