"""The fast carrier: all spliced sockets in one epoll, served by one task in place of two for each connection.

A readable socket is read once, into a buffer that all share, followed, and written at once to the other side. Only
what the kernel does not take is kept, at most one buffer's worth a direction, and its source is not read until
it is gone. After 256 KiB or 64 operations all other tasks have their turn. A fault in the handling of one pair
ends that pair.
"""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervisor.gateway.carrier import Change, Direction
    from supervisor.gateway.frames import Bytes

T = TypeVar("T")

# More than 64 KiB, the size at which many programs send: a message of that size comes with its frame's header, and
# would take two reads and two sends each way (a fifth of the processor time of an echo). Not kept for a connection
# unless its other side takes nothing.
_BUFFER_BYTES: Final = 128 * 1024
_TURN_BYTES: Final = 256 * 1024
# What an operation counts at least, so that a turn has at most 64 of them.
_OPERATION_BYTES: Final = _TURN_BYTES // 64
_BATCH: Final = 64
_NOTHING: Final = memoryview(b"")

_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_ERROR: Final = select.EPOLLERR
# With neither IN nor OUT wanted an epoll still reports errors and hang-ups, for ever if level-triggered.
_ERRORS_ONCE: Final = select.EPOLLET


@attrs.define(eq=False)
class _End:
    """One socket of a pair."""

    sock: socket.socket
    fd: int
    # The direction that comes out of it, into `peer`.
    way: Direction
    change: Change
    peer: _End = attrs.field(init=False)
    # What came out of `peer` and would not go in here: `peer.way` is `unsent` while there is any.
    rest: memoryview = _NOTHING
    # What the epoll watches it for; 0 if it is not in there.
    watched: int = 0


@attrs.define(eq=False)
class Pair:
    """The carrier of one splice. See `Carrier`."""

    _relay: Relay
    _client: trio.SocketStream
    _agent: trio.SocketStream
    _up: Direction
    _down: Direction
    _change: Change
    _ends: tuple[_End, _End] | None = None

    async def run(self, conduct: Callable[[], Awaitable[T]], to_agent: bytes, to_client: bytes) -> T:
        relay = self._relay
        # Before the first of the second objects is made, since one that is not detached closes its fd.
        if self._client.socket.fileno() < 0 or self._agent.socket.fileno() < 0:
            raise trio.ClosedResourceError("a stream was closed before it was spliced")
        # Trio's sockets offer no way to try without a checkpoint, so each gets a second object around the same fd.
        client = _End(_bare(self._client), self._client.socket.fileno(), self._up, self._change)
        agent = _End(_bare(self._agent), self._agent.socket.fileno(), self._down, self._change)
        client.peer, agent.peer = agent, client
        self._ends = (client, agent)
        try:
            for end, data in ((client, to_agent), (agent, to_client)):
                if data:
                    relay.carry(end, data, memoryview(data), len(data))
                relay.watch(end)
            return await conduct()
        finally:
            self._ends = None
            for end in (client, agent):
                relay.forget(end)
                end.sock.detach()
                # Else the two keep each other until the garbage collector comes by.
                del end.peer

    def drop(self) -> None:
        self._up.drop()
        self._down.drop()
        for end in self._ends or ():
            self._relay.watch(end)

    async def finish(self, last: bytes) -> None:
        assert self._ends is not None, "finish belongs into run"
        client, agent = self._ends
        down = self._down
        if last:
            self._relay.send(agent, memoryview(last), len(last))
            await self._change.until(lambda: not down.unsent or down.refused)
        if not down.refused:
            _shut(client)


@attrs.define(eq=False)
class Relay:
    """Owns the epoll and the buffer. `run` must be running while pairs are."""

    # How often others had their turn.
    turns: int = 0
    _epoll: select.epoll = attrs.field(factory=select.epoll, init=False)
    _buffer: bytearray = attrs.field(factory=lambda: bytearray(_BUFFER_BYTES), init=False)
    _view: memoryview = attrs.field(init=False)
    _ends: dict[int, _End] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._view = memoryview(self._buffer)

    @property
    def sockets(self) -> int:
        """How many sockets are in it: two a pair."""
        return len(self._ends)

    def pair(
        self, client: trio.SocketStream, agent: trio.SocketStream, up: Direction, down: Direction, change: Change
    ) -> Pair:
        """The carrier for one splice."""
        return Pair(self, client, agent, up, down, change)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Pairs that are still there then fail with `trio.ClosedResourceError`."""
        fd = self._epoll.fileno()
        task_status.started()
        try:
            spent = 0
            while True:
                # More than one poll a turn: to come back through Trio's loop costs many times what a poll does.
                events = self._epoll.poll(0, _BATCH)
                for number, flags in events:
                    spent += self._serve(number, flags)
                    if spent >= _TURN_BYTES:
                        spent = 0
                        self.turns += 1
                        await trio.lowlevel.checkpoint()
                if not events:
                    spent = 0
                    self.turns += 1
                    await trio.lowlevel.wait_readable(fd)
        finally:
            for end in list(self._ends.values()):
                self._fault(end, trio.ClosedResourceError("the relay has ended"))
            trio.lowlevel.notify_closing(fd)
            self._epoll.close()

    def _serve(self, fd: int, flags: int) -> int:
        """Do what a socket is ready for. Returns what that cost, in bytes.

        An event can be old: since the poll its socket may have been closed, and the number be a newer one's. So
        the flags are hints, and whoever reads or writes takes EAGAIN for an answer.
        """
        end = self._ends.get(fd)
        if end is None:
            return 0
        cost = _OPERATION_BYTES
        try:
            watched = end.watched
            if watched & _OUT and flags & ~_IN:
                self._flush(end)
            if watched & _IN:
                if flags & ~_OUT:
                    cost += self._read(end)
            elif flags & _ERROR and end.way.up:
                # The client is gone, and nobody is left who would want what it had sent before.
                end.way.end(failed=True)
        except Exception as error:
            self._fault(end, error)
        return cost

    def _read(self, end: _End) -> int:
        buffer = self._buffer
        try:
            n = end.sock.recv_into(buffer)
        except BlockingIOError:
            return 0
        except OSError:
            end.way.end(failed=True)
            self.watch(end)
            return 0
        if n:
            self.carry(end, buffer, self._view, n)
        else:
            end.way.end()
            # Nothing can be left to send before this: its source is not read while anything is.
            if end.way.up and end.way.passing:
                _shut(end.peer)
            self.watch(end)
        return n

    def carry(self, end: _End, data: Bytes, view: memoryview, n: int) -> None:
        """Pass on the first `n` bytes of `data`, read from `end`; `view` is a view of the same."""
        n = end.way.take(data, n)
        if n:
            self.send(end, view, n)

    def send(self, end: _End, view: memoryview, n: int) -> None:
        """Send to the peer of `end` what it takes now, and keep the rest."""
        peer = end.peer
        try:
            sent = peer.sock.send(view[:n])
        except BlockingIOError:
            sent = 0
        except OSError:
            return self._refuse(end)
        if sent != n:
            peer.rest = memoryview(bytes(view[sent:n]))
            end.way.unsent = True
            self.watch(end)
            self.watch(peer)

    def _flush(self, end: _End) -> None:
        """Send to `end` more of what was kept for it."""
        try:
            sent = end.sock.send(end.rest)
        except BlockingIOError:
            return
        except OSError:
            return self._refuse(end.peer)
        end.rest = end.rest[sent:]
        if not end.rest:
            end.rest = _NOTHING
            end.peer.way.sent()
            self.watch(end)
            self.watch(end.peer)

    def _refuse(self, end: _End) -> None:
        """What comes out of `end` is not wanted any more."""
        end.peer.rest = _NOTHING
        end.way.refuse()
        self.watch(end)
        self.watch(end.peer)

    def watch(self, end: _End) -> None:
        """Let the epoll watch `end` for what can be done with it now."""
        way = end.way
        wanted = 0 if way.ended or (way.unsent and way.passing) else _IN
        if end.rest:
            wanted |= _OUT
        wanted = wanted or _ERRORS_ONCE
        if end.watched == 0:
            self._epoll.register(end.fd, wanted)
            self._ends[end.fd] = end
        elif end.watched != wanted:
            self._epoll.modify(end.fd, wanted)
        end.watched = wanted

    def forget(self, end: _End) -> None:
        """Before the socket is closed: its number may be another's at once."""
        if end.watched:
            end.watched = 0
            if self._ends.get(end.fd) is end:
                del self._ends[end.fd]
                # Where somebody else closed it, the kernel has forgotten it already.
                with contextlib.suppress(OSError):
                    self._epoll.unregister(end.fd)

    def _fault(self, end: _End, error: Exception) -> None:
        self.forget(end)
        end.change.fail(error)


def _bare(stream: trio.SocketStream) -> socket.socket:
    sock = socket.socket(fileno=stream.socket.fileno())
    sock.setblocking(False)
    return sock


def _shut(end: _End) -> None:
    try:
        end.sock.shutdown(socket.SHUT_WR)
    except OSError:
        end.peer.way.refuse()
