"""Signals to a whole session: a process that was started with `setsid`, and all below it that did not leave.

A session takes in every job of an interactive shell, which the leader's process group alone does not. Callers
hold the leader unreaped, so that its number means this session and no other. What calls `setsid` itself is
out of reach here; it ends with the agent, whose whole tree the supervisor empties.
"""

from __future__ import annotations

import contextlib
import os
import signal

_MAX_ROUNDS = 16


def signal_session(leader: int, number: signal.Signals) -> int:
    """Sends `number` to every process of the session that is alive; returns how many besides the leader.

    SIGKILL is repeated until nobody is left who could fork another.
    """
    reached: set[int] = set()
    for _ in range(_MAX_ROUNDS):
        members = _members(leader)
        # At once for the leader's group: nobody in it can fork past this.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, number)
        for pid, group in members:
            if group != leader:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        new = {pid for pid, _ in members} - reached
        reached |= new
        if number is not signal.SIGKILL or not new:
            break
    return len(reached - {leader})


def _members(session: int) -> list[tuple[int, int]]:
    """(pid, process group) of the session's processes that are no zombies, by proc(5)."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # After the command's name, which may hold anything: state, parent, group, session.
                state, _, group, of, *_ = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(of) == session and state not in (b"Z", b"X"):
            found.append((int(name), int(group)))
    return found
