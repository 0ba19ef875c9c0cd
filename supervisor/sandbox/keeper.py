"""The keeper: one small, single-threaded process that is the parent of every agent's shim, or the init itself.

    keeper.py CONTROL_FD [SUPERVISOR_PID]

It forks a shim for each spawn request on the control socket and forgets what the request brought. At the end of
that socket, or of the supervisor, it lets go of the shims' lifeline, and ends when the last of them has. With a
SUPERVISOR_PID it is the init: it also forwards signals to that process, reaps what is orphaned, and ends with its
status. It runs no thread, imports nothing of site-packages, and holds no secret.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Final, NoReturn

if __name__ == "__main__":
    # Run by its path and without site-packages: the package is found last, so it can hide nothing of Python's.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from supervisor.sandbox import kernel, shim, tree

_FORWARDED: Final = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
# Why blocked and not ignored: what is ignored stays so over an exec, and each agent would have to undo it.
_BLOCKED: Final = {*_FORWARDED, signal.SIGPIPE, signal.SIGCHLD}
_MAX_REQUEST_BYTES: Final = 1024 * 1024
_MIN_FDS: Final = 4
_MAX_FDS: Final = 5
_KEPT_FDS: Final = 2
_SWEEP_S: Final = 0.01
# As init: from the supervisor's end until the last orphan's; after that the kernel ends the namespace.
_INIT_LINGER_S: Final = 10.0


def command_line(control_fd: int, supervisor: int | None = None) -> list[str]:
    """How to run the keeper, isolated and without site-packages; with a supervisor's pid, as its init."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__), str(control_fd)]
    return command if supervisor is None else [*command, str(supervisor)]


class _Keeper:
    def __init__(self, control: socket.socket, supervisor: int | None) -> None:
        self._control = control
        self._supervisor = supervisor
        self._is_init = supervisor is not None
        self._status = 0
        # Each shim's status socket and lock, let go when it was reaped and has left nothing: to everybody else
        # a murdered shim's agent is not over before it is.
        self._shims: dict[int, tuple[int, int]] = {}
        self._lost: list[tuple[int, int]] = []
        self._sweeps = 0
        self._orphans = 0
        self._ending_since: float | None = None
        # Why a pipe: considered PR_SET_PDEATHSIG; chose the end of a pipe that only the keeper holds, since it
        # has no race with the fork, needs no handler, and can be let go on purpose too.
        self._lifeline, self._lifeline_end = os.pipe2(os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> int:
        handled = {signal.SIGCHLD, *(_FORWARDED if self._is_init else ())}
        wakeup = shim.open_wakeup()
        self._poll.register(wakeup, select.POLLIN)
        for number in handled:
            signal.signal(number, _do_nothing)
        self._blocked = _BLOCKED - handled
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        # Beside the control socket, since a fork of the supervisor's program may hold a copy of that.
        parent = None if self._is_init else _watch(os.getppid())
        if parent is not None:
            self._poll.register(parent, select.POLLIN)
        self._tell(ready=os.getpid())
        while True:
            left = self._reap()
            if self._ending_since is not None and (not left or self._has_lingered()):
                return self._status
            timeout_s = _SWEEP_S if self._sweep() else None
            ready = {fd for fd, _ in self._poll.poll(None if timeout_s is None else timeout_s * 1000)}
            if wakeup in ready:
                self._forward(os.read(wakeup, 4096))
            if self._control.fileno() in ready and not self._take_request():
                self._poll.unregister(self._control)
                if not self._is_init:
                    self._end()
            if parent in ready:
                self._poll.unregister(parent)
                self._end()

    def _take_request(self) -> bool:
        """False at the end of the control socket."""
        # Not socket.recv_fds, which drops its flags in some versions of Python: all must be close-on-exec.
        fds = array.array("i")
        kept = 0
        try:
            room = socket.CMSG_SPACE(_MAX_FDS * fds.itemsize)
            flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            data, ancillary, _, _ = self._control.recvmsg(_MAX_REQUEST_BYTES, room, flags)
            for _, _, packed in ancillary:
                fds.frombytes(packed[: len(packed) // fds.itemsize * fds.itemsize])
            if not data:
                return False
            # Fewer come if our own limit on open files is reached; the supervisor sees the socket's end then.
            if len(fds) >= _MIN_FDS and self._spawn(data, shim.Handles(*fds)):
                kept = _KEPT_FDS
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return False
        except Exception:
            # A request that cannot be read is a bug, and no reason to end everybody's agents.
            sys.excepthook(*sys.exc_info())
        finally:
            for fd in fds[kept:]:
                os.close(fd)
        return True

    def _spawn(self, data: bytes, handles: shim.Handles) -> bool:
        """Whether there is a shim now, and the status socket and the lock are kept for it."""
        request = json.loads(data)
        # A signal between the fork and the shim's own handlers would be taken for one of the keeper's.
        signal.pthread_sigmask(signal.SIG_SETMASK, _BLOCKED)
        try:
            pid = os.fork()
            if pid == 0:
                _become_shim(request, handles, self._lifeline)
            self._shims[pid] = (handles.status, handles.lock)
            return True
        except OSError as error:
            told = {"failed": f"the keeper cannot fork: {error.strerror}", "errno": error.errno}
            with contextlib.suppress(OSError):
                os.write(handles.status, json.dumps(told).encode())
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _reap(self) -> bool:
        """Whether children are left."""
        left = True
        while left:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                left = False
                break
            if pid == 0:
                break
            if os.WIFSTOPPED(status):
                # Only an agent would stop the shim that is to end it.
                if pid in self._shims:
                    os.kill(pid, signal.SIGKILL)
                continue
            if pid == self._supervisor:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code
                self._supervisor = None
                self._end()
            elif (held := self._shims.pop(pid, None)) is None:
                self._orphans += 1
            elif status == 0:
                _release(held)
            else:
                self._lost.append(held)
        if self._orphans and self._tell(orphans=self._orphans):
            self._orphans = 0
        return left

    def _sweep(self) -> bool:
        """Ends what is left of murdered shims, or of all at the end of an init; whether to look again soon."""
        closing = self._is_init and self._ending_since is not None
        if not self._lost and not closing:
            return False
        # Which orphan was whose nobody can tell any more: all that has no shim goes. As init that may be a
        # stranger's background job; the other choice is an agent that nobody watches.
        spare = {*self._shims, *([self._supervisor] if self._supervisor else [])}
        if tree.end(spare, freeze=self._sweeps > 0):
            self._sweeps += 1
            return True
        self._sweeps = 0
        while self._lost:
            _release(self._lost.pop())
        return closing

    def _forward(self, numbers: bytes) -> None:
        for number in numbers:
            if self._supervisor is not None and number in _FORWARDED:
                os.kill(self._supervisor, number)

    def _end(self) -> None:
        if self._ending_since is None:
            self._ending_since = time.monotonic()
            os.close(self._lifeline_end)

    def _has_lingered(self) -> bool:
        return (
            self._is_init and self._ending_since is not None and time.monotonic() - self._ending_since > _INIT_LINGER_S
        )

    def _tell(self, **message: object) -> bool:
        try:
            self._control.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True


def _become_shim(request: dict[str, Any], handles: shim.Handles, lifeline: int) -> NoReturn:
    code = 1
    try:
        shim.run(request, handles, lifeline)
        code = 0
    except Exception:
        # The keeper takes an exit with this status for a murder, and ends the tree.
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _do_nothing(_number: int, _frame: object) -> None:
    """Its byte in the wakeup pipe is all that a signal does."""


def _watch(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _release(held: tuple[int, int]) -> None:
    # The lock first: who sees the status socket's end may start the next agent at once.
    status, lock = held
    os.close(lock)
    os.close(status)


def main(argv: list[str]) -> int:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    control = socket.socket(fileno=int(argv[1]))
    control.set_inheritable(False)
    kernel.set_name("tenantry-keeper")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    keeper = _Keeper(control, int(argv[2]) if len(argv) > 2 else None)
    # The shims share the keeper's memory until somebody writes to it, and a collection writes to all of it.
    gc.disable()
    gc.freeze()
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
