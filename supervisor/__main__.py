"""The program. Blocks the signals that stop it before anything slow is imported, becomes the init if it is PID 1,
runs the command line, and exits once.

As PID 1 a signal without a handler is dropped by the kernel, but a blocked one waits: for the supervisor's receiver,
or for the init's, which takes the place of this process and starts with the same mask.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    import socket

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# As PID 1 these would be dropped too, and an init forwards them.
_FORWARDED: Final = (*_STOPPING, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_VERBS: Final = frozenset({"serve", "check", "config", "token", "tenants", "attach", "exec", "drain", "doctor"})


def main() -> NoReturn:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    _open_closed_streams()
    control = None
    if _serves(sys.argv[1:]):
        if _wants_init():
            control = _become_init()
        # A program of ours, and no init: these two keep the kernel's meaning.
        signal.pthread_sigmask(signal.SIG_SETMASK, {*before, *_STOPPING})
    else:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    from supervisor.cli import main as run

    status = run(control=control)
    # The interpreter's last collections would look through all that is about to go: most of the time of an exit.
    gc.freeze()
    sys.exit(status)


def _open_closed_streams() -> None:
    """Leads what the caller closed to /dev/null: else the next socket would get its number, and be taken for stdin."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is this one. The init and the agents inherit it, as they would an open one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(fd, "r" if fd == 0 else "w", closefd=False))


def _serves(arguments: list[str]) -> bool:
    return next((word for word in arguments if word in _VERBS), None) == "serve"


def _wants_init() -> bool:
    if "--init" in sys.argv:
        sys.argv.remove("--init")
        return True
    return os.getpid() == 1 or os.environ.get("TENANTRY_INIT", "") not in ("", "0")


def _become_init() -> socket.socket:
    """Returns in the child, which is to be the supervisor, with the socket to its keeper, the init."""
    import socket

    from supervisor.sandbox import keeper

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisor = os.fork()
    if supervisor == 0:
        theirs.close()
        # A process group of its own: Ctrl-C on a terminal reaches the init alone, and is forwarded once.
        os.setpgid(0, 0)
        return ours
    ours.close()
    theirs.set_inheritable(True)
    command = keeper.command_line(theirs.fileno(), supervisor)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
