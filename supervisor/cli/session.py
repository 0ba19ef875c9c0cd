"""`exec`, `attach` and `attach --raw`: between the caller's streams, terminal and signals, and an agent.

A lost connection, a closed stdout and a second Ctrl-C end it; the terminal is always left as it was found.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import signal
import termios
import tty
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from supervisor.cli import OUTPUT_CLOSED, UNAVAILABLE, Failure
from supervisor.cli.rpc import CallFailed, RpcClient, ended
from supervisor.cli.server import Server, refused, unreachable
from supervisor.client import ConnectionClosed, ConnectionRejected, HandshakeFailed, WebSocket, open_websocket_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

# A sleeping tenant's agent may need the whole ladder.
_HANDSHAKE_S: Final = 120.0
_CHUNK_BYTES: Final = 32 * 1024
# Output that waits for a slow stdout; beyond it the agent waits.
_QUEUED_OUTPUTS: Final = 256
_LAST_ANSWERS_S: Final = 0.5
# Ctrl-]
_LEAVE: Final = b"\x1d"
_SHELL: Final = ("sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash; exec sh")
_PASSED_ON: Final = ("TERM", "COLORTERM", "LANG", "LC_ALL", "LC_CTYPE")
_NOT_FOUND: Final = 127
_NOT_STARTED: Final = 126


@attrs.frozen
class Streams:
    """The caller's file descriptors."""

    stdin: int = 0
    stdout: int = 1
    stderr: int = 2


def run(verb: Callable[..., Awaitable[int]], *args: object) -> int:
    """Runs one of the verbs below in Trio, and gives its exit status or raises its Failure."""

    async def alone() -> int:
        return await verb(*args)

    try:
        return trio.run(alone)
    except BaseExceptionGroup as group:
        raise _one(group) from None


async def execute(
    server: Server, tenant: str, argv: Sequence[str], cwd: str = ".", streams: Streams = Streams()
) -> int:
    """Runs a command with the caller's stdin, stdout, stderr and signals; returns its exit status as a shell has it."""
    async with _connected(server, tenant) as websocket:
        return await _Session(RpcClient(websocket), streams).run({"argv": list(argv), "cwd": cwd})


async def attach(server: Server, tenant: str, argv: Sequence[str] = (), streams: Streams = Streams()) -> int:
    """A shell, or `argv`, with a terminal if the caller's stdin is one."""
    start: dict[str, object] = {"argv": list(argv) or list(_SHELL)}
    async with _connected(server, tenant) as websocket:
        if not os.isatty(streams.stdin):
            return await _Session(RpcClient(websocket), streams).run(start)
        start["env"] = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        start["pty"] = _size(streams.stdin)
        os.write(streams.stderr, f"Connected to {tenant}; Ctrl-] leaves.\n".encode())
        with _raw_terminal(streams.stdin):
            return await _Session(RpcClient(websocket), streams, terminal=True).run(start)


async def talk(server: Server, tenant: str, path: str = "", streams: Streams = Streams()) -> int:
    """Each line of stdin is a text message, each message a line of stdout; the end of stdin closes."""

    closed: ConnectionClosed | None = None

    async def receive() -> None:
        nonlocal closed
        while True:
            try:
                message = await websocket.receive()
            except ConnectionClosed as error:
                closed = error
                return
            data = message if isinstance(message, bytes) else message.encode()
            await _write(streams.stdout, data if data.endswith(b"\n") else data + b"\n")

    async def send() -> None:
        with contextlib.suppress(ConnectionClosed):  # `receive` learns why.
            rest = b""
            while data := await _read(streams.stdin):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    await websocket.send(line.decode(errors="replace"))
            if rest:
                await websocket.send(rest.decode(errors="replace"))
            # A peer may answer a Close before the messages in front of it: so it gets time for these.
            quiet_at = trio.current_time() + _LAST_ANSWERS_S
            while trio.current_time() < quiet_at:
                await trio.sleep_until(quiet_at)
                quiet_at = max(quiet_at, websocket.heard_at + _LAST_ANSWERS_S)
            nursery.cancel_scope.cancel()

    async with _connected(server, tenant, path) as websocket:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await receive()
                nursery.cancel_scope.cancel()
        except* BrokenPipeError:
            return_status = OUTPUT_CLOSED
        else:
            return_status = 0
    if closed is not None and closed.code not in (1000, 1005):
        raise ended(closed)
    return return_status


class _Session:
    """One process of the agent, with the caller's streams at its own."""

    def __init__(self, rpc: RpcClient, streams: Streams, *, terminal: bool = False) -> None:
        self._rpc = rpc
        self._streams = streams
        self._terminal = terminal
        self._id = ""
        self._status: int | None = None

    async def run(self, start: dict[str, object]) -> int:
        """Starts the process, and returns its exit status as a shell has it."""
        send_output, outputs = trio.open_memory_channel[tuple[int, bytes] | None](_QUEUED_OUTPUTS)
        try:
            # From here on Ctrl-C is the command's.
            with trio.open_signal_receiver(*self._signals()) as received:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._rpc.run, self._notified(send_output))
                    try:
                        self._id = (await self._rpc.call("process.start", **start))["id"]
                    except CallFailed as error:
                        status = {"not_found": _NOT_FOUND, "start_failed": _NOT_STARTED}.get(error.code or "", 1)
                        raise Failure(f"the agent did not start it: {error}", status) from None
                    nursery.start_soon(self._pass_signals, received, nursery.cancel_scope)
                    nursery.start_soon(self._pass_input, nursery.cancel_scope)
                    async for output in outputs:
                        if output is None:
                            break
                        await _write(*output)
                    nursery.cancel_scope.cancel()
        except* BrokenPipeError:
            self._status = OUTPUT_CLOSED
        return self._status if self._status is not None else UNAVAILABLE

    def _notified(
        self, outputs: trio.MemorySendChannel[tuple[int, bytes] | None]
    ) -> Callable[[str, dict[str, Any]], Awaitable[bool]]:
        fds = {"stdout": self._streams.stdout, "stderr": self._streams.stderr}

        async def notified(method: str, params: dict[str, Any]) -> bool:
            if method == "process.output":
                data = params["data"]
                decoded = base64.b64decode(data) if params.get("encoding") == "base64" else data.encode()
                await outputs.send((fds[params["stream"]], decoded))
            elif method == "process.exit":
                returncode = params["returncode"]
                self._status = returncode if returncode >= 0 else 128 - returncode
                await outputs.send(None)
                return True
            return False

        return notified

    async def _pass_input(self, scope: trio.CancelScope) -> None:
        with contextlib.suppress(CallFailed):  # It reads no more, or has ended: its exit will tell.
            while data := await _read(self._streams.stdin):
                data, leave, _ = data.partition(_LEAVE) if self._terminal else (data, b"", b"")
                if data:
                    await self._feed(data)
                if leave:
                    self._leave(0, scope)
            if self._terminal:
                # The terminal is gone, and we with it.
                self._leave(128 + signal.SIGHUP, scope)
            else:
                await self._rpc.call("process.stdin", id=self._id, eof=True)

    def _leave(self, status: int, scope: trio.CancelScope) -> None:
        self._status = status
        scope.cancel()

    async def _feed(self, data: bytes) -> None:
        await self._rpc.call("process.stdin", id=self._id, data=base64.b64encode(data).decode(), encoding="base64")

    def _signals(self) -> list[signal.Signals]:
        passed = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        return [*passed, signal.SIGWINCH] if self._terminal else passed

    async def _pass_signals(self, received: AsyncIterator[int], scope: trio.CancelScope) -> None:
        passed = 0
        async for number in received:
            with contextlib.suppress(CallFailed):
                if number == signal.SIGWINCH:
                    await self._rpc.call("process.resize", id=self._id, **_size(self._streams.stdin))
                    continue
                passed += 1
                if passed > 1 or self._terminal:
                    # A terminal's Ctrl-C is input: this one is meant for us.
                    self._leave(128 + number, scope)
                    return
                await self._rpc.call("process.signal", id=self._id, signal=signal.Signals(number).name)


@contextlib.asynccontextmanager
async def _connected(server: Server, tenant: str, path: str = "") -> AsyncIterator[WebSocket]:
    websocket_of = open_websocket_url(
        server.connect_url(tenant, path),
        token=server.token(tenant),
        unix_path=server.unix_path,
        handshake_timeout_s=_HANDSHAKE_S,
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            websocket = await stack.enter_async_context(websocket_of)
        except ConnectionRejected as error:
            raise refused(f"no connection to the agent of tenant {tenant!r}", error.status, error.body) from None
        except HandshakeFailed as error:
            raise unreachable(server, error) from None
        yield websocket


async def _read(fd: int) -> bytes:
    """What comes next from `fd`, whatever it is; empty at its end. Cancellation takes nothing, no flag is changed."""
    # Why not FdStream: it makes the open file non-blocking, which the shell and our own stdout share. Why no
    # thread: it could not be cancelled, and would take what the next program of a script is to read.
    while True:
        try:
            await trio.lowlevel.wait_readable(fd)
        except PermissionError:
            # What epoll does not take, such as a file, is always readable.
            await trio.lowlevel.checkpoint()
        try:
            return os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            continue
        except OSError:
            # EIO: a terminal that is gone.
            return b""


async def _write(fd: int, data: bytes) -> None:
    """All of it, in a thread, since a pipe whose reader is slow may take a while. Raises OSError."""

    def write() -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                select.select([], [fd], [])

    await trio.to_thread.run_sync(write, abandon_on_cancel=True)


@contextlib.contextmanager
def _raw_terminal(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        # Now, and not when all is written: a terminal that was stopped would keep us here.
        termios.tcsetattr(fd, termios.TCSANOW, before)


def _size(fd: int) -> dict[str, int]:
    rows, columns = termios.tcgetwinsize(fd)
    return {"rows": rows or 24, "cols": columns or 80}


def _one(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong, without the nurseries around it: the first Failure, else the first of all."""
    leaves: list[BaseException] = []

    def flatten(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                flatten(inner)
        else:
            leaves.append(error)

    flatten(group)
    return next((leaf for leaf in leaves if isinstance(leaf, Failure)), leaves[0])
