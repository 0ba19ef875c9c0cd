"""What the two carriers of a splice share: a direction and what becomes of its bytes, and their small interface.

A `Direction` decides for each chunk how much of it passes; it does no I/O. The carriers (`relay.py` for sockets,
`pumps.py` for any stream) move the bytes and tell what happened. What it means is the business of `splice.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervisor.gateway.frames import Bytes, Follower
    from supervisor.tenant.traffic import Traffic

T = TypeVar("T")


@attrs.define(eq=False)
class Change:
    """How a carrier wakes the one task that owns its splice. Says that something happened, never what."""

    seen: Callable[[], None] | None = None
    _event: trio.Event | None = None
    _error: Exception | None = None

    def notify(self) -> None:
        if self.seen is not None:
            self.seen()
        if self._event is not None:
            self._event.set()

    def fail(self, error: Exception) -> None:
        """Let the owner's next, or current, `until` raise `error`."""
        self._error = error
        self.notify()

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until `done()`; it is looked at once, and then after every `notify`. One task at a time.

        Raises:
            Exception: what was handed to `fail`.
        """
        while self._error is None and not done():
            self._event = trio.Event()
            await self._event.wait()
            self._event = None
        if self._error is not None:
            raise self._error


@attrs.define(eq=False)
class Direction:
    """One way through a splice: from its source, past the follower, to its sink."""

    up: bool
    follower: Follower
    _traffic: Traffic
    _change: Change
    # False: what is read from the source is thrown away.
    passing: bool = True
    # Asked to stop at the next frame boundary.
    stopping: bool = False
    # Stopped at one: the sink has got whole frames, or will once nothing is `unsent`, and gets no more.
    stopped: bool = False
    # The source gave its last byte; `failed`: with an error in place of an end-of-file.
    ended: bool = False
    failed: bool = False
    # The sink takes no more bytes: its peer is gone.
    refused: bool = False
    # Bytes that passed and are not in the sink yet. The carrier's to set.
    unsent: bool = False

    def take(self, data: Bytes, n: int) -> int:
        """Account for `n` bytes just read. Returns how many of them, from the first, go to the sink."""
        follower, traffic = self.follower, self._traffic
        if self.up:
            traffic.up_bytes += n
        else:
            traffic.down_bytes += n
        before = follower.closed
        if self.passing:
            if self.stopping:
                n = follower.feed_to_boundary(data, n)
                if follower.closed or follower.at_boundary:
                    self._stop()
            else:
                traffic.data_frames += follower.feed(data, n)
        else:
            # The client's Close is worth knowing, even if it goes nowhere; the agent's would be one that nobody saw.
            if self.up:
                follower.feed(data, n)
            n = 0
        if follower.closed and not before:
            self._change.notify()
        return n

    def stop(self) -> None:
        """Stop at the next frame boundary, or at once if this is one."""
        self.stopping = True
        if self.follower.closed or self.follower.at_boundary:
            self._stop()

    def _stop(self) -> None:
        self.passing = False
        self.stopped = True
        self._change.notify()

    def drop(self) -> None:
        """From now on throw away what the source gives. What passed before still goes to the sink."""
        self.passing = False

    def end(self, *, failed: bool = False) -> None:
        self.ended = True
        self.failed = failed
        self._change.notify()

    def sent(self) -> None:
        """All that passed is in the sink."""
        self.unsent = False
        if not self.passing:
            self._change.notify()

    def refuse(self) -> None:
        """The sink's peer is gone: this ends the sink, and nothing else (else the agent's tail is lost)."""
        self.refused = True
        self.passing = self.unsent = False
        self._change.notify()


class Carrier(Protocol):
    """Moves the bytes of both directions of one splice. All of it belongs to the one task that is in `run`."""

    async def run(self, conduct: Callable[[], Awaitable[T]], to_agent: bytes, to_client: bytes) -> T:
        """Carry while `conduct` runs, and end with it; the streams stay open. First goes what was read already.

        At the client's end-of-file, once all before it is sent, writing to the agent is shut down.

        Raises:
            Exception: what `conduct` raised, or a fault in carrying; inside a group or bare.
        """
        ...

    def drop(self) -> None:
        """Throw away what either source gives from now on."""
        ...

    async def finish(self, last: bytes) -> None:
        """Send `last` to the client and shut down writing to it. Only once `down` is dropped and nothing unsent."""
        ...
