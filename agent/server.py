"""Serves WebSockets on a listener, each behind its own crash boundary, until it is drained.

It owns the connections: a fault of one (malformed head, crashed handler, silent peer) ends that one alone.
It never decides what a path means: that is the `route` it is given.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeAlias

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest

from agent.connection import PONG_WITHIN_S, Connection

Handler: TypeAlias = Callable[[WebSocketConnection], Awaitable[None]]
# The handler for a path (without its query), or None: 404.
Route: TypeAlias = Callable[[str], Handler | None]

HANDSHAKE_S = 10.0
CLOSE_S = 2.0
DRAIN_S = 0.5


def log(message: str, error: BaseException | None = None) -> None:
    """One line on stderr, which the supervisor carries to its log, and the traceback of `error`."""
    print(f"agent: {message}", file=sys.stderr, flush=True)
    if error is not None:
        traceback.print_exception(error, file=sys.stderr)


class Server:
    """One agent's door.

    `on_drain` runs beside the closing of the connections, in the same 500 ms.
    """

    def __init__(self, route: Route, *, on_drain: Callable[[], Awaitable[None]] | None = None) -> None:
        self._route = route
        self._on_drain = on_drain
        self._draining = trio.Event()
        self._open: set[Connection] = set()
        # Those in `_open`, and those whose answer is on its way.
        self._accepted = 0
        self._idle = trio.Event()
        self._numbers = itertools.count(1)

    def drain(self) -> None:
        """Begins the drain; calling it again changes nothing (S3-14)."""
        self._draining.set()

    async def serve(self, listeners: Sequence[trio.abc.Listener[trio.abc.Stream]]) -> None:
        """Serves until it is drained; closes the listeners. Cancellation ends every connection at once."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                partial(trio.serve_listeners, self.serve_stream, list(listeners), handler_nursery=nursery)
            )
            await self._draining.wait()
            # The listener stays open to the end: a client is told 503, not left in the backlog.
            with trio.move_on_after(DRAIN_S):
                async with trio.open_nursery() as closing:
                    for connection in list(self._open):
                        closing.start_soon(self._close_for_restart, connection)
                    if self._on_drain is not None:
                        closing.start_soon(self._on_drain)
                if self._accepted:
                    await self._idle.wait()
            nursery.cancel_scope.cancel()

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Serves one connection to its end. Raises nothing but Cancelled; the stream is closed on return."""
        name = f"connection {next(self._numbers)}"
        try:
            await self._serve_connection(stream, name)
        except* (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The peer left in the middle of a handshake.
        except* Exception as errors:
            log(f"{name} failed: {_first(errors)!r}", errors)
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve_connection(self, stream: trio.abc.Stream, name: str) -> None:
        ws = Connection(stream)
        async with trio.open_nursery() as nursery:
            request: WebSocketRequest | None = None
            deadline = trio.current_time() + HANDSHAKE_S
            with trio.CancelScope(deadline=deadline) as handshake:
                nursery.start_soon(_read, ws, handshake)
                request = await ws.wait_request()
            if request is not None:
                self._accepted += 1
                try:
                    await self._serve_request(request, ws, deadline, name)
                finally:
                    self._accepted -= 1
                    if self._draining.is_set() and not self._accepted:
                        self._idle.set()
            nursery.cancel_scope.cancel()

    async def _serve_request(self, request: WebSocketRequest, ws: Connection, deadline: float, name: str) -> None:
        handler: Handler | None = None
        with trio.CancelScope(deadline=deadline):
            handler = await self._answer(request)
        if handler is None:
            return
        name = f"{name} on {ws.path}"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_alive, ws, name)
            self._open.add(ws)
            try:
                if self._draining.is_set():  # The signal came while the answer went out.
                    await self._close_for_restart(ws)
                else:
                    await self._run_handler(handler, ws, name)
            finally:
                self._open.discard(ws)
            nursery.cancel_scope.cancel()

    async def _answer(self, request: WebSocketRequest) -> Handler | None:
        """Accepts the handshake and returns who serves it, or refuses it and returns None."""
        handler = self._route(request.path.partition("?")[0])
        if self._draining.is_set():
            headers = [(b"retry-after", b"1"), (b"connection", b"close")]
            await request.reject(503, extra_headers=headers, body=b"the agent is restarting\n")
        elif handler is None:
            body = b"nothing is served at this path\n"
            await request.reject(404, extra_headers=[(b"connection", b"close")], body=body)
        else:
            known = getattr(handler, "subprotocols", ())
            wanted = (name for name in request.proposed_subprotocols if name in known)
            await request.accept(subprotocol=next(wanted, None))
            return handler
        return None

    async def _run_handler(self, handler: Handler, ws: Connection, name: str) -> None:
        code, reason = 1000, ""
        try:
            await handler(ws)
        except* ConnectionClosed:
            pass
        except* Exception as errors:
            log(f"the handler of {name} failed: {_first(errors)!r}", errors)
            code, reason = 1011, "the handler failed"
        await ws.close(code, reason, CLOSE_S)

    async def _close_for_restart(self, ws: Connection) -> None:
        """One that fails to close is logged and does not stop the others (S3-14)."""
        try:
            await ws.close(1012, "Server restarting", DRAIN_S)
        except Exception as error:
            log("a connection failed to close for the restart", error)


async def _read(ws: Connection, handshake: trio.CancelScope) -> None:
    """A peer that leaves before its request is whole ends the reader, and so the wait for the request."""
    await ws.run_reader()
    handshake.cancel()


async def _keep_alive(ws: Connection, name: str) -> None:
    if await ws.keep_alive():
        log(f"{name} was ended: its peer is silent, and has not answered a ping for {PONG_WITHIN_S:.0f} s")


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
