"""The signals that stop a supervisor, for programs that own their process; and the watchdog behind a drain.

The first SIGTERM, SIGINT or SIGHUP drains, the second shortens the grace, the third forces. Only the command line
uses this module: the library installs no handler.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_WATCHDOG: Final = 70
_STDERR: Final = 2


async def watch_signals(
    actions: Sequence[Callable[[signal.Signals], None]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Calls one action for each signal, in order, and the last one again for all that follow. Main thread only.

    Run it for the whole life of the program: a receiver that closes sends itself again what it has not passed
    on, and kills a process that has just drained. Signals that were blocked before are unblocked once it is
    open, and blocked again when it is cancelled, so that a late one cannot change the exit status.
    """
    watched = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # nohup asked for that.
        watched.remove(signal.SIGHUP)
    with trio.open_signal_receiver(*watched) as received:
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        try:
            task_status.started()
            remaining = iter(actions)
            action = next(remaining)
            async for number in received:
                action(signal.Signals(number))
                action = next(remaining, action)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@attrs.define(eq=False)
class Watchdog:
    """Ends the process, with one line on stderr and status 70, unless disarmed in time.

    A thread of its own, on real time: what it guards against is a Trio loop that is blocked or shielded for
    ever, and there no deadline of Trio's fires.
    """

    _timer: threading.Timer | None = attrs.field(default=None, init=False)

    def arm(self, after_s: float, why: str) -> None:
        """Once more replaces the deadline before."""
        self.disarm()
        line = f"tenantry: {why}: not done after {after_s:g} s, exit {EXIT_WATCHDOG}\n"
        self._timer = threading.Timer(after_s, _end_process, [line])
        self._timer.daemon = True
        self._timer.start()

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _end_process(line: str) -> None:
    # A pipe that nobody reads must not keep the watchdog from its work.
    writer = threading.Thread(target=os.write, args=(_STDERR, line.encode()), daemon=True)
    writer.start()
    writer.join(1.0)
    os._exit(EXIT_WATCHDOG)
