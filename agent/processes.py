"""The commands that clients start: one task each, which owns the whole session from the spawn to the exit told.

It guarantees that `process.exit` comes after all output that is to come, that output waits for the client and
never piles up here, and that a command without `detach` leaves nothing of its session when it has ended.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import termios
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import attrs
import trio

from agent import content
from agent.rpc import INVALID_PARAMS, Failed, RpcError
from agent.tree import signal_session

MAX_PROCESSES = 256
MAX_INPUT_BYTES = 16 * 1024 * 1024
MAX_INPUTS = 64
# From SIGTERM to SIGKILL: when the client has left, and in the agent's own drain of 500 ms.
LEAVE_GRACE_S = 2.0
DRAIN_GRACE_S = 0.3
# How long output is awaited after the exit while somebody else holds the pipe, and nothing comes.
LINGER_S = 1.0
_CHUNK_BYTES = 64 * 1024
# The most that a pipe can hold (fs.pipe-max-size).
_PIPE_BYTES = 1024 * 1024
_MAX_REMEMBERED = 64
_UNFIT_FOR_CHILDREN = ("TENANTRY_LINK_FD",)

# Takes the terminal on its input as the controlling one, and becomes the program. Why a program: considered
# preexec_fn (unsafe with threads) and `sh -c` (a sandbox may have none; it adds variables of its own). The
# environment comes in a file, since Python would add to its own (PEP 538), and everybody can read arguments.
_ON_TERMINAL = """\
import os, signal, sys
for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.login_tty(0)
with open(int(sys.argv[1]), "rb") as file:
    pairs = file.read().split(b"\\0")
argv = sys.argv[2:]
try:
    os.execvpe(argv[0], argv, dict(pair.split(b"=", 1) for pair in pairs if pair))
except OSError as error:
    sys.exit(f"{argv[0]}: {error.strerror}")
"""

# Sends a notification to the client; False once there is nobody to send to.
Sink: TypeAlias = Callable[[str, Mapping[str, Any]], Awaitable[bool]]


@attrs.frozen(kw_only=True)
class Command:
    """What to start. `cwd` is a path as the processes see it; `terminal` is (rows, columns)."""

    argv: list[str]
    env: Mapping[str, str]
    cwd: str
    terminal: tuple[int, int] | None
    encoding: content.Encoding
    detach: bool


@attrs.define(eq=False)
class _Input:
    data: bytes
    eof: bool
    written: trio.Event = attrs.Factory(trio.Event)
    error: Failed | None = None


@attrs.define(eq=False)
class Process:
    """One command. Its numbers stay readable after its end."""

    id: str
    command: Command
    pid: int
    _sink: Sink | None
    _child: trio.Process
    # The pipe, or the terminal's end that is ours.
    _stdin: trio.lowlevel.FdStream
    _outputs: dict[str, trio.lowlevel.FdStream]
    returncode: int | None = None
    # Output that came when its client had left.
    discarded_bytes: int = 0
    _gone: bool = False  # The leader is reaped: its number may be another's.
    _released: trio.Event = attrs.Factory(trio.Event)
    _ending: trio.Event = attrs.Factory(trio.Event)
    _grace: trio.CancelScope = attrs.Factory(trio.CancelScope)
    _inputs: deque[_Input] = attrs.Factory(deque)
    _input_bytes: int = 0
    _input_came: trio.Event = attrs.Factory(trio.Event)
    _no_more_input: bool = False
    _reads_until: float = math.inf
    _output_complete: bool = True
    _reads: set[trio.CancelScope] = attrs.Factory(set)

    @property
    def running(self) -> bool:
        return not self._gone

    # What the session calls; none of it blocks.

    def release(self) -> None:
        """Lets the output flow: the client knows the process by now."""
        self._released.set()

    def leave(self) -> None:
        """The client that started it is gone: it is ended, or runs on unheard if it is detached."""
        self._sink = None
        self._released.set()
        if not self.command.detach:
            self.end(LEAVE_GRACE_S)

    def end(self, grace_s: float) -> None:
        """SIGTERM to the session now, SIGKILL after `grace_s`; called again, the earlier SIGKILL counts."""
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace_s)
        self._ending.set()

    def signal(self, number: signal.Signals) -> None:
        """To the process group of the command. Raises Failed once it has ended."""
        if self._gone:
            raise Failed("exited", f"process {self.id} has ended")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def resize(self, rows: int, columns: int) -> None:
        if self.command.terminal is None:
            raise Failed("no_terminal", f"process {self.id} was started without a terminal")
        if self._gone:
            raise Failed("exited", f"process {self.id} has ended")
        termios.tcsetwinsize(self._stdin.fileno(), (rows, columns))

    def feed(self, data: bytes, eof: bool) -> Callable[[], Awaitable[dict[str, Any]]]:
        """Puts `data` behind what waits already, at once; awaiting what it returns waits until it is written.

        Raises Failed: `exited` or `closed` if nobody will read it, `busy` if too much waits.
        """
        if self._gone or self._no_more_input:
            raise Failed("closed", f"the input of process {self.id} is closed")
        if eof and self.command.terminal is not None:
            raise RpcError(INVALID_PARAMS, "a terminal's input has no end; write \\u0004 to tell the program so")
        full = self._input_bytes + len(data) > MAX_INPUT_BYTES or len(self._inputs) >= MAX_INPUTS
        if full and self._inputs:
            raise Failed("busy", f"process {self.id} does not read its input; wait for the earlier answers")
        item = _Input(data, eof)
        self._no_more_input = eof
        self._inputs.append(item)
        self._input_bytes += len(data)
        self._input_came.set()
        return partial(self._written, item)

    async def _written(self, item: _Input) -> dict[str, Any]:
        await item.written.wait()
        if item.error is not None:
            raise item.error
        return {}

    def describe(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "pid": self.pid,
            "argv": self.command.argv,
            "terminal": self.command.terminal is not None,
            "detached": self.command.detach,
            "running": self.running,
            "returncode": self.returncode,
            "discarded_bytes": self.discarded_bytes,
        }

    # Its task.

    async def run(self) -> None:
        """Carries output and input until the command has ended and that is told. Cancelled, it kills the session."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed_input)
                nursery.start_soon(self._end_when_asked)
                drained = trio.Event()
                nursery.start_soon(self._carry_all, drained)
                await self._wait_exited()
                left_behind = 0
                if not self.command.detach:
                    # Who holds the output may finish it; who does not is of no more use.
                    with trio.move_on_after(LINGER_S):
                        await drained.wait()
                    left_behind = await trio.to_thread.run_sync(signal_session, self.pid, signal.SIGKILL)
                self._bound_reads(trio.current_time() + LINGER_S)
                await drained.wait()
                self.returncode = await self._child.wait()
                self._gone = True
                nursery.cancel_scope.cancel()
        finally:
            await self._finish()  # noqa: ASYNC102 (shields itself, bounded)
        await self._tell(
            "process.exit",
            {
                "id": self.id,
                "returncode": self.returncode,
                "signal": _signal_name(self.returncode),
                "output_complete": self._output_complete,
                "left_behind": left_behind,
            },
        )

    async def _finish(self) -> None:
        if not self._gone:
            signal_session(self.pid, signal.SIGKILL)
            with trio.move_on_after(LEAVE_GRACE_S, shield=True):  # Unless it hangs in the kernel, it is dead by now.
                self.returncode = await self._child.wait()
            self._gone = True
        for item in self._inputs:
            item.error = Failed("exited", f"process {self.id} ended before it read this")
            item.written.set()
        self._inputs.clear()
        with trio.CancelScope(shield=True):  # Closing a descriptor does not block.
            for stream in {self._stdin, *self._outputs.values()}:
                await trio.aclose_forcefully(stream)

    async def _wait_exited(self) -> None:
        """Until the leader is a zombie: it keeps its number while the rest of the session is ended."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:  # A kernel without pidfds, such as an older gVisor's.
            wait = partial(os.waitid, os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            await trio.to_thread.run_sync(wait, abandon_on_cancel=True)
            return
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    async def _end_when_asked(self) -> None:
        await self._ending.wait()
        signal_session(self.pid, signal.SIGTERM)
        signal_session(self.pid, signal.SIGCONT)
        with self._grace:
            await trio.sleep_forever()
        signal_session(self.pid, signal.SIGKILL)

    async def _feed_input(self) -> None:
        while True:
            while self._inputs:
                item = self._inputs[0]
                try:
                    await self._stdin.send_all(item.data)
                    if item.eof:
                        await self._stdin.aclose()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    item.error = Failed("closed", f"process {self.id} has closed its input")
                self._inputs.popleft()
                self._input_bytes -= len(item.data)
                item.written.set()
            self._input_came = trio.Event()
            await self._input_came.wait()

    async def _carry_all(self, drained: trio.Event) -> None:
        await self._released.wait()
        async with trio.open_nursery() as nursery:
            for name, stream in self._outputs.items():
                nursery.start_soon(self._carry, name, stream.fileno())
        drained.set()

    async def _carry(self, name: str, fd: int) -> None:
        """One output to its end. No queue: the next part is read when the last one is sent."""
        held = b""
        after_exit = 0
        while True:
            # A file's reader must not starve the rest while data and client are both quick.
            await trio.lowlevel.checkpoint()
            data = None if after_exit > _PIPE_BYTES else await self._read(fd)
            if not data:
                self._output_complete &= data is not None
                break
            if self._reads_until != math.inf:
                after_exit += len(data)
            data = held + data
            cut = content.whole_characters(data) if self.command.encoding == "utf-8" else len(data)
            held = data[cut:]
            await self._tell_output(name, data[:cut])
        await self._tell_output(name, held)

    async def _read(self, fd: int) -> bytes | None:
        """What is there, or b"" at the end, or None if nothing has come by the end of the linger."""
        while True:
            try:
                return os.read(fd, _CHUNK_BYTES)
            except BlockingIOError:
                pass
            except OSError:  # EIO: a terminal whose last program is gone.
                return b""
            with trio.CancelScope(deadline=self._reads_until) as waiting:
                self._reads.add(waiting)
                try:
                    await trio.lowlevel.wait_readable(fd)
                finally:
                    self._reads.discard(waiting)
            if waiting.cancelled_caught:
                return None

    def _bound_reads(self, deadline: float) -> None:
        self._reads_until = deadline
        for waiting in self._reads:
            waiting.deadline = deadline

    async def _tell_output(self, stream: str, data: bytes) -> None:
        if not data:
            return
        text, encoding = content.encode(data, self.command.encoding)
        sent = await self._tell("process.output", {"id": self.id, "stream": stream, "data": text, "encoding": encoding})
        if not sent:
            self.discarded_bytes += len(data)

    async def _tell(self, method: str, params: Mapping[str, Any]) -> bool:
        if self._sink is not None and not await self._sink(method, params):
            self._sink = None
        return self._sink is not None


class Processes:
    """All commands of one agent. Any connection may list, signal and feed them; output goes to who started them."""

    def __init__(self, nursery: trio.Nursery, environ: Mapping[str, str]) -> None:
        self._nursery = nursery
        # The launcher made it clean; what is only for the agent is taken out.
        self._environ = {name: value for name, value in environ.items() if name not in _UNFIT_FOR_CHILDREN}
        self._running: dict[str, Process] = {}
        self._ended: deque[Process] = deque(maxlen=_MAX_REMEMBERED)
        self._count = 0
        # Those being started too.
        self._alive = 0
        self._none_left = trio.Event()
        self._closed = False

    def get(self, process_id: str) -> Process:
        """Raises Failed if there is none of that name, or none any more."""
        if process_id in self._running:
            return self._running[process_id]
        raise Failed("unknown_process", f"no process {process_id!r} is running")

    def list(self) -> list[dict[str, Any]]:
        """Those that run, and the last 64 that have ended."""
        return [process.describe() for process in (*self._ended, *self._running.values())]

    async def start(self, command: Command, sink: Sink) -> Process:
        """Starts it; its output waits for `release`. Raises Failed (`not_found`, `busy`, `start_failed`)."""
        if self._closed or self._alive >= MAX_PROCESSES:
            raise Failed("busy", f"{MAX_PROCESSES} processes are running, or the agent is ending")
        self._alive += 1
        process: Process = await self._nursery.start(self._own, command, sink)
        return process

    async def end_all(self) -> None:
        """SIGTERM to all, SIGKILL after 300 ms, nothing new; returns when none is left."""
        self._closed = True
        for process in self._running.values():
            process.end(DRAIN_GRACE_S)
        if self._alive:
            await self._none_left.wait()

    async def _own(
        self, command: Command, sink: Sink, task_status: trio.TaskStatus[Process] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            self._count += 1
            process = await _spawn(f"p{self._count}", command, {**self._environ, **command.env}, sink)
            self._running[process.id] = process
            try:
                task_status.started(process)
                if self._closed:
                    process.end(DRAIN_GRACE_S)
                await process.run()
            finally:
                del self._running[process.id]
                self._ended.append(process)
        finally:
            self._alive -= 1
            if self._closed and not self._alive:
                self._none_left.set()


def _check(command: Command, path: str) -> None:
    """Raises Failed for what would not start, in words that a reader of the error can use."""
    named = command.argv[0]
    if not os.path.isdir(command.cwd):
        raise Failed("start_failed", f"{command.cwd}: no such directory to run {named} in")
    program = os.path.join(command.cwd, named) if "/" in named else named
    if shutil.which(program, path=path) is not None:
        return
    if ("/" in named and os.path.isdir(program)) or shutil.which(program, mode=os.F_OK, path=path) is not None:
        raise Failed("start_failed", f"{named}: not executable")
    raise Failed("not_found", f"{named}: no such program")


async def _spawn(process_id: str, command: Command, env: Mapping[str, str], sink: Sink) -> Process:
    _check(command, env.get("PATH", os.defpath))
    with contextlib.ExitStack() as on_failure:
        try:
            if command.terminal is None:
                child = await trio.lowlevel.open_process(
                    command.argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=command.cwd,
                    env=env,
                    start_new_session=True,
                )
                assert child.stdin is not None
                assert child.stdout is not None
                assert child.stderr is not None
                outputs = {"stdout": child.stdout, "stderr": child.stderr}
                return Process(process_id, command, child.pid, sink, child, child.stdin, outputs)  # type: ignore[arg-type]
            ours, theirs = os.openpty()
            on_failure.callback(os.close, ours)
            with contextlib.ExitStack() as afterwards:
                afterwards.callback(os.close, theirs)
                file = afterwards.enter_context(_environment_file(env))
                termios.tcsetwinsize(theirs, command.terminal)
                child = await trio.lowlevel.open_process(
                    [sys.executable, "-I", "-S", "-c", _ON_TERMINAL, str(file), *command.argv],
                    stdin=theirs,
                    stdout=theirs,
                    stderr=theirs,
                    cwd=command.cwd,
                    env={},
                    pass_fds=[file],
                    start_new_session=True,
                )
            terminal = trio.lowlevel.FdStream(ours)
            on_failure.pop_all()
            return Process(process_id, command, child.pid, sink, child, terminal, {"stdout": terminal})
        except (OSError, ValueError) as error:
            raise Failed("start_failed", f"{command.argv[0]}: {error}") from error


@contextlib.contextmanager
def _environment_file(env: Mapping[str, str]) -> Iterator[int]:
    """A file in memory that holds `env` as a process has it, ready to be read."""
    with open(os.memfd_create("environment"), "wb", buffering=0) as file:
        rest = memoryview(b"\0".join(os.fsencode(f"{name}={value}") for name, value in env.items()))
        while rest:
            rest = rest[file.write(rest) :]
        file.seek(0)
        yield file.fileno()


def _signal_name(returncode: int | None) -> str | None:
    if returncode is None or returncode >= 0:
        return None
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"SIG{-returncode}"
