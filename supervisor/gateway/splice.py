"""One spliced WebSocket: client and agent joined for as long as both want, and how that ends.

The bytes pass untouched; what is put in is at most one Close, at a frame boundary of the agent's direction and
never after the agent's own. Both streams are closed when `run` returns, however it does.
"""

from __future__ import annotations

import enum
import socket
import struct
from math import inf
from typing import TYPE_CHECKING, Final

import attrs
import trio

from supervisor.gateway.carrier import Carrier, Change, Direction
from supervisor.gateway.frames import Follower, close_answer, close_frame
from supervisor.gateway.pumps import Pumps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervisor.gateway.relay import Relay
    from supervisor.tenant.traffic import Traffic

# How long an agent may go on after its client has left, or after both have said their Close.
_AGENT_LEAVES_S: Final = 10.0
# How long the client is read after writing to it was shut down. Closing with bytes of its unread would make the
# kernel send a reset, and a reset takes from the client what it has not read yet.
_LINGER_S: Final = 2.0
# Closing a TLS stream writes a little.
_GOODBYE_S: Final = 1.0

_KEEPALIVE_IDLE_S: Final = 60
_KEEPALIVE_INTERVAL_S: Final = 15
_KEEPALIVE_PROBES: Final = 4


class Side(enum.Enum):
    AGENT = "agent"
    CLIENT = "client"
    SUPERVISOR = "supervisor"


@attrs.frozen
class Outcome:
    """How a splice ended.

    `code` is that of the first Close, which the client saw or sent; 1005 for a Close without a code; None if there
    was no Close at all. `side` is whose Close that was, or else who ended the splice. `aborted_mid_frame`: the
    client was left inside a frame, and so without a Close from us.
    """

    code: int | None
    side: Side
    aborted_mid_frame: bool = False


@attrs.define(eq=False)
class Splice:
    """Joins `client` and `agent`, both past their HTTP heads.

    Args:
        relay: carries the bytes if both streams are `trio.SocketStream`; otherwise, or if None, two tasks do.
        traffic: is counted up at every read.
        when_agent_ends: asked once, if the agent's stream ends at a frame boundary and without a Close: the code
            and the reason to tell the client. `close` cuts the wait for it short.
        to_client: bytes of the agent that were read together with its head.
        to_agent: bytes of the client that were read together with its head.
    """

    _client: trio.abc.Stream
    _agent: trio.abc.Stream
    _relay: Relay | None = attrs.field(kw_only=True)
    _traffic: Traffic = attrs.field(kw_only=True)
    _when_agent_ends: Callable[[], Awaitable[tuple[int, str]]] = attrs.field(kw_only=True)
    _to_client: bytes = attrs.field(default=b"", kw_only=True)
    _to_agent: bytes = attrs.field(default=b"", kw_only=True)

    _change: Change = attrs.field(init=False)
    _up: Direction = attrs.field(init=False)
    _down: Direction = attrs.field(init=False)
    _carrier: Carrier = attrs.field(init=False)
    # The Close that `close` asks for, and the instant by which it must be on its way.
    _word: tuple[int, str] | None = attrs.field(default=None, init=False)
    _close_by: float = attrs.field(default=inf, init=False)
    # The waits under way that `close` shortens.
    _limit: trio.CancelScope | None = attrs.field(default=None, init=False)
    _asking: trio.CancelScope | None = attrs.field(default=None, init=False)
    # The code of the Close that came first, and whose it was.
    _first_close: tuple[int | None, Side] | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        client, agent, relay = self._client, self._agent, self._relay
        change = self._change = Change(self._note_close)
        up = self._up = Direction(True, Follower(masked=True), self._traffic, change)
        down = self._down = Direction(False, Follower(masked=False), self._traffic, change)
        if relay is not None and isinstance(client, trio.SocketStream) and isinstance(agent, trio.SocketStream):
            self._carrier = relay.pair(client, agent, up, down, change)
        else:
            self._carrier = Pumps(client, agent, up, down)

    @property
    def at_rest(self) -> bool:
        """Whether both directions stand between two frames, with nothing on the way."""
        return all(way.follower.at_boundary and not way.unsent for way in (self._up, self._down))

    def close(self, code: int, reason: str, *, within_s: float) -> None:
        """End the splice with a Close to the client, at the next frame boundary of the agent's direction.

        Synchronous, from any task; the first call counts, later ones do nothing. Nothing is put in after the agent's
        own Close. If it cannot be written within `within_s`, because no boundary comes or because the client does
        not read, the connection is reset. After it the client has 2 s to leave.

        Raises:
            ValueError: `code` may not be sent.
        """
        close_frame(code, reason)
        if self._word is not None:
            return
        self._word = (code, reason)
        self._close_by = trio.current_time() + within_s
        if self._limit is not None:
            self._limit.deadline = min(self._limit.deadline, self._close_by)
        if self._asking is not None:
            self._asking.cancel(reason="the splice is being closed")
        self._down.stop()

    async def run(self) -> Outcome:
        """Carry until it is over. Cancellation ends both streams at once, without a Close.

        Raises:
            Exception: of `when_agent_ends`, or a fault in carrying this connection; bare or in a group.
        """
        try:
            _find_dead_peers(self._client)
            outcome = await self._carrier.run(self._conduct, self._to_agent, self._to_client)
            with trio.move_on_after(_GOODBYE_S):
                await self._client.aclose()
            return outcome
        finally:
            # Else the two keep each other until the garbage collector comes by.
            self._change.seen = None
            with trio.move_on_after(_GOODBYE_S, shield=True):
                await trio.aclose_forcefully(self._client)
                await trio.aclose_forcefully(self._agent)

    async def _conduct(self) -> Outcome:
        """The course of a splice from its first byte to its last. The carrier moves the bytes beside it."""
        up, down, change = self._up, self._down, self._change

        def over() -> bool:
            return down.ended or down.stopped or self._client_gone()

        def leaving() -> bool:
            return over() or up.ended or (up.follower.closed and down.follower.closed)

        await self._within(inf, change.until, leaving)
        if not over():
            await self._within(_AGENT_LEAVES_S, change.until, over)
        if self._client_gone():
            return self._outcome(Side.CLIENT)
        if not over():
            return self._reset(Side.CLIENT if self._word is None else Side.SUPERVISOR)

        # What has passed of the agent's direction by now is all that the client gets of it.
        torn = self._inside_frame()
        self._carrier.drop()
        last = b"" if torn else await self._last_word()
        said = self._first_close
        in_time = await self._within(inf, self._deliver, last)
        if not in_time:
            return self._reset(Side.SUPERVISOR)
        if self._client_gone():
            return self._outcome(Side.CLIENT)
        self._close_by = inf
        if last:
            self._first_close = said or (int.from_bytes(last[2:4], "big"), Side.SUPERVISOR)
        await self._within(_LINGER_S, change.until, lambda: up.ended or up.follower.closed or self._client_gone())
        return self._outcome(Side.AGENT if torn else Side.CLIENT, torn=torn)

    async def _within(self, limit_s: float, wait: Callable[..., Awaitable[None]], *args: object) -> bool:
        """Whether `wait` ended within `limit_s`, and within the limit of a `close` before or meanwhile."""
        self._limit = trio.CancelScope(deadline=min(trio.current_time() + limit_s, self._close_by))
        with self._limit:
            await wait(*args)
        return not self._limit.cancelled_caught

    async def _last_word(self) -> bytes:
        """The Close that is ours to put in, or nothing."""
        up, down = self._up, self._down
        if down.follower.closed:
            return b""
        if self._word is None:
            # The client went first: the agent's end is the answer to that, and no failure to ask about.
            if up.follower.close_code is not None:
                return close_answer(up.follower.close_code)
            if up.ended:
                return b""
        return close_frame(*(self._word or await self._ask()))

    async def _ask(self) -> tuple[int, str]:
        with trio.CancelScope() as self._asking:
            return await self._when_agent_ends()
        assert self._word is not None, "only close() cancels the question"
        return self._word

    async def _deliver(self, last: bytes) -> None:
        await self._change.until(lambda: not self._down.unsent or self._client_gone())
        if not self._client_gone():
            await self._carrier.finish(last)

    def _client_gone(self) -> bool:
        return self._up.failed or self._down.refused

    def _inside_frame(self) -> bool:
        follower = self._down.follower
        return not follower.closed and not follower.at_boundary

    def _note_close(self) -> None:
        """Runs at every change, so that the first Close is told from the answer to it."""
        if self._first_close is None:
            for way, side in ((self._down, Side.AGENT), (self._up, Side.CLIENT)):
                if way.follower.closed:
                    self._first_close = (way.follower.close_code, side)
                    return

    def _reset(self, side: Side) -> Outcome:
        """Give up what the client has not read; the kernel is not to keep it either."""
        sock = _tcp_socket(self._client)
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self._outcome(side, torn=self._inside_frame() or self._down.unsent)

    def _outcome(self, side: Side, *, torn: bool = False) -> Outcome:
        code, side = self._first_close or (None, side)
        return Outcome(code, side, aborted_mid_frame=torn)


def _tcp_socket(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    """The TCP socket that carries `stream`, if one does."""
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    if isinstance(stream, trio.SocketStream) and stream.socket.family != socket.AF_UNIX:
        return stream.socket
    return None


# Why no TCP_USER_TIMEOUT: it would find a peer that died with bytes on their way to it sooner than the kernel's
# own limit of some 15 minutes does. But it also ends a peer that is alive and only does not read, since Linux
# counts the probes of a closed window against it, answered or not; and a suspended browser tab is no fault.
def _find_dead_peers(stream: trio.abc.Stream) -> None:
    sock = _tcp_socket(stream)
    if sock is None:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
