"""A supervisor in memory and the way in: what the fixtures give, for those who do not use pytest."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import attrs
import trio

from supervisor.client import WebSocket, open_websocket
from supervisor.store import open_memory_store
from supervisor.supervisor import Supervisor, open_supervisor
from supervisor.telemetry import captured_telemetry
from supervisor.testing.launcher import MemoryLauncher
from supervisor.testing.leftovers import Check, wait_nothing_left
from supervisor.testing.streams import MemoryStream, open_stream_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from supervisor.settings import Settings
    from supervisor.testing.launcher import Program

HOST = "localhost"


@attrs.frozen(eq=False)
class World:
    """Made by `open_world`."""

    supervisor: Supervisor
    launcher: MemoryLauncher
    log: list[dict[str, Any]]
    _connections: trio.Nursery
    _check: Check

    def open_stream(self, peer: str = "memory") -> MemoryStream:
        """A new connection to the gateway, for a client of any kind; `peer` is the address that it comes from."""
        ours, theirs = open_stream_pair()
        with self._check.watching_tasks():
            self._connections.start_soon(_serve, self.supervisor, theirs, peer)
        return ours

    def token(self, tenant: str | None, *scopes: str) -> str:
        """A token for `tenant`; without scopes, to connect."""
        return self.supervisor.authenticator.issue(
            tenant=tenant, scopes=scopes or ("connect",), ttl_s=None, subject="test"
        )

    @contextlib.asynccontextmanager
    async def connect(
        self,
        tenant: str,
        path: str = "/",
        *,
        token: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        subprotocols: Sequence[str] = (),
        handshake_timeout_s: float = 300.0,
        close_timeout_s: float = 2.0,
        max_message_bytes: int = 16 * 1024 * 1024,
        peer: str = "memory",
    ) -> AsyncIterator[WebSocket]:
        """A WebSocket to `path` of the tenant's agent, through the gateway; without `token` with one made for it.

        The time for the handshake is long enough for every rung of the ladder. Raises as `open_websocket` does:
        ConnectionRejected with the gateway's or the agent's answer.
        """
        async with open_websocket(
            self.open_stream(peer),
            host=HOST,
            target=f"/v1/tenants/{tenant}/connect/{path.removeprefix('/')}",
            headers=[("Authorization", f"Bearer {token or self.token(tenant)}"), *headers],
            subprotocols=subprotocols,
            handshake_timeout_s=handshake_timeout_s,
            close_timeout_s=close_timeout_s,
            max_message_bytes=max_message_bytes,
        ) as websocket:
            yield websocket


async def _serve(supervisor: Supervisor, stream: MemoryStream, peer: str) -> None:
    await supervisor.front.serve_stream(stream, peer=peer)


@contextlib.asynccontextmanager
async def open_world(settings: Settings, program: Program) -> AsyncIterator[World]:
    """A supervisor whose agents run `program`, with a store in memory, a captured log and no listener.

    The wall clock moves with Trio's, so that tokens expire in virtual time too. Leaving drains; then it raises what
    agents raised (`MemoryLauncher.check`), and LeftOver if anything is left. An exception or a cancellation of the
    block goes through, and nothing more is checked. The log is printed at the end, for pytest to show if a test fails.
    """
    launcher = MemoryLauncher(program)
    telemetry, log = captured_telemetry()
    began_at = time.time() - trio.current_time()

    def wall_clock() -> float:
        return began_at + trio.current_time()

    check = Check()
    try:
        async with contextlib.AsyncExitStack() as stack:
            # What the supervisor starts, for itself or for a connection, is its own; what the test starts is not.
            with check.watching_tasks():
                store = await stack.enter_async_context(open_memory_store(wall_clock=wall_clock))
                supervisor = await stack.enter_async_context(
                    open_supervisor(
                        settings, launcher=launcher, store=store, telemetry=telemetry, wall_clock=wall_clock
                    )
                )
                connections = await stack.enter_async_context(trio.open_nursery())
            yield World(supervisor, launcher, log, connections, check)
            # Those that still speak HTTP; the others are their tenants', and are drained with them.
            connections.cancel_scope.cancel(reason="the test is over")
        launcher.check()
        await wait_nothing_left(check)
    finally:
        for event in log:
            print(event)
