"""One agent's parent: a fork of the keeper that takes the home's lock, starts the agent, and empties its tree.

It is a subreaper, so the agent's whole tree, `setsid` and double forks included, is below it and nowhere else;
when waitpid says ECHILD nothing is left, and only then does it end. It ends the tree once the main process has
ended, when told to, and when the supervisor or the keeper is gone. On its status socket it speaks JSON, an
object a packet: `started`, `failed`, `exited` and `empty` go out, `signal` and `kill` come in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import time
from typing import Any, Final, NamedTuple, NoReturn

from supervisor.sandbox import kernel, tree

_LINK_FD: Final = 4
_FIRST_FREE_FD: Final = 5
_EXEC_FAILED: Final = 127
_LOCK_RETRY_S: Final = 0.005
# Between two looks at a tree that does not empty: an uninterruptible wait in the kernel may take long.
_SHORTEST_WAIT_S: Final = 0.001
_LONGEST_WAIT_S: Final = 0.05
_BUSY: Final = (
    "its workspace is busy: processes of an earlier agent in it are not gone yet, or another supervisor "
    "uses the same state directory"
)


class Handles(NamedTuple):
    """The descriptors of a spawn request, in the order in which they are sent; `link` may be left out."""

    status: int
    lock: int
    output: int
    listener: int
    link: int | None = None

    def of_agent(self) -> list[int]:
        return [fd for fd in self[2:] if fd is not None]


def run(request: dict[str, Any], handles: Handles, lifeline: int) -> None:
    """In the fork, with the keeper's signals blocked; returns when nothing is left. `lifeline` ends with the keeper."""
    os.setsid()
    kernel.close_all_but({0, 1, 2, lifeline, handles.status, handles.lock, *handles.of_agent()})
    kernel.set_name("tenantry-shim")
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    _Shim(request, handles, lifeline).run()


class _Shim:
    def __init__(self, request: dict[str, Any], handles: Handles, lifeline: int) -> None:
        self._request = request
        self._handles = handles
        self._lifeline = lifeline
        self._status = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, handles.status)
        self._wakeup = open_wakeup()
        # The agent's process, until it was reaped.
        self._main: int | None = None
        # Where the fork tells why it could not become the agent; None once that is known.
        self._errors: int | None = None
        self._failed = False
        self._ending = False
        self._orphans = 0
        self._poll = select.poll()
        for fd in (handles.status, lifeline):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        if not self._take_lock():
            return
        self._fork_agent()
        while self._main is not None and not self._ending:
            self._turn()
        self._empty_tree()
        if not self._failed:
            self._report(empty=True, orphans=self._orphans)

    def _take_lock(self) -> bool:
        deadline = time.monotonic() + self._request["lock_timeout_s"]
        while True:
            try:
                fcntl.flock(self._handles.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            except OSError as error:
                self._fail(f"cannot lock its workspace: {error.strerror}", error.errno)
                return False
            else:
                return True
            if time.monotonic() >= deadline:
                self._fail(_BUSY, errno.EBUSY)
                return False
            # Whatever it is: all that can come now means that nobody wants the agent any more.
            if self._poll.poll(_LOCK_RETRY_S * 1000):
                return False

    def _fork_agent(self) -> None:
        self._errors, errors = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        shim = os.getpid()
        try:
            self._main = os.fork()
        except OSError as error:
            self._fail(f"cannot fork: {error.strerror}", error.errno)
            return
        if self._main == 0:
            _become_agent(self._request, self._handles, errors, shim)
        # The agent's copies must be the only ones: its listener refuses and its output ends when it is gone.
        for fd in (errors, *self._handles.of_agent()):
            os.close(fd)
        self._poll.register(self._errors, select.POLLIN)
        self._poll.register(self._wakeup, select.POLLIN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])

    def _turn(self) -> None:
        ready = {fd for fd, _ in self._poll.poll()}
        self._see_exec()
        if self._wakeup in ready:
            os.read(self._wakeup, 4096)
            self._reap()
        if self._handles.status in ready:
            self._obey()
        if self._lifeline in ready:
            self._ending = True

    def _see_exec(self) -> None:
        """Reports the exec's outcome, once, and before the exit: both close the pipe."""
        if self._errors is None:
            return
        try:
            told = os.read(self._errors, 65536)
        except BlockingIOError:
            return
        self._poll.unregister(self._errors)
        os.close(self._errors)
        self._errors = None
        if told:
            self._fail(**json.loads(told))
        else:
            self._report(started=self._main, shim=os.getpid())

    def _obey(self) -> None:
        try:
            data = self._status.recv(4096)
        except OSError:
            data = b""
        command = json.loads(data) if data else {"kill": True}
        if "kill" in command:
            self._ending = True
        elif self._main is not None:
            os.kill(self._main, command["signal"])
            if command["signal"] == signal.SIGTERM:
                # A stopped process could not follow it.
                os.kill(self._main, signal.SIGCONT)

    def _empty_tree(self) -> None:
        wait_s = _SHORTEST_WAIT_S
        ended = select.poll()
        ended.register(self._wakeup, select.POLLIN)
        while self._reap():
            tree.end(freeze=wait_s > _SHORTEST_WAIT_S)
            if ended.poll(wait_s * 1000):
                os.read(self._wakeup, 4096)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    def _reap(self) -> bool:
        """Whether children are left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid != self._main:
                self._orphans += 1
                continue
            self._see_exec()
            self._main = None
            if not self._failed:
                self._report(exited=os.waitstatus_to_exitcode(status))

    def _fail(self, failed: str, errno: int | None) -> None:
        self._failed = True
        self._report(failed=failed, errno=errno)

    def _report(self, **message: object) -> None:
        # To a supervisor that is gone it goes nowhere; the end of the socket tells that.
        with contextlib.suppress(OSError):
            self._status.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def open_wakeup() -> int:
    """The end of a pipe that gets the number of every signal that has a handler as a byte."""
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    return readable


def _become_agent(request: dict[str, Any], handles: Handles, errors: int, shim: int) -> NoReturn:
    """In the second fork: leaves by the exec, or with the reason written to `errors`."""
    argv = request["argv"]
    doing = "start"
    try:
        os.setsid()
        # A murdered shim's tree is the keeper's to end; this makes the end of the main process immediate.
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != shim:
            os._exit(_EXEC_FAILED)
        errors = _arrange_fds(handles, errors)
        doing = f"enter {request['cwd']}"
        os.chdir(request["cwd"])
        os.umask(0o077)
        environment = {**request["env"], "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
        if handles.link is not None:
            environment["TENANTRY_LINK_FD"] = str(_LINK_FD)
        doing = f"confine {argv[0]}"
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, limit in request["limits"].items():
            resource.setrlimit(getattr(resource, name), tuple(limit))
        # The keeper blocks signals and handles some, but ignores none: after the exec all are the default.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        doing = f"execute {argv[0]}"
        os.execvpe(argv[0], argv, environment)
    except Exception as error:
        cause = error.errno if isinstance(error, OSError) else None
        why = os.strerror(cause) if cause else str(error)
        if cause == errno.ENOENT and os.path.exists(argv[0]):
            why += " (the file is there; the interpreter that it names is not)"
        with contextlib.suppress(OSError):
            os.write(errors, json.dumps({"failed": f"cannot {doing}: {why}"[:2000], "errno": cause}).encode())
    finally:
        os._exit(_EXEC_FAILED)


def _arrange_fds(handles: Handles, errors: int) -> int:
    """0 is empty, 1 and 2 the output, 3 the listening socket, 4 the link; returns the pipe's number.

    All else is close-on-exec: the shim began by closing what it does not know.
    """
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    output, *rest = handles.of_agent()
    # First out of the way of the numbers that are given out.
    sources = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD) if fd < _FIRST_FREE_FD else fd
        for fd in (null, output, output, *rest, errors)
    ]
    errors = sources.pop()
    for target, fd in enumerate(sources):
        os.dup2(fd, target, inheritable=True)
    return errors
