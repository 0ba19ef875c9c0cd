"""JSON-RPC on `/`: one session a connection, which answers requests and passes on the output of its processes.

Requests run side by side, begun in the order of arrival. What a client causes is bounded: 16 requests at work,
one unsent part for each output, and nothing is read from a client that does not take its answers.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, TypeAlias

import trio
from msgspec import UNSET, Meta, field
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent import content, files, rpc
from agent.processes import Command, Process, Processes
from agent.rpc import INTERNAL_ERROR, INVALID_PARAMS, Call, Method, Params, RpcError
from agent.server import log
from agent.workspace import Workspace

MAX_AT_WORK = 16
_FILE_THREADS = 4

Later: TypeAlias = Callable[[], Awaitable[Any]]
Rows: TypeAlias = Annotated[int, Meta(ge=1, le=65535)]


class Size(Params):
    rows: Rows = 24
    cols: Rows = 80


class Start(Params):
    argv: Annotated[list[str], Meta(min_length=1)]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "."
    pty: Size | None = None
    encoding: content.Encoding = "utf-8"
    detach: bool = False


class Stdin(Params):
    id: str
    data: str = ""
    encoding: content.Encoding = "utf-8"
    eof: bool = False


class Resize(Params):
    id: str
    rows: Rows
    cols: Rows


class Signal(Params):
    id: str
    signal: str | int


class Nothing(Params):
    pass


class Desk:
    """What the sessions of one agent share: the workspace, its files, the processes."""

    def __init__(self, path: str, environ: Mapping[str, str], nursery: trio.Nursery) -> None:
        self.workspace = Workspace(path)
        self.files = files.Files(self.workspace)
        self.processes = Processes(nursery, environ)
        # Their own, so that a slow disk holds up no process that is to be started.
        self.file_threads = trio.CapacityLimiter(_FILE_THREADS)


class Session:
    """One client. When it leaves, what it started ends, but for what was detached."""

    def __init__(self, ws: WebSocketConnection, desk: Desk) -> None:
        self._ws = ws
        self._desk = desk
        self._own: set[Process] = set()
        self._at_work = trio.Semaphore(MAX_AT_WORK)
        of = desk.files
        self._methods = {
            "process.start": Method(Start, self._start),
            "process.stdin": Method(Stdin, self._stdin),
            "process.resize": Method(Resize, self._resize),
            "process.signal": Method(Signal, self._signal),
            "process.list": Method(Nothing, self._list),
            "file.read": Method(files.Read, partial(self._in_thread, of.read)),
            "file.write": Method(files.Write, partial(self._in_thread, of.write)),
            "file.list": Method(files.List, partial(self._in_thread, of.list)),
            "file.stat": Method(files.Stat, partial(self._in_thread, of.stat)),
            "file.remove": Method(files.Remove, partial(self._in_thread, of.remove)),
        }

    async def run(self) -> None:
        """Serves until the client leaves. Cancellation lets a file that is being written be finished."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await self._take(await self._ws.get_message(), nursery)
        except* ConnectionClosed:
            pass
        finally:
            for process in self._own:
                process.leave()

    async def _take(self, message: str | bytes, nursery: trio.Nursery) -> None:
        try:
            call = rpc.parse(message)
        except RpcError as error:
            await self._ws.send_message(rpc.encode_error(error.request_id, error))
            return
        try:
            result = rpc.call_method(self._methods, call)
        except RpcError as error:
            await self._refuse(call, error)
            return
        except Exception as error:
            await self._crash(call, error)
            return
        if not callable(result):
            await self._answer(call, result)
        elif call.method == "process.stdin":
            # Bounded by the process's own queue, and free of the limit: else a program that does not read
            # would keep the client from sending it a signal.
            nursery.start_soon(self._work, call, result)
        else:
            await self._at_work.acquire()
            nursery.start_soon(self._work, call, result, self._at_work)

    async def _work(self, call: Call, later: Callable[[], Awaitable[Any]], limit: trio.Semaphore | None = None) -> None:
        try:
            await self._answer(call, await later())
        except RpcError as error:
            await self._refuse(call, error)
        except ConnectionClosed:
            raise
        except Exception as error:
            await self._crash(call, error)
        finally:
            if limit is not None:
                limit.release()

    async def _answer(self, call: Call, result: Any) -> None:
        process = result if isinstance(result, Process) else None
        if process is not None:
            result = {"id": process.id, "pid": process.pid}
        if call.id is not UNSET:
            await self._ws.send_message(rpc.encode_result(call.id, result))
        if process is not None:
            process.release()

    async def _refuse(self, call: Call, error: RpcError) -> None:
        if call.id is UNSET:
            log(f"{call.method} as a notification failed: {error.message}")
        else:
            await self._ws.send_message(rpc.encode_error(call.id, error))

    async def _crash(self, call: Call, error: Exception) -> None:
        log(f"{call.method} failed: {error!r}", error)
        await self._refuse(call, RpcError(INTERNAL_ERROR, f"{call.method}: internal error"))

    async def notify(self, method: str, params: Mapping[str, Any]) -> bool:
        """Sends a notification; False once the client has left."""
        try:
            await self._ws.send_message(rpc.encode_notification(method, params))
        except ConnectionClosed:
            return False
        return True

    def _in_thread(self, method: Callable[[Any], Any], params: Params) -> Later:
        return partial(trio.to_thread.run_sync, method, params, limiter=self._desk.file_threads)

    def _start(self, params: Start) -> Later:
        return partial(self._start_process, params)

    async def _start_process(self, params: Start) -> Process:
        for text in (*params.argv, *params.env, *params.env.values()):
            if "\0" in text:
                raise RpcError(INVALID_PARAMS, "argv and env must not contain NUL")
        if any(not name or "=" in name for name in params.env):
            raise RpcError(INVALID_PARAMS, 'a name in env must not be empty or contain "="')
        command = Command(
            argv=params.argv,
            env=params.env,
            cwd=await trio.to_thread.run_sync(self._find, params.cwd, limiter=self._desk.file_threads),
            terminal=None if params.pty is None else (params.pty.rows, params.pty.cols),
            encoding=params.encoding,
            detach=params.detach,
        )
        process = await self._desk.processes.start(command, self.notify)
        # Those that have ended go, or a client that stays would make us remember every command it ever ran.
        self._own = {one for one in self._own if one.running} | {process}
        return process

    def _find(self, cwd: str) -> str:
        with self._desk.workspace.resolve(cwd) as place:
            return place.path

    def _stdin(self, params: Stdin) -> Later:
        process = self._desk.processes.get(params.id)
        return process.feed(content.decode(params.data, params.encoding), params.eof)

    def _resize(self, params: Resize) -> dict[str, Any]:
        self._desk.processes.get(params.id).resize(params.rows, params.cols)
        return {}

    def _signal(self, params: Signal) -> dict[str, Any]:
        try:
            if isinstance(params.signal, int):
                number = signal.Signals(params.signal)
            else:
                number = signal.Signals["SIG" + params.signal.removeprefix("SIG")]
        except (KeyError, ValueError):
            raise RpcError(INVALID_PARAMS, f"there is no signal {params.signal!r}") from None
        self._desk.processes.get(params.id).signal(number)
        return {}

    def _list(self, _: Nothing) -> dict[str, Any]:
        return {"processes": self._desk.processes.list()}
