"""What the agent serves at which path: `/echo`, and JSON-RPC at `/` or a handler of one's own everywhere else.

What `/` needs is imported at its first connection, so that an agent starts no slower for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_websocket import ConnectionClosed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import trio
    from trio_websocket import WebSocketConnection

    from agent.server import Handler
    from agent.session import Desk


async def echo(ws: WebSocketConnection) -> None:
    """Sends every message back as it came, text as text and binary as binary."""
    receive, send = ws.get_message, ws.send_message
    try:
        while True:
            await send(await receive())
    except ConnectionClosed:
        return


class OwnRoutes:
    """`--app`: one handler on every path but `/echo`."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __call__(self, path: str) -> Handler:
        return echo if path == "/echo" else self._handler


class BundledRoutes:
    """`/` speaks JSON-RPC. The processes that it starts run in `nursery`, which must outlive the server."""

    def __init__(self, workspace: str, environ: Mapping[str, str], nursery: trio.Nursery) -> None:
        self._workspace = workspace
        self._environ = environ
        self._nursery = nursery
        self._desk: Desk | None = None

    def __call__(self, path: str) -> Handler | None:
        return {"/": self._rpc, "/echo": echo}.get(path)

    async def _rpc(self, ws: WebSocketConnection) -> None:
        from agent.session import Desk, Session

        if self._desk is None:
            self._desk = Desk(self._workspace, self._environ, self._nursery)
        await Session(ws, self._desk).run()

    async def end(self) -> None:
        """Ends all processes, within the drain; returns when none is left."""
        if self._desk is not None:
            await self._desk.processes.end_all()
