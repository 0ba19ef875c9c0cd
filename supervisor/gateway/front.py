"""The accept loop: takes clients, counts them, and gives each a task, a crash boundary and its deadlines.

Owns every connection from accept until its stream is closed, also while `on_upgrade` has it. Nothing that a
client sends, and no error in serving one, reaches another connection or ends the loop.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import TYPE_CHECKING

import attrs
import trio

from supervisor.gateway import heads
from supervisor.gateway.http import HttpConnection, HttpService, problem, say_and_close

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import h11

    from supervisor.gateway.listeners import Listener
    from supervisor.gateway.parser import App
    from supervisor.settings import Settings
    from supervisor.telemetry import Telemetry

# What accept(2) says when the process or the machine has no more to give.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_EXHAUSTED_PAUSE_S = 0.1
# Clients over a cap that are being told so, at once; one more is cut without a word.
_MAX_TOLD = 64
_RETRY_AFTER_S = 1.0


@attrs.define(eq=False)
class Lease:
    """One connection's place in the caps. Released once, however often it is asked."""

    _release: Callable[[], None] | None

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


@attrs.define(eq=False)
class Upgrade:
    """A WebSocket's opening, not answered yet: the head, the bytes behind it, and the stream they came on.

    The request has passed `heads.refusal` and `heads.upgrade_refusal`. `peer` and `scheme` ("http", "https")
    are the client's own, as far as a trusted proxy tells; `trusted` says whether one stands in between. Who
    sets `taken` owns the stream and the lease from then on; else the front releases and closes both.
    """

    request: h11.Request
    trailing: bytes
    stream: trio.abc.Stream
    peer: str
    scheme: str
    trusted: bool
    lease: Lease
    taken: bool = False


class _Places:
    """The caps on connections, in all and for each peer. Peers that stand for many are capped in all only."""

    def __init__(self, most: int, most_per_peer: int, trusted: Sequence[heads.Network | str]) -> None:
        self._most = most
        self._most_per_peer = most_per_peer
        self._trusted = trusted
        self._taken = 0
        self._by_peer: Counter[str] = Counter()

    def take(self, peer: str) -> Lease | heads.Refusal:
        if self._taken >= self._most:
            return heads.Refusal(503, "over_capacity", f"All {self._most} connections are taken.")
        key = None if peer in ("unix", "memory") or heads.is_trusted(peer, self._trusted) else heads.peer_key(peer)
        if key is not None:
            if self._by_peer[key] >= self._most_per_peer:
                return heads.Refusal(
                    503, "over_capacity", f"All {self._most_per_peer} connections of your address are taken."
                )
            self._by_peer[key] += 1
        self._taken += 1
        return Lease(lambda: self._give_back(key))

    def _give_back(self, key: str | None) -> None:
        self._taken -= 1
        if key is not None:
            self._by_peer[key] -= 1
            if not self._by_peer[key]:
                del self._by_peer[key]


class Front:
    """Serves `app` (ASGI) on its listeners, and gives every upgrade to `on_upgrade`.

    `on_upgrade` answers the client and speaks with it until the end, or sets `Upgrade.taken` and returns.
    """

    def __init__(
        self,
        app: App,
        *,
        on_upgrade: Callable[[Upgrade], Awaitable[None]],
        settings: Settings,
        telemetry: Telemetry,
    ) -> None:
        limits = settings.limits
        self.trusted = heads.trusted_networks(settings.trusted_proxies)
        self._service = HttpService(app=app, limits=limits, telemetry=telemetry, trusted=self.trusted)
        self._on_upgrade = on_upgrade
        self._telemetry = telemetry
        self._places = _Places(limits.connections, limits.connections_per_peer, self.trusted)
        self._http: set[HttpConnection] = set()
        self._told = 0
        self._accepting = trio.CancelScope()

    async def serve(
        self, listeners: Sequence[Listener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serves until cancelled, or after `terminate` until the last connection has ended. Once a front.

        The listeners are closed in any case. Cancellation closes every connection at once.
        """
        try:
            async with trio.open_nursery() as connections:
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        for listener in listeners:
                            accepting.start_soon(self._accept, listener, connections)
                        task_status.started()
                for listener in listeners:
                    listener.close()
        finally:
            for listener in listeners:
                listener.close()

    async def serve_stream(self, stream: trio.abc.Stream, *, peer: str = "memory") -> None:
        """Serves one connection over any stream, under the same caps, until it has ended; closes it."""
        lease = self._places.take(peer)
        if isinstance(lease, heads.Refusal):
            await self._tell(stream, lease, peer)
        else:
            await self._serve_connection(stream, peer, lease)

    def refuse_new(self) -> None:
        """From now on each connection gets at most one more answer, with `Connection: close`; idle ones end.

        New connections are still accepted: a load balancer must see 503, not a refused connect.
        """
        self._service.ending.set()
        for connection in self._http:
            connection.wake()

    def terminate(self, grace_s: float = 1.0) -> None:
        """Accepts no more, and ends what speaks HTTP: idle connections now, answers under way within `grace_s`.

        Upgraded connections belong to `on_upgrade`; `serve` returns when they have ended too.
        """
        self.refuse_new()
        self._accepting.cancel()
        deadline = trio.current_time() + grace_s
        for connection in self._http:
            connection.hurry(deadline)

    async def _accept(self, listener: Listener, connections: trio.Nursery) -> None:
        exhausted = False
        while True:
            try:
                accepted = await listener.accept_some()
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                if not exhausted:
                    self._telemetry.log.error(
                        "accept_failed",
                        address=listener.address,
                        error=os.strerror(error.errno or 0),
                        mend="raise the limit on open files, or lower limits.connections",
                    )
                exhausted = True
                await trio.sleep(_EXHAUSTED_PAUSE_S)
                continue
            if exhausted:
                self._telemetry.log.info("accept_recovered", address=listener.address)
                exhausted = False
            for transport, peer in accepted:
                self._admit(transport, peer, listener, connections)

    def _admit(self, transport: trio.SocketStream, peer: str, listener: Listener, connections: trio.Nursery) -> None:
        stream: trio.abc.Stream = transport
        if listener.tls is not None:
            stream = trio.SSLStream(transport, listener.tls, server_side=True, https_compatible=True)
        lease = self._places.take(peer)
        if isinstance(lease, Lease):
            connections.start_soon(self._serve_connection, stream, peer, lease)
        elif self._told < _MAX_TOLD:
            connections.start_soon(self._tell, stream, lease, peer)
        else:
            self._telemetry.metrics.refused.labels(reason=lease.code).inc()
            transport.socket.close()

    async def _tell(self, stream: trio.abc.Stream, refusal: heads.Refusal, peer: str) -> None:
        """Says to a client over a cap that it is; bounded in time by `say_and_close`, in number by `_admit`."""
        self._told += 1
        try:
            self._telemetry.metrics.refused.labels(reason=refusal.code).inc()
            self._telemetry.log.debug("connection_refused", peer=peer, code=refusal.code)
            await say_and_close(stream, problem(refusal, retryable=True, retry_after_s=_RETRY_AFTER_S))
        except* Exception as group:
            self._crashed(group, peer)
        finally:
            self._told -= 1
            await trio.aclose_forcefully(stream)

    async def _serve_connection(self, stream: trio.abc.Stream, peer: str, lease: Lease) -> None:
        upgrade: Upgrade | None = None
        try:
            upgrade = await self._serve_http(stream, peer, lease)
            if upgrade is not None:
                await self._on_upgrade(upgrade)
        except* Exception as group:
            self._crashed(group, peer)
        finally:
            if upgrade is None or not upgrade.taken:
                lease.release()
                await trio.aclose_forcefully(stream)

    async def _serve_http(self, stream: trio.abc.Stream, peer: str, lease: Lease) -> Upgrade | None:
        scheme = "https" if isinstance(stream, trio.SSLStream) else "http"
        connection = HttpConnection(self._service, stream, peer=peer, scheme=scheme)
        self._http.add(connection)
        try:
            takeover = await connection.run()
        finally:
            self._http.discard(connection)
        if takeover is None:
            return None
        headers, trusted = takeover.request.headers, self.trusted
        return Upgrade(
            request=takeover.request,
            trailing=takeover.trailing,
            stream=stream,
            peer=heads.peer_address(peer, headers, trusted),
            scheme=heads.peer_scheme(scheme, peer, headers, trusted),
            trusted=heads.is_trusted(peer, trusted),
            lease=lease,
        )

    def _crashed(self, group: BaseExceptionGroup[Exception], peer: str) -> None:
        self._telemetry.metrics.refused.labels(reason="connection_crashed").inc()
        self._telemetry.log.error("connection_crashed", peer=peer, exc_info=group)
